"""The native runtime against logits and activations that transformers computed, and what it refuses."""
import json
import multiprocessing
import signal
import threading
import time
from functools import cached_property
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import modelq._core as core
from golden_data import models, read_safetensors
from modelq.checkpoint.config import runtime_config

FAMILIES = Path(__file__).parent / "data" / "families"
NAMES = sorted(folder.name for folder in FAMILIES.iterdir())


class Source:
    """A folder with config.json and model.safetensors, as a Runtime and its tensors."""

    def __init__(self, folder, compute="float32"):
        self.folder = folder
        self.tensors = read_safetensors(folder)
        self.runtime = core.Runtime(*runtime_config(json.loads((folder / "config.json").read_text())), compute)

    @cached_property
    def reference(self):
        return dict(np.load(self.folder / "reference.npz"))

    def pick(self, names):
        return {name: self.tensors[name] for name in names}

    @property
    def head(self):
        return self.pick(self.runtime.head_tensors())

    def start(self, ids, masks=None, **options):
        run = self.runtime.start(ids, masks, **options)
        run.embed(self.pick(self.runtime.embed_tensors()))
        return run

    def load(self, layer):
        self.runtime.load_layer(layer, self.pick(self.runtime.layer_tensors(layer)))

    def pass_layer(self, run, layer):
        tokens = run.layer(layer)
        for expert in () if tokens is None else np.flatnonzero(tokens[:, 0]).tolist():
            run.expert(layer, expert, self.pick(self.runtime.expert_tensors(layer, expert)))

    def run(self, ids, masks=None, **options):
        run = self.start(ids, masks, **options)
        for layer in range(self.runtime.layers):
            self.load(layer)
            self.pass_layer(run, layer)
            self.runtime.drop_layer(layer)
        return run

    def logits(self, ids, masks=None):
        return self.run([ids], None if masks is None else [masks]).logits(0, self.head)


@pytest.fixture
def llama():
    return Source(FAMILIES / "llama3")


@pytest.fixture(autouse=True)
def default_threads():
    yield
    core.set_threads(0)


# ---- against transformers ----

# The largest difference of two float32 forwards of these sizes, summed in different orders; logits are below 10.
FLOAT32_LOGITS = 2e-4


@pytest.mark.parametrize("model", [p for p in models() if p.values[0].name in ("llama", "qwen3", "qwen3moe")])
def test_golden_logits(model):
    source = Source(model.source)
    np.testing.assert_allclose(source.logits(model.calib[:1]), model.logits, rtol=0, atol=FLOAT32_LOGITS)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", NAMES)
def test_logits_of_every_family_with_padding(family, side):
    """Biases, rope scaling, a sliding window, tied heads, odd head sizes; at the tokens that count."""
    source = Source(FAMILIES / family)
    mask, wanted = source.reference[side], source.reference[f"logits_{side}"]
    kept = mask.astype(bool)
    got = source.logits(source.reference["ids"], mask)
    np.testing.assert_allclose(got[kept], wanted[kept], rtol=0, atol=FLOAT32_LOGITS)
    np.testing.assert_allclose(source.logits(source.reference["ids"][:1]), wanted[:1], rtol=0, atol=FLOAT32_LOGITS)


@pytest.mark.parametrize("family", NAMES)
def test_bfloat16_is_as_near_as_rounding_allows(family):
    """Logits of two layers of bfloat16 activations: some 2^-9 relative errors each on values of a few units."""
    source = Source(FAMILIES / family, "bfloat16")
    wanted = source.reference["logits_right"][:1]
    got = source.logits(source.reference["ids"][:1])
    assert 1e-6 < np.abs(got - wanted).max() < 0.03 * np.abs(wanted).max()


def collect_inputs(source, ids, masks=None, **options):
    """{linear: amax of its input}."""
    rows = [module for module in source.runtime.modules if module["kind"] in ("linear", "experts") and module["expert"] is None]
    linears = [row["name"] + ".gate_up_proj" * (row["kind"] == "experts") for row in rows]
    calibrators = {name: core.Calibrator() for name in linears}
    for row, (name, calibrator) in zip(rows, calibrators.items()):
        source.runtime.set_calibrator(f"{name}{'_' if row['kind'] == 'experts' else '.'}input_quantizer", calibrator)
    source.run(ids, masks, **options).finish(source.head)
    return {name: calibrator.compute_amax() for name, calibrator in calibrators.items()}


@pytest.mark.parametrize("compute, tolerance", [("float32", 1e-5), ("bfloat16", 0.015)])
@pytest.mark.parametrize("family", NAMES)
def test_input_amax(family, compute, tolerance):
    source = Source(FAMILIES / family, compute)
    found = collect_inputs(source, [source.reference["ids"]], [source.reference["right"]])
    assert list(found) == list(source.reference["names"])
    np.testing.assert_allclose(list(found.values()), source.reference[f"amax_{compute}"], rtol=tolerance)
    if compute == "bfloat16":
        assert all(np.float32(amax) == np.float32(ml_dtypes.bfloat16(amax)) for amax in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("compute, tolerance", [("bfloat16", 0.005), ("float32", 0.001)])
def test_smollm2_perplexity(smollm2, compute, tolerance):
    """29.595: transformers in float32 on the first 16 windows of 512 tokens of WikiText-2's test text."""
    import os

    from modelq.checkpoint import open_checkpoint

    text = Path(os.environ.get("MODELQ_WIKITEXT", ROOT / "shared" / "data" / "wikitext2-test.txt"))
    if not text.exists():
        pytest.skip("needs WikiText-2's test text (MODELQ_WIKITEXT)")
    with open_checkpoint(smollm2) as checkpoint:
        ids = checkpoint.tokenizer().encode(text.read_text(), add_special_tokens=False)
        ids = np.array(getattr(ids, "ids", ids)[:16 * 512]).reshape(4, 4, 512)
        runtime = core.Runtime(*runtime_config(checkpoint.config), compute)
        run = runtime.start(list(ids))
        run.embed({name: checkpoint.read(name) for name in runtime.embed_tensors()})
        for layer in range(runtime.layers):
            runtime.load_layer(layer, {name: checkpoint.read(name) for name in runtime.layer_tensors(layer)})
            run.layer(layer)
            runtime.drop_layer(layer)
        sums, counts = run.loss({name: checkpoint.read(name) for name in runtime.head_tensors()})
    assert counts.tolist() == [511] * 16
    assert np.exp(sums.sum() / counts.sum()) == pytest.approx(29.595, rel=tolerance)


ROOT = Path(__file__).resolve().parents[2]


# ---- loss ----

def nll(logits, ids):
    """Of each next token: [B, T - 1], float64."""
    x = logits[:, :-1].astype(np.float64)
    top = x.max(-1)
    return np.log(np.exp(x - top[..., None]).sum(-1)) + top - np.take_along_axis(x, ids[:, 1:, None], -1)[..., 0]


def test_loss(llama):
    ids, mask = llama.reference["ids"], llama.reference["left"]
    run = llama.run([ids, ids[:1, :5]], [mask, None])
    each = [nll(run.logits(batch, llama.head), batch_ids) for batch, batch_ids in enumerate((ids, ids[:1, :5]))]
    both = mask[:, 1:] * mask[:, :-1]
    sums, counts = run.loss(llama.head)
    np.testing.assert_allclose(sums, [*(each[0] * both).sum(1), each[1].sum()], rtol=1e-6)
    assert counts.tolist() == [*both.sum(1), 4] and sums.dtype == np.float64 and counts.dtype == np.int64
    labels = ids.copy()
    labels[:, ::2] = -100
    sums, counts = run.loss(llama.head, labels=[labels, ids[:1, :5]])
    np.testing.assert_allclose(sums[:2], (each[0] * (labels[:, 1:] >= 0)).sum(1), rtol=1e-6)
    assert counts.tolist() == [10, 10, 4]


def test_loss_over_a_vocabulary_of_many_slices():
    """The head's weight goes by in slices of 4096 rows; the running log-sum-exp must not show where they end."""
    rng = np.random.default_rng(0)
    config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 0, "num_attention_heads": 2, "vocab_size": 9001}
    runtime = core.Runtime("llama", config, "float32")
    tensors = {"model.embed_tokens.weight": rng.standard_normal((9001, 16), np.float32), "model.norm.weight": np.ones(16, np.float32),
               "lm_head.weight": (rng.standard_normal((9001, 16)) * 6).astype(np.float32)}
    ids = rng.integers(0, 9001, (3, 150))
    run = runtime.start([ids])
    run.embed({"model.embed_tokens.weight": tensors["model.embed_tokens.weight"]})
    head = {name: tensors[name] for name in runtime.head_tensors()}
    logits = run.logits(0, head)
    x = tensors["model.embed_tokens.weight"][ids].astype(np.float64)
    normed = x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(logits, normed @ tensors["lm_head.weight"].T.astype(np.float64), atol=2e-4)
    np.testing.assert_allclose(run.loss(head)[0], nll(logits, ids).sum(1), rtol=1e-6)


# ---- statistics ----

def test_siblings_share_and_padding_does_not_count(llama):
    ids, right = llama.reference["ids"], llama.reference["right"]
    runtime, prefix = llama.runtime, "model.layers.0.self_attn"
    shared, own, channels, keys = core.Calibrator(), core.Calibrator(), core.Calibrator(axis=-1), core.Calibrator()
    runtime.set_calibrator(f"{prefix}.q_proj.input_quantizer", shared)
    runtime.set_calibrator(f"{prefix}.k_proj.input_quantizer", shared)
    runtime.set_calibrator(f"{prefix}.v_proj.input_quantizer", own)
    runtime.set_calibrator("model.layers.0.mlp.down_proj.output_quantizer", channels)
    runtime.set_calibrator(f"{prefix}.k_bmm_quantizer", keys)
    plain = llama.run([ids], [right]).hidden(0)
    assert shared.compute_amax() == own.compute_amax() and shared.count == own.count == keys.count == right.sum()
    assert channels.compute_amax().shape == (32,)
    llama.run([ids], [right], count_padding=True)
    assert shared.count == right.sum() + ids.size
    for name in ("self_attn.q_proj.input", "self_attn.k_proj.input", "mlp.down_proj.output"):
        runtime.set_calibrator(f"model.layers.0.{name}_quantizer", None)
    np.testing.assert_allclose(llama.run([ids], [right]).hidden(0), plain, atol=1e-5)   # down_proj's sum is a product's own again
    assert shared.count == right.sum() + ids.size


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_same_bits_for_every_number_of_threads_and_every_grouping(compute):
    """One batch or many, short sequences together or alone, 1, 2 or 7 threads: logits, losses and statistics are the same bits."""
    source = Source(FAMILIES / "mistral", compute)
    rng = np.random.default_rng(5)
    ids = [rng.integers(0, 64, (batch, tokens)) for batch, tokens in ((3, 20), (1, 700), (9, 3))]
    results = []
    for threads in (1, 2, 7):
        core.set_threads(threads)
        amax = collect_inputs(source, ids)
        run = source.run(ids)
        results.append(([run.logits(i, source.head).tobytes() for i in range(3)], run.loss(source.head)[0].tobytes(), amax))
    assert results[0] == results[1] == results[2]
    alone = source.run([ids[0][1:2]]).logits(0, source.head)
    assert alone.tobytes() == source.run(ids).logits(0, source.head)[1:2].tobytes()


# ---- fake quantization ----

def test_an_input_quantizer_changes_what_its_linear_sees(llama):
    """lm_head behind a quantizer: logits are those of the fake-quantized input."""
    ids = llama.reference["ids"][:1]
    quantizer = core.Quantizer(num_bits=(4, 3), axis=None)
    quantizer.amax = 2.0
    run = llama.run([ids])
    norm = llama.tensors["model.norm.weight"].astype(np.float32)
    hidden = run.hidden(0)
    seen = norm * hidden / np.sqrt((hidden ** 2).mean(-1, keepdims=True) + llama.runtime.config["rms_norm_eps"])
    llama.runtime.set_quantizer("lm_head.input_quantizer", quantizer)
    clipped = np.clip(seen, -2, 2) * (448 / 2)
    wanted = clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * (2 / 448) @ llama.tensors["model.embed_tokens.weight"].astype(np.float32).T
    got, plain = run.logits(0, llama.head), seen @ llama.tensors["model.embed_tokens.weight"].astype(np.float32).T
    assert np.abs(got - wanted).max() < 0.1 * np.abs(plain - wanted).max()
    llama.runtime.set_quantizer("lm_head.input_quantizer", None)
    np.testing.assert_allclose(run.logits(0, llama.head), plain, atol=1e-4)


@pytest.mark.parametrize("point", ["self_attn.q_proj.input", "self_attn.o_proj.input", "mlp.down_proj.output", "self_attn.k_bmm", "self_attn.v_bmm"])
def test_a_quantizer_at_every_point_has_an_effect(llama, point):
    ids = llama.reference["ids"]
    plain = llama.logits(ids)
    quantizer = core.Quantizer(num_bits=4, axis=None)
    name = f"model.layers.1.{point}_quantizer"
    llama.runtime.set_quantizer(name, quantizer)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        llama.logits(ids)                                     # no amax yet
    quantizer.amax = 1.0
    changed = llama.logits(ids)
    assert np.abs(changed - plain).max() > 1e-3
    quantizer.enabled = False
    assert np.abs(llama.logits(ids) - plain).max() < 1e-5


# ---- contract ----

def test_modules(llama):
    modules = llama.runtime.modules
    assert [m["name"] for m in modules[:3]] == ["model.embed_tokens", "model.layers.0.self_attn", "model.layers.0.self_attn.q_proj"]
    assert [m["name"] for m in modules[-3:]] == ["model.layers.1.post_attention_layernorm", "model.norm", "lm_head"]
    by_name = {module["name"]: module for module in modules}
    assert by_name["model.layers.1.self_attn.k_proj"] == {
        "name": "model.layers.1.self_attn.k_proj", "kind": "linear", "layer": 1, "shape": (32, 32),
        "weight": "model.layers.1.self_attn.k_proj.weight", "bias": None, "site": "model.layers.1.self_attn.input", "expert": None, "offset": 0}
    assert by_name["lm_head"]["weight"] == "model.embed_tokens.weight" and by_name["lm_head"]["layer"] == -1
    assert by_name["model.layers.0.input_layernorm"]["kind"] == "norm" and by_name["model.layers.0.input_layernorm"]["shape"] == (32,)
    assert set(llama.runtime.layer_tensors(0)) | set(llama.runtime.layer_tensors(1)) | set(llama.runtime.head_tensors()) == set(llama.tensors)
    biased = Source(FAMILIES / "qwen2").runtime.modules
    assert {m["name"].rsplit(".")[-1] for m in biased if m["bias"]} == {"q_proj", "k_proj", "v_proj"}


def test_archs_covers_the_models():
    rows = {row["family"]: row for row in core.archs()}
    assert {"llama", "qwen2", "qwen3"} <= set(rows) and "mistral" in rows["llama"]["model_types"]
    for family, row in rows.items():
        names = set()
        for case in range(3 if {"moe", "blocks"} & set(row["flags"]) else 1):     # no expert, one, two; all blocks linear
            experts = case if "moe" in row["flags"] else 0
            linear = {"layer_attention": [2, 2], "layer_mlp": [2, 2]} if case and "blocks" in row["flags"] else {}
            latent = {"q_lora_rank": case % 2, "kv_lora_rank": 2, "qk_rope_head_dim": 2} if "latent" in row["flags"] else {}
            runtime = core.Runtime(family, {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
                                            "vocab_size": 8, "attention_bias": True, "mlp_bias": True, "num_experts": experts,
                                            "shared_intermediate_size": 8, "num_experts_per_tok": 1} | linear | latent)
            names |= {name for layer in range(2) for name in runtime.layer_tensors(layer)}
            names |= {name for layer in range(2) for e in range(runtime.experts(layer)) for name in runtime.expert_tensors(layer, e)}
            names |= set(runtime.embed_tensors() + runtime.head_tensors())
        assert names == {name.format(layer=layer, expert=e) for name in row["tensors"] for layer in range(2) for e in range(2)}
        assert row["config_keys"]["hidden_size"] is None and row["config_keys"]["rope_type"] == "default"


def test_weights_of_any_dtype_and_stride(llama):
    """float32, float16, transposed, strided and misaligned weights load to the same model."""
    ids, original = llama.reference["ids"], dict(llama.tensors)
    wanted = llama.logits(ids)

    def misaligned(x):
        raw = np.zeros(x.nbytes + 1, np.uint8)
        raw[1:] = x.reshape(-1).view(np.uint8)
        return raw[1:].view(x.dtype).reshape(x.shape)
    variants = {"float32": lambda x: x.astype(np.float32), "column-major": np.asfortranarray, "misaligned": misaligned,
                "strided": lambda x: np.repeat(x, 2, axis=-1)[..., ::2], "reversed": lambda x: x[::-1].copy()[::-1]}
    for name, change in variants.items():
        llama.tensors = {key: change(value) for key, value in original.items()}
        np.testing.assert_array_equal(llama.logits(ids), wanted, name)
    llama.tensors = {key: value.astype(np.float16) for key, value in original.items()}
    np.testing.assert_allclose(llama.logits(ids), wanted, atol=1e-3)    # bfloat16 numbers below 2^-14 lose bits in float16


def test_bad_weights_are_named(llama):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = llama.pick(llama.runtime.layer_tensors(1))
    ones = np.ones((48, 32), np.float32)
    for bad, error, message in ((None, ValueError, "is missing"), (ones[:-1], ValueError, r"\[47, 32\] float32, expected \[48, 32\]"),
                                (ones.astype(np.int32), TypeError, "int32"), (ones * np.nan, ValueError, "contains NaN"),
                                (np.where(ones.cumsum(1) == 5, np.inf, ones), ValueError, "an infinity")):
        given = {key: value for key, value in tensors.items() if key != name} | ({} if bad is None else {name: bad.astype(
            bad.dtype if bad.dtype != np.float64 else np.float32)})
        with pytest.raises(error, match=message) as caught:
            llama.runtime.load_layer(1, given)
        assert name in str(caught.value)
    with pytest.raises(ValueError, match="layers.0.* is not a tensor of layer 1"):
        llama.runtime.load_layer(1, tensors | llama.pick(llama.runtime.layer_tensors(0)))
    with pytest.raises(IndexError):
        llama.runtime.load_layer(2, tensors)
    run = llama.start([llama.reference["ids"]])
    with pytest.raises(RuntimeError, match="layer 0 is not loaded"):
        run.layer(0)


@pytest.mark.parametrize("changes, message", [
    ({"hidden_size": None}, "hidden_size is missing"), ({"num_key_value_heads": 3}, "not a multiple"), ({"head_dim": 7}, "odd"),
    ({"rope_type": "ntk"}, "rope_type \"ntk\" is not supported"), ({"hidden_act": "gelu"}, "gelu"), ({"vocab_size": 0}, "vocab_size"),
    ({"rope_type": "llama3"}, "rope_original_max"), ({"rope_theta": 0}, "rope_theta"), ({"num_hidden_layers": -1}, "num_hidden_layers"),
    ({"layer_windows": [1]}, "layer_windows has 1 entries for 2 layers")])
def test_bad_configs(changes, message):
    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    core.Runtime("llama", config)
    with pytest.raises(ValueError, match=message):
        core.Runtime("llama", config | changes)
    with pytest.raises(TypeError, match="vocab_size cannot be 'many'"):
        core.Runtime("llama", config | {"vocab_size": "many"})
    with pytest.raises(ValueError, match="family 'gpt'"):
        core.Runtime("gpt", config)
    with pytest.raises(ValueError, match="float16"):
        core.Runtime("llama", config, "float16")


def test_bad_ids_and_masks(llama):
    start, ids = llama.runtime.start, np.zeros((2, 5), np.int64)
    ids[1, 3] = 64
    with pytest.raises(ValueError, match=r"batch 1, position \[1, 3\]: token id 64 is outside the vocabulary of 64"):
        start([ids[:1], ids])
    ids[1, 3] = -1
    with pytest.raises(ValueError, match="token id -1"):
        start([ids])
    for bad in ([], [np.zeros((0, 5), np.int64)], [np.zeros((1, 0), np.int64)], [np.zeros(5, np.int64)]):
        with pytest.raises(ValueError):
            start(bad)
    with pytest.raises(TypeError, match="float64"):
        start([np.zeros((1, 5))])
    with pytest.raises(ValueError, match=r"masks\[0\] is \[1, 4\] bool, but ids\[0\] is \[1, 5\]"):
        start([ids[:1]], [np.ones((1, 4))])
    with pytest.raises(ValueError, match="masks: 0 for 1 batches"):
        start([ids[:1]], [])


def test_order_is_enforced(llama):
    ids = llama.reference["ids"]
    run = llama.runtime.start([ids])
    llama.load(0)
    llama.load(1)
    for call in (lambda: run.layer(0), lambda: run.hidden(0), lambda: run.loss(llama.head)):
        with pytest.raises(RuntimeError):
            call()
    run.embed(llama.pick(llama.runtime.embed_tensors()))
    with pytest.raises(RuntimeError, match="the next layer is 0"):
        run.layer(1)
    run.layer(0)
    with pytest.raises(RuntimeError, match="not been through all layers"):
        run.logits(0, llama.head)
    run.layer(1)
    for call in (lambda: run.logits(1, llama.head), lambda: run.hidden(-1), lambda: run.layer(2)):
        with pytest.raises(IndexError):
            call()
    with pytest.raises(ValueError, match="model.norm.weight is missing"):
        run.logits(0, {})
    for name in ("model.layers.0.mlp.input_quantizer", "model.layers.2.mlp.up_proj.input_quantizer", "lm_head", "lm_head.output_quantizer"):
        with pytest.raises(KeyError, match=name):
            llama.runtime.set_calibrator(name, core.Calibrator())
    with pytest.raises(TypeError, match="expected a Calibrator"):
        llama.runtime.set_calibrator("lm_head.input_quantizer", 3)
    with pytest.raises(TypeError, match="Quantizer"):
        llama.runtime.set_quantizer("lm_head.input_quantizer", core.Calibrator())
    assert run.nbytes > ids.size * 32 * 4


def child_logits(source, ids, queue):
    queue.put(source.logits(ids))


def test_fork_after_use(llama):
    core.set_threads(2)
    ids = np.tile(llama.reference["ids"], (20, 20))
    wanted = llama.logits(ids)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=child_logits, args=(llama, ids, queue))
    child.start()
    np.testing.assert_array_equal(queue.get(), wanted)
    child.join()
    assert child.exitcode == 0


def test_interrupt_leaves_calibrators_alone(llama):
    """Ctrl-C in a layer: KeyboardInterrupt, no half statistics, and the run can start again."""
    ids = np.tile(llama.reference["ids"][:1], (1500, 20))
    calibrator = core.Calibrator()
    llama.runtime.set_calibrator("model.layers.0.mlp.up_proj.input_quantizer", calibrator)
    run = llama.start([ids])
    llama.load(0)
    main = threading.main_thread().ident
    timer = threading.Timer(0.03, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        started = time.perf_counter()
        run.layer(0)
        time.sleep(max(0.0, 1 - (time.perf_counter() - started)))      # it came too late: still a KeyboardInterrupt
    timer.join()
    if run.next_layer == 1:
        pytest.skip("the layer was done before the signal came")
    assert calibrator.compute_amax() is None and run.next_layer == -1
    with pytest.raises(RuntimeError, match="embed"):
        run.layer(0)
    run.embed(llama.pick(llama.runtime.embed_tensors()))
    run.layer(0)
    assert calibrator.count == ids.size


def test_two_threads_do_not_share_a_run(llama):
    ids = np.tile(llama.reference["ids"][:1], (1000, 20))
    run, errors = llama.start([ids]), []
    llama.load(0)

    def work():
        try:
            run.layer(0)
        except RuntimeError as error:
            errors.append(str(error))
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 1 and ("in use by another thread" in errors[0] or "the next layer is 1" in errors[0])
    assert run.next_layer == 1


def test_every_allocation_may_fail(llama, no_allocation_faults):
    """The n-th allocation fails, for n = 1, 2, ... until everything succeeds: MemoryError each time, then the right logits."""
    ids, mask = llama.reference["ids"], llama.reference["right"]
    core.set_threads(1)
    wanted = llama.logits(ids, mask)
    calibrator = core.Calibrator(axis=-1)
    llama.runtime.set_calibrator("model.layers.1.mlp.down_proj.input_quantizer", calibrator)
    for n in range(1, 500):
        core._alloc_fail_at(n)
        try:
            run = llama.run([ids], [mask])
            run.loss(llama.head)
            logits = run.logits(0, llama.head)
        except MemoryError:
            continue
        finally:
            core._alloc_fail_at(0)
        break
    assert n > 20
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
