"""quantize() end to end on the golden models: amax and simulated logits against Model Optimizer's, what is refused, what is kept."""
import copy
import json
import os
import re
import signal
import threading
import warnings

import numpy as np
import pytest

import golden_data
import modelq
import modelq.quantization as mtq
from modelq import rules, streaming
from modelq.calibration import walk
from modelq.export import export_hf_checkpoint
from modelq.supported import fitting_blocks

FLOAT32_AMAX = 1e-3      # relative; the forwards agree to 2e-4 in logits
BFLOAT16_AMAX = 1.5e-2   # two bfloat16 forwards differ by up to 1% among themselves
FAKE_LOGITS = 1e-3       # absolute

CONFIGS = ["FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"]
OFF = {"quantizer_name": "*", "enable": False}


def loop_over(rows):
    """Row by row, as make_golden.py calibrates."""
    def forward_loop(model):
        for row in rows:
            model(row[None])
    return forward_loop


def quantized(model, config, dtype="float32"):
    loaded = modelq.load(model.source, compute=dtype)
    return mtq.quantize(loaded, config, loop_over(model.calib))


@pytest.fixture
def llama(golden):
    return golden["llama"]


@pytest.fixture
def model(llama):
    return modelq.load(llama.source, compute="float32")


def state(model):
    return model.quantized, dict(model.settings), {name: (q.enabled, q.amax) for name, q in model.quantizers.items()}


# Against the reference -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", golden_data.cases(configs=CONFIGS, names=["llama", "qwen3"], needs=["amax.safetensors"]))
def test_amax_equals_the_reference(case):
    model = quantized(case.model, getattr(mtq, case.config), case.dtype)
    tolerance = FLOAT32_AMAX if case.dtype == "float32" else BFLOAT16_AMAX
    expected = {name.removesuffix(".amax"): value for name, value in case.amax.items() if name.endswith("quantizer.amax")}
    found = {name: quantizer.amax for name, quantizer in model.quantizers.items() if quantizer.enabled}
    assert set(found) == set(expected)
    for name, value in expected.items():
        if name.endswith("weight_quantizer"):
            assert np.array_equal(np.asarray(found[name]), value), name
        else:
            assert np.asarray(found[name]) == pytest.approx(value, rel=tolerance), name


@pytest.mark.parametrize("case", golden_data.cases("float32", ["FP8_DEFAULT_CFG"], names=["llama", "qwen3"], needs=["fake_logits.npy"]))
def test_simulated_logits_equal_the_reference(case):
    model = quantized(case.model, mtq.FP8_DEFAULT_CFG)
    logits = model(case.model.calib[:1]).logits
    assert np.abs(logits - case.fake_logits).max() <= FAKE_LOGITS
    assert np.abs(logits - case.model.logits).max() > 10 * FAKE_LOGITS     # and quantization is really there


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("parts", [("weight", "input"), ("weight",), ("input",)])
def test_both_sides_are_simulated(llama, config, parts):
    entries = [OFF] + [rule for rule in getattr(mtq, config)["quant_cfg"][1:3] if any(part in rule["quantizer_name"] for part in parts)]
    if parts == ("input",):
        entries.append({"quantizer_name": "*layers.0.mlp.up_proj.weight_quantizer", "cfg": entries[1]["cfg"]})
    model = quantized(llama, {"quant_cfg": entries, "algorithm": "max"})
    both = quantized(llama, getattr(mtq, config)).loss([llama.calib])
    plain = modelq.load(llama.source, compute="float32").loss([llama.calib])
    assert model.loss([llama.calib]) not in (pytest.approx(both, rel=1e-6), pytest.approx(plain, rel=1e-6))


@pytest.mark.parametrize("batch_rows", [1, 3, 8])
def test_batching_changes_nothing(llama, model, batch_rows):
    expected = quantized(llama, mtq.FP8_DEFAULT_CFG)
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda m: [m(llama.calib[i:i + batch_rows]) for i in range(0, 8, batch_rows)])
    for name, quantizer in expected.quantizers.items():
        if quantizer.enabled:
            assert np.asarray(model.quantizers[name].amax) == pytest.approx(np.asarray(quantizer.amax), rel=1e-6)


def test_padding_counts_in_no_statistic(llama, model):
    padded = np.concatenate([llama.calib, np.full((8, 16), 255)], axis=1)
    mask = np.concatenate([np.ones((8, 64), int), np.zeros((8, 16), int)], axis=1)
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda m: m(input_ids=padded, attention_mask=mask))
    expected = quantized(llama, mtq.FP8_DEFAULT_CFG)
    for name, quantizer in expected.quantizers.items():
        if quantizer.enabled:
            assert np.asarray(model.quantizers[name].amax) == pytest.approx(np.asarray(quantizer.amax), rel=1e-5)


def test_both_spellings_give_the_same(llama, model):
    entries = mtq.FP8_DEFAULT_CFG["quant_cfg"]
    flat = {"default": {"enable": False}}
    for rule in entries[1:]:
        value = rule.get("cfg", {"enable": False})
        if "parent_class" in rule:
            flat[rule["parent_class"]] = {rule["quantizer_name"]: value}
        else:
            flat[rule["quantizer_name"]] = value
    with pytest.warns(DeprecationWarning):
        mtq.quantize(model, {"quant_cfg": flat, "algorithm": "max"}, loop_over(llama.calib))
    expected = quantized(llama, mtq.FP8_DEFAULT_CFG)
    assert np.array_equal(model(llama.calib[:1]).logits, expected(llama.calib[:1]).logits)


# What is computed ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def work(monkeypatch):
    """Layers run, and tensors read from the checkpoint."""
    seen, run_layer, load = {"layers": [], "read": []}, streaming.run_layer, modelq.load

    def run(model, r, layer, *how, **more):
        seen["layers"].append(layer)
        return run_layer(model, r, layer, *how, **more)

    def watched(path, **more):
        model = load(path, **more)
        read = model.checkpoint.read
        model.checkpoint.read = lambda name: (seen["read"].append(name), read(name))[1]
        return model
    monkeypatch.setattr(streaming, "run_layer", run)
    monkeypatch.setattr(modelq, "load", watched, raising=False)
    return seen


def test_calibration_reads_no_head_and_runs_each_layer_once(llama, work):
    quantized(llama, mtq.NVFP4_DEFAULT_CFG)
    assert work["layers"] == [0, 1]
    assert "lm_head.weight" not in work["read"] and "model.norm.weight" not in work["read"]


def test_calibration_stops_after_the_last_layer_it_needs(llama, work):
    config = {"quant_cfg": [OFF, {"quantizer_name": "*layers.0*weight_quantizer", "cfg": {"num_bits": (4, 3)}},
                            {"quantizer_name": "*layers.0*input_quantizer", "cfg": {"num_bits": (4, 3)}}], "algorithm": "max"}
    quantized(llama, config)
    assert work["layers"] == [0]


@pytest.mark.parametrize("config", ["W4A16_NVFP4_CFG", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"])
def test_weight_only_needs_no_data_and_no_forward(llama, work, config):
    model = mtq.quantize(modelq.load(llama.source, compute="float32"), getattr(mtq, config))
    assert work["layers"] == []
    assert all(q.amax is not None for q in model.quantizers.values() if q.enabled)
    assert np.isfinite(model(llama.calib[:1]).logits).all()


def test_lm_head_when_asked(llama, model):
    config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    config["quant_cfg"] += [{"quantizer_name": f"lm_head.{kind}_quantizer", "cfg": {"num_bits": (4, 3)}} for kind in ("weight", "input")]
    mtq.quantize(model, config, loop_over(llama.calib))
    assert model.quantizers["lm_head.input_quantizer"].amax > 0 and model.quantizers["lm_head.weight_quantizer"].amax > 0
    without = quantized(llama, mtq.FP8_DEFAULT_CFG)
    assert np.abs(model(llama.calib[:1]).logits - without(llama.calib[:1]).logits).max() > 1e-3


@pytest.mark.parametrize("kv", ["FP8_KV_CFG", "NVFP4_KV_CFG"])
def test_kv_cache_quantizers(golden, kv, capsys):
    (case,) = [c.values[0] for c in golden_data.cases("float32", [f"{'FP8' if kv[0] == 'F' else 'NVFP4'}_DEFAULT_CFG__{kv}"], ["llama"])] or [None]
    if case is None:
        pytest.skip("the golden folder has no such case")
    config = mtq.update_quant_cfg_with_kv_cache_quant(getattr(mtq, case.configs[0]), getattr(mtq, kv)["quant_cfg"])
    model = quantized(case.model, config)
    for name, value in case.amax.items():
        if "_bmm_quantizer.amax" in name:
            assert np.asarray(model.quantizers[name.removesuffix(".amax")].amax) == pytest.approx(value, rel=FLOAT32_AMAX)


# Exports opened again ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", golden_data.cases("bfloat16", CONFIGS, ["llama", "qwen3"], ["model.safetensors"]))
def test_a_golden_export_opens_with_its_input_quantizers(case):
    from modelq.summary import summary_lines
    model = modelq.load(case.folder, compute="bfloat16")
    for name, value in case.amax.items():
        if name.endswith("input_quantizer.amax"):
            quantizer = model.quantizers[name.removesuffix(".amax")]
            assert quantizer.enabled and float(quantizer.amax) == pytest.approx(float(value), rel=BFLOAT16_AMAX)
    own = quantized(case.model, getattr(mtq, case.config), "bfloat16")
    ids = case.model.calib[:4]
    assert model.loss([ids]) == pytest.approx(own.loss([ids]), rel=5e-3)
    assert np.array_equal(modelq.load(case.folder / "model.safetensors", compute="bfloat16")(ids).logits, model(ids).logits)
    assert "14 of 1" in summary_lines(model)[-2]


# Before, during, after -----------------------------------------------------------------------------------------------------

def test_quantizing_twice_equals_once(llama):
    once = quantized(llama, mtq.NVFP4_DEFAULT_CFG)
    twice = mtq.quantize(quantized(llama, mtq.FP8_DEFAULT_CFG), mtq.NVFP4_DEFAULT_CFG, loop_over(llama.calib))
    assert np.array_equal(once(llama.calib[:1]).logits, twice(llama.calib[:1]).logits)
    for name, quantizer in once.quantizers.items():
        assert np.array_equal(np.asarray(quantizer.amax, object), np.asarray(twice.quantizers[name].amax, object))


def test_logits_asked_for_before_stay_unquantized(llama, model):
    early = model(llama.calib[:1])
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, loop_over(llama.calib))
    late = model(llama.calib[:1])
    assert np.abs(early.logits - llama.logits).max() < 2e-4 < np.abs(late.logits - llama.logits).max()


def test_logits_touched_inside_the_loop_are_unquantized(llama):
    model, seen = quantized(llama, mtq.NVFP4_DEFAULT_CFG), []

    def forward_loop(m):
        for row in llama.calib:
            output = m(row[None])
            seen.append(output.logits if not seen else None)
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, forward_loop)
    assert np.abs(seen[0] - llama.logits).max() < 2e-4
    assert np.array_equal(model(llama.calib[:1]).logits, quantized(llama, mtq.FP8_DEFAULT_CFG)(llama.calib[:1]).logits)


class Stop(BaseException):
    """As KeyboardInterrupt: no Exception."""


@pytest.mark.parametrize("first", [None, "FP8_DEFAULT_CFG"])
@pytest.mark.parametrize("where", ["loop", "layer", "amax"])
def test_a_model_is_left_as_it_was(llama, monkeypatch, first, where):
    model = modelq.load(llama.source, compute="float32")
    if first:
        mtq.quantize(model, getattr(mtq, first), loop_over(llama.calib))
    before, logits = state(model), model(llama.calib[:1]).logits

    def stop(*args, **more):
        raise Stop
    with monkeypatch.context() as patch:
        if where == "layer":
            patch.setattr(streaming, "run_layer", stop)
        if where == "amax":
            patch.setattr(walk, "take_amax", stop)
        with pytest.raises(Stop):
            mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, stop if where == "loop" else loop_over(llama.calib))
    after = state(model)
    assert after[0] == before[0] and after[1] == before[1] and after[2].keys() == before[2].keys()
    assert np.array_equal(model(llama.calib[:1]).logits, logits)
    mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, loop_over(llama.calib))      # and nothing hinders a second try
    assert np.array_equal(model(llama.calib[:1]).logits, quantized(llama, mtq.NVFP4_DEFAULT_CFG)(llama.calib[:1]).logits)


def test_ctrl_c_in_the_middle_of_a_layer(llama):
    model = quantized(llama, mtq.FP8_DEFAULT_CFG)
    before, logits = state(model), model(llama.calib[:1]).logits
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))

    def forward_loop(m):
        for _ in range(1500):
            m(llama.calib)
        timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, forward_loop)
    finally:
        timer.cancel()
    assert state(model)[:2] == before[:2] and np.array_equal(model(llama.calib[:1]).logits, logits)


def test_calibrate_anew(llama):
    model = quantized(llama, mtq.FP8_DEFAULT_CFG)
    before = {name: float(q.amax) for name, q in model.quantizers.items() if q.enabled}
    mtq.calibrate(model, "max", loop_over(llama.calib[:1]))
    first = {name: float(q.amax) for name, q in model.quantizers.items() if q.enabled}
    assert all(first[name] <= before[name] for name in before) and first != before
    mtq.calibrate(model, "max", loop_over(llama.calib))
    assert {name: float(q.amax) for name, q in model.quantizers.items() if q.enabled} == before
    with pytest.raises(ValueError, match="not quantized yet"):
        mtq.calibrate(modelq.load(llama.source), "max")


def test_switching_quantizers(llama):
    model = quantized(llama, mtq.FP8_DEFAULT_CFG)
    full = model(llama.calib[:1]).logits
    mtq.disable_quantizer(model, "*")
    assert np.abs(model(llama.calib[:1]).logits - llama.logits).max() < 2e-4
    mtq.enable_quantizer(model, lambda name: "layers" in name and name.endswith(("weight_quantizer", "input_quantizer")))
    assert np.array_equal(model(llama.calib[:1]).logits, full)
    with mtq.set_quantizer_by_cfg_context(model, [{"quantizer_name": "*mlp*", "enable": False}]):
        assert not model.quantizers["model.layers.0.mlp.up_proj.weight_quantizer"].enabled
        assert not np.array_equal(model(llama.calib[:1]).logits, full)
    assert np.array_equal(model(llama.calib[:1]).logits, full)


def test_setting_attributes_keeps_an_amax_that_still_fits(llama):
    model = quantized(llama, mtq.FP8_DEFAULT_CFG)
    name = "model.layers.0.mlp.up_proj.weight_quantizer"
    amax = float(model.quantizers[name].amax)
    mtq.set_quantizer_by_cfg(model, [{"quantizer_name": "*mlp.up_proj.weight_quantizer", "cfg": mtq.NVFP4_DEFAULT_CFG["quant_cfg"][1]["cfg"]}])
    assert float(model.quantizers[name].amax) == amax and model.settings[name].attributes.num_bits == (2, 1)
    mtq.set_quantizer_attributes_full(model, name, {"num_bits": (4, 3), "axis": 0})
    assert model.quantizers[name].amax is None
    mtq.set_quantizer_attributes_partial(model, name, {"axis": None})
    assert model.settings[name].attributes.num_bits == (4, 3) and model.settings[name].attributes.axis is None


# What is refused -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config, words", [
    ({"quant_cfg": [OFF]}, "quantizes nothing"),
    ({"quant_cfg": [OFF, {"quantizer_name": "*weihgt_quantizer", "cfg": {"num_bits": (4, 3)}}]}, r"nothing.*fit nothing: '\*weihgt_quantizer'"),
    ({"quant_cfg": [OFF, {"quantizer_name": "*q_porj.weight_quantizer", "cfg": {"num_bits": (4, 3)}},
                    {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": (4, 3)}}]}, "no weight.*q_porj"),
    ({"quant_cfg": [{"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": (4, 3)}}, OFF]}, "later rules win"),
])
def test_a_config_that_quantizes_nothing(llama, model, config, words):
    with pytest.raises(ValueError, match=words):
        mtq.quantize(model, config, loop_over(llama.calib))
    assert not model.quantized and model.quantizers == {}


def test_a_pattern_that_fits_nothing_warns(llama, model):
    config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    config["quant_cfg"].append({"quantizer_name": "*q_porj*", "enable": False})
    with pytest.warns(UserWarning, match=r"no quantizer fits '\*q_porj\*'$"):
        mtq.quantize(model, config, loop_over(llama.calib))


def test_parts_that_are_not_simulated_warn(llama, model):
    with pytest.warns(UserWarning, match=r"no quantizer fits '\*p_bmm_quantizer'$"):
        mtq.quantize(model, mtq.NVFP4_FP8_MHA_CONFIG, loop_over(llama.calib))


@pytest.mark.parametrize("name", ["FP8_DEFAULT_CFG", "NVFP4_MLP_ONLY_CFG", "MAMBA_MOE_NVFP4_AGGRESSIVE_CFG"])
def test_presets_do_not_warn(llama, model, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mtq.quantize(model, getattr(mtq, name), loop_over(llama.calib))


@pytest.mark.parametrize("cfg", [{"num_bits": (2, 1), "block_sizes": {-1: 96, "type": "dynamic", "scale_bits": (4, 3)}},
                                 {"num_bits": (4, 3), "block_sizes": {-1: 96}}])
def test_block_sizes_that_do_not_divide(llama, model, cfg):
    config = {"quant_cfg": [OFF, {"quantizer_name": "*layers*weight_quantizer", "cfg": cfg}]}
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight_quantizer: 128 columns with block 96: use "
                                         r"block_size 64 or 128.*'model\.layers\.0\.self_attn\.q_proj\.\*'"):
        mtq.quantize(model, config)
    assert not model.quantized


def test_integer_blocks_that_do_not_divide_can_be_tried(llama, model, tmp_path):
    """The last block of a row is what is left of it: each as if it were alone."""
    config = {"quant_cfg": [OFF, {"quantizer_name": "*layers*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: 96}}}]}
    words = r"model\.layers\.0\.self_attn\.q_proj\.weight_quantizer: 128 columns with block 96: use block_size 64 or 128"
    with pytest.warns(UserWarning, match=words + ".*no checkpoint can hold it"):
        mtq.quantize(model, config)
    weight = np.asarray(model.checkpoint.read("model.layers.0.self_attn.q_proj.weight"), np.float32)
    alone = modelq._core.Quantizer(num_bits=4, block_sizes={-1: 32})
    alone.amax = modelq._core.amax(np.ascontiguousarray(weight[:, 96:]), block=(1, 32))
    seen = streaming.read(model, ["model.layers.0.self_attn.q_proj.weight"], model.modules_of(0))["model.layers.0.self_attn.q_proj.weight"]
    assert np.array_equal(seen[:, 96:], alone(np.ascontiguousarray(weight[:, 96:])))
    with pytest.raises(ValueError, match=words):
        export_hf_checkpoint(model, tmp_path / "out")


@pytest.mark.parametrize("width, size, expected", [(576, 128, [64, 192]), (128, 96, [64, 128]), (100, 16, [10, 20]), (48, 32, [16, 48]),
                                                   (7, 16, [7]), (320, 128, [64, 320])])
def test_which_block_sizes_would_work(width, size, expected):
    options = fitting_blocks(width, size)
    assert options == expected and all(width % option == 0 for option in options)


@pytest.mark.parametrize("loop, words", [
    (None, "no calibration data: this config quantizes activations"), (lambda m: None, "ran without calling the model"),
    (lambda m: m([[1, 2]], attention_mask=[[0, 0]]), "attention_mask is 0"), (lambda m: m([[1, 9999]]), "token id 9999"),
])
def test_no_calibration_data(model, loop, words):
    with pytest.raises(ValueError, match=words):
        mtq.quantize(model, mtq.FP8_DEFAULT_CFG, loop)
    assert not model.quantized


@pytest.mark.parametrize("rule, words", [
    ({"quantizer_name": "*input_quantizer", "cfg": [{"num_bits": 8}, {"num_bits": (4, 3)}]}, "list of attributes"),
    ({"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": (4, 3), "rotate": True}}, "rotate"),
    ({"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": (4, 3), "calibrator": "histogram"}}, "calibrator='histogram' here"),
])
def test_what_is_not_there_says_so_before_any_work(model, rule, words):
    with pytest.raises(NotImplementedError, match=words):
        mtq.quantize(model, {"quant_cfg": [OFF, rule]})


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="a model from modelq.load"):
        mtq.quantize(object(), mtq.FP8_DEFAULT_CFG)
    with pytest.raises(RuntimeError, match="cannot run inside a forward_loop"):
        nested = modelq.load(golden_data.models()[0].values[0].source)
        mtq.quantize(nested, mtq.FP8_DEFAULT_CFG, lambda m: mtq.quantize(m, mtq.FP8_DEFAULT_CFG, lambda n: n([[1]])))


def damaged(source, tmp_path, tensor, value):
    """A copy of a checkpoint with one value of one tensor replaced."""
    import ml_dtypes
    from safetensors.numpy import save_file
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    tensors = {name: np.array(array) for name, array in golden_data.read_safetensors(source).items()}
    tensors[tensor].reshape(-1)[5] = np.array(value).astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("config", ["FP8_DEFAULT_CFG", "W4A16_NVFP4_CFG"])
def test_a_damaged_weight_is_named(llama, tmp_path, value, config):
    name = "model.layers.1.mlp.up_proj.weight"
    model = modelq.load(damaged(llama.source, tmp_path, name, value), compute="float32")
    with pytest.raises(ValueError, match=re.escape(name) + r".*(NaN|inf)"):
        mtq.quantize(model, getattr(mtq, config), loop_over(llama.calib))
    assert not model.quantized


def test_overflowing_activations_are_named(llama, tmp_path):
    model = modelq.load(damaged(llama.source, tmp_path, "model.layers.1.input_layernorm.weight", np.inf), compute="float32")
    with pytest.raises(ValueError, match=r"layers\.1.*(NaN|inf)"):
        mtq.quantize(model, mtq.FP8_DEFAULT_CFG, loop_over(llama.calib))


def test_a_zero_weight_warns(llama, tmp_path):
    from safetensors.numpy import save_file
    folder = tmp_path / "zero"
    folder.mkdir()
    (folder / "config.json").write_text((llama.source / "config.json").read_text())
    tensors = {name: np.array(array) for name, array in golden_data.read_safetensors(llama.source).items()}
    tensors["model.layers.1.mlp.down_proj.weight"][:] = 0
    save_file(tensors, folder / "model.safetensors")
    model = modelq.load(folder, compute="float32")
    with pytest.warns(UserWarning, match=r"layers\.1\.mlp\.down_proj\.weight_quantizer: amax is zero"):
        mtq.quantize(model, mtq.FP8_DEFAULT_CFG, loop_over(llama.calib))
    assert np.isfinite(model(llama.calib[:1]).logits).all()


# Summary -------------------------------------------------------------------------------------------------------------------

def test_summary(llama, capsys, tmp_path):
    model = quantized(llama, mtq.NVFP4_DEFAULT_CFG)
    mtq.print_quant_summary(model)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{len(model.slots)} TensorQuantizers found in model"
    amax = float(model.quantizers["model.layers.0.mlp.up_proj.weight_quantizer"].amax)
    expected = ("TensorQuantizer((2, 1) bit fake block_sizes={-1: 16, 'type': 'dynamic', 'scale_bits': (4, 3)}, "
                f"amax={amax:.2e} calibrator=MaxCalibrator quant)")
    assert f"{'model.layers.0.mlp.up_proj.weight_quantizer':80} {expected}" in lines
    assert f"{'lm_head.weight_quantizer':80} TensorQuantizer(disabled)" in lines
    text = "\n".join(lines)
    assert re.search(r"^  lm_head +switched off by rule '\*lm_head\*'$", text, re.M)
    assert re.search(r"^  model\.embed_tokens +switched off by rule '\*' with parent_class 'nn\.Embedding'$", text, re.M)
    assert re.search(r"^  model\.layers\.\*\.input_layernorm +norm: not a kind that is quantized$", text, re.M)
    assert "14 of 16 linear and embedding modules quantized" in text
    mtq.print_quant_summary(model, tmp_path / "new")
    assert (tmp_path / "new" / ".quant_summary.txt").read_text().splitlines() == lines


def test_summary_of_part_of_a_model(llama):
    from modelq.summary import summary_lines
    config = {"quant_cfg": [OFF, {"quantizer_name": "*layers.1*weight_quantizer", "cfg": {"num_bits": (4, 3), "axis": 0}}]}
    text = "\n".join(summary_lines(quantized(llama, config)))
    assert re.search(r"model\.layers\.\*\.mlp\.up_proj +no rule switched it on \(layers 0\)", text)
    assert re.search(r"layers\.1\.mlp\.up_proj\.weight_quantizer +TensorQuantizer\(\(4, 3\) bit fake axis=0 amax=\[[\d.e+-]+, [\d.e+-]+\]\(256\)", text)
    assert "7 of 16 linear and embedding modules" in text


def test_config_from_a_file(llama, model, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(mtq.FP8_DEFAULT_CFG))
    mtq.quantize(model, mtq.load_config(tmp_path / "c.json"), loop_over(llama.calib))
    assert np.array_equal(model(llama.calib[:1]).logits, quantized(llama, mtq.FP8_DEFAULT_CFG)(llama.calib[:1]).logits)


def test_settings_say_which_rule(model, llama):
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, loop_over(llama.calib))
    assert isinstance(model.settings["lm_head.weight_quantizer"], rules.Setting)
    assert model.settings["lm_head.weight_quantizer"].rule.quantizer_name == "*lm_head*"
