"""engine=: the dialect that an engine loads, what it needs besides, and refusals that say what would work."""
import json

import modelq
import modelq.quantization as mtq
import numpy as np
import pytest
from golden_data import read_safetensors
from modelq.export import convert_checkpoint, export_hf_checkpoint
from modelq.verify import ENGINES, ERROR, verify_checkpoint
from test_dialects import FORMATS, exported, llama, quantized, said  # noqa: F401  (fixtures)

MODELOPT, COMPRESSED = "modelopt", "compressed-tensors"
# format -> engine -> the dialect it is written in, None where it is refused (vllm, sglang, tensorrt-llm, transformers)
CHOICES = {
    "fp8": (MODELOPT, MODELOPT, MODELOPT, COMPRESSED),
    "fp8-channel": (MODELOPT, COMPRESSED, MODELOPT, COMPRESSED),
    "fp8-block": (None, None, None, "fp8"),           # k_proj has 64 rows here, which fused products in blocks of 128 cannot hold
    "int8": (COMPRESSED, COMPRESSED, None, COMPRESSED),
    "int8-token": (COMPRESSED, COMPRESSED, None, COMPRESSED),
    "int8-weight": (COMPRESSED, COMPRESSED, None, COMPRESSED),
    "int4": (COMPRESSED, COMPRESSED, None, COMPRESSED),      # TensorRT-LLM has groups of 128
    "int4-token": (COMPRESSED, COMPRESSED, None, COMPRESSED),
    "nvfp4": (MODELOPT, MODELOPT, MODELOPT, COMPRESSED),
    "nvfp4-weight": (MODELOPT, MODELOPT, MODELOPT, COMPRESSED),
    "mxfp8": (MODELOPT, MODELOPT, MODELOPT, COMPRESSED),
    "mxfp4": (COMPRESSED, None, None, COMPRESSED),
    "mixed": (COMPRESSED, COMPRESSED, None, COMPRESSED),
}
CASES = [(name, engine, dialect) for name, row in CHOICES.items() for engine, dialect in zip(ENGINES, row)]


def dialect_of(folder):
    return said(folder)["quant_method"]


@pytest.mark.parametrize("name, engine, dialect", CASES)
def test_each_engine_gets_a_dialect_that_it_loads(name, engine, dialect, quantized, tmp_path):  # noqa: F811
    if dialect is None:
        with pytest.raises(ValueError, match=f"{engine} does not load this model: model.layers.0.self_attn.q_proj is .*what {engine} loads is|"
                           f"{engine} would not load this export: model.layers.*(takes a multiple of 128|use block_size 128|block_size 128)"):
            export_hf_checkpoint(quantized(name), tmp_path / "out", engine=engine)
        assert not list(tmp_path.iterdir())
        return
    export_hf_checkpoint(quantized(name), tmp_path / "out", engine=engine)
    assert dialect_of(tmp_path / "out") == dialect
    errors = [finding for finding in verify_checkpoint(tmp_path / "out", engine) if finding.level == ERROR]
    assert not errors, errors


def test_engines_that_fuse_get_shared_scales(quantized, llama, tmp_path):  # noqa: F811
    """Otherwise vLLM rounds q, k and v anew to the largest of their scales. transformers, which does not, keeps each its own."""
    model = quantized("fp8")
    parts = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    export_hf_checkpoint(model, tmp_path / "vllm", engine="vllm")
    export_hf_checkpoint(model, tmp_path / "hf", engine="transformers")
    ours, own = read_safetensors(tmp_path / "vllm"), read_safetensors(tmp_path / "hf")
    assert len({float(ours[f"{part}.weight_scale"]) for part in parts}) == 1
    scales = [float(own[f"{part}.weight_scale"][0]) for part in parts]
    assert len(set(scales)) == 3 and max(scales) == float(ours[f"{parts[0]}.weight_scale"])
    before, after = (np.asarray(m(llama.calib[:1]).logits) for m in (model, modelq.load(tmp_path / "vllm", compute="bfloat16")))
    assert np.abs(before - after).mean() < 0.2 * np.abs(before).mean()


def test_tensorrt_llm_gets_the_ones_that_it_looks_up(llama, tmp_path):  # noqa: F811
    model = modelq.load(llama.source)
    mtq.quantize(model, mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    export_hf_checkpoint(model, tmp_path / "out", engine="tensorrt-llm")
    tensors = read_safetensors(tmp_path / "out")
    smoothed = sorted(name for name in tensors if name.endswith("pre_quant_scale"))
    assert smoothed == [f"model.layers.{i}.{part}.pre_quant_scale" for i in range(2) for part in ("mlp.down_proj", "self_attn.o_proj")]
    assert all((tensors[name].astype(np.float32) == 1).all() for name in smoothed)


def test_vllm_reads_other_names_in_mxfp8(quantized, tmp_path):  # noqa: F811
    """Its loader of quant_method mxfp8 looks for weight_scale, where transformers' layout has weight_scale_inv."""
    with pytest.raises(ValueError, match="vllm does not load mxfp8 weights with mxfp8 inputs as mxfp8 of the fp8 dialect"):
        export_hf_checkpoint(quantized("mxfp8"), tmp_path / "out", dialect="fp8", engine="vllm")
    export_hf_checkpoint(quantized("mxfp8"), tmp_path / "out", dialect="fp8", engine="transformers")


@pytest.mark.parametrize("arguments, words", [
    ({"engine": "llama.cpp"}, "unknown engine 'llama.cpp'; known are vllm, sglang, tensorrt-llm, transformers"),
    ({"engine": "transformers", "dialect": "modelopt"}, "transformers does not load nvfp4 weights with nvfp4 inputs as NVFP4 of the modelopt"),
    ({"engine": "vllm", "dialect": "gptq"}, "the gptq dialect cannot say nvfp4"),
])
def test_wrong_wishes(arguments, words, quantized, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=words):
        export_hf_checkpoint(quantized("nvfp4"), tmp_path / "out", **arguments)


def test_a_cache_narrows_the_choice(llama, tmp_path):  # noqa: F811
    def made(name, cache):
        model = modelq.load(llama.source, compute="bfloat16")
        rules = FORMATS[name]["quant_cfg"] + cache["quant_cfg"]
        return mtq.quantize(model, {"quant_cfg": rules, "algorithm": "max"}, lambda model: model(llama.calib[:2]))
    affine = made("fp8", mtq.FP8_AFFINE_KV_CFG)
    with pytest.raises(ValueError, match="does not load a KV cache in .*AFFINE; it loads FP8 and NVFP4: use FP8_KV_CFG or NVFP4_KV_CFG"):
        export_hf_checkpoint(affine, tmp_path / "out", engine="vllm")
    with pytest.raises(ValueError, match="transformers does not load a KV cache in NVFP4"):
        export_hf_checkpoint(made("fp8", mtq.NVFP4_KV_CFG), tmp_path / "out", engine="transformers")
    export_hf_checkpoint(made("fp8", mtq.FP8_KV_CFG), tmp_path / "out", engine="transformers")
    assert dialect_of(tmp_path / "out") == COMPRESSED


def test_conversion_for_an_engine(exported, tmp_path):  # noqa: F811
    convert_checkpoint(exported(MODELOPT, "nvfp4"), tmp_path / "hf", engine="transformers")
    assert dialect_of(tmp_path / "hf") == COMPRESSED
    convert_checkpoint(tmp_path / "hf", tmp_path / "vllm", engine="vllm")
    assert dialect_of(tmp_path / "vllm") == MODELOPT
    assert json.loads((tmp_path / "vllm" / "hf_quant_config.json").read_text())["quantization"]["quant_algo"] == "NVFP4"
