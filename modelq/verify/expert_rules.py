"""Checks of experts by family: engines hold a layer's experts in one tensor, and fill it by names of their own."""
from __future__ import annotations

from collections.abc import Iterator

from modelq.verify.findings import Finding
from modelq.verify.opened import Export, Layer

LEAVE_OUT = "leave them in high precision with {'quantizer_name': '*experts.*', 'enable': False}"
PER_TOKEN = "{'quantizer_name': '*experts.*input_quantizer', 'cfg': {'num_bits': 8, 'type': 'dynamic', 'block_sizes': {-1: None}}}"
# What transformers 5.23 makes of experts, which it holds in one tensor (integrations/compressed_tensors.py): it takes them to be in the
# format of the other linears, whatever is ignored, and knows these. Others it meets with an error, or with other values and no word. Only
# beside FP8 may they be unquantized. Llama 4's it makes linears of, Granite's it finds by no number.
FUSED_EXPERTS = ("float-quantized tensor", "float-quantized channel", "pack-quantized group", "pack-quantized channel")
BESIDE_PLAIN = FUSED_EXPERTS[:2]
FAMILIES_APART = ("llama4", "llama4_text", "gpt_oss")

_LOADED_BY = {
    "nemotron_nas": "vLLM", "llama4": "vLLM in compressed-tensors, transformers", "gpt_oss": "vLLM and transformers, experts unquantized",
    "granitemoe": "vLLM; transformers, experts unquantized",
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"), "vLLM; transformers in FP8 and INT4")}


def loaded_by(family: str) -> str:
    """The engines, of the two whose CPU builds are asked (tests/engines), that loaded micro models of the family, and in what."""
    return _LOADED_BY.get(family, "vLLM, transformers")


def fused_experts(export: Export) -> Iterator[Finding]:
    """Experts are in a format, and of a family, that transformers puts into one tensor."""
    family = str(export.checkpoint.config.get("model_type"))
    experts = [layer for layer in export.layers.values() if ".experts." in layer.module and family not in FAMILIES_APART]
    quantized = [layer for layer in experts if layer.stored_quantized]
    if family == "granitemoe":
        if quantized:
            yield Finding("fused_experts", quantized[0].module, "transformers looks for none of Granite by number, and makes others up",
                          LEAVE_OUT)
        return
    wrong = next((layer for layer in quantized if layer.layout and layer.layout.name not in FUSED_EXPERTS), None)
    if wrong is not None and wrong.layout is not None:
        known = ", ".join(FUSED_EXPERTS)
        yield Finding("fused_experts", wrong.module, f"transformers reads no experts in {wrong.layout.name}, only in {known}",
                      "quantize the model in FP8 or INT4")
    plain = next((layer for layer in experts if not layer.stored_quantized), None)
    other = next((layer.layout.name for layer in export.quantized if layer.layout and layer.layout.name not in BESIDE_PLAIN), None)
    if plain is not None and other is not None:
        yield Finding("fused_experts", plain.module, f"is not quantized, and transformers takes it to be in {other}, as others are",
                      "quantize the model in FP8, or its experts in INT4 as well")


def vllm_experts(export: Export) -> Iterator[Finding]:
    """Quantized experts are of a family whose loader has a place for their parts, read in vLLM 0.32."""
    family = str(export.checkpoint.config.get("model_type"))
    experts = [layer for layer in export.quantized if ".experts." in layer.module]
    if not experts:
        return
    if family == "gpt_oss":
        yield Finding("vllm_experts", experts[0].module, "vllm has no biases beside gpt-oss' experts in this format", LEAVE_OUT)
    elif family == "llama4_text" and export.dialect == "modelopt":
        yield Finding("vllm_experts", experts[0].module, "vllm knows the names of the stacks' scales in the multimodal model alone",
                      'export with dialect="compressed-tensors"')
    elif static := next((layer for layer in experts if _is_static_int8(layer)), None):
        yield Finding("vllm_experts", static.module, "vllm has INT8 experts with a scale of inputs per token, these have one for all",
                      f"add {PER_TOKEN}")


def _is_static_int8(layer: Layer) -> bool:
    activations = (layer.said or {}).get("input_activations") or {}
    return layer.layout is not None and layer.layout.name.startswith("int-quantized") and not activations.get("dynamic")
