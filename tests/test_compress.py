"""Weights held packed in memory, and fake quantization baked into weights."""
import modelq
import modelq.quantization as mtq
import numpy as np
import pytest
from golden_data import cases
from modelq.export import export_hf_checkpoint
from test_dialects import FORMATS, exported, llama, quantized  # noqa: F401  (fixtures)

NAMES = [name for name in FORMATS if name != "fp8-channel-weight"]
DOWN = "model.layers.0.mlp.down_proj"


def made(llama, name, compute="bfloat16"):  # noqa: F811
    model = modelq.load(llama.source, compute=compute)
    return mtq.quantize(model, FORMATS[name], lambda model: model(llama.calib[:2]))


def logits(model, llama):  # noqa: F811
    return np.asarray(model(llama.calib[:2]).logits)


@pytest.mark.parametrize("name", NAMES)
def test_a_compressed_model_computes_the_same_in_less(name, llama):  # noqa: F811
    model = made(llama, name)
    before, size = logits(model, llama), model.weight_nbytes
    assert mtq.compress(model) is model
    assert len(model.packed) == 14
    linears = sum(2 * row["shape"][0] * row["shape"][1] for row in model.modules if row["name"] in model.packed)
    packed = sum(weight.nbytes for weight in model.packed.values())
    assert packed < (0.6 if "8" in name else 0.45) * linears
    assert model.weight_nbytes == size - linears + packed
    assert np.array_equal(logits(model, llama), before)


def test_the_files_are_not_read_again(llama, monkeypatch):  # noqa: F811
    model = mtq.compress(made(llama, "nvfp4"))
    read, seen = model.checkpoint.read, []
    monkeypatch.setattr(model.checkpoint, "read", lambda name: seen.append(name) or read(name))
    logits(model, llama)
    assert seen and not any("proj" in name for name in seen)


@pytest.mark.parametrize("name", ["nvfp4", "int4", "fp8-block"])
def test_float32_models_stay_within_ties(name, llama):  # noqa: F811
    model = made(llama, name, compute="float32")
    before = logits(model, llama)
    after = logits(mtq.compress(model), llama)
    assert np.abs(after - before).mean() < 0.05 * np.abs(before).mean()


@pytest.mark.parametrize("config, count", [
    (None, 14), ({"*": True}, 14), ({"*": True, "*down_proj*": False}, 12), ({"*mlp*": True}, 6), ({"compress": {"*": True}}, 14),
    ({"default": True, "*self_attn*": False}, 6)])
def test_patterns(config, count, llama):  # noqa: F811
    assert len(mtq.compress(made(llama, "fp8"), config).packed) == count


@pytest.mark.parametrize("config, words", [({"*": False}, "nothing to compress"), (["*"], "expected a dictionary of patterns"),
                                           ({"*": 1}, "expected a dictionary of patterns")])
def test_bad_patterns(config, words, llama):  # noqa: F811
    with pytest.raises(ValueError, match=words):
        mtq.compress(made(llama, "fp8"), config)


def test_what_has_no_packed_form_is_named(llama):  # noqa: F811
    model = modelq.load(llama.source)
    mtq.quantize(model, {"quant_cfg": [{"quantizer_name": "*", "enable": False},
                                       {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 6, "axis": 0}}], "algorithm": "max"})
    with pytest.raises(ValueError, match="q_proj.weight_quantizer: num_bits 6 .* no packed form; leave it out"):
        mtq.compress(model)
    assert model.packed == {}
    with pytest.raises(ValueError, match="nothing to compress"):
        mtq.compress(modelq.load(llama.source))


def test_changes_after_compressing(llama):  # noqa: F811
    """Other settings mean other bytes; quantizing anew starts from the checkpoint, with nothing packed."""
    model, other = (made(llama, "fp8") for _ in range(2))
    mtq.compress(model)
    for each in (model, other):
        mtq.disable_quantizer(each, "*down_proj.weight_quantizer")
    assert len(model.packed) == 12
    assert np.array_equal(logits(model, llama), logits(other, llama))
    for each in (model, other):
        mtq.calibrate(each, "max", lambda m: m(llama.calib[4:]))
    assert len(model.packed) == 12 and np.array_equal(logits(model, llama), logits(other, llama))
    mtq.quantize(model, FORMATS["nvfp4"], lambda m: m(llama.calib[:2]))
    assert model.packed == {} and np.array_equal(logits(model, llama), logits(made(llama, "nvfp4"), llama))


def test_a_compressed_model_exports_as_before(llama, exported, tmp_path):  # noqa: F811
    export_hf_checkpoint(mtq.compress(made(llama, "nvfp4")), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (exported("modelopt", "nvfp4") / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dialect, name", [("modelopt", "nvfp4"), ("compressed-tensors", "int4"), ("gptq", "int4"), ("compressed-tensors", "mixed")])
def test_reopened_exports_compress_too(dialect, name, exported, llama):  # noqa: F811
    model = modelq.load(exported(dialect, name), compute="bfloat16")
    before, size = logits(model, llama), model.weight_nbytes
    mtq.compress(model)
    assert model.weight_nbytes < 0.6 * size and np.array_equal(logits(model, llama), before)


@pytest.mark.parametrize("case", cases(dtype="bfloat16", configs=["W4A8_AWQ_BETA_CFG", "INT4_AWQ_CFG"], needs=["model.safetensors"]))
def test_smoothed_exports_of_the_reference_compress(case):
    model = modelq.load(case.folder, compute="bfloat16")
    before = logits(model, case.model)
    assert np.array_equal(logits(mtq.compress(model), case.model), before)


# Folding ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, compute", [("nvfp4", "bfloat16"), ("int8", "bfloat16"), ("mixed", "bfloat16"), ("fp8", "float32")])
@pytest.mark.parametrize("packed", [False, True])
def test_a_folded_model_computes_the_same(name, compute, packed, llama):  # noqa: F811
    model = made(llama, name, compute)
    if packed:
        mtq.compress(model)
    before = logits(model, llama)
    assert mtq.fold_weight(model) is model
    weights = [quantizer for quantizer_name, quantizer in model.quantizers.items() if quantizer_name.endswith("weight_quantizer")]
    assert not any(quantizer.enabled for quantizer in weights) and all(quantizer.amax is None for quantizer in weights)
    assert np.array_equal(logits(model, llama), before)
    with model.simulating(weights=False, activations=False):       # what was folded is no simulation any more
        assert not np.array_equal(logits(model, llama), llama.logits)
    mtq.disable_quantizer(model, "*")
    after = logits(model, llama)
    plain = np.asarray(modelq.load(llama.source, compute=compute)(llama.calib[:2]).logits)
    assert not np.array_equal(after, plain)


def test_attributes_stay_if_asked(llama):  # noqa: F811
    model = made(llama, "fp8")
    amax = float(model.quantizers[f"{DOWN}.weight_quantizer"].amax)
    mtq.fold_weight(model, keep_attrs=True)
    assert float(model.quantizers[f"{DOWN}.weight_quantizer"].amax) == amax


def test_folding_ends_what_can_be_exported_until_quantized_again(llama, tmp_path):  # noqa: F811
    model = mtq.fold_weight(made(llama, "int4"))
    with pytest.raises(ValueError, match="no layer of this model is quantized"):
        export_hf_checkpoint(model, tmp_path / "out")
    with pytest.raises(ValueError, match="nothing to fold"):
        mtq.fold_weight(model)
    folded = model.checkpoint.read(f"{DOWN}.weight")
    mtq.quantize(model, FORMATS["int4"])
    export_hf_checkpoint(model, tmp_path / "out")
    reopened = modelq.load(tmp_path / "out").checkpoint.read(f"{DOWN}.weight")
    scale = np.abs(folded.astype(np.float32)).max()
    assert np.abs(reopened.astype(np.float32) - folded.astype(np.float32)).max() < 0.02 * scale
