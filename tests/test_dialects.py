"""Exports in every dialect: what is stored stands for the same numbers, by formulas that share no code with modelq, and reopens."""
import json

import ml_dtypes
import modelq
import modelq.quantization as mtq
import numpy as np
import pytest
import reference
from golden_data import models, read_safetensors, write_safetensors
from modelq import _core
from modelq.checkpoint import open_checkpoint
from modelq.export import export_hf_checkpoint

E4M3, E8M0 = (4, 3), (8, 0)
LINEAR = "model.layers.0.mlp.down_proj"


def config(weight, side=None, rest=()):
    rules = [{"quantizer_name": "*", "enable": False}, {"quantizer_name": "*weight_quantizer", "cfg": weight, "enable": True}]
    if side is not None:
        rules.append({"quantizer_name": "*input_quantizer", "cfg": side, "enable": True})
    return {"quant_cfg": rules + [{"quantizer_name": "*lm_head*", "enable": False}, {"quantizer_name": "*embed*", "enable": False},
                                  {"quantizer_name": "*output_quantizer", "enable": False}, *rest], "algorithm": "max"}


TOKEN = {"num_bits": E4M3, "type": "dynamic", "block_sizes": {-1: None}}
NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": E4M3}}
MX = {name: {"num_bits": bits, "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": E8M0}}
      for name, bits in (("fp4", (2, 1)), ("fp6", (2, 3)), ("fp8", E4M3))}
INT4, BLOCK = {"num_bits": 4, "block_sizes": {-1: 32}}, {"num_bits": E4M3, "block_sizes": {-1: 128, -2: 128}}
FORMATS = {
    "fp8": config({"num_bits": E4M3}, {"num_bits": E4M3}),
    "fp8-channel": config({"num_bits": E4M3, "axis": 0}, TOKEN),
    "fp8-channel-weight": config({"num_bits": E4M3, "axis": 0}),
    "fp8-block": config(BLOCK),
    "int8": config({"num_bits": 8, "axis": 0}, {"num_bits": 8}),
    "int8-token": config({"num_bits": 8, "axis": 0}, {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}}),
    "int8-weight": config({"num_bits": 8, "axis": 0}),
    "int4": config(INT4),
    "int4-token": config(INT4, TOKEN),
    "nvfp4": config(NVFP4, NVFP4),
    "nvfp4-weight": config(NVFP4),
    "mxfp4": config(MX["fp4"], MX["fp4"]),
    "mxfp4-weight": config(MX["fp4"]),
    "mxfp6-weight": config(MX["fp6"]),
    "mxfp8": config(MX["fp8"], MX["fp8"]),
    "mixed": config(NVFP4, NVFP4, [{"quantizer_name": "*down_proj.weight_quantizer", "cfg": INT4, "enable": True},
                                   {"quantizer_name": "*down_proj.input_quantizer", "enable": False},
                                   {"quantizer_name": "*o_proj.weight_quantizer", "cfg": {"num_bits": E4M3}, "enable": True},
                                   {"quantizer_name": "*o_proj.input_quantizer", "cfg": {"num_bits": E4M3}, "enable": True}]),
}
EXPORTS = [("compressed-tensors", name) for name in FORMATS] + [("autoawq", "int4"), ("gptq", "int4"), ("fp8", "fp8-block"), ("fp8", "mxfp8")]
EXPORTS += [("modelopt", name) for name in ("fp8", "fp8-channel", "fp8-block", "int8", "int8-weight", "int4", "nvfp4", "nvfp4-weight",
                                            "mxfp4", "mxfp4-weight", "mxfp8", "mixed")]
# the layouts that hold float16 scales
HALF = ("autoawq", "gptq")


@pytest.fixture(scope="module")
def llama():
    return models(["llama"])[0].values[0]


@pytest.fixture(scope="module")
def quantized(llama):
    """quantized(name): golden llama in one of FORMATS, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = modelq.load(llama.source, compute="bfloat16")
            mtq.quantize(made[name], FORMATS[name], lambda model: model(llama.calib[:2]))
        return made[name]
    return get


@pytest.fixture(scope="module")
def exported(quantized, tmp_path_factory):
    """exported(dialect, name): the folder."""
    made = {}

    def get(dialect, name):
        if (dialect, name) not in made:
            folder = tmp_path_factory.mktemp("export") / "out"
            made[dialect, name] = export_hf_checkpoint(quantized(name), folder, dialect=dialect)
        return made[dialect, name]
    return get


def said(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def simulated(model, module):
    from modelq import streaming
    row = next(row for row in model.modules if row["name"] == module)
    return streaming.read(model, [row["weight"]], [row])[row["weight"]].astype(np.float32)


def assert_close(dialect, ours, expected):
    """The same bfloat16 numbers; float16 scales are off by a part in 2048, and bfloat16 rounds once more."""
    tolerance = 0 if dialect not in HALF else 2.0**-8
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


# What is stored --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dialect, name", [export for export in EXPORTS if export[0] != "modelopt"])
def test_stored_tensors_stand_for_the_simulated_weights(dialect, name, exported, quantized):
    """Unpacked by NumPy alone, by the contract of each layout (see reference.py)."""
    folder, model = exported(dialect, name), quantized(name)
    tensors = read_safetensors(folder)
    checked = 0
    for row in model.modules:
        if row["kind"] != "linear" or row["layer"] < 0:
            continue
        ours = reference.unpack(dialect, tensors, row["name"], said(folder))
        assert ours.shape == tuple(row["shape"])
        assert_close(dialect, ours.astype(ml_dtypes.bfloat16).astype(np.float32), simulated(model, row["name"]))
        checked += 1
    assert checked == 14


@pytest.mark.parametrize("dialect, name", EXPORTS)
def test_a_reopened_export_computes_what_the_quantized_model_computed(dialect, name, exported, quantized, llama):
    before = np.asarray(quantized(name)(llama.calib[:2]).logits)
    reopened = modelq.load(exported(dialect, name), compute="bfloat16")
    after = np.asarray(reopened(llama.calib[:2]).logits)
    assert np.abs(before).max() > 1
    if dialect in HALF:
        assert np.abs(before - after).max() < 0.02 * np.abs(before).max()
    else:
        assert np.array_equal(before, after)


def test_global_scales_of_compressed_tensors_are_reciprocals(exported):
    ours, theirs = (read_safetensors(exported(dialect, "nvfp4")) for dialect in ("modelopt", "compressed-tensors"))
    for module in (LINEAR, "model.layers.1.self_attn.q_proj"):
        assert theirs[f"{module}.weight_packed"].tobytes() == ours[f"{module}.weight"].tobytes()
        assert theirs[f"{module}.weight_scale"].tobytes() == ours[f"{module}.weight_scale"].tobytes()
        for stored, ours_name in (("weight_global_scale", "weight_scale_2"), ("input_global_scale", "input_scale")):
            assert theirs[f"{module}.{stored}"].shape == (1,)
            assert theirs[f"{module}.{stored}"][0] * ours[f"{module}.{ours_name}"] == pytest.approx(1, rel=1e-6)


def test_names_and_shapes_of_the_other_layouts(exported):
    """An [128, 256] weight."""
    awq, gptq, packed, block = (read_safetensors(exported(*which)) for which in (
        ("autoawq", "int4"), ("gptq", "int4"), ("compressed-tensors", "int4"), ("fp8", "fp8-block")))
    found = {name: {key.removeprefix(f"{LINEAR}."): (value.dtype.name, value.shape) for key, value in tensors.items() if LINEAR in key}
             for name, tensors in (("awq", awq), ("gptq", gptq), ("packed", packed), ("block", block))}
    assert found["awq"] == {"qweight": ("int32", (256, 16)), "qzeros": ("int32", (8, 16)), "scales": ("float16", (8, 128))}
    assert found["gptq"] == {"qweight": ("int32", (32, 128)), "qzeros": ("int32", (8, 16)), "scales": ("float16", (8, 128)),
                             "g_idx": ("int32", (256,))}
    assert found["packed"] == {"weight_packed": ("int32", (128, 32)), "weight_scale": ("float32", (128, 8)), "weight_shape": ("int64", (2,))}
    assert found["block"] == {"weight": ("float8_e4m3fn", (128, 256)), "weight_scale_inv": ("float32", (1, 2))}
    assert gptq[f"{LINEAR}.qzeros"].view(np.uint32).min() == gptq[f"{LINEAR}.qzeros"].view(np.uint32).max() == 0x77777777
    assert awq[f"{LINEAR}.qzeros"].view(np.uint32).min() == awq[f"{LINEAR}.qzeros"].view(np.uint32).max() == 0x88888888


# What is said ----------------------------------------------------------------------------------------------------------------

def test_config_of_one_format(exported):
    config = said(exported("compressed-tensors", "nvfp4"))
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "nvfp4-pack-quantized"
    assert config["ignore"] == ["lm_head"] and config["quantization_status"] == "compressed"
    group = config["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert group["weights"] == {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16,
                                "dynamic": False, "scale_dtype": "torch.float8_e4m3fn"}
    assert group["input_activations"] == group["weights"] | {"dynamic": "local"}


def test_config_of_several_formats(exported):
    config = said(exported("compressed-tensors", "mixed"))
    assert config["format"] == "mixed-precision" and len(config["config_groups"]) == 3
    formats = {group["format"]: group["targets"] for group in config["config_groups"].values()}
    assert set(formats) == {"nvfp4-pack-quantized", "pack-quantized", "float-quantized"}
    assert formats["pack-quantized"] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


def test_native_configs(exported):
    assert said(exported("autoawq", "int4")) | {"backend": 0} == {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", "backend": 0,
        "modules_to_not_convert": ["lm_head"]}
    gptq, fp8 = said(exported("gptq", "int4")), said(exported("fp8", "fp8-block"))
    assert (gptq["bits"], gptq["group_size"], gptq["sym"], gptq["desc_act"]) == (4, 32, True, False)
    assert fp8["quant_method"] == "fp8" and fp8["weight_block_size"] == [128, 128] and fp8["activation_scheme"] == "dynamic"
    assert fp8["modules_to_not_convert"] == ["lm_head"]
    assert not (exported("gptq", "int4") / "hf_quant_config.json").exists()


@pytest.mark.parametrize("dialect, name, words", [
    ("autoawq", "fp8", "q_proj: the autoawq dialect cannot say fp8 weights with fp8 inputs; it can say int4 weights"),
    ("fp8", "nvfp4", "q_proj: the fp8 dialect cannot say nvfp4.*it can say fp8_block"),
    ("modelopt", "int8-token", "q_proj: the modelopt dialect cannot say int8 weights with int8_token"),
])
def test_what_a_dialect_cannot_say_is_refused_by_name(dialect, name, words, quantized, tmp_path):
    with pytest.raises(ValueError, match=words):
        export_hf_checkpoint(quantized(name), tmp_path / "out", dialect=dialect)
    assert not list(tmp_path.iterdir())


def test_caches(llama, tmp_path):
    """compressed-tensors has words for FP8 caches, with its own names; the others have none."""
    def made(cache):
        model = modelq.load(llama.source, compute="bfloat16")
        rules = FORMATS["fp8"]["quant_cfg"] + cache["quant_cfg"]
        return mtq.quantize(model, {"quant_cfg": rules, "algorithm": "max"}, lambda model: model(llama.calib[:2]))
    model = made(mtq.FP8_KV_CFG)
    export_hf_checkpoint(model, tmp_path / "out", dialect="compressed-tensors")
    tensors = read_safetensors(tmp_path / "out")
    scale = tensors["model.layers.0.self_attn.k_scale"]
    assert scale.shape == (1,) and not any(name.endswith("k_proj.k_scale") for name in tensors)
    assert scale[0] == pytest.approx(float(model.quantizers["model.layers.0.self_attn.k_bmm_quantizer"].amax) / 448)
    assert said(tmp_path / "out")["kv_cache_scheme"] == {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True,
                                                         "dynamic": False}
    before, after = (np.asarray(m(llama.calib[:1]).logits) for m in (model, modelq.load(tmp_path / "out", compute="bfloat16")))
    assert np.array_equal(before, after)
    with pytest.raises(ValueError, match="the KV cache is NVFP4: the compressed-tensors dialect can say FP8"):
        export_hf_checkpoint(made(mtq.NVFP4_KV_CFG), tmp_path / "no", dialect="compressed-tensors")


# INT4 layouts ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rows, cols", [(8, 8), (16, 24), (264, 640), (128, 8)])
def test_repacking_int4(rows, cols):
    codes = np.random.default_rng(rows * cols).integers(-8, 8, (rows, cols)).astype(np.int8)
    packed = {layout: pack(codes) for layout, pack in reference.INT4_LAYOUTS.items()}
    for source in packed:
        for target in packed:
            ours = _core.repack_int4(packed[source], source, target)
            assert ours.dtype == packed[target].dtype and np.array_equal(ours, packed[target]), (source, target)


@pytest.mark.parametrize("source, shape, target, words", [
    ("row_pairs", (2, 8), "awq", "4, 8.*awq needs a multiple of 8 rows"),
    ("row_pairs", (4, 12), "gptq", "multiple of 1 rows and of 8 columns"),
    ("row_pairs", (4, 12), "nf4", "unknown layout 'nf4'; known are row_pairs"),
])
def test_int4_shapes_that_do_not_fit(source, shape, target, words):
    with pytest.raises(ValueError, match=words):
        _core.repack_int4(np.zeros(shape, np.uint8), source, target)
    with pytest.raises(TypeError, match="expected .*uint8"):
        _core.repack_int4(np.zeros((2, 8), np.int16), "row_pairs", "gptq")


def test_repacking_nothing_and_unaligned():
    assert _core.repack_int4(np.zeros((0, 16), np.uint8), "row_pairs", "awq").shape == (16, 0)
    raw = np.arange(4 * 16 + 1, dtype=np.uint8)
    words = raw[1:].view(np.int32).reshape(2, 8)
    assert np.array_equal(_core.repack_int4(words, "gptq", "row_pairs"), _core.repack_int4(words.copy(), "gptq", "row_pairs"))


# Damaged or foreign ------------------------------------------------------------------------------------------------------------

def rewrite(folder, target, edit_tensors=None, edit_config=None):
    tensors = dict(read_safetensors(folder))
    if edit_tensors:
        edit_tensors(tensors)
    target.mkdir()
    write_safetensors(target / "model.safetensors", tensors)
    config = json.loads((folder / "config.json").read_text())
    if edit_config:
        edit_config(config["quantization_config"])
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("dialect, name, part, spoil, words", [
    ("compressed-tensors", "nvfp4", "weight_global_scale", None, "tensor '.*weight_global_scale' is missing"),
    ("compressed-tensors", "int4", "weight_shape", lambda t: t + 8, "tensor '.*weight_shape' does not say the shape"),
    ("compressed-tensors", "fp8-channel", "weight_scale", lambda t: t.reshape(-1), r"is float32 \[128\], float-quantized.*needs .*\[128, 1\]"),
    ("autoawq", "int4", "scales", lambda t: np.ascontiguousarray(t.T), r"scales' is float16 \[128, 8\].*needs"),
    ("gptq", "int4", "g_idx", lambda t: t + 1, "g_idx' must say for each of 256 columns one of 8 groups"),
    ("gptq", "int4", "qweight", None, "lists|not quantized|no layer|tensor"),
    ("fp8", "fp8-block", "weight_scale_inv", None, "weight_scale_inv' is missing, fp8 .*needs it; export the model again"),
])
def test_damage_is_named(dialect, name, part, spoil, words, exported, tmp_path):
    def edit(tensors):
        if spoil is None:
            del tensors[f"{LINEAR}.{part}"]
        else:
            tensors[f"{LINEAR}.{part}"] = np.ascontiguousarray(spoil(tensors[f"{LINEAR}.{part}"]))
    folder = rewrite(exported(dialect, name), tmp_path / "m", edit)
    with pytest.raises((ValueError, KeyError), match=words):
        model = modelq.load(folder)
        model.checkpoint.read(f"{LINEAR}.weight")


def set_in(path, value):
    def edit(config):
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value
    return edit


@pytest.mark.parametrize("dialect, name, edit, words", [
    ("compressed-tensors", "int4", set_in(["config_groups"], []), "config.json: config_groups must map"),
    ("compressed-tensors", "int4", set_in(["config_groups", "group_0", "weights", "symmetric"], False), "weight_zero_point' is missing"),
    ("compressed-tensors", "int4", set_in(["config_groups", "group_0", "weights", "num_bits"], 3), r"weight_shape says \[\d+, \d+\] in codes of 3 bits"),
    ("compressed-tensors", "int4", set_in(["config_groups", "group_0", "weights", "num_bits"], 9), "num_bits 9.*modelq reads"),
    ("compressed-tensors", "nvfp4", set_in(["config_groups", "group_0", "input_activations", "group_size"], 64), "activations of"),
    ("compressed-tensors", "nvfp4", set_in(["transform_config"], {"rotate": 1}), "sparsity and transforms"),
    ("compressed-tensors", "fp8", set_in(["sparsity_config"], {"format": "sparse-24-bitmask"}), "sparsity and transforms"),
    ("gptq", "int4", set_in(["checkpoint_format"], "marlin"), "gptq with checkpoint_format 'marlin' is not read; modelq reads"),
    ("gptq", "int4", set_in(["group_size"], "x"), "group_size must be a positive integer"),
    ("autoawq", "int4", set_in(["version"], "gemv"), "awq with version 'gemv' is not read; modelq reads version 'gemm'"),
    ("fp8", "fp8-block", set_in(["weight_block_size"], [64, 64]), r"a weight \[\d+, \d+\] in blocks of \[64, 64\] has"),
    ("fp8", "fp8-block", set_in(["weight_block_size"], 64), "weight_block_size must be two positive integers, found 64"),
])
def test_configs_that_are_not_read(dialect, name, edit, words, exported, tmp_path):
    with pytest.raises(ValueError, match=words):
        open_checkpoint(rewrite(exported(dialect, name), tmp_path / "m", edit_config=edit))


@pytest.mark.parametrize("targets", [["Linear"], ["re:.*proj"], ["re:.*down_proj", "Linear"]])
def test_targets_of_other_writers(targets, exported, tmp_path):
    folder = rewrite(exported("compressed-tensors", "fp8"), tmp_path / "m", edit_config=set_in(["config_groups", "group_0", "targets"], targets))
    with open_checkpoint(folder) as checkpoint:
        assert len(checkpoint.layers) == 14


STATED = {"actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "num_bits": 8, "observer": "minmax",
          "observer_kwargs": {}, "strategy": "tensor", "symmetric": True, "type": "float"}


@pytest.mark.parametrize("more", [
    {}, {"format": "naive-quantized", "quantization_status": "frozen"}, {"version": "0.12.2", "transform_config": {}, "sparsity_config": {}},
    {"sparsity_config": {"format": "dense", "global_sparsity": 0.14, "ignore": ["lm_head"], "registry_requires_subclass": False,
                         "sparsity_structure": "unstructured", "targets": []}}])
def test_configs_of_published_checkpoints(llama, more, exported, tmp_path):
    """FP8 as llm-compressor's and Neural Magic's models on the Hub say it, older and newer: with quantized inputs."""
    said = {"config_groups": {"group_0": {"input_activations": STATED, "output_activations": None, "targets": ["Linear"], "weights": STATED}},
            "format": "float-quantized", "global_compression_ratio": 1.24, "ignore": ["lm_head"], "kv_cache_scheme": None,
            "quant_method": "compressed-tensors", "quantization_status": "compressed", **more}

    def edit(config):
        config.clear()
        config.update(said)
    folder = rewrite(exported("compressed-tensors", "fp8"), tmp_path / "m", edit_config=edit)
    found, wanted = (np.asarray(modelq.load(path, compute="float32")(llama.calib[:1]).logits)
                     for path in (folder, exported("compressed-tensors", "fp8")))
    np.testing.assert_array_equal(found, wanted)


def test_scales_of_other_writers_may_be_bfloat16(exported, tmp_path):
    def edit(tensors):
        tensors[f"{LINEAR}.weight_scale"] = tensors[f"{LINEAR}.weight_scale"].astype(ml_dtypes.bfloat16)
    folder = rewrite(exported("compressed-tensors", "int4"), tmp_path / "m", edit)
    with open_checkpoint(folder) as checkpoint:
        ours = checkpoint.read(f"{LINEAR}.weight").astype(np.float32)
    expected = reference.unpack("compressed-tensors", read_safetensors(folder), LINEAR, said(folder))
    assert np.array_equal(ours, expected.astype(ml_dtypes.bfloat16).astype(np.float32))
