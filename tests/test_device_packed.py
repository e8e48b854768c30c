"""Weights that stay codes on a GPU (modelq.load(device="cuda") of a compressed, reopened or simulated model): they travel packed, are
multiplied by the path that the device has for them, and the model computes what it computes on the CPU. The GPU is the emulated
library's, of several compute capabilities; MODELQ_CUDA_LIBRARY may name one for a real GPU, of MODELQ_CAPABILITY (10 * major + minor)."""
import ctypes
import gc
import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cuda_library import library_to_test
from golden_data import read_safetensors, write_safetensors
from test_dialects import E4M3, MX, NVFP4, TOKEN, config

import modelq
import modelq.quantization as mtq
from modelq import cuda, streaming
from modelq.devices import placement_of
from modelq.export import export_hf_checkpoint
from modelq.inputs import make_batch

FAMILIES = Path(__file__).parent / "data" / "families"
RNG = np.random.default_rng(0)
IDS = [RNG.integers(0, 200, (2, 12)), RNG.integers(0, 200, (4, 20))]
SEEN = [RNG.integers(0, 200, (2, 16))]      # by calibration: others, so that no input is the one that a scale was made of
MASK = np.array([[1] * 12, [1] * 7 + [0] * 5])
ENOUGH = "64MiB"
CAPABILITIES = [80, 89, 90, 100]
if "MODELQ_CUDA_LIBRARY" in os.environ:     # a GPU is what it is
    CAPABILITIES = [min(int(os.environ.get("MODELQ_CAPABILITY", 90)), 100)]
ADA_ON = {89, 90, 100}
INT8_TOKEN = {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}}
GROUP = {"num_bits": E4M3, "type": "dynamic", "block_sizes": {-1: 128}}

# what is quantized, and which path products take on which capabilities; elsewhere weights are dequantized
FORMATS = {
    "fp8": (mtq.FP8_DEFAULT_CFG, {"fp8_tensor": ADA_ON}),
    "fp8 channels, tokens": (mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG, {"fp8_outer": {90}, "fp8_scaled": {89, 100}}),
    "fp8 blocks": (mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG, {}),
    "fp8 blocks, groups": (config({"num_bits": E4M3, "block_sizes": {-1: 128, -2: 128}}, GROUP), {"fp8_block": {90}}),
    "nvfp4": (mtq.NVFP4_DEFAULT_CFG, {"nvfp4": {100}}),
    "nvfp4 weights": (config(NVFP4), {}),
    "mxfp8": (mtq.MXFP8_DEFAULT_CFG, {"mxfp8": {100}}),
    "mxfp4": (mtq.MXFP4_DEFAULT_CFG, {}),
    "mxfp6": (config(MX["fp6"], MX["fp6"]), {}),
    "int4": (mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG, {}),
    "int4 awq": (mtq.INT4_AWQ_CFG, {}),
    "int8": (config({"num_bits": 8, "axis": 0}, INT8_TOKEN), {"int8": set(CAPABILITIES)}),
    "int8 smoothed": (mtq.INT8_SMOOTHQUANT_CFG, {"int8": set(CAPABILITIES)}),
    "w4a8": (mtq.W4A8_AWQ_BETA_CFG, {"fp8_tensor": ADA_ON}),
    "w4a8 nvfp4": (mtq.W4A8_NVFP4_FP8_CFG, {}),
    "low rank": (mtq.NVFP4_SVDQUANT_DEFAULT_CFG, {"nvfp4": {100}}),
}


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setenv("MODELQ_CUDA_LIBRARY", str(library_to_test()))
    shim = ctypes.CDLL(str(library_to_test()))
    is_emulated = shim.mq_cuda_is_emulated()

    def be(capability):
        if not is_emulated and capability not in CAPABILITIES:
            pytest.skip("is of another device")
        if is_emulated:
            monkeypatch.setenv("MODELQ_SHIM_CAPABILITY", str(capability))
            shim.mq_shim_lt_set_capability(capability)
    yield be
    if is_emulated:
        shim.mq_shim_lt_set_capability(90)


@pytest.fixture
def llama(golden):
    return golden["llama"].source


def passes(model):
    for ids in SEEN:
        model(ids)


def quantized(source, cfg, compute="float32"):
    return mtq.quantize(modelq.load(source, compute=compute), cfg, passes)


def logits(model):
    found = [np.asarray(model(IDS[0], attention_mask=MASK).logits)[MASK.astype(bool)], np.asarray(model(IDS[1]).logits)]
    return np.concatenate([part.reshape(-1, part.shape[-1]) for part in found])


def there(model, memory=ENOUGH):
    """The same model, computed on a device from now on; back() ends that."""
    model.runtime.use_device(None)
    placement_of("cuda", memory).attach(model.runtime)
    return model


def on_device(model, memory=ENOUGH):
    """(logits, how many products took which path, the most memory in use) of a model on a device, which is on the CPU again then."""
    there(model, memory)
    found, device = logits(model), model.runtime.device
    model.runtime.use_device(None)
    assert device["peak"] <= device["memory"]
    return found, device["products"], device["peak"]


def path_of(name, capability):
    return next((path for path, where in FORMATS[name][1].items() if capability in where), "dequantize")


def check_rows(found, expected, tolerance=3e-5, most=0.25, within=0.5):
    """The tokens' logits, within float32's sums; but those of few tokens, where a sum fell to the code beside and the rest followed."""
    error = np.abs(found - expected).max(axis=1)
    assert (error > tolerance).mean() <= most, f"{(error > tolerance).sum()} of {len(error)} tokens differ by up to {error.max()}"
    assert error.max() < within


def products_of(model, calls=2):
    """Of one forward of each of the calls: a linear has one."""
    return calls * sum(row["kind"] == "linear" and row["layer"] >= 0 for row in model.modules)


# ---- what is computed ----

@pytest.mark.parametrize("name", FORMATS)
def test_compressed_models(llama, emulated, name):
    """Codes of a float32 model times scales are its numbers, on every path."""
    model = mtq.compress(quantized(llama, FORMATS[name][0]))
    expected = logits(model)
    for capability in CAPABILITIES:
        emulated(capability)
        found, products, _ = on_device(model)
        assert products == {path_of(name, capability): products_of(model)}
        check_rows(found, expected)


@pytest.mark.parametrize("name", ["fp8", "fp8 channels, tokens", "nvfp4", "mxfp8", "int8", "w4a8"])
def test_bfloat16_is_as_near_to_what_is_meant_as_the_cpus(llama, emulated, name, tmp_path):
    """Tensor cores multiply codes, the CPU numbers that were rounded to bfloat16: two computations in bfloat16. Neither is nearer than the
    other to what the same export computes in float32, and they are nearer to each other than twice that."""
    dialect = "compressed-tensors" if name == "int8" else "modelopt"
    export_hf_checkpoint(quantized(llama, FORMATS[name][0], "bfloat16"), export_dir=tmp_path / "export", dialect=dialect)
    exact = logits(modelq.load(tmp_path / "export", compute="float32"))
    model = modelq.load(tmp_path / "export", compute="bfloat16")
    here = np.sqrt(np.mean((logits(model) - exact)**2))
    capability = max(min(where) for where in FORMATS[name][1].values())
    emulated(capability)
    found, products, _ = on_device(model)
    assert products == {path_of(name, capability): products_of(model)} and path_of(name, capability) != "dequantize"
    assert np.sqrt(np.mean((found - exact)**2)) < 1.2 * here
    assert np.sqrt(np.mean((found - logits(model))**2)) < 1.2 * here


@pytest.mark.parametrize("dialect, name", [("modelopt", "nvfp4"), ("modelopt", "fp8"), ("modelopt", "int4 awq"), ("modelopt", "w4a8"),
                                           ("compressed-tensors", "fp8 channels, tokens"), ("compressed-tensors", "int8"),
                                           ("compressed-tensors", "nvfp4 weights"), ("modelopt", "mxfp8")])
def test_reopened_exports(llama, emulated, name, dialect, tmp_path):
    """Their numbers are bfloat16's: in float32 they are rounded so, tile by tile, and never multiplied as codes."""
    emulated(100)
    export_hf_checkpoint(quantized(llama, FORMATS[name][0], "bfloat16"), export_dir=tmp_path / "export", dialect=dialect)
    model = modelq.load(tmp_path / "export", compute="float32")
    expected = logits(model)
    found, products, _ = on_device(model)
    assert products == {"dequantize": products_of(model)}
    check_rows(found, expected)


@pytest.mark.parametrize("name", [*FORMATS, "gptq", "local hessian", "mse"])
def test_simulated_models_are_quantized_there(llama, emulated, name):
    """To the codes that `compress` packs on the CPU, bit for bit."""
    searched = {"gptq": mtq.INT4_GPTQ_CFG, "local hessian": mtq.NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG,
                "mse": mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG}
    model = quantized(llama, searched[name] if name in searched else FORMATS[name][0], "bfloat16")
    emulated(100)
    for memory in (ENOUGH, 3_500_000):      # in one piece or several
        there(model, memory)
        there_too = [streaming.is_quantized_there(model, row) for row in model.modules]
        model.runtime.use_device(None)
        found, products, _ = on_device(model, memory)
        assert products == {path_of(name, 100) if name in FORMATS else next(iter(products)): products_of(model)}
        assert sum(there_too) == products_of(model, 1)
        mtq.compress(model)
        expected, same, _ = on_device(model, memory)
        model.packed = {}
        assert same == products and np.array_equal(found, expected)


def test_experts(golden, emulated):
    source = golden["qwen3moe"].source
    for name in ("fp8", "nvfp4", "int4"):
        model = mtq.compress(quantized(source, FORMATS[name][0]))
        expected = logits(model)
        for capability in {CAPABILITIES[0], CAPABILITIES[-1]}:
            emulated(capability)
            found, products, _ = on_device(model)
            assert list(products) == [path_of(name, capability)] and products[path_of(name, capability)] > 40
            check_rows(found, expected)


def test_a_packed_head(golden, llama, emulated, tmp_path):
    """A slice of the vocabulary at a time: blocks and pairs of rows are whole."""
    folder, tensors = tmp_path / "wide", read_safetensors(llama)
    shutil.copytree(llama, folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    said = json.loads((folder / "config.json").read_text())
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & set(tensors):
        tensors[name] = (np.random.default_rng(1).standard_normal((6004, said["hidden_size"])) * 0.05).astype(tensors[name].dtype)
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({**said, "vocab_size": 6004}))
    for weight, side, path in (({"num_bits": E4M3}, {"num_bits": E4M3}, "fp8_tensor"), (NVFP4, NVFP4, "nvfp4"),
                               ({"num_bits": 4, "block_sizes": {-1: 32}}, None, "dequantize"),
                               ({"num_bits": E4M3, "block_sizes": {-1: 128, -2: 128}}, TOKEN, "dequantize")):
        rules = [{"quantizer_name": "*", "enable": False}, {"quantizer_name": "*lm_head.weight_quantizer", "cfg": weight, "enable": True}]
        rules += [{"quantizer_name": "*lm_head.input_quantizer", "cfg": side, "enable": True}] if side else []
        model, ids = mtq.compress(quantized(folder, {"quant_cfg": rules, "algorithm": "max"})), IDS[0][:, :5]
        expected, loss = np.asarray(model(ids).logits), model.loss([ids])
        emulated(100)
        counts = []
        for memory in (ENOUGH, 2_600_000):
            found = np.asarray(there(model, memory)(ids).logits)
            assert model.loss([ids]) == pytest.approx(loss, rel=1e-6)
            products = model.runtime.device["products"]
            assert list(products) == [path]
            counts.append(products[path])
            check_rows(found.reshape(10, -1), expected.reshape(10, -1))
            model.runtime.use_device(None)
        assert counts[0] == 2 < counts[1]


def test_what_has_no_packed_form_is_simulated_on_the_cpu(llama, emulated):
    """Integers of six bits; blocks that no kernel has; what a float32 model follows the reference in."""
    emulated(100)
    for compute, weight in (("bfloat16", {"num_bits": 6, "axis": 0}), ("float32", {"num_bits": E4M3})):
        model = quantized(llama, config(weight), compute)
        expected = logits(model)
        found, products, _ = on_device(model)
        assert products == {}
        check_rows(found, expected, tolerance=3e-5 if compute == "float32" else 0.1)


def test_quantizers_that_products_have_no_words_for(llama, emulated):
    """An affine input, four bits, or unsigned ones: rounded before the product."""
    emulated(100)
    for side in ({"num_bits": 4}, {"num_bits": 8, "unsigned": True}, {"num_bits": E4M3, "block_sizes": {-1: 64}, "type": "dynamic"}):
        model = mtq.compress(quantized(llama, config({"num_bits": E4M3}, side)))
        expected = logits(model)
        found, products, _ = on_device(model)
        assert products == {"dequantize": products_of(model)}
        check_rows(found, expected)


@pytest.mark.parametrize("streams", ["late", "random"])
def test_streams_that_do_nothing_before_they_must(llama, emulated, monkeypatch, streams):
    emulated(100)
    model = quantized(llama, mtq.NVFP4_DEFAULT_CFG, "bfloat16")
    expected, _, _ = on_device(model, 3_500_000)
    monkeypatch.setenv("MODELQ_SHIM_STREAMS", streams)
    for _ in range(2):
        found, _, _ = on_device(model, 3_500_000)
        assert np.array_equal(found, expected)
        mtq.compress(model)


def test_calibration_goes_on_beside_codes(llama, emulated):
    """Statistics of a compressed model's inputs are those of the same model on the CPU."""
    emulated(90)
    model = mtq.compress(quantized(llama, mtq.INT4_AWQ_CFG))
    found = {}
    for place in ("cpu", "cuda"):
        if place == "cuda":
            there(model)
        with model.simulating(weights=True, activations=False):
            found[place] = np.asarray(model(IDS[0]).logits)
    np.testing.assert_allclose(found["cuda"], found["cpu"], rtol=0, atol=3e-5)


# ---- memory ----

@pytest.fixture(scope="module")
def large(golden, tmp_path_factory):
    """golden llama with linears of 512 columns: 5.2 MB a layer."""
    folder, hidden, inner = tmp_path_factory.mktemp("large") / "model", 512, 1024
    shutil.copytree(golden["llama"].source, folder)
    tensors = read_safetensors(folder)
    said = json.loads((folder / "config.json").read_text())
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    sizes = {said["hidden_size"]: hidden, said["intermediate_size"]: inner}
    heads, random = said["num_attention_heads"], np.random.default_rng(2)
    said |= {"hidden_size": hidden, "intermediate_size": inner, "head_dim": hidden // heads}
    widths = {"q_proj": (hidden, hidden), "k_proj": (said["num_key_value_heads"] * hidden // heads, hidden), "o_proj": (hidden, hidden)}
    widths["v_proj"] = widths["k_proj"]
    for name, tensor in tensors.items():
        shape = widths.get(name.split(".")[-2], tuple(sizes.get(size, size) for size in tensor.shape))
        if "embed" in name or "head" in name:
            shape = (tensor.shape[0], hidden)
        tensors[name] = (np.ones(shape) if len(shape) == 1 else random.standard_normal(shape) * shape[1]**-0.5).astype(ml_dtypes.bfloat16)
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def test_codes_take_less_memory_than_numbers(large, emulated):
    emulated(80)
    model = modelq.load(large, compute="bfloat16")
    layer = sum(2 * row["shape"][0] * row["shape"][1] for row in model.modules_of(0) if row["kind"] == "linear")
    memory, ids = 16_000_000, IDS[0][:, :6]

    def peak(model):
        there(model, memory).loss([ids])
        return model.runtime.device["peak"]
    plain, shares = peak(model), {}
    for preset, bits in ((mtq.FP8_DEFAULT_CFG, 8), (mtq.NVFP4_DEFAULT_CFG, 4.5), (mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG, 4.25)):
        model.runtime.use_device(None)
        mtq.quantize(model, preset, lambda model: model(ids))
        for _ in range(2):                                      # simulated, then compressed
            assert plain - peak(model) > (1 - bits / 16) * layer - 200_000
            mtq.compress(model)
    # a device too small for a layer's numbers, but not for its codes
    model = modelq.load(large, compute="bfloat16", device="cuda", device_memory=5_000_000)
    with pytest.raises(MemoryError, match="for the weights of a layer"):
        model.loss([ids])
    model = modelq.load(large, compute="bfloat16", device="cuda", device_memory=5_000_000)
    mtq.quantize(model, mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    assert mtq.compress(model).loss([ids]) > 0 and model.runtime.device["peak"] < layer


def test_memory_is_given_back(llama, emulated):
    emulated(100)
    gc.collect()
    before = cuda.library().device(0)["free_nbytes"]
    model = quantized(llama, mtq.NVFP4_DEFAULT_CFG, "bfloat16")
    there(model).loss(IDS)
    assert cuda.library().device(0)["free_nbytes"] < before
    model.runtime.use_device(None)
    del model
    gc.collect()
    assert cuda.library().device(0)["free_nbytes"] == before


# ---- what goes wrong ----

def test_codes_that_are_not_finite(llama, emulated, monkeypatch):
    emulated(100)
    model = mtq.compress(quantized(llama, mtq.FP8_DEFAULT_CFG, "bfloat16"))
    name = "model.layers.1.mlp.up_proj"
    good, expected = model.packed[name], model.loss(IDS)
    there(model)
    for role, value in (("weight", np.uint8(0x7f)), ("weight_scale", np.float32(np.nan)), ("weight_scale", np.float32(3e38))):
        parts = {key: np.array(part) for key, part in good.parts.items()}
        if role == "weight":
            parts[role].view(np.uint8)[3, 5] = value
        else:
            parts[role][...] = value
        model.packed[name] = type(good)(good.form, parts)
        with pytest.raises(ValueError, match=f"{name}.weight contains (NaN|an infinity)"):
            model.loss(IDS)
    model.packed[name] = good
    assert model.loss(IDS) == pytest.approx(expected, rel=2e-3)


def test_large_scales_of_small_codes(llama, emulated):
    """Scales whose largest code would be an infinity, which is nowhere."""
    emulated(80)
    model = mtq.compress(quantized(llama, config({"num_bits": E4M3, "axis": 0})))
    name = "model.layers.1.mlp.down_proj"
    parts = {key: np.array(part) for key, part in model.packed[name].parts.items()}
    parts["weight"].view(np.uint8)[...] = 0
    parts["weight_scale"][...] = 3e38
    model.packed[name] = type(model.packed[name])(model.packed[name].form, parts)
    expected = logits(model)
    found, products, _ = on_device(model)
    assert products == {"dequantize": products_of(model)}
    check_rows(found, expected)


@pytest.mark.parametrize("preset", ["NVFP4_DEFAULT_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"])
def test_numbers_that_are_not_finite(llama, emulated, monkeypatch, preset):
    emulated(100)
    model = quantized(llama, getattr(mtq, preset), "bfloat16")
    read, name = model.checkpoint.read, "model.layers.1.mlp.up_proj.weight"

    def broken(wanted):
        tensor = np.array(read(wanted))
        if wanted == name:
            tensor[3, 5] = np.nan
        return tensor
    monkeypatch.setattr(model.checkpoint, "read", broken)
    with pytest.raises(ValueError, match=f"{name} contains NaN"):
        there(model).loss(IDS)


def test_what_is_said_of_numbers_is_checked(llama, emulated):
    emulated(100)
    model = there(quantized(llama, mtq.NVFP4_DEFAULT_CFG, "bfloat16"))
    names, modules = model.runtime.layer_tensors(0), model.modules_of(0)
    tensors = streaming.read_for_products(model, names, modules)
    name = "model.layers.0.mlp.up_proj.weight"
    numbers, scheme, dtype, size, (amax, blocks, divisor) = tensors[name]
    for value, error, words in [((numbers, "fp5", dtype, size, (amax, blocks, divisor)), ValueError, "unknown scheme"),
                                ((numbers, scheme, dtype, size, (amax, blocks)), TypeError, "3"),
                                ((numbers, scheme, "float16", size, (amax, blocks, divisor)), ValueError, "expected float32 or float16"),
                                ((numbers[0], scheme, dtype, size, (amax, blocks, divisor)), ValueError, "of 2 dimensions"),
                                ((numbers, scheme, dtype, size, (np.ones(3), blocks, divisor)), ValueError, "1 amax values, got 3")]:
        with pytest.raises(error, match=words):
            model.runtime.load_layer(0, {**tensors, name: value})
    model.runtime.load_layer(0, tensors)
    model.runtime.use_device(None)      # the CPU makes the numbers itself
    model.runtime.load_layer(0, tensors)
    model.runtime.load_layer(0, {**tensors, name: (numbers.astype(np.float32), scheme, dtype, size, (amax, blocks, divisor))})


# ---- what travels ----

@pytest.fixture
def trace(emulated):
    shim = ctypes.CDLL(str(library_to_test()))
    if not shim.mq_cuda_is_emulated():
        pytest.skip("only the shim notes what it is asked for")
    shim.mq_shim_trace.restype = ctypes.c_char_p

    def sent(model, layer, following=None):
        """Bytes of weights that were sent during a layer."""
        shim.mq_shim_trace(1)
        streaming.run_layer(model, model.run, layer, following=following)
        calls = [line.split() for line in shim.mq_shim_trace(0).decode().splitlines()]
        return sum(int(nbytes) for what, stream, nbytes in calls if what == "send" and int(stream) == model.copies)

    def begin(model):
        shim.mq_shim_trace(1)
        there(model)
        streams = [int(line.split()[1]) for line in shim.mq_shim_trace(0).decode().splitlines() if line.startswith("stream ")]
        model.copies = streams[1]
        model.run = streaming.start(model, [make_batch(model.vocab_size, IDS[0])])
        return sent
    yield begin
    shim.mq_shim_trace(0)


@pytest.mark.parametrize("name, bits", [("fp8", 8), ("nvfp4", 4.5), ("int4", 4.25), ("mxfp8", 8.25), ("int8", 8), ("w4a8", 16)])
@pytest.mark.parametrize("compressed", [True, False])
def test_what_travels(llama, emulated, trace, name, bits, compressed):
    """The packed bytes of a compressed model; of a simulated one the checkpoint's. Both come ahead."""
    emulated(100)
    model = quantized(llama, FORMATS[name][0], "bfloat16")
    linears = [row for row in model.modules_of(1) if row["kind"] == "linear"]
    numbers = sum(row["shape"][0] * row["shape"][1] for row in linears)
    if compressed:
        mtq.compress(model)
        bits = 8 if name == "w4a8" else bits        # INT4 that is FP8 afterwards travels as that
    weights, sent = numbers * (bits if compressed else 16) / 8, trace(model)
    scales = 4 * sum(row["shape"][0] * (4 if name == "int4" else 1) for row in linears) + 4096    # maxima, scales of rows, norms
    first, second = sent(model, 0, following=1), sent(model, 1)
    assert weights <= first + second - weights <= weights + 2 * scales
    assert second < weights / 4
