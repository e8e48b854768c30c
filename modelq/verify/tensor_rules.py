"""Checks of names, dtypes and shapes, layer by layer, against the table of layouts."""
from __future__ import annotations

from collections.abc import Iterator

from modelq.verify.findings import ERROR, NOTE, Finding
from modelq.verify.layouts import KV_SCALES, Part, expected_shapes
from modelq.verify.opened import Export, Layer

AGAIN = "export again"
SMOOTHED = {"W4A16_AWQ", "W4A8_AWQ", "NVFP4_AWQ"}
FUSED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")     # what reads a norm, into which a pre_quant_scale can be folded
FP8_BLOCK = ("FP8_PB_WO", "fp8 block", "float-quantized block")


def parts(export: Export) -> Iterator[Finding]:
    """Every tensor that the layout asks for is there, with its dtype and shape, and no other."""
    for layer in export.layers.values():
        if layer.layout is None or not _claims(layer):
            continue
        for part in layer.layout.parts:
            yield from _part(export, layer, part)
        known = {part.suffix for part in layer.layout.parts} | {"bias", "k_bias", "v_bias"}     # these: kv_tensors
        for suffix in layer.parts.keys() - known:
            if export.engine.strict and (suffix, export.engine_name) not in TOLERATED:
                yield Finding("parts", layer.parts[suffix].name,
                              f"{layer.layout.name} has no {suffix}, and {export.engine_name} refuses a tensor "
                              "that it has no place for", "leave it out (a pre_quant_scale has to be folded into the layer before)")


ROUTERS_OWN = ("e_score_correction_bias",)      # beside DeepSeek's weight, which is never quantized
TOLERATED = {("input_scale", "sglang"), ("input_scale", "vllm")}


def _claims(layer: Layer) -> bool:
    """Whether the layer is quantized by its tensors: a plain weight is the exclusion rule's matter."""
    return layer.stored_quantized or len(layer.parts.keys() - {"weight", "bias", *ROUTERS_OWN}) > 0


def _wanted(export: Export, layer: Layer, part: Part) -> bool:
    said = layer.said or {}
    if part.only == "optional":
        return False
    if part.only == "zeros":
        return (said.get("weights") or {}).get("symmetric") is False
    if part.only != "input" or export.engine_name == "tensorrt-llm" and part.suffix == "input_scale":
        return part.only != "input"       # TensorRT-LLM then scales dynamically
    if export.dialect == "compressed-tensors":
        activations = said.get("input_activations")
        return activations is not None and activations.get("dynamic") in (False, "local", None)
    return export.dialect == "modelopt" or said.get("activation_scheme") == "static"


def _part(export: Export, layer: Layer, part: Part) -> Iterator[Finding]:
    assert layer.layout is not None
    info = layer.parts.get(part.suffix)
    name = f"{layer.module}.{part.suffix}"
    if info is None:
        if _wanted(export, layer, part):
            yield Finding("parts", name, f"is missing, {layer.layout.name} needs it; engines compute with what memory held", AGAIN)
        return
    if info.dtype not in part.dtype.split("|"):
        yield Finding("parts", name, f"is {info.dtype}, {layer.layout.name} needs {part.dtype.replace('|', ' or ')}", AGAIN)
    shapes = expected_shapes(part, layer.sizes() | _rank(layer))
    if export.engine_name == "tensorrt-llm" and layer.layout.name == "FP8_PB_WO" and part.suffix == "weight_scale":
        shapes = [*shapes, *[tuple(shape[::2]) for shape in shapes if shape]]      # it takes two axes as well
    if layer.shape is not None and None not in shapes and info.shape not in shapes:
        yield Finding("parts", name, f"has the shape {list(info.shape)}, {layer.layout.name} of {list(layer.shape)} needs "
                      f"{' or '.join(str(list(shape)) for shape in shapes if shape is not None)}", AGAIN)


def _rank(layer: Layer) -> dict[str, int]:
    first = layer.parts.get("svdquant_lora_a")
    return {"rank": first.shape[0]} if first is not None and first.shape else {}


def true_shapes(export: Export) -> Iterator[Finding]:
    """The packed weight stands for the [out, in] that config.json's sizes give; of families that the runtime knows."""
    for name, shape in _shapes_of_config(export).items():
        layer = export.layers.get(name)
        if layer is None or layer.shape is None:
            if layer is None:
                yield Finding("true_shapes", name, "has no weight, config.json asks for it", "copy all files of the checkpoint")
        elif tuple(layer.shape) != shape and (layer.layout or not layer.stored_quantized):
            yield Finding("true_shapes", f"{name}.weight", f"stands for {list(layer.shape)}, config.json asks for {list(shape)}", AGAIN)


def _shapes_of_config(export: Export) -> dict[str, tuple[int, ...]]:
    from modelq import _core
    from modelq.checkpoint.config import runtime_config

    try:
        modules = _core.Runtime(*runtime_config(export.checkpoint.config, export.checkpoint.tensors), "bfloat16").modules
    except (TypeError, ValueError):      # a family that modelq does not run: nothing to compare with
        return {}
    return {row["name"]: tuple(row["shape"]) for row in modules if row["kind"] == "linear" and row["weight"] == f"{row['name']}.weight"}


def divisible(export: Export) -> Iterator[Finding]:
    """Block-scaled FP8 in fused products: a member that ends inside a block shifts the next one's scales."""
    for layer in export.quantized:
        if layer.layout is None or layer.layout.name not in FP8_BLOCK or layer.shape is None or not export.engine.fuses:
            continue
        rows, columns = layer.shape
        if columns % 128 and export.engine_name == "vllm":
            yield Finding("divisible", layer.module, f"has {columns} columns; vLLM takes multiples of 128",
                          "keep it unquantized, or quantize per channel")
        leaf = layer.module.rpartition(".")[2]
        last = leaf in ("v_proj", "up_proj", "w3") and export.engine_name != "sglang"
        if rows % 128 and leaf in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "w1", "w3") and not last:
            yield Finding("divisible", layer.module, f"has {rows} rows and is fused with its siblings, which takes a multiple of 128",
                          "quantize per channel")


def smoothing(export: Export) -> Iterator[Finding]:
    """pre_quant_scale is where the engine reads it, and nowhere else."""
    dtype = export.checkpoint.config.get("dtype") or export.checkpoint.config.get("torch_dtype")
    for layer in export.quantized:
        if layer.layout is None or layer.layout.name not in SMOOTHED:
            continue
        leaf, info = layer.module.rpartition(".")[2], layer.parts.get("pre_quant_scale")
        name = f"{layer.module}.pre_quant_scale"
        if export.engine_name == "tensorrt-llm":
            if info is None and leaf not in FUSED and layer.layout.name != "NVFP4_AWQ":
                yield Finding("smoothing", name, "is missing, TensorRT-LLM ends with a KeyError", "write ones")
            if info is not None and leaf in FUSED and not (layer.layout.name == "NVFP4_AWQ" and leaf in ("gate_proj", "up_proj")):
                yield Finding("smoothing", name, "is ignored by TensorRT-LLM", "fold it into the norm before")
            if info is not None and dtype and info.dtype != dtype:
                yield Finding("smoothing", name, f"is {info.dtype}, the model is {dtype}: TensorRT-LLM asserts that they are equal", AGAIN)
        elif info is not None and (export.engine_name != "sglang" or leaf in FUSED):
            yield Finding("smoothing", name, f"{export.engine_name} does not read it here", "fold it into the layer before")


def kv_tensors(export: Export) -> Iterator[Finding]:
    """k_scale and v_scale come together, as one number each, where the engine looks; no engine reads the biases of an affine cache."""
    for name, info in export.checkpoint.tensors.items():
        if name.endswith((".k_bias", ".v_bias")):
            crash = ", and ends with an AttributeError" if export.engine.strict else ""
            yield Finding("kv_tensors", name, f"{export.engine_name} has no affine KV cache{crash}",
                          "quantize with FP8_KV_CFG")
    for module, scales in export.kv_scales().items():
        for missing in [suffix for suffix in KV_SCALES if suffix not in scales]:
            yield Finding("kv_tensors", f"{module}.{missing}", "is missing, the other one is there", AGAIN)
        for info in scales.values():
            if info.dtype != "float32" and export.dialect == "modelopt" or info.shape not in ((), (1,)):
                yield Finding("kv_tensors", info.name, f"is {info.dtype} {list(info.shape)}, one float32 is needed", AGAIN)
            inside = info.name.rpartition(".")[0].endswith(("k_proj", "v_proj"))
            if export.engine_name == "tensorrt-llm" and not inside:
                yield Finding("kv_tensors", info.name, "TensorRT-LLM looks for it in k_proj and v_proj, and takes 1 otherwise",
                              'export with dialect="modelopt"')
    scheme = (export.flat or {}).get("kv_cache_scheme") or (export.nested or {}).get("kv_cache_quant_algo")
    if scheme and not export.kv_scales():
        yield Finding("kv_tensors", "k_scale, v_scale", "the KV cache is quantized, and there are none: engines take 1",
                      "calibrate with a forward_loop",
                      NOTE if export.engine_name != "tensorrt-llm" else ERROR)
