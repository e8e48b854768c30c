"""Algorithms that search, on transformers models: torch's forward, the native methods, and so Model Optimizer's choices."""
import json
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import modelq.quantization as mtq  # noqa: E402
from golden_data import OTHER_ALGORITHMS, SEARCH_ROOT, SEARCHING, cases  # noqa: E402
from modelq.export import export_hf_checkpoint  # noqa: E402
from modelq.torch_models import calibration  # noqa: E402
from test_torch_models import UP, load, logits, quantizers  # noqa: E402

TIES = {"FOUR_OVER_SIX": 0.02, "LOCAL_HESSIAN": 0.05, "FP8_SWEEP": 0.01, "AWQ_CLIP": 0.01}
FIELDS = {"amax": "amax", "pre_quant_scale": "pre_quant_scale", "global_amax": "global_amax"}


def config_of(name):
    preset, algorithm = OTHER_ALGORITHMS.get(name, (name, None))
    return getattr(mtq, preset) if algorithm is None else {**getattr(mtq, preset), "algorithm": algorithm}


def available(dtype):
    found = cases(dtype, SEARCHING, ["llama", "qwen3", "qwen3moe"], needs=["amax.safetensors"]) + cases(
        dtype, None, ["llama", "qwen3", "qwen3moe"], needs=["amax.safetensors"], root=SEARCH_ROOT)
    return found


def quantize(model, golden_model, config, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return mtq.quantize(model, config, lambda model: [model(torch.from_numpy(row[None])) for row in golden_model.calib], **options)


@pytest.mark.parametrize("case", available("float32") + [case for case in available("bfloat16") if "FULL" not in case.id])
def test_what_was_found(case):
    """In float32 to the last digits. In bfloat16 too where torch rounds sums as the reference's did; another processor's may not."""
    model, compared = quantize(load(case.model, case.dtype), case.model, config_of(case.config), compat="modelopt"), 0
    found, tolerance = quantizers(model), 3e-6 if case.dtype == "float32" else 0.03
    ties = next((share for word, share in TIES.items() if word in case.config), 0)
    for name, expected in case.amax.items():
        quantizer, _, field = name.rpartition(".")
        quantizer = quantizer if quantizer in found else f"{quantizer}.0"
        if quantizer in found and field in FIELDS:
            ours = np.ravel(getattr(found[quantizer].core, FIELDS[field]))
            off = np.abs(ours / np.maximum(np.ravel(expected), 1e-30) - 1) > tolerance
            assert off.mean() <= (max(ties, 0.05 if case.dtype == "bfloat16" else 0) if off.size > 1 else 0.5 * bool(ties)), name
            compared += 1
    assert compared >= 14


@pytest.mark.parametrize("preset", ["INT4_AWQ_CFG", "INT8_SMOOTHQUANT_CFG", "W4A8_AWQ_BETA_CFG", "NVFP4_AWQ_LITE_CFG", "INT4_GPTQ_CFG", "NVFP4_GPTQ_CFG"])
def test_exports(golden, preset, tmp_path):
    """What is written of the model is what the reference writes for the same scales: names, words, and numbers that compute the same."""
    config = getattr(mtq, preset)
    if preset.endswith("GPTQ_CFG"):
        config = {**config, "algorithm": {**config["algorithm"], "layerwise": {"enable": False}}}
    model = quantize(load(golden["llama"]), golden["llama"], config)
    export_hf_checkpoint(model, export_dir=tmp_path)
    said = json.loads((tmp_path / "hf_quant_config.json").read_text())["quantization"]
    assert said["quant_algo"] in ("W4A16_AWQ", "W8A8_SQ_PER_CHANNEL", "W4A8_AWQ", "NVFP4_AWQ", "INT4", "NVFP4", "W4A16")
    import modelq
    opened, plain = modelq.load(tmp_path, compute="bfloat16"), logits(load(golden["llama"]), golden["llama"])
    off = np.linalg.norm(opened(golden["llama"].calib[:1]).logits - plain)
    assert off < 1.5 * np.linalg.norm(logits(model, golden["llama"]) - plain)


def test_rounding_helps_and_changes_the_weights(golden):
    config = {**mtq.INT4_GPTQ_CFG, "algorithm": {**mtq.INT4_GPTQ_CFG["algorithm"], "layerwise": {"enable": False}}}
    plain, original = logits(load(golden["llama"]), golden["llama"]), load(golden["llama"]).get_submodule(UP).weight
    rounded = quantize(load(golden["llama"]), golden["llama"], config)
    nearest = quantize(load(golden["llama"]), golden["llama"], mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    errors = [np.linalg.norm(logits(model, golden["llama"]) - plain) for model in (rounded, nearest)]
    assert errors[0] < errors[1]
    assert not torch.equal(rounded.get_submodule(UP).weight, original) and torch.equal(nearest.get_submodule(UP).weight, original)


def test_groups_of_layers_find_the_same(golden, monkeypatch):
    """However much has room at once."""
    runs, results = [], []
    for room in (1 << 30, 1):
        monkeypatch.setattr(calibration, "ROOM", room)
        count = [0]

        def loop(model, count=count):
            count[0] += 1
            model(torch.from_numpy(golden["llama"].calib))
        model = mtq.quantize(load(golden["llama"]), mtq.INT4_AWQ_CFG, loop)
        runs.append(count[0])
        results.append({name: quantizer.amax for name, quantizer in quantizers(model).items() if quantizer.is_enabled})
    assert runs == [1, 2]
    for name, amax in results[0].items():
        np.testing.assert_array_equal(amax, results[1][name])


def test_a_failing_loop_leaves_weights_and_quantizers(golden):
    model = load(golden["llama"])
    plain = logits(model, golden["llama"])

    def fails(model):
        model(torch.from_numpy(golden["llama"].calib[:1]))
        raise RuntimeError("the disk is on fire")
    for preset in ("INT4_AWQ_CFG", "INT8_SMOOTHQUANT_CFG", "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG"):
        with pytest.raises(RuntimeError, match="the disk is on fire"):
            mtq.quantize(model, getattr(mtq, preset), fails)
        np.testing.assert_array_equal(logits(model, golden["llama"]), plain)
        assert not quantizers(model)
    with pytest.raises(ValueError, match="awq_lite looks at activations"):
        mtq.quantize(model, mtq.INT4_AWQ_CFG)


def test_any_module_can_be_searched():
    """Not only families that modelq knows. What a search finds helps, and a folded weight computes the same."""
    torch.manual_seed(1)
    x = torch.randn(64, 128)
    x[:, :4] *= 50
    errors = []
    for preset in ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "INT4_AWQ_CFG"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8))
        plain = model(x)
        mtq.quantize(model, getattr(mtq, preset), lambda model: model(x))
        errors.append((model(x) - plain).norm().item())
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("preset", ["INT4_AWQ_CFG", "INT4_GPTQ_CFG", "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG", "NVFP4_SVDQUANT_DEFAULT_CFG"])
def test_a_linear_that_no_data_reaches(preset):
    """It keeps its weight's maxima, and is said."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"0": torch.nn.Linear(128, 128), "1": torch.nn.Linear(128, 128)})
    config = getattr(mtq, preset)
    if "GPTQ" in preset:
        config = {**config, "algorithm": {**config["algorithm"], "layerwise": {"enable": False}}}
    with pytest.warns(UserWarning, match="no data reached 1.input_quantizer"):
        mtq.quantize(model, config, lambda model: model["0"](torch.randn(300, 128)))
    unused = model["1"].weight_quantizer
    assert unused.is_enabled and unused.amax is not None and unused.pre_quant_scale is None
    assert not torch.equal(model["1"](torch.ones(1, 128)), torch.nn.functional.linear(torch.ones(1, 128), model["1"].weight, model["1"].bias))
    with pytest.raises(ValueError, match="no quantizer saw an array"):
        mtq.quantize(model, config, lambda model: None)


@pytest.mark.parametrize("preset", ["INT4_GPTQ_CFG", "NVFP4_GPTQ_CFG", "INT4_AWQ_CFG", "FP8_DEFAULT_CFG"])
def test_layer_by_layer(golden, preset, monkeypatch):
    """The user's loop is run once, or twice where lm_head is looked at; a model whose every layer is quantized loses less to GPTQ so."""
    config = getattr(mtq, preset)
    step = config["algorithm"] if isinstance(config["algorithm"], dict) else {"method": config["algorithm"]}
    model, count = load(golden["llama"]), [0]

    def loop(model):
        count[0] += 1
        for row in golden["llama"].calib:
            model(torch.from_numpy(row[None]))
    plain = logits(model, golden["llama"])
    mtq.quantize(model, {**config, "algorithm": {**step, "layerwise": {"enable": True}}}, loop)
    assert count[0] == 1 and not torch.equal(torch.from_numpy(plain), torch.from_numpy(logits(model, golden["llama"])))
    assert all(quantizer.amax is not None for quantizer in quantizers(model).values() if quantizer.is_enabled and quantizer.needs_calibration)


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3moe"])
def test_rotated_weights(golden, name, tmp_path):
    """The model computes what it did (a tied lm_head has a weight of its own then), and exports what the native path does; a failure turns
    everything back."""
    import modelq
    from golden_data import read_safetensors

    golden_model, config = golden[name], {**mtq.NVFP4_DEFAULT_CFG, "algorithm": [{"method": "rotate", "seed": 3}, "max"]}
    off = {"quant_cfg": [{"quantizer_name": "*", "enable": False}, {"quantizer_name": "*layers.0*q_proj.weight_quantizer", "cfg": {"num_bits": (4, 3)}}],
           "algorithm": ["rotate", "max"]}
    model, plain = load(golden_model, "float32"), logits(load(golden_model, "float32"), golden_model)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    mtq.quantize(model, off)
    mtq.disable_quantizer(model, "*")
    turned = logits(model, golden_model)
    assert 0 < np.abs(turned - plain).max() < 1e-4 and (model.lm_head.weight is not model.model.embed_tokens.weight) and not model.config.tie_word_embeddings
    model = load(golden_model)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def fails(model):
        raise RuntimeError("no data today")
    with pytest.raises(RuntimeError):
        mtq.quantize(model, config, fails)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()) and model.state_dict().keys() == before.keys()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied == model.config.tie_word_embeddings
    export_hf_checkpoint(quantize(model, golden_model, config), export_dir=tmp_path / "torch")
    native = modelq.load(golden_model.source)
    mtq.quantize(native, config, lambda model: [model(row[None]) for row in golden_model.calib])
    export_hf_checkpoint(native, tmp_path / "native")
    ours, theirs = (read_safetensors(tmp_path / kind) for kind in ("torch", "native"))
    assert ours.keys() == theirs.keys()
    for key in ours:
        if key.endswith("input_scale"):
            np.testing.assert_allclose(ours[key], theirs[key], rtol=0.05)
        else:
            assert ours[key].tobytes() == theirs[key].tobytes(), key


@pytest.mark.parametrize("preset", ["INT4_GPTQ_CFG", "NVFP4_AWQ_LITE_CFG"])
def test_an_interrupted_search_goes_on(golden, preset, tmp_path, monkeypatch):
    """Layer by layer, with a folder for the progress: the same result, and what was done is not done again."""
    from modelq.torch_models.calibration import Step

    def config(folder=None):
        algorithm = getattr(mtq, preset)["algorithm"]
        algorithm = algorithm if isinstance(algorithm, dict) else {"method": algorithm}
        return {**getattr(mtq, preset), "algorithm": {**algorithm, "layerwise": {"enable": True, **({"checkpoint_dir": str(folder)} if folder else {})}}}
    expected = quantize(load(golden["llama"]), golden["llama"], config())
    observed, original = [], Step.observe

    def counted(self, run, parts, ranges):
        observed.append(parts[0].layer)
        if stop and observed == [0, 1]:
            raise KeyboardInterrupt
        original(self, run, parts, ranges)
    monkeypatch.setattr(Step, "observe", counted)
    model, stop = load(golden["llama"]), True
    weight = model.get_submodule(UP).weight.clone()
    with pytest.raises(KeyboardInterrupt):
        quantize(model, golden["llama"], config(tmp_path / "progress"))
    assert torch.equal(model.get_submodule(UP).weight, weight) and not quantizers(model)
    observed.clear()
    stop = False
    quantize(model, golden["llama"], config(tmp_path / "progress"))
    assert observed == [1, -1]
    np.testing.assert_array_equal(logits(model, golden["llama"]), logits(expected, golden["llama"]))
    with pytest.raises(ValueError, match="another calibration"):
        quantize(load(golden["qwen3"]), golden["qwen3"], config(tmp_path / "progress"))
    with pytest.raises(ValueError, match="layerwise"):
        quantize(load(golden["llama"]), golden["llama"], mtq.INT4_AWQ_CFG, checkpoint_dir=tmp_path / "other")
