"""Key and value caches: biases, rotations, their calibration, what an export says of them and what it refuses."""
import copy
import json
import warnings

import ml_dtypes
import numpy as np
import pytest

import modelq
import modelq.quantization as mtq
import reference
from golden_data import read_safetensors
from modelq import _core
from modelq.export import export_hf_checkpoint

F32, BF16 = np.float32, ml_dtypes.bfloat16
OFF = {"quantizer_name": "*", "enable": False}
FP8 = {"num_bits": (4, 3)}
NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
BIAS = {-2: None, -4: None, "type": "static"}
ATTENTION = "model.layers.0.self_attn"


@pytest.fixture
def llama(golden):
    return golden["llama"]


def quantized(llama, rules, compute="bfloat16", rows=8):
    model = modelq.load(llama.source, compute=compute)
    config = {"quant_cfg": [OFF] + [{"quantizer_name": name, **more} for name, more in rules.items()], "algorithm": "max"}
    return mtq.quantize(model, config, lambda model: [model(row[None]) for row in llama.calib[:rows]])


def logits_of(model, llama):
    return np.asarray(model(llama.calib[:2]).logits)


# A quantizer's bias and rotation ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("settings, simulate", [(FP8, reference.fake_fp8), (NVFP4, reference.fake_nvfp4)], ids=["fp8", "nvfp4"])
def test_a_bias_is_taken_off_and_put_back(dtype, settings, simulate):
    random = np.random.default_rng(0)
    x = (random.standard_normal((37, 64)) + 5).astype(dtype)
    bias = x.astype(F32).mean(axis=0).astype(dtype)
    quantizer = _core.Quantizer(**settings)
    shifted = (x.astype(F32) - bias.astype(F32)).astype(dtype)
    quantizer.amax, quantizer.bias = np.abs(shifted.astype(F32)).max(), bias.astype(F32)
    inside = simulate(shifted, np.asarray(quantizer.amax))
    expected = (inside.astype(F32) + bias.astype(F32)).astype(dtype)
    assert quantizer(x).astype(F32) == pytest.approx(expected.astype(F32), abs=1e-6 if dtype is F32 else 0)
    quantizer.bias = None
    quantizer.amax = np.abs(x.astype(F32)).max()
    without = quantizer(x).astype(F32)
    assert np.abs(without - x.astype(F32)).mean() > 1.5 * np.abs(expected.astype(F32) - x.astype(F32)).mean()


def hadamard(size):
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return matrix / np.sqrt(size)


@pytest.mark.parametrize("size, columns", [(2, 6), (32, 64), (64, 64), (1024, 2048)])
def test_rotation_is_the_hadamard_matrix_block_by_block(size, columns):
    x = np.random.default_rng(1).standard_normal((5, columns)).astype(F32)
    quantizer = _core.Quantizer(enabled=False)
    quantizer.rotate = size
    expected = (x.reshape(5, -1, size).astype(np.float64) @ hadamard(size)).reshape(x.shape)
    assert quantizer(x) == pytest.approx(expected, abs=1e-5)
    assert quantizer(quantizer(x)) == pytest.approx(x, abs=1e-5)      # its own inverse
    assert quantizer(x.astype(BF16)).dtype == BF16


@pytest.mark.parametrize("name, value, words", [
    ("rotate", 3, "power of two"), ("rotate", 2048, "power of two up to 1024"), ("rotate", -2, "rotate"),
    ("bias", [1.0, np.nan], "bias: expected finite"), ("bias", [np.inf], "bias: expected finite")])
def test_bad_values_are_refused(name, value, words):
    with pytest.raises(ValueError, match=words):
        setattr(_core.Quantizer(), name, value)


def test_counts_must_fit():
    quantizer = _core.Quantizer(num_bits=(4, 3))
    quantizer.amax, quantizer.bias = F32(1), np.zeros(3, F32)
    with pytest.raises(ValueError, match="bias has 3 values for 4 columns"):
        quantizer(np.zeros((2, 4), F32))
    quantizer.bias, quantizer.rotate = None, 8
    with pytest.raises(ValueError, match="rotates blocks of 8 columns, which do not divide 12"):
        quantizer(np.zeros((2, 12), F32))


# Statistics ------------------------------------------------------------------------------------------------------------------

def reference_affine(batches, dtype, method):
    """calib/bias.py of the reference, with TensorQuantizer.collect around it, in NumPy."""
    bias, low, high, amax = None, None, None, F32(0)
    for n, x in enumerate(batches):
        values = x.astype(F32)
        if method == "affine":
            mean = values.mean(axis=0, dtype=np.float64).astype(F32).astype(dtype).astype(F32)
            bias = mean if bias is None else ((bias * F32(n) + mean) / F32(n + 1)).astype(dtype).astype(F32)
        else:
            low = values.min(axis=0) if low is None else np.minimum(low, values.min(axis=0))
            high = values.max(axis=0) if high is None else np.maximum(high, values.max(axis=0))
            bias = ((high + low).astype(dtype).astype(F32) / 2).astype(dtype).astype(F32)
        amax = max(amax, np.abs((values - bias).astype(dtype).astype(F32)).max())
    return bias, amax


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("method", ["affine", "affine_max_min"])
def test_a_bias_follows_the_reference_batch_by_batch(dtype, method):
    random = np.random.default_rng(2)
    batches = [(random.standard_normal((rows, 24)) * 2 + np.arange(24) + rows / 10).astype(dtype) for rows in (7, 64, 1, 30)]
    calibrator = _core.Calibrator(method)
    assert calibrator.compute_bias() is None and calibrator.compute_amax() is None
    for x in batches:
        calibrator.collect(x)
    bias, amax = reference_affine(batches, dtype, method)
    assert np.array_equal(calibrator.compute_bias(), bias) and calibrator.compute_amax() == amax
    assert calibrator.count == 102
    again = _core.Calibrator(method)
    again.load(calibrator.save())
    assert np.array_equal(again.compute_bias(), bias) and again.compute_amax() == amax
    halves = [_core.Calibrator(method), _core.Calibrator(method)]
    for i, x in enumerate(batches):
        halves[i // 2].collect(x)
    halves[0].merge(halves[1])
    assert np.array_equal(halves[0].compute_bias(), bias) and halves[0].compute_amax() == amax
    again.reset()
    assert again.compute_bias() is None


def test_rows_that_are_padding_count_nowhere():
    x = np.random.default_rng(3).standard_normal((10, 8)).astype(F32)
    x[6:] = 1e6
    calibrator, expected = _core.Calibrator("affine"), _core.Calibrator("affine")
    calibrator.collect(x, np.arange(10) < 6)
    calibrator.collect(x[6:], np.zeros(4))
    expected.collect(x[:6])
    assert np.array_equal(calibrator.compute_bias(), expected.compute_bias()) and calibrator.count == 6


def test_what_statistics_refuse():
    calibrator = _core.Calibrator("affine")
    calibrator.collect(np.ones((2, 4), F32))
    with pytest.raises(ValueError, match="4 channels, the data has 5"):
        calibrator.collect(np.ones((2, 5), F32))
    saved = calibrator.save()
    for damaged in (saved[:-1], saved[:60], saved + b"12345678"):
        with pytest.raises(ValueError, match="load"):
            _core.Calibrator("affine").load(damaged)
    calibrator.collect(np.full((1, 4), np.nan, F32))
    with pytest.raises(ValueError, match="NaN or an infinity"):
        calibrator.compute_bias()
    with pytest.raises(ValueError, match="axis must be None"):
        _core.Calibrator("affine", -1)
    with pytest.raises(ValueError, match="kind max finds no bias"):
        _core.Calibrator("max").compute_bias()


def test_padding_moves_no_bias(llama):
    """Two windows, one of them padded with tokens that would move every mean."""
    rules = {"*[kv]_bmm_quantizer": {"cfg": {**FP8, "bias": BIAS}}}
    plain = quantized(llama, rules, "float32", rows=1)
    model = modelq.load(llama.source, compute="float32")
    padded = np.concatenate([llama.calib[:1], np.full((1, 40), 7)], axis=1)
    mask = np.concatenate([np.ones((1, 64), int), np.zeros((1, 40), int)], axis=1)
    mtq.quantize(model, {"quant_cfg": [OFF, *({"quantizer_name": k, **v} for k, v in rules.items())]}, lambda m: m(padded, mask))
    for name, quantizer in plain.quantizers.items():
        if quantizer.enabled:
            assert model.quantizers[name].bias == pytest.approx(quantizer.bias, abs=1e-5), name
            assert model.quantizers[name].amax == pytest.approx(quantizer.amax, rel=1e-5), name


# Rotated caches --------------------------------------------------------------------------------------------------------------

ROTATED = {rule["quantizer_name"]: {k: v for k, v in rule.items() if k != "quantizer_name"} for rule in mtq.NVFP4_KV_ROTATE_CFG["quant_cfg"]}


def test_queries_and_keys_rotated_alike_change_nothing(llama):
    rules = {"*[qk]_bmm_quantizer": {"cfg": {"rotate": True}, "enable": False}, "*layers.0.mlp.up_proj.weight_quantizer": {"cfg": FP8}}
    turned, plain = quantized(llama, rules, "float32"), quantized(llama, dict(list(rules.items())[1:]), "float32")
    assert [q.rotate for name, q in turned.quantizers.items() if "_bmm_" in name] == [32, 32, 0] * 2
    assert logits_of(turned, llama) == pytest.approx(logits_of(plain, llama), abs=1e-4)
    turned.quantizers[f"{ATTENTION}.q_bmm_quantizer"].rotate = 0
    turned.connect()
    assert np.abs(logits_of(turned, llama) - logits_of(plain, llama)).max() > 0.05


def test_amax_is_of_rotated_keys(llama):
    rules = {name: {**more, "cfg": {**more["cfg"], **({} if "q_bmm" in name else FP8), "block_sizes": None}} for name, more in ROTATED.items()}
    turned, plain = quantized(llama, rules, "float32"), quantized(llama, {"*[kv]_bmm_quantizer": {"cfg": FP8}}, "float32")
    key, value = (f"{ATTENTION}.{which}_bmm_quantizer" for which in "kv")
    assert turned.quantizers[key].amax != pytest.approx(plain.quantizers[key].amax, rel=0.01)
    assert turned.quantizers[value].amax == plain.quantizers[value].amax


def test_a_rule_that_only_switches_off_ends_the_rotation(llama):
    model = quantized(llama, {**ROTATED, "*k_bmm_quantizer": {**ROTATED["*k_bmm_quantizer"]}})
    mtq.set_quantizer_by_cfg(model, [{"quantizer_name": "*[qk]_bmm_quantizer", "enable": False}])
    assert all(q.rotate == 0 for q in model.quantizers.values())


def test_a_rotated_cache_goes_all_the_way(llama, tmp_path):
    model = quantized(llama, ROTATED)
    with pytest.warns(UserWarning, match="scales are of rotated keys"):
        export_hf_checkpoint(model, tmp_path / "out")
    again = modelq.load(tmp_path / "out", compute="bfloat16")
    assert np.array_equal(logits_of(model, llama), logits_of(again, llama))
    assert json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"] == {
        "quant_algo": None, "kv_cache_quant_algo": "NVFP4", "kv_cache_rotate": True, "quantized_layers": {}}


@pytest.mark.parametrize("rotate, words", [({"block_size": 24}, "block_size 24 is no power of two"), ({"block_size": 64}, "divides the 32 columns"),
                                           ({"mode": "rotate_back"}, "rotate_back.*not available")])
def test_rotations_that_cannot_be(llama, rotate, words):
    with pytest.raises((ValueError, NotImplementedError), match=words):
        quantized(llama, {"*k_bmm_quantizer": {"cfg": {**NVFP4, "rotate": {"enable": True, **rotate}}}})


# Exports ---------------------------------------------------------------------------------------------------------------------

def said_of(folder):
    return json.loads((folder / "hf_quant_config.json").read_text())["quantization"]


@pytest.mark.parametrize("settings, algorithm", [(FP8, "FP8"), (NVFP4, "NVFP4"), ({**FP8, "bias": BIAS}, "FP8"),
                                                 ({**NVFP4, "bias": {**BIAS, "method": "max_min"}}, "NVFP4_AFFINE")])
def test_a_cache_alone(llama, tmp_path, settings, algorithm):
    """No weight is quantized: quant_algo null, the weights as they were, and the cache's scales."""
    model = quantized(llama, {"*[kv]_bmm_quantizer": {"cfg": settings}})
    export_hf_checkpoint(model, tmp_path / "out")
    assert said_of(tmp_path / "out") == {"quant_algo": None, "kv_cache_quant_algo": algorithm, "quantized_layers": {}}
    tensors, source = read_safetensors(tmp_path / "out"), read_safetensors(llama.source)
    added = {name.rpartition(".")[2] for name in set(tensors) - set(source)}
    assert added == {"k_scale", "v_scale"} | ({"k_bias", "v_bias"} if "bias" in settings else set())
    assert all(tensors[name].tobytes() == source[name].tobytes() for name in source)
    assert tensors[f"{ATTENTION}.k_proj.k_scale"] == F32(model.quantizers[f"{ATTENTION}.k_bmm_quantizer"].amax) / F32(448)
    assert np.array_equal(logits_of(model, llama), logits_of(modelq.load(tmp_path / "out", compute="bfloat16"), llama))


@pytest.mark.parametrize("settings", [FP8, NVFP4], ids=["fp8", "nvfp4"])
def test_scales_of_one_by_decree_need_no_data_and_are_not_stored(llama, tmp_path, settings):
    model = modelq.load(llama.source, compute="bfloat16")
    weights = {"quantizer_name": "*mlp*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}}
    cache = {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {**settings, "use_constant_amax": True}}
    mtq.quantize(model, {"quant_cfg": [OFF, weights, cache]})
    export_hf_checkpoint(model, tmp_path / "out")
    assert not any("_scale" in name and "weight_scale" not in name for name in read_safetensors(tmp_path / "out"))
    assert said_of(tmp_path / "out")["kv_cache_quant_algo"] in ("FP8", "NVFP4")
    assert np.array_equal(logits_of(model, llama), logits_of(modelq.load(tmp_path / "out", compute="bfloat16"), llama))


@pytest.mark.parametrize("rules, words", [
    ({"*[kv]_bmm_quantizer": {"cfg": {"num_bits": 8}}}, "layers.0.self_attn: no checkpoint can say a cache of num_bits 8.*use FP8_KV_CFG"),
    ({"*k_bmm_quantizer": {"cfg": FP8}}, "only k of its cache is quantized"),
    ({"*k_bmm_quantizer": {"cfg": FP8}, "*v_bmm_quantizer": {"cfg": NVFP4}}, "k is fp8, v nvfp4: a cache holds both in one format"),
    ({"*0.self_attn.[kv]_bmm_quantizer": {"cfg": FP8}}, "layers.1.self_attn: its cache is in high precision, model.layers.0.self_attn's is FP8"),
    ({"*[kv]_bmm_quantizer": {"cfg": {**NVFP4, "block_sizes": {**NVFP4["block_sizes"], -1: 32}}}}, "no checkpoint can say a cache"),
    ({"*k_bmm_quantizer": {"cfg": {**FP8, "bias": BIAS}}, "*v_bmm_quantizer": {"cfg": FP8}}, "k is fp8 with a bias, v fp8"),
])
def test_caches_that_no_checkpoint_can_say(llama, tmp_path, rules, words):
    model = quantized(llama, rules)
    with pytest.raises(ValueError, match=words):
        export_hf_checkpoint(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bias, words", [({-1: None, "type": "static"}, "bias"), ({**BIAS, "type": "dynamic"}, "bias")])
def test_biases_that_cannot_be_computed(llama, bias, words):
    with pytest.raises(NotImplementedError, match=rf"k_bmm_quantizer.*{words}.*not available"):
        quantized(llama, {"*k_bmm_quantizer": {"cfg": {**FP8, "bias": bias}}})


def test_blocks_must_divide_the_head(llama):
    with pytest.raises(ValueError, match="k_bmm_quantizer: 32 columns with block 24: use block_size 16 or 32"):
        quantized(llama, {"*k_bmm_quantizer": {"cfg": {**NVFP4, "block_sizes": {**NVFP4["block_sizes"], -1: 24}}}})


def test_a_cache_of_zeros_gets_a_scale_of_one(llama, tmp_path):
    model = quantized(llama, {"*[kv]_bmm_quantizer": {"cfg": FP8}})
    model.quantizers[f"{ATTENTION}.k_bmm_quantizer"].amax = F32(0)
    export_hf_checkpoint(model, tmp_path / "out")
    assert read_safetensors(tmp_path / "out")[f"{ATTENTION}.k_proj.k_scale"] == 1


def test_a_damaged_scale_is_named(llama, tmp_path):
    from safetensors.numpy import save_file

    model = quantized(llama, {"*[kv]_bmm_quantizer": {"cfg": FP8}})
    export_hf_checkpoint(model, tmp_path / "out")
    tensors = read_safetensors(tmp_path / "out") | {f"{ATTENTION}.v_proj.v_scale": np.asarray(-1, F32)}
    save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, tmp_path / "out" / "model.safetensors")
    with pytest.raises(ValueError, match="v_proj.v_scale' is .?-1.0.?, not a positive number"):
        modelq.load(tmp_path / "out")


def test_a_cache_joins_any_weight_config(llama):
    """With the helper that scripts use, after the rules that switch off."""
    for name in ("MXFP8_DEFAULT_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "W4A16_NVFP4_CFG"):
        config = mtq.update_quant_cfg_with_kv_cache_quant(copy.deepcopy(getattr(mtq, name)), mtq.FP8_KV_CFG["quant_cfg"])
        model = mtq.quantize(modelq.load(llama.source, compute="bfloat16"), config, lambda m: m(llama.calib[:1]))
        assert config["algorithm"] == "max" and model.quantizers[f"{ATTENTION}.k_bmm_quantizer"].amax > 0


def test_the_preset_without_a_place_for_queries_says_so(llama, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = mtq.quantize(modelq.load(llama.source), mtq.NVFP4_FP8_MHA_CONFIG, lambda m: m(llama.calib[:1]))
    with pytest.warns(UserWarning, match="q_bmm_quantizer and the like: a checkpoint has no place"):
        export_hf_checkpoint(model, tmp_path / "out")
