"""Generation: token by token as a forward over all of them, as transformers' generate, sampling, stops, and what is refused."""
import json
import signal
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

import modelq
import modelq._core as core
import modelq.quantization as mtq
from golden_data import models
from modelq import streaming
from modelq.generation import text_pieces
from modelq.sampling import Sampling

GENERATED = json.loads((Path(__file__).parent / "data" / "generated.json").read_text())
FAMILIES = Path(__file__).parent / "data" / "families"
GOLDEN = [param for param in models() if param.values[0].name in GENERATED]
# The largest difference of logits (below 10) between one token at a time and all together. bfloat16: products have the same bits, but
# probabilities may be rounded relative to another maximum: half a unit in the last place of a hidden state, here and there.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.06}


@pytest.fixture
def llama(golden):
    return modelq.load(golden["llama"].source, compute="float32")


@pytest.fixture
def sigint():
    """SIGINT raises, which it does not in a job that a shell has put into the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def default_threads():
    yield
    core.set_threads(0)


def step_by_step(model, ids, prompt):
    """Logits after each token from prompt - 1 on: the prompt in one pass, then one token of every row at a time."""
    decoding = model.decoding()
    found = [decoding.begin([row[:prompt].tolist() for row in ids])]
    for position in range(prompt, ids.shape[1]):
        found.append(decoding.forward(range(len(ids)), [[int(row[position])] for row in ids]))
    return np.stack(found, axis=1)


def assert_as_whole(model, ids, prompt=9):
    whole = np.asarray(model(ids).logits)[:, prompt - 1:]
    np.testing.assert_allclose(step_by_step(model, ids, prompt), whole, rtol=0, atol=TOLERANCE[model.runtime.compute])
    return whole


# ---- the same logits as a forward ----

@pytest.mark.parametrize("compute", TOLERANCE)
@pytest.mark.parametrize("golden_model", GOLDEN)
def test_steps_are_the_forward(golden_model, compute):
    assert_as_whole(modelq.load(golden_model.source, compute=compute), golden_model.calib[:2])


@pytest.mark.parametrize("compute", TOLERANCE)
@pytest.mark.parametrize("family", sorted(folder.name for folder in FAMILIES.iterdir()))
def test_steps_of_every_family(family, compute):
    """Sliding windows, rope scaling, biases, layers with and without experts, tied heads."""
    ids = np.random.default_rng(3).integers(0, 64, (2, 40))
    assert_as_whole(modelq.load(FAMILIES / family, compute=compute), ids, prompt=1)


@pytest.mark.parametrize("compute", TOLERANCE)
@pytest.mark.parametrize("cache", ["FP8_KV_CFG", "NVFP4_KV_CFG"])
@pytest.mark.parametrize("preset", ["FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "INT8_DEFAULT_CFG"])
@pytest.mark.parametrize("golden_model", GOLDEN)
def test_steps_of_a_quantized_model_with_a_quantized_cache(golden_model, preset, cache, compute):
    model, calib = modelq.load(golden_model.source, compute=compute), golden_model.calib
    plain = np.asarray(model(calib[:2]).logits)[:, 8:]
    config = {"quant_cfg": [*getattr(mtq, preset)["quant_cfg"], *getattr(mtq, cache)["quant_cfg"]], "algorithm": "max"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)     # experts that no token reached
        mtq.quantize(model, config, lambda model: [model(row[None]) for row in calib])
    whole = np.asarray(model(calib[:2]).logits)[:, 8:]
    found = step_by_step(model, calib[:2], 9)
    # A value on the edge between two codes may fall to either side: few logits move, and by no more than a code does.
    difference = np.abs(found - whole)
    assert np.median(difference) < TOLERANCE[compute] / 4 and difference.mean() < 0.1 * np.abs(whole - plain).mean()


def test_keys_and_values_in_the_cache_are_quantized(golden, llama):
    ids = golden["llama"].calib[:1]
    plain = step_by_step(llama, ids, 5)
    for kind in "kv":
        model = modelq.load(golden["llama"].source, compute="float32")
        rules = [{"quantizer_name": "*", "enable": False}, {"quantizer_name": f"*[{kind}]_bmm_quantizer", "cfg": {"num_bits": (4, 3)}}]
        mtq.quantize(model, {"quant_cfg": rules, "algorithm": "max"}, lambda model: model(ids))
        assert np.abs(assert_as_whole(model, ids, 5) - plain).max() > 1e-3


def test_low_rank_branches_and_compressed_weights(golden):
    model, ids = modelq.load(golden["llama"].source, compute="float32"), golden["llama"].calib
    mtq.quantize(model, mtq.NVFP4_SVDQUANT_DEFAULT_CFG, lambda model: [model(row[None]) for row in ids])
    assert model.low_rank
    found, whole = step_by_step(model, ids[:1], 9), np.asarray(model(ids[:1]).logits)[:, 8:]
    assert np.median(np.abs(found - whole)) < 1e-4
    fp8 = modelq.load(golden["llama"].source, compute="bfloat16")
    mtq.quantize(fp8, mtq.FP8_DEFAULT_CFG, lambda model: [model(row[None]) for row in ids])
    before = fp8.generate(ids[:1, :9], max_new_tokens=8)
    assert (mtq.compress(fp8).generate(ids[:1, :9], max_new_tokens=8) == before).all()


def test_lengths_of_their_own_and_prompts_in_pieces(golden, llama):
    """Sequences in one decoder know nothing of each other, whatever their lengths, and tokens may come in any portions."""
    first, second = golden["llama"].calib[:2]
    decoding = llama.decoding()
    alone = [decoding.begin([row])[0] for row in (first[:30].tolist(), second[:11].tolist())]
    np.testing.assert_array_equal(decoding.begin([first[:30].tolist(), second[:11].tolist()]), alone)
    decoding.begin([first[:10].tolist(), second[:11].tolist()])
    every = decoding.forward([0], [first[10:30].tolist()], every=True)
    np.testing.assert_allclose(every, np.asarray(llama(first[None]).logits)[0, 10:30], rtol=0, atol=1e-4)
    assert decoding.decoder.lengths == [30, 11] and decoding.tokens[0] == first[:30].tolist()
    both = decoding.forward([1, 0], [second[11:12].tolist(), first[30:33].tolist()])
    wanted = np.stack([np.asarray(llama(second[None]).logits)[0, 11], np.asarray(llama(first[None]).logits)[0, 32]])
    np.testing.assert_allclose(both, wanted, rtol=0, atol=1e-4)


def test_a_cache_that_grows_beyond_a_block(golden):
    """Keys go by in blocks of 256 positions, and room grows in such steps."""
    config = json.loads((golden["llama"].source / "config.json").read_text())
    assert config["max_position_embeddings"] == 256
    model = modelq.load(golden["llama"].source, compute="float32")
    ids = np.random.default_rng(0).integers(0, 256, (2, 600))
    whole = np.asarray(model(ids).logits)[:, 499:]
    np.testing.assert_allclose(step_by_step(model, ids, 500), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("compute", TOLERANCE)
def test_the_same_bits_for_every_number_of_threads(golden, compute):
    found = []
    for threads in (1, 2, 7):
        core.set_threads(threads)
        found.append(step_by_step(modelq.load(golden["qwen3moe"].source, compute=compute), golden["qwen3moe"].calib[:3], 20).tobytes())
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
@pytest.mark.parametrize("compute, tolerance", [("float32", 2e-3), ("bfloat16", 1.0)])
def test_smollm2(smollm2, compute, tolerance):
    """Thirty layers, logits of up to 30. bfloat16 forwards of this model differ by some tenths whatever changes their rounding."""
    model = modelq.load(smollm2, compute=compute)
    ids = np.array([model.tokenizer.encode("The capital of France is Paris, and the capital of Italy is Rome. " * 3)[:40]])
    whole, found = np.asarray(model(ids).logits)[:, 7:], step_by_step(model, ids, 8)
    assert np.abs(whole - found).max() < tolerance
    assert (whole.argmax(-1) == found.argmax(-1)).mean() > 0.9


# ---- generate ----

@pytest.mark.parametrize("golden_model", GOLDEN)
def test_greedy_tokens_are_those_of_transformers(golden_model):
    """With a padded row, with and without an end, padding behind it."""
    said = GENERATED[golden_model.name]
    model = modelq.load(golden_model.source, compute="float32")
    assert said["margin"] > 10 * TOLERANCE["float32"]
    new = len(said["tokens"][0]) - len(said["ids"][0])
    found = model.generate(said["ids"], said["mask"], max_new_tokens=new, eos_token_id=[], pad_token_id=3)
    assert found.dtype == np.int64 and found.tolist() == said["tokens"]
    found = model.generate({"input_ids": said["ids"], "attention_mask": said["mask"]}, max_new_tokens=new, eos_token_id=said["end"],
                           pad_token_id=3)
    assert found.tolist() == said["ended"]


def test_padding_on_the_right_is_no_part_of_the_prompt(llama):
    said = GENERATED["llama"]
    row = said["ids"][1][-7:]
    alone = llama.generate([row], max_new_tokens=6, eos_token_id=[])[0, 7:]
    padded = llama.generate([row + [0, 0]], [[1] * 7 + [0, 0]], max_new_tokens=6, eos_token_id=[])
    assert padded.tolist() == [row + [0, 0] + alone.tolist()]


def test_the_end_is_what_the_files_say(golden, tmp_path, llama):
    import shutil

    ids = golden["llama"].calib[:1, :12]
    free = llama.generate(ids, max_new_tokens=10, eos_token_id=[])[0, 12:]
    first = {token: int(np.flatnonzero(free == token)[0]) for token in free.tolist()}
    ends = [token for token, at in first.items() if at >= 3][:2]
    for where, value in (("config.json", ends[1]), ("generation_config.json", ends)):
        folder = tmp_path / where
        shutil.copytree(golden["llama"].source, folder, copy_function=shutil.copyfile)
        if where == "config.json":
            (folder / "generation_config.json").unlink()
        said = json.loads((folder / where).read_text())
        (folder / where).write_text(json.dumps({**said, "eos_token_id": value}))
        found = modelq.load(folder, compute="float32").generate(ids, max_new_tokens=10)[0, 12:]
        stop = first[ends[1]] if where == "config.json" else min(first[end] for end in ends)
        assert found.tolist() == free[:stop + 1].tolist()
    (folder / "generation_config.json").write_text('{"eos_token_id": "two"}')
    with pytest.raises(ValueError, match="eos_token_id 'two'"):
        modelq.load(folder).generate(ids)


def test_stream_gives_what_generate_gives(golden, llama):
    ids = golden["llama"].calib[:2, :9]
    stream = llama.stream(ids, max_new_tokens=5, eos_token_id=[])
    first = next(stream)
    assert first.shape == (2,) and first.dtype == np.int64
    tokens = np.stack([first, *stream], axis=1)
    assert (llama.generate(ids, max_new_tokens=5, eos_token_id=[])[:, 9:] == tokens).all()
    left = llama.stream(ids, max_new_tokens=5, eos_token_id=[])
    next(left)
    llama.generate(ids, max_new_tokens=1)
    with pytest.raises(RuntimeError, match="another generate"):
        next(left)


def test_reuse_computes_only_what_is_new(golden, llama):
    ids = golden["llama"].calib[0].tolist()
    decoding, seen = llama.decoding(), []
    forward = decoding.decoder.forward

    class Watched:
        def __getattr__(self, name):
            return getattr(inner, name)

        def forward(self, sequences, rows, every):
            seen.append([len(row) for row in rows])
            return forward(sequences, rows, every)
    inner, decoding.decoder = decoding.decoder, Watched()
    llama.generate([ids[:30]], max_new_tokens=1, reuse=True)
    again = decoding.begin([ids[:20] + ids[40:45]], reuse=True)
    assert seen == [[30], [5]]
    np.testing.assert_allclose(again, decoding.begin([ids[:20] + ids[40:45]]), rtol=0, atol=1e-4)
    assert seen[-1] == [25]


def test_weights_are_held_until_quantization_changes(golden, llama):
    ids = golden["llama"].calib
    before = llama.generate(ids[:1, :20], max_new_tokens=30, eos_token_id=[])
    held = llama.decoding()
    assert llama.decoding() is held and held.nbytes > 2 * sum(np.prod(row["shape"]) for row in llama.modules if row["kind"] == "linear")
    mtq.quantize(llama, mtq.NVFP4_DEFAULT_CFG, lambda model: [model(row[None]) for row in ids])
    assert llama.decoding() is not held
    assert (llama.generate(ids[:1, :20], max_new_tokens=30, eos_token_id=[]) != before).any()
    with llama.simulating(False, False):
        assert (llama.generate(ids[:1, :20], max_new_tokens=30, eos_token_id=[]) == before).all()


def test_a_calibration_may_generate(golden):
    """What generate computed is what is calibrated on: prompt and answer, without the last token, padding and what follows an end."""
    said = GENERATED["llama"]
    options = {"max_new_tokens": 20, "eos_token_id": said["end"], "pad_token_id": 3}
    found = []
    for generates in (True, False):
        model = modelq.load(golden["llama"].source, compute="float32")
        whole = model.generate(said["ids"], said["mask"], **options)
        seen = np.concatenate([said["mask"], np.ones((2, 20), int)], axis=1)[:, :whole.shape[1]]
        seen[0, np.flatnonzero(whole[0] == said["end"])[0] + 1:] = 0

        def loop(model):
            if generates:
                model.generate(said["ids"], said["mask"], **options)
            else:
                model(whole[:, :-1], seen[:, :-1])
        mtq.quantize(model, mtq.INT8_DEFAULT_CFG, loop)
        found.append({name: quantizer.amax for name, quantizer in model.quantizers.items() if quantizer.enabled})
    assert found[0].keys() == found[1].keys() and all((found[0][name] == found[1][name]).all() for name in found[0])


def test_interrupted(llama, sigint):
    """Ctrl-C between the layers of a long prompt: the sequence is where it was."""
    decoder = llama.decoding().decoder
    decoder.forward([0], [[1, 2]])
    ids = np.random.default_rng(0).integers(0, 256, 6000)
    main = threading.main_thread().ident
    timer = threading.Timer(0.02, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        decoder.forward([0], [ids])
        timer.join()
        time.sleep(1)
    if decoder.lengths == [6002]:
        pytest.skip("it was done before the signal came")
    assert decoder.lengths == [2]
    assert np.isfinite(decoder.forward([0], [[3]])).all() and decoder.lengths == [3]


# ---- sampling ----

def test_seed_temperature_and_rows(golden, llama):
    ids = golden["llama"].calib[:2, :9]
    options = {"max_new_tokens": 12, "temperature": 1.5, "eos_token_id": []}
    one, same = (llama.generate(ids, seed=5, **options) for _ in range(2))
    assert (one == same).all()
    assert (llama.generate(ids, seed=6, **options) != one).any()
    assert (llama.generate(ids, **options) != llama.generate(ids, **options)).any()
    assert (llama.generate(ids[:1], seed=5, **options) == one[:1]).all()      # a row draws the same whatever else is there
    greedy = llama.generate(ids, max_new_tokens=12, eos_token_id=[])
    assert (one != greedy).any()
    assert (llama.generate(ids, seed=5, **{**options, "temperature": 1e-4}) == greedy).all()
    assert (llama.generate(ids, seed=5, top_k=1, **options) == greedy).all()
    assert (llama.generate(ids, seed=5, do_sample=False, **options) == greedy).all()
    drawn, said = ({**options, "temperature": temperature, "do_sample": sample} for temperature, sample in ((0.0, True), (1.0, None)))
    assert (llama.generate(ids, seed=5, **drawn) == llama.generate(ids, seed=5, **said)).all()
    assert (llama.generate(ids, seed=5, top_p=1e-6, **options) == greedy).all()


@pytest.mark.parametrize("size", [7, 3000])
def test_candidates(size):
    rng = np.random.default_rng(size)
    logits = rng.standard_normal(size).astype(np.float32)
    p = np.exp(logits.astype(np.float64) / 0.7)
    p /= p.sum()
    order = np.argsort(-p)
    for top_p in (0.05, 0.5, 0.9, 0.999):
        tokens, weights = Sampling(0.7, top_p=top_p).candidates(logits)
        wanted = order[:np.searchsorted(np.cumsum(p[order]), top_p) + 1]
        assert tokens.tolist() == wanted.tolist()
        np.testing.assert_allclose(weights / weights.sum(), p[wanted] / p[wanted].sum())
    assert sorted(Sampling(0.7, top_k=5).candidates(logits)[0].tolist()) == sorted(order[:5].tolist())
    assert len(Sampling(0.7, top_p=0.5, top_k=5).candidates(logits)[0]) < 5


def test_draws_have_their_probabilities():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampling = Sampling(1.0, seed=1)
    generator = sampling.generators(1)[0]
    counts = np.bincount([sampling.choose(logits, generator) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.03)


# ---- what is refused ----

@pytest.mark.parametrize("options, error, words", [
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens"), ({"temperature": -1}, ValueError, "temperature"),
    ({"temperature": float("nan")}, ValueError, "temperature"), ({"top_p": 0}, ValueError, "top_p"), ({"top_p": 1.5}, ValueError, "top_p"),
    ({"top_k": -1}, ValueError, "top_k"), ({"input_ids": [[1, 999]]}, ValueError, "999"), ({"input_ids": "text"}, TypeError, "tokenize"),
    ({"attention_mask": [[0, 0]]}, ValueError, "no tokens"), ({"beams": 4}, TypeError, "beams"),
    ({"input_ids": [[1] * 256]}, ValueError, "256 tokens leaves no room.*context of 256.*shorten"),
])
def test_refused_before_anything_is_loaded(llama, options, error, words):
    with pytest.raises(error, match=words):
        llama.stream(**{"input_ids": [[1, 2]], **options})
    assert llama._decoding is None


def test_an_answer_ends_with_the_context(llama):
    with pytest.warns(UserWarning, match="context of 256 ends after 6 more"):
        assert llama.generate([[1] * 250], max_new_tokens=10, eos_token_id=[]).shape == (1, 256)


def test_a_decoder_says_what_is_wrong(golden):
    model = modelq.load(golden["qwen3moe"].source, compute="float32")
    decoding = model.decoding()
    decoder = decoding.decoder
    logits = decoder.forward([0], [[1, 2, 3]])
    for arguments, error, words in [
        (([0, 0], [[1], [1]]), ValueError, "sequence 0 is there twice"), (([1], [[1]]), ValueError, "sequence 1 of 1"),
        (([0], [[256]]), ValueError, "token id 256"), (([0], [np.zeros(0, int)]), ValueError, "empty"),
        (([0], [[[1]]]), ValueError, "one row"),
        (([0], [[1], [2]]), ValueError, "1 sequences, but ids for 2"), (([], []), ValueError, "no batches"),
        ((0, [[1]]), TypeError, "sequences"),
    ]:
        with pytest.raises(error, match=words):
            decoder.forward(*arguments)
    assert decoder.lengths == [3]
    with pytest.raises(ValueError, match="4 positions to keep of 3"):
        decoder.keep(0, 4)
    with pytest.raises(ValueError, match="sequence 7"):
        decoder.keep(7, 0)
    with pytest.raises(ValueError, match="one sequence or more"):
        decoder.reset(0)
    with pytest.raises(IndexError, match="expert 99"):
        decoder.load_expert(0, 99, {})
    with pytest.raises(IndexError, match="layer 9"):
        decoder.load_expert(9, 0, {})
    decoder.keep(0, 0)
    np.testing.assert_array_equal(decoder.forward([0], [[1, 2, 3]]), logits)
    decoding.runtime.drop_layer(1)
    with pytest.raises(RuntimeError, match="layer 1 is not loaded"):
        decoder.forward([0], [[1]])
    assert decoder.lengths == [3]
    with pytest.raises(ValueError, match="embed_tokens.weight is missing"):
        core.Decoder(decoding.runtime, {}, {})
    with pytest.raises(TypeError):
        core.Decoder(None, {}, {})


def test_weights_that_moved_together_stay_the_runtimes(golden):
    """A decoder moves what its runtime has loaded; both may go first, and parts may be loaded anew."""
    model, ids = modelq.load(golden["qwen3moe"].source, compute="bfloat16"), [5, 6, 7]
    decoding = model.decoding()
    runtime, decoder = decoding.runtime, decoding.decoder
    logits = decoder.forward([0], [ids])
    for layer in range(model.num_layers):
        for expert in (None, 0, 3):
            decoding._load(model, layer, expert)
    decoder.keep(0, 0)
    np.testing.assert_array_equal(decoder.forward([0], [ids]), logits)
    del decoding
    model.forget_decoding()
    other = core.Decoder(runtime, streaming.embed_tensors(model), streaming.head_tensors(model))
    del decoder
    run = runtime.start([np.array([ids])])
    run.embed(streaming.embed_tensors(model))
    run.layer(0)
    runtime.drop_layer(0)
    with pytest.raises(RuntimeError, match="layer 0 is not loaded"):
        other.forward([0], [ids])
    del runtime, run, other


def test_a_missing_expert(golden):
    model = modelq.load(golden["qwen3moe"].source, compute="float32")
    decoder = core.Decoder(model.runtime, streaming.embed_tensors(model), streaming.head_tensors(model))
    for layer in range(model.num_layers):
        model.runtime.load_layer(layer, streaming.read(model, model.runtime.layer_tensors(layer), model.modules_of(layer)))
    with pytest.raises(RuntimeError, match="layer 0: expert [0-9]+ is not loaded"):
        decoder.forward([0], [[1, 2, 3]])


def test_one_thread_at_a_time(llama):
    decoder, errors = llama.decoding().decoder, []
    rows = [np.random.default_rng(0).integers(0, 256, 3000)]

    def work():
        try:
            for _ in range(3):
                decoder.keep(0, 0)
                decoder.forward([0], rows)
        except RuntimeError as error:
            errors.append(str(error))
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors and all("in use by another thread" in error for error in errors)
    decoder.keep(0, 0)
    assert np.isfinite(decoder.forward([0], [[1]])).all()


# ---- text ----

def test_text_comes_in_whole_characters(tiny_checkpoint):
    """One token per byte: a piece comes with the last byte of a character."""
    tokenizer = modelq.load(tiny_checkpoint).tokenizer
    text = "naïve — 東京 🙂!"
    ids = tokenizer.encode(text)
    pieces = list(text_pieces(tokenizer, ids))
    assert pieces == list(text)
    assert "".join(text_pieces(tokenizer, ids[:-2])) == text[:-2] + "\ufffd"
    assert list(text_pieces(tokenizer, [])) == []


@pytest.mark.parametrize("config", ["INT4_AWQ_CFG", "NVFP4_AWQ_LITE_CFG", "INT8_SMOOTHQUANT_CFG", "INT4_GPTQ_CFG", "W4A8_AWQ_BETA_CFG"])
@pytest.mark.parametrize("compressed", [False, True])
def test_smoothed_models_answer_as_they_compute(golden, config, compressed):
    """What norms take up is there as well where weights stay codes."""
    model, ids = modelq.load(golden["llama"].source, compute="bfloat16"), golden["llama"].calib[:1, :20]
    mtq.quantize(model, getattr(mtq, config), lambda model: model(golden["llama"].calib))
    expected = model(ids).logits[0, -1]
    if compressed:
        mtq.compress(model)
        np.testing.assert_array_equal(model(ids).logits[0, -1], expected)
    np.testing.assert_allclose(model.decoding().begin([ids[0].tolist()])[0], expected, atol=0.02 * np.abs(expected).max())
