"""Single arrays in a format, and the TensorQuantizer by hand, on NumPy arrays. (tests/torch_models has the same on torch's.)"""
import copy
import pickle
import sys
import warnings
from collections import defaultdict, namedtuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import golden_data
import modelq
import modelq._core as core
import modelq.quantization as mtq
from modelq.export import export_hf_checkpoint
from modelq.nn import TensorQuantizer

F32, BF16 = np.float32, ml_dtypes.bfloat16
NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
KINDS = {"fp8": {"num_bits": (4, 3)}, "int8": {"num_bits": 8}, "int8 rows": {"num_bits": 8, "axis": 0},
         "int4 blocks": {"num_bits": 4, "block_sizes": {-1: 16}}, "nvfp4": NVFP4}


def array(*shape, dtype=F32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# Arrays -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [F32, BF16, np.float16])
@pytest.mark.parametrize("scheme", sorted(core.schemes()))
def test_packed_and_back_is_fake_quantized(scheme, dtype):
    x = array(2, 64, 256, dtype=dtype)
    packed = modelq.quantize_array(x, scheme)
    back, fake = packed.dequantize(), modelq.fake_quantize_array(x, scheme)
    assert back.shape == fake.shape == x.shape and back.dtype == fake.dtype == x.dtype
    np.testing.assert_array_equal(back, fake)
    assert packed.nbytes < x.nbytes and not np.array_equal(back, x)
    parts = core.quantize(x.reshape(-1, 256), scheme)
    assert all(np.array_equal(packed.parts[role], part) for role, part in parts.items())
    np.testing.assert_array_equal(packed.dequantize("float32").astype(dtype), back)


@pytest.mark.parametrize("preset, scheme, block", [("NVFP4_DEFAULT_CFG", "nvfp4", 16), ("FP8_DEFAULT_CFG", "fp8", None),
                                                   ("INT4_AWQ_CFG", "int4", 128), ("W4A8_AWQ_BETA_CFG", "int4", 128),
                                                   ("MXFP8_DEFAULT_CFG", "mxfp8", 32), ("INT8_DEFAULT_CFG", "int8", None)])
def test_presets(preset, scheme, block):
    """By name or as they are: what they make of weights."""
    x = array(8, 256)
    for format in (preset, getattr(mtq, preset)):
        packed = modelq.quantize_array(x, format)
        assert packed.scheme == scheme and packed.block_size in (block, None)
    np.testing.assert_array_equal(packed.dequantize(), modelq.quantize_array(x, scheme).dequantize())


INT4_MSE = {"quant_cfg": mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG["quant_cfg"], "algorithm": "mse"}


@pytest.mark.parametrize("preset, differs", [
    ("NVFP4_DEFAULT_CFG", False), ("NVFP4_FOUR_OVER_SIX_CFG", True), ("NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG", True),
    ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", False), ("INT8_DEFAULT_CFG", False), (INT4_MSE, True)])
def test_a_preset_does_to_an_array_what_it_does_to_a_model(preset, differs, golden, tmp_path):
    """Searches by the weight alone and their scales with it: the bytes of an export, of a linear that shares nothing with others."""
    model, name = modelq.load(golden["llama"].source), "model.layers.1.mlp.down_proj.weight"
    weight = model.checkpoint.read(name)
    packed = modelq.quantize_array(weight, preset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mtq.quantize(model, preset if isinstance(preset, dict) else getattr(mtq, preset), lambda model: model(golden["llama"].calib[:2]))
    export_hf_checkpoint(model, tmp_path / "export")
    exported = golden_data.read_safetensors(tmp_path / "export")
    for role, part in packed.parts.items():
        assert part.tobytes() == exported[name + role.removeprefix("weight")].tobytes(), role
    plain = modelq.quantize_array(weight, packed.scheme)
    assert differs != np.array_equal(packed.dequantize(), plain.dequantize())
    lost, plainly = (((weight - made.dequantize("float32")) ** 2).sum() for made in (packed, plain))
    assert lost < plainly if differs else lost == plainly
    np.testing.assert_array_equal(packed.dequantize(), modelq.fake_quantize_array(weight, preset))
    kernel = modelq.quantize_array({"kernel": weight.T}, preset, axis=0)["kernel"]
    np.testing.assert_array_equal(kernel.dequantize(), packed.dequantize().T)


def test_searches_and_what_is_given():
    x, preset = array(8, 256), "NVFP4_FOUR_OVER_SIX_CFG"
    given = modelq.quantize_array(x, preset, amax=8.0)
    assert given.parts["weight_scale_2"] == F32(8) / F32(1536)
    np.testing.assert_array_equal(given.dequantize(), modelq.fake_quantize_array(x, preset, amax=F32(8)))
    wide = modelq.quantize_array(x, preset, block_size=32)
    assert wide.block_size == 32 and wide.parts["weight_scale"].shape == (8, 8)
    np.testing.assert_array_equal(wide.dequantize(), modelq.fake_quantize_array(x, preset, block_size=32))
    x[3, 4] = np.nan
    for bad, words in ((x, "b: row 3|b .*row 3 holds NaN"), (array(4, 30), r"b \[4, 30\]")):
        with pytest.raises(ValueError, match=words):
            modelq.quantize_array({"b": bad}, preset)
    assert modelq.quantize_array(array(0, 32), preset).dequantize().shape == (0, 32)
    hessian = modelq.quantize_array(array(8, 256), "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG")      # no inputs: plain squares
    np.testing.assert_array_equal(hessian.dequantize(), modelq.fake_quantize_array(array(8, 256), "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG"))


Layer = namedtuple("Layer", "kernel bias")


class Settings(dict):
    """A dictionary of the user's own."""


def parameters():
    return {"embed": array(6, 32), "layers": [Layer(array(3, 4, 16, seed=1, dtype=BF16), array(7)), Layer(array(2, 16, seed=2), None)],
            "norm": Settings(scale=array(32), steps=np.arange(4).reshape(2, 2)), "rest": (3, "text", 0.5, (), [1.5, 2.5]),
            "counts": defaultdict(list, a=[array(2, 32, seed=3)])}


def test_trees():
    """Float matrices are packed, wherever they are; all else stays, and so do the kinds of containers."""
    tree = parameters()
    packed = modelq.quantize_array(tree, "nvfp4")
    assert repr(packed["embed"]).startswith("<QuantizedArray nvfp4 [6, 32] of float32")
    back, fake = modelq.dequantize_array(packed), modelq.fake_quantize_array(tree, "nvfp4")
    for made in (back, fake):
        assert made["embed"].shape == (6, 32) and made["layers"][0].kernel.dtype == BF16 and made["layers"][1].bias is None
        assert type(made["layers"][0]) is Layer and type(made["norm"]) is Settings and made["counts"].default_factory is list
        assert made["layers"][0].bias is tree["layers"][0].bias and made["norm"]["steps"] is tree["norm"]["steps"]
        assert made["rest"] == tree["rest"] and list(made) == list(tree)
    for path in (lambda t: t["embed"], lambda t: t["layers"][0].kernel, lambda t: t["layers"][1].kernel, lambda t: t["counts"]["a"][0]):
        np.testing.assert_array_equal(path(back), path(fake))
        np.testing.assert_array_equal(path(back), modelq.fake_quantize_array(path(tree), "nvfp4"))
    assert isinstance(tree["embed"], np.ndarray)      # the caller's own is as it was
    np.testing.assert_array_equal(modelq.fake_quantize_array([[1.0, 2.0], [3.0, 448.0]], "fp8"), [[1, 2], [3, 448]])      # lists of numbers


def test_leaves_are_chosen_by_path():
    seen, tree = [], parameters()
    packed = modelq.quantize_array(tree, "fp8", where=lambda path, leaf: seen.append(path) or path in ("norm.scale", "layers.1.kernel"))
    assert seen == ["embed", "layers.0.kernel", "layers.0.bias", "layers.1.kernel", "norm.scale", "norm.steps", "rest.0", "rest.1",
                    "rest.2", "rest.4", "counts.a.0"]
    assert [isinstance(leaf, modelq.QuantizedArray) for leaf in (packed["embed"], packed["norm"]["scale"], packed["layers"][1].kernel)] == [
        False, True, True]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("scheme", ["nvfp4", "int4", "fp8_channel", "mxfp8"])
def test_along_another_axis(scheme, dtype):
    """A kernel [in, out] is the transposed weight, and is packed as that."""
    weight = array(2, 6, 256, dtype=dtype)
    kernel = np.swapaxes(weight, 1, 2)
    packed, as_weight = modelq.quantize_array(kernel, scheme, axis=-2), modelq.quantize_array(weight, scheme)
    for role, part in as_weight.parts.items():
        np.testing.assert_array_equal(packed.parts[role], part)
    made = packed.dequantize()
    assert made.shape == kernel.shape and made.dtype == dtype and made.flags.c_contiguous
    np.testing.assert_array_equal(made, np.swapaxes(as_weight.dequantize(), 1, 2))
    np.testing.assert_array_equal(modelq.fake_quantize_array(kernel, scheme, axis=1), made)


def test_packed_arrays_can_be_copied_and_pickled():
    x = array(4, 32)
    packed = modelq.quantize_array({"x": x}, "nvfp4")
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        np.testing.assert_array_equal(other["x"].dequantize(), packed["x"].dequantize())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3), st.integers(1, 5), st.sampled_from(["fp8", "nvfp4", "mxfp4"]), st.integers(0, 99))
def test_any_shape(axes, blocks, scheme, seed):
    x = array(*range(2, 2 + axes), 32 * blocks, seed=seed)
    np.testing.assert_array_equal(modelq.quantize_array(x, scheme).dequantize(), modelq.fake_quantize_array(x, scheme))


@pytest.mark.parametrize("call, words", [
    (lambda: modelq.quantize_array(array(4, 32), "fp3"), "unknown format 'fp3'"),
    (lambda: modelq.quantize_array(array(4, 30), "nvfp4"), r"array \[4, 30\]"),
    (lambda: modelq.quantize_array({"a": [{"kernel": array(4, 30)}]}, "nvfp4"), r"a\.0\.kernel \[4, 30\]: scheme nvfp4 needs"),
    (lambda: modelq.fake_quantize_array([array(2, 16), (array(4, 30),)], "nvfp4"), r"1\.0 \[4, 30\]"),
    (lambda: modelq.quantize_array({"w": array(4, 32).astype(float)}, "fp8"), r"w \[4, 32\] float64: expected float32"),
    (lambda: modelq.quantize_array({"w": array(4, 32), "n": 3}, "fp8", where=lambda path, leaf: path == "n"), "n: .*at least one axis"),
    (lambda: modelq.quantize_array({"w": array(4, 32), "n": "text"}, "fp8", where=lambda path, leaf: path == "n"), "n: dtype"),
    (lambda: modelq.quantize_array({"w": array(4, 32)}, "fp8", where=lambda path, leaf: False), "where said no"),
    (lambda: modelq.fake_quantize_array({"b": array(4), "n": 3}, "fp8"), "no leaf is a float array"),
    (lambda: modelq.quantize_array(array(4, 32), "fp8", where=lambda path, leaf: True), "single array"),
    (lambda: modelq.quantize_array(array(4, 32), "fp8", axis=2), "axis 2 is out of bounds"),
    (lambda: modelq.quantize_array({"b": array(32)}, "fp8", axis=-2, where=lambda path, leaf: True), "b: axis -2 is out of bounds"),
    (lambda: modelq.quantize_array(F32(3), "fp8"), "at least one axis"),
    (lambda: modelq.quantize_array(np.full((2, 16), np.nan, F32), "fp8"), "NaN"),
    (lambda: modelq.quantize_array(array(2, 16), {"quant_cfg": [{"quantizer_name": "*", "enable": False}]}), "no rule"),
    (lambda: modelq.dequantize_array(array(2, 16)), "expected a QuantizedArray")])
def test_what_cannot_be(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


# TensorQuantizer ------------------------------------------------------------------------------------------------------------------

def calibrated(kind, *arrays):
    quantizer = TensorQuantizer(KINDS[kind], name=kind)
    if quantizer.needs_calibration:
        quantizer.disable_quant()
        quantizer.enable_calib()
        for x in arrays:
            assert quantizer(x) is x
        quantizer.disable_calib()
        quantizer.enable_quant()
        quantizer.load_calib_amax()
    return quantizer


@pytest.mark.parametrize("dtype", [F32, BF16, np.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_calibrate_and_round(kind, dtype):
    """The range is of everything that passed; rounding is the core's."""
    arrays = [array(8, 64, dtype=dtype, seed=seed) for seed in range(3)]
    quantizer, plain = calibrated(kind, *arrays), core.Quantizer(**{k: v for k, v in KINDS[kind].items()})
    if quantizer.needs_calibration:
        largest = np.max([np.abs(x.astype(F32)) for x in arrays], axis=0)
        expected = {"int8 rows": largest.max(1, keepdims=True), "int4 blocks": largest.reshape(8, 4, 16).max(-1)}.get(kind, largest.max())
        np.testing.assert_array_equal(np.ravel(quantizer.amax), np.ravel(expected))
        np.testing.assert_allclose(quantizer.step_size, quantizer.amax / quantizer.maxbound)
        plain.amax = quantizer.amax
    made = quantizer(arrays[0])
    assert made.dtype == dtype
    np.testing.assert_array_equal(made, plain(arrays[0]))


def test_switches():
    x, quantizer = array(4, 16), TensorQuantizer({"num_bits": 8}, amax=1.0)
    rounded = quantizer(x)
    assert not np.array_equal(rounded, x)
    quantizer.disable()
    assert quantizer(x) is x and not quantizer.is_enabled and "disabled" in repr(quantizer)
    quantizer.pre_quant_scale = np.full(16, 2, F32)      # multiplies even so
    np.testing.assert_array_equal(quantizer(x), x * 2)
    quantizer.enable()
    quantizer.pre_quant_scale = None
    np.testing.assert_array_equal(quantizer(x), rounded)
    quantizer.reset_amax()
    with pytest.raises(ValueError, match="quantizer: no amax yet"):
        quantizer(x)
    with pytest.raises(ValueError, match="no array has passed"):
        quantizer.load_calib_amax()
    with pytest.raises(ValueError, match="nothing to calibrate"):
        TensorQuantizer({"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None}}).enable_calib()


def test_calibration_sees_what_will_be_rounded():
    quantizer = TensorQuantizer({"num_bits": 8}, if_quant=False, if_calib=True)
    quantizer.pre_quant_scale = np.array([10, 1], F32)
    quantizer(np.array([[1, 2]], F32))
    quantizer.load_calib_amax()
    assert quantizer.amax == 10


def test_histograms():
    quantizer, x = TensorQuantizer({"num_bits": 8, "calibrator": "histogram"}, if_quant=False, if_calib=True), array(100, 100)
    x[0, 0] = 100
    quantizer(x)
    quantizer.load_calib_amax("percentile", percentile=99.0)
    assert 2 < quantizer.amax < 3.5


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_states(kind):
    x = array(8, 64)
    quantizer = calibrated(kind, x)
    quantizer.pre_quant_scale = np.linspace(1, 2, 64, dtype=F32)
    other = TensorQuantizer(KINDS[kind])
    other.load_state(quantizer.state())
    for made in (copy.deepcopy(quantizer), other):
        np.testing.assert_array_equal(made(x), quantizer(x))
    copied = copy.deepcopy(quantizer)
    copied.pre_quant_scale = None
    assert quantizer.pre_quant_scale is not None
    with pytest.raises(ValueError, match="unknown state"):
        other.load_state({"scale": 1})


@pytest.mark.parametrize("given, words", [({"num_bits": 99}, "num_bits"), ({"bits": 8}, "unknown quantizer attribute 'bits'"), (3, "dictionary")])
def test_attributes_that_make_no_quantizer(given, words):
    with pytest.raises(ValueError, match=words):
        TensorQuantizer(given)


def test_nan_is_refused_by_calibration():
    quantizer = TensorQuantizer({"num_bits": 8}, if_quant=False, if_calib=True, name="layer.input_quantizer")
    with pytest.raises(ValueError, match="layer.input_quantizer"):
        quantizer(np.array([1, np.nan], F32))


def test_arrays_of_a_device(monkeypatch):
    """CuPy's way out of and back to its device; the real one is not here."""
    import contextlib
    import types

    class ndarray:      # noqa: N801 (as CuPy calls it)
        def __init__(self, host):
            self.host, self.device, self.shape, self.dtype = host, contextlib.nullcontext(), host.shape, host.dtype

        def get(self):
            return self.host
    ndarray.__module__ = "cupy"
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(asarray=ndarray))
    x = np.linspace(-2, 2, 64, dtype=np.float32).reshape(2, 32)
    for made in (modelq.fake_quantize_array(ndarray(x), "mxfp8"), modelq.quantize_array(ndarray(x), "mxfp8").dequantize()):
        assert type(made) is ndarray
        np.testing.assert_array_equal(made.host, modelq.fake_quantize_array(x, "mxfp8"))
    quantizer = TensorQuantizer({"num_bits": 8}, amax=1.5)
    np.testing.assert_array_equal(quantizer(ndarray(x)).host, quantizer(x))
