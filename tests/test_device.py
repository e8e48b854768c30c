"""modelq.load(device="cuda"): what a GPU computes of a model is what the CPU does. The GPU is the emulated library's (cuda/shim), whose
memory crashes a host that touches it; MODELQ_CUDA_LIBRARY may name one for a real GPU."""
import ctypes
import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import modelq
import modelq.quantization as mtq
from cuda_library import library_to_test
from golden_data import read_safetensors, write_safetensors
from modelq import cuda
from modelq.devices import nbytes_of, placement_of
from modelq.export import export_hf_checkpoint

FAMILIES = Path(__file__).parent / "data" / "families"
RNG = np.random.default_rng(0)
IDS = [RNG.integers(0, 200, (2, 12)), RNG.integers(0, 200, (1, 20))]
MASK = np.array([[1] * 12, [1] * 7 + [0] * 5])
ENOUGH = "64MiB"        # of which products take a sixteenth


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setenv("MODELQ_CUDA_LIBRARY", str(library_to_test()))
    return library_to_test()


@pytest.fixture
def llama(golden):
    return golden["llama"].source


def pair(source, compute="float32", memory=ENOUGH):
    """The same model on the CPU and on the device."""
    here, there = modelq.load(source, compute=compute), modelq.load(source, compute=compute, device="cuda", device_memory=memory)
    assert (here.device, there.device) == ("cpu", "cuda:0") and here.runtime.device is None
    return here, there


def passes(model):
    model(IDS[0], attention_mask=MASK)
    model(IDS[1])


def amax_of(model):
    return {name: np.asarray(quantizer.amax) for name, quantizer in model.quantizers.items() if getattr(quantizer, "amax", None) is not None}


def check_amax(here, there):
    found, expected = amax_of(there), amax_of(here)
    assert found.keys() == expected.keys() and found
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=0, err_msg=name)


def exported(model, folder):
    export_hf_checkpoint(model, export_dir=folder)
    return read_safetensors(folder)


# ---- what is computed ----

@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3moe"])
def test_golden_models(golden, name):
    if name not in golden:
        pytest.skip("not in this folder")
    here, there = pair(golden[name].source)
    np.testing.assert_allclose(np.asarray(there(IDS[0], attention_mask=MASK).logits), np.asarray(here(IDS[0], attention_mask=MASK).logits),
                               rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", sorted(path.name for path in FAMILIES.iterdir()))
def test_families_against_transformers(name):
    """Logits of transformers models (tests/data/README.md), rope scaling, biases, windows and experts among them."""
    reference = np.load(FAMILIES / name / "reference.npz")
    model = modelq.load(FAMILIES / name, compute="float32", device="cuda", device_memory=ENOUGH)
    for side in ("left", "right"):      # where the padding is
        mask = reference[side]
        logits, seen = np.asarray(model(reference["ids"], attention_mask=mask).logits), mask.astype(bool)
        np.testing.assert_allclose(logits[seen], reference[f"logits_{side}"][seen], rtol=0, atol=1e-4)


def test_bfloat16(llama):
    here, there = pair(llama, "bfloat16")
    assert there.loss(IDS) == pytest.approx(here.loss(IDS), rel=2e-3)
    assert modelq.load(llama, device="cuda", device_memory=ENOUGH).runtime.compute == "bfloat16"     # what a GPU is fast at


@pytest.fixture(scope="module")
def wide(golden, tmp_path_factory):
    """golden llama with a vocabulary of 12000, whose head (6 MB) is larger than the devices of the tests that use it."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(golden["llama"].source, folder)
    tensors = read_safetensors(folder)
    config = json.loads((folder / "config.json").read_text())
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            old = tensors[name]
            tensors[name] = (np.random.default_rng(1).standard_normal((12000, old.shape[1])) * 0.05).astype(old.dtype)
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 12000}))
    return folder


@pytest.mark.parametrize("streams", ["at once", "late", "random"])
def test_losses_are_sums_over_slices_of_the_vocabulary(wide, monkeypatch, streams):
    monkeypatch.setenv("MODELQ_SHIM_STREAMS", streams)
    here, there = pair(wide, memory=3_000_000)
    labels = {"input_ids": IDS[0], "labels": np.where(MASK, IDS[0], -100)}
    assert there.loss([labels, IDS[1]]) == pytest.approx(here.loss([labels, IDS[1]]), rel=1e-6)
    np.testing.assert_allclose(np.asarray(there(IDS[1]).logits), np.asarray(here(IDS[1]).logits), rtol=0, atol=2e-5)


# ---- calibration ----

@pytest.mark.parametrize("preset", ["FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"])
def test_maxima_and_exports(llama, tmp_path, preset):
    here, there = pair(llama)
    for model in (here, there):
        mtq.quantize(model, getattr(mtq, preset), passes)
    check_amax(here, there)
    one, other = exported(here, tmp_path / "cpu"), exported(there, tmp_path / "cuda")
    assert one.keys() == other.keys()
    for name in one:
        if name.endswith(("input_scale", "k_scale", "v_scale")):        # of activations, which are sums in another order
            np.testing.assert_allclose(other[name], one[name], rtol=1e-6, err_msg=name)
        else:
            assert one[name].tobytes() == other[name].tobytes(), name
    # with quantizers at the points, which may round a sum to the code beside
    assert there.loss(IDS) == pytest.approx(here.loss(IDS), rel=1e-5 if preset.startswith("FP8") else 5e-4)


@pytest.mark.parametrize("preset", ["INT8_SMOOTHQUANT_CFG", "INT4_AWQ_CFG", "INT4_GPTQ_CFG", "NVFP4_AWQ_CLIP_CFG", "FP8_AFFINE_KV_CFG"])
def test_other_statistics(llama, preset):
    """Channels' maxima and means, Gram matrices, averages by batch and head."""
    here, there = pair(llama)
    for model in (here, there):
        config = getattr(mtq, preset)
        if "KV" in preset:
            config = {**mtq.FP8_DEFAULT_CFG, "quant_cfg": [*mtq.FP8_DEFAULT_CFG["quant_cfg"], *config["quant_cfg"]]}
        mtq.quantize(model, config, passes)
    found, expected = amax_of(there), amax_of(here)
    assert found.keys() == expected.keys() and found
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=3e-6, atol=0, err_msg=name)
    assert there.loss(IDS) == pytest.approx(here.loss(IDS), rel=1e-4)


def test_histograms(llama):
    here, there = pair(llama)
    for model in (here, there):
        mtq.quantize(model, {**mtq.INT8_DEFAULT_CFG, "algorithm": "percentile"}, passes)
    for name, value in amax_of(here).items():       # a value at an edge may fall into the bin beside it, which is 2048th of the range
        np.testing.assert_allclose(amax_of(there)[name], value, rtol=1e-3, err_msg=name)


def test_branches_of_low_rank(llama):
    here, there = pair(llama)
    for model in (here, there):
        mtq.quantize(model, mtq.NVFP4_SVDQUANT_DEFAULT_CFG, passes)
    assert there.runtime.device["copied"] == 0 and there.low_rank and there.loss(IDS) == pytest.approx(here.loss(IDS), rel=1e-4)
    assert here.low_rank.keys() == there.low_rank.keys()
    for name, one in here.low_rank.items():
        other, scale = there.low_rank[name], (lambda model: np.asarray(model.quantizers[f"{name}.weight_quantizer"].pre_quant_scale))
        np.testing.assert_allclose(scale(there), scale(here), rtol=1e-5, err_msg=name)      # so AWQ's exponent is the same
        product = np.float32(one.up) @ np.float32(one.down)
        np.testing.assert_allclose(np.float32(other.up) @ np.float32(other.down), product, atol=0.01 * np.abs(product).max(), err_msg=name)


def test_experts(golden):
    source = golden["qwen3moe"].source if "qwen3moe" in golden else FAMILIES / "qwen3_moe"
    here, there = pair(source)
    for model in (here, there):
        mtq.quantize(model, mtq.FP8_DEFAULT_CFG, passes)
    check_amax(here, there)
    assert str(here.expert_tokens) == str(there.expert_tokens)


def test_statistics_on_the_host_where_there_is_no_room_on_the_device(llama):
    """Gram matrices go there then."""
    here, there = pair(llama, memory=2_600_000)
    for model in (here, there):
        mtq.quantize(model, mtq.INT4_GPTQ_CFG, passes)
    for name, value in amax_of(here).items():
        np.testing.assert_allclose(amax_of(there)[name], value, rtol=3e-6, err_msg=name)


def test_a_search_for_formats(llama):
    states = []
    for model in pair(llama):
        batches = [{"input_ids": ids, "labels": ids} for ids in IDS]
        _, state = mtq.auto_quantize(model, {"effective_bits": 6.0}, [mtq.NVFP4_DEFAULT_CFG, mtq.FP8_DEFAULT_CFG], batches,
                                     lambda model, batch: model(**batch), lambda output, batch: output.loss)
        states.append(state)
        assert model.device in ("cpu", "cuda:0")
    chosen = [state["best"]["recipe"] if "best" in state else state for state in states]
    assert str(chosen[0]) == str(chosen[1])


@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
def test_streams_that_do_nothing_before_they_must(golden, monkeypatch, name):
    """Copies and kernels are ordered by what is said between streams alone, never by chance: with streams that are as late as may be, in a
    device so small that all comes in pieces, everything is as it is when they are at once."""
    source = golden[name].source if name in golden else FAMILIES / "qwen3_moe"
    ids, found = [RNG.integers(0, 200, (6, 20)) for _ in range(3)], []
    for streams in ("at once", "late", "random"):
        monkeypatch.setenv("MODELQ_SHIM_STREAMS", streams)
        model = modelq.load(source, compute="float32", device="cuda", device_memory=2_700_000)
        mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda model: [model(batch) for batch in ids])
        found.append((amax_of(model), model.loss(ids), np.asarray(model(ids[0]).logits)))
    one, loss, logits = found[0]
    for other, other_loss, other_logits in found[1:]:
        assert one.keys() == other.keys() and loss == other_loss and np.array_equal(logits, other_logits)
        for name, value in one.items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)


# ---- memory ----

def test_a_model_larger_than_the_device(llama):
    """Layers come and go, and so do the rows: the budget is a sixth of the weights and activations."""
    ids = [RNG.integers(0, 200, (8, 20)) for _ in range(4)]
    small = modelq.load(llama, compute="float32", device="cuda", device_memory=3_000_000)
    large = modelq.load(llama, compute="float32", device="cuda", device_memory=ENOUGH)
    for model in (small, large):
        mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda model: [model(batch) for batch in ids])
    assert small.runtime.device["peak"] <= small.runtime.device["memory"] == 3_000_000 < large.runtime.device["peak"]
    for name, value in amax_of(large).items():
        np.testing.assert_array_equal(amax_of(small)[name], value, err_msg=name)


def test_a_sequence_that_does_not_fit(golden, tiny_checkpoint):
    model = modelq.load(tiny_checkpoint, compute="float32", device="cuda", device_memory=3_000_000)
    with pytest.raises(MemoryError, match=r"out of device memory: a sequence of 1500 tokens needs .* sequences of (\d+) tokens fit") as error:
        model.loss([RNG.integers(0, 200, (1, 1500))])
    fits = int(str(error.value).split("sequences of ")[1].split(" tokens")[0])
    assert 100 < fits < 1500
    assert model.loss([RNG.integers(0, 200, (1, fits))]) > 0       # that was no guess, and the device is as it was


def test_weights_that_do_not_fit(llama):
    model = modelq.load(llama, compute="float32", device="cuda", device_memory=1_800_000)
    with pytest.raises(MemoryError, match="out of device memory: .* MB for the weights of a layer, but .* of the 1.8 MB that may be used"):
        model.loss(IDS)
    with pytest.raises(MemoryError, match="out of device memory: 1.0 MB for the workspace of products"):
        modelq.load(llama, device="cuda", device_memory=500_000)


@pytest.mark.emulated
def test_memory_of_the_device_is_given_back(llama):
    gc.collect()
    library = cuda.library()
    before = library.device(0)["free_nbytes"]
    model = modelq.load(llama, compute="float32", device="cuda", device_memory=ENOUGH)
    mtq.quantize(model, mtq.NVFP4_SVDQUANT_DEFAULT_CFG, passes)
    model.loss(IDS)
    assert library.device(0)["free_nbytes"] < before
    model.runtime.use_device(None)
    assert model.runtime.device is None
    del model
    gc.collect()
    assert library.device(0)["free_nbytes"] == before


@pytest.mark.emulated
def test_the_device_itself_is_full(llama, monkeypatch):
    monkeypatch.setenv("MODELQ_SHIM_MEMORY", "3000000")
    with pytest.raises(MemoryError, match="out of device memory: .* MB for .*, but .* of 3.0 MB are free"):
        modelq.load(llama, compute="float32", device="cuda", device_memory=ENOUGH).loss(IDS)


@pytest.mark.parametrize("text, nbytes", [(5, 5), ("123", 123), ("8GB", 8 * 10**9), ("1.5g", 1_500_000_000), ("512 MiB", 512 << 20)])
def test_amounts_of_memory(text, nbytes, monkeypatch):
    assert nbytes_of(text) == nbytes == placement_of("cuda", text).memory
    monkeypatch.setenv("MODELQ_CUDA_MEMORY", str(text))
    assert placement_of("cuda:2").memory == nbytes and placement_of("cuda:2").index == 2


@pytest.mark.parametrize("text", ["", "8 apples", "-1", -1, "GB", True])
def test_wrong_amounts_of_memory(text):
    with pytest.raises(ValueError, match="device memory: expected a number of bytes, or text as '8GB'"):
        nbytes_of(text)


# ---- what goes wrong ----

@pytest.mark.emulated
def test_devices_that_are_not_there(llama, monkeypatch):
    with pytest.raises(ValueError, match="device cuda:3: there are 1, from cuda:0 on"):
        modelq.load(llama, device="cuda:3")
    with pytest.raises(ValueError, match="device 'gpu': expected 'cpu', 'cuda' or 'cuda:0'"):
        modelq.load(llama, device="gpu")
    with pytest.raises(ValueError, match="device_memory is for device='cuda'"):
        modelq.load(llama, device_memory=5)
    monkeypatch.setenv("MODELQ_SHIM_DRIVER", "0")
    with pytest.raises(cuda.CudaUnavailable, match="there is no NVIDIA driver"):
        modelq.load(llama, device="cuda")
    assert modelq.load(llama).loss(IDS) > 0


def test_a_kernel_that_fails_is_named_and_the_model_goes_on(llama, emulated):
    model = modelq.load(llama, compute="float32", device="cuda", device_memory=ENOUGH)
    expected = model.loss(IDS)
    shim = ctypes.CDLL(str(emulated))
    if not shim.mq_cuda_is_emulated():
        pytest.skip("only the shim can make a launch fail")
    for launch in (1, 20, 40):
        shim.mq_shim_fail_launch(launch, 9)
        with pytest.raises((ValueError, RuntimeError), match=r"kernel \w+, grid \(\d+, \d+, \d+\), block \(\d+, 1, 1\), .*cudaErrorInvalid"):
            model.loss(IDS)
        assert model.loss(IDS) == expected


@pytest.mark.parametrize("value, word", [(np.nan, "NaN"), (np.inf, "an infinity")])
def test_weights_that_are_not_finite(llama, monkeypatch, value, word):
    model = modelq.load(llama, compute="float32", device="cuda", device_memory=ENOUGH)
    read, name = model.checkpoint.read, "model.layers.1.mlp.up_proj.weight"

    def broken(wanted):
        tensor = np.array(read(wanted))
        if wanted == name:
            tensor[3, 5] = value
        return tensor
    monkeypatch.setattr(model.checkpoint, "read", broken)
    with pytest.raises(ValueError, match=f"{name} contains {word}"):
        model.loss(IDS)


# ---- what stays on the CPU ----

def test_generation_is_the_cpus(tiny_checkpoint):
    here, there = pair(tiny_checkpoint)
    assert np.array_equal(here.generate(IDS[1], max_new_tokens=4), there.generate(IDS[1], max_new_tokens=4))


@pytest.mark.emulated
def test_the_command_line(llama, tmp_path, capsys, monkeypatch):
    from modelq.cli import main
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 20)
    monkeypatch.setenv("MODELQ_SHIM_DEVICES", "0")
    assert main(["eval", str(llama), "--device", "cuda", "--text", str(tmp_path / "text.txt")]) == 2
    assert "finds no GPU" in capsys.readouterr().err
