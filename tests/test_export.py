"""The export: its words against golden configs, its tensors against golden checkpoints, and what it refuses."""
import json
from fnmatch import fnmatch

import pytest
from golden_data import cases, read_safetensors
from modelq.export import modelopt
from modelq.export.excluded import summarize_excluded

# (unquantized, quantized, expected): what modelopt 0.47's summariser answers for random names of few and short parts
SUMMARIES = [
    (["lm_head", "model.embed_tokens"], ["model.layers.0.mlp.up_proj"], ["lm_head", "model.embed_tokens"]),
    (["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"], ["model.layers.0.mlp.up_proj"],
     ["model.layers.0.self_attn*"]),
    (["model.layers.1.mlp.up_proj"], ["model.layers.10.mlp.up_proj"], ["model.layers.1.*"]),
    (["1.a", "1.b.b1", "ab.a.b1.1", "b.x.a.1", "a.1"], ["x.1.x.b", "a.abc", "b1"], ["1*", "a.1", "ab*", "b.*"]),
    (["b1.b1", "1.b", "b1.0.b"], [], ["1*", "b1*"]),
    (["1.a", "0", "ab"], ["x.10.b1.a", "0.10.10.a", "10", "x.ab.b1.b1"], ["0", "1.*", "ab"]),
    (["b", "0.1.b.a", "x.ab"], ["1.a.0", "x", "a", "abc.abc.b1"], ["0*", "b", "x.ab"]),
    (["10.ab", "abc.b.b1.0", "b.a.abc"], ["0.ab.0", "a"], ["10*", "abc*", "b*"]),
    (["b", "abc.10.x.b", "abc", "0.10.x", "ab.x.10", "10.1.b.x"], ["a", "ab.ab.ab.x"], ["0*", "10*", "ab.x*", "abc", "abc*", "b"]),
    (["b.abc", "0", "10.10.1", "b1.10.ab.b", "x.x", "1"], ["b1.b1.b1.10"], ["0", "1", "10*", "b.*", "b1.10*", "x*"]),
    (["a.b"], ["a.b"], []),
    ([], ["a"], []),
]


@pytest.mark.parametrize("unquantized, quantized, expected", SUMMARIES)
def test_excluded_modules_are_summarized_as_by_the_reference(unquantized, quantized, expected):
    assert summarize_excluded(unquantized, quantized) == expected


def linears_of(case) -> list[str]:
    """Modules with a two-dimensional weight, and lm_head, which a tied model does not store."""
    names = [name.removesuffix(".weight") for name, tensor in read_safetensors(case.model.source).items() if tensor.ndim == 2]
    return names + ["lm_head"] * ("lm_head" not in names)


@pytest.mark.parametrize("case", cases(dtype="bfloat16", needs=["hf_quant_config.json", "config.json"]))
def test_config_files_equal_golden_ones(case):
    text = (case.folder / "hf_quant_config.json").read_text()
    golden = json.loads(text)
    said = golden["quantization"]
    if said["quant_algo"] == "MIXED_PRECISION":
        layers, rest = said["quantized_layers"], ["model.embed_tokens"]
    else:
        rest = [name for name in linears_of(case) if any(fnmatch(name, pattern) for pattern in said["exclude_modules"])]
        layers = {name: modelopt.layer_entry(said["quant_algo"], said.get("group_size"))
                  for name in linears_of(case) if name not in rest}
    ours = modelopt.hf_quant_config(layers, rest, said["kv_cache_quant_algo"])
    assert ours["producer"]["name"] == "modelopt"      # what vLLM looks for in the nested file
    ours["producer"] = golden["producer"]
    assert json.dumps(ours, indent=4) == text
    inline = json.loads((case.folder / "config.json").read_text())["quantization_config"]
    assert json.dumps(modelopt.quantization_config(ours)) == json.dumps(inline)   # the same keys in the same order
