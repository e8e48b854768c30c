"""Checks of the config files: whether the engine knows the words, and whether the patterns leave out what is unquantized, no more."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from modelq.verify.engines import MIXED, siblings
from modelq.verify.findings import NOTE, Finding
from modelq.verify.opened import NESTED_FILE, Export, Layer, format_of

CONFIG = "config.json: quantization_config"
NVFP4_ALGORITHMS = ("NVFP4", "W4A16_NVFP4")


def method(export: Export) -> Iterator[Finding]:
    """The engine reads this dialect at all."""
    if export.dialect is None:
        stored = export.quantized
        if stored:
            yield Finding("method", CONFIG, f"is missing, but {stored[0].module} is stored quantized", "export again")
    elif export.dialect == "modelopt" and not export.engine.algorithms:
        yield Finding("method", f"{CONFIG}.quant_method",
                      f"{export.engine_name} does not read the modelopt dialect: it loads packed weights "
                      "without their scales, with no more than a warning", 'export with dialect="compressed-tensors"')
    elif export.dialect not in ("modelopt", "compressed-tensors", *export.engine.methods):
        yield Finding("method", f"{CONFIG}.quant_method", f"{export.engine_name} does not know {export.dialect!r}",
                      f"export with engine={export.engine_name!r}, which chooses a dialect that it reads")


def algorithm(export: Export) -> Iterator[Finding]:
    """Every quant_algo, or format, is one that the engine knows, in its spelling."""
    if export.dialect == "modelopt" and export.engine.algorithms:
        yield from _algorithms(export)
    elif export.dialect == "compressed-tensors":
        groups = export.stated.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            yield Finding("algorithm", f"{CONFIG}.config_groups", "there is no group, so nothing says how weights are stored",
                          "export again")
        for name, group in (groups or {}).items():
            if format_of(group, export.stated) not in export.engine.formats:
                yield Finding("algorithm", f"{CONFIG}.config_groups.{name}",
                              f"{export.engine_name} does not load {format_of(group, export.stated)}",
                              f"export with engine={export.engine_name!r}, which chooses a dialect that it reads")


def _algorithms(export: Export) -> Iterator[Finding]:
    said = export.stated.get("quant_algo")
    entries = [("quant_algo", said)]
    if said == MIXED:
        listed = export.stated.get("quantized_layers") or {}
        entries = [(f"quantized_layers.{module}", entry.get("quant_algo")) for module, entry in listed.items()]
        if not entries:
            yield Finding("algorithm", f"{_stated_file(export)}: quantized_layers", f"{MIXED} without it says nothing of any layer",
                          "export again")
    for where, name in entries:
        if name not in export.engine.algorithms:
            near = next((known for known in export.engine.algorithms if known.upper() == str(name).upper()), None)
            remedy = f"write {near!r}" if near else f"it knows {', '.join(export.engine.algorithms)}; export in another format or dialect"
            yield Finding("algorithm", f"{_stated_file(export)}: {where}", f"{export.engine_name} does not know {name!r}", remedy)


def _stated_file(export: Export) -> str:
    return NESTED_FILE if export.stated is export.nested else CONFIG


def both_files(export: Export) -> Iterator[Finding]:
    """TensorRT-LLM goes by hf_quant_config.json, the others by config.json: both are there, and say the same."""
    flat, nested = export.flat, export.nested
    if nested is None:
        level = "error" if export.engine.nested_first else NOTE
        yield Finding("both_files", NESTED_FILE, "is missing; TensorRT-LLM's releases read only that file", "export again", level)
        return
    if flat is None:
        if not str(nested.get("quant_algo")).startswith(("FP8", "NVFP4")):
            yield Finding("both_files", CONFIG, f"is missing; by {NESTED_FILE} alone vLLM knows FP8 and NVFP4 only", "export again")
        return
    for name, key in (("quant_algo", "quant_algo"), ("quantized_layers", "quantized_layers"), ("ignore", "exclude_modules")):
        ours, theirs = flat.get(name) or None, nested.get(key) or None
        if ours != theirs:
            yield Finding("both_files", f"{NESTED_FILE}: {key}",
                          f"differs from config.json's {name}, and engines differ in which they read first",
                          "export again")


def nested_keys(export: Export) -> Iterator[Finding]:
    """Keys that readers of the nested file index without asking."""
    if export.nested is None:
        return
    needed = ["quant_algo", "kv_cache_quant_algo"]
    if export.nested.get("quant_algo") != MIXED:
        needed.append("exclude_modules")
        if "NVFP4" in str(export.nested.get("quant_algo")) or "AWQ" in str(export.nested.get("quant_algo")):
            needed.append("group_size")
    for key in needed:
        if export.nested.get(key, ()) == () or (key == "exclude_modules" and export.nested[key] is None):
            yield Finding("nested_keys", f"{NESTED_FILE}: {key}", "is missing", "export again")


def group_size(export: Export) -> Iterator[Finding]:
    """The group size is one that the engine's kernels have."""
    for layer in export.quantized:
        if layer.layout is None:
            continue
        said = layer.sizes().get("group")
        stated = (layer.said or {}).get("group_size", said) or said
        fixed = 128 if export.engine_name == "tensorrt-llm" and layer.layout.name in ("W4A16_AWQ", "W4A8_AWQ") else layer.layout.group
        if fixed and stated != fixed:
            yield Finding("group_size", f"{layer.module}: group_size", f"is {stated}, {layer.layout.name} has {fixed}",
                          f"quantize with block_size {fixed}")


def awq_keys(export: Export) -> Iterator[Finding]:
    """TensorRT-LLM asks both of an AWQ checkpoint."""
    for layer_name, entry in _awq_entries(export):
        for key, value in (("has_zero_point", False), ("pre_quant_scale", True)):
            if entry.get(key) is not value:
                yield Finding("awq_keys", f"{NESTED_FILE}: {layer_name}{key}",
                              f"is {entry.get(key)!r}, {entry['quant_algo']} needs {value!r}", "export again")


def _awq_entries(export: Export) -> Iterator[tuple[str, dict[str, Any]]]:
    nested = export.nested or {}
    entries = {f"quantized_layers.{module}.": entry for module, entry in (nested.get("quantized_layers") or {}).items()} or {"": nested}
    for name, entry in entries.items():
        if str(entry.get("quant_algo")) in ("W4A16_AWQ", "W4A8_AWQ", "NVFP4_AWQ"):
            yield name, entry


def mixed(export: Export) -> Iterator[Finding]:
    """quantized_layers and the tensors agree, and the algorithms are ones that the engine combines."""
    if export.stated.get("quant_algo") != MIXED:
        return
    listed = export.stated.get("quantized_layers") or {}
    where = f"{_stated_file(export)}: quantized_layers"
    for module in listed:
        if module not in export.layers or not export.layers[module].stored_quantized:
            yield Finding("mixed", f"{where}.{module}", "no such layer is stored quantized", "export again")
    for layer in export.quantized:
        if layer.module not in listed:
            yield Finding("mixed", layer.module, "is stored quantized, and quantized_layers does not list it: engines read it as bfloat16",
                          "export again")
    entries = [entry for entry in listed.values() if isinstance(entry, dict)]
    sizes = {entry.get("group_size") for entry in entries if entry.get("quant_algo") in NVFP4_ALGORITHMS}
    if len(sizes) > 1:
        yield Finding("mixed", where, f"NVFP4 layers have the group sizes {sorted(map(str, sizes))}, engines take one",
                      "quantize all with block_size 16")
    if export.engine_name == "sglang" and not any(entry.get("quant_algo") in NVFP4_ALGORITHMS for entry in entries):
        yield Finding("mixed", where, "no layer is NVFP4, and SGLang then takes the checkpoint for w4afp8",
                      'export with dialect="compressed-tensors"')


def one_format_per_group(export: Export) -> Iterator[Finding]:
    """q/k/v, and gate/up, become one product: all or none are quantized, and alike."""
    if not export.engine.fuses:
        return
    for group in siblings(export.layers):
        layers = [export.layers[module] for module in group]
        kinds = {layer.layout.name if layer.stored_quantized and layer.layout else None for layer in layers}
        if len(kinds) > 1:
            odd = next(layer.module for layer in layers if not layer.stored_quantized or layer.layout != layers[0].layout)
            yield Finding("one_format_per_group", odd,
                          f"is stored unlike {', '.join(m for m in group if m != odd)}, and {export.engine_name} makes one product of them",
                          "quantize all of them in one format, or none")


# What the mixture-of-experts kernels take of the modelopt dialect, where that is less than what linears take.
EXPERTS = {"vllm": ("FP8", "NVFP4", "W4A16_NVFP4", "MXFP8"),
           "tensorrt-llm": ("FP8", "NVFP4", "NVFP4_AWQ", "W4A16_AWQ", "W4A8_AWQ", "MXFP8", "W4A8_MXFP4_FP8")}


def experts(export: Export) -> Iterator[Finding]:
    """An expert's format is one that the engine's fused kernels have; others stay uninitialised, some in silence."""
    known = EXPERTS.get(export.engine_name)
    wrong = [layer for layer in export.quantized if ".experts." in layer.module
             and known and layer.layout and layer.layout.name not in known]
    if wrong:
        yield Finding("experts", wrong[0].module,
                      f"{export.engine_name} has no experts in {wrong[0].layout.name if wrong[0].layout else None}, "
                      f"only in {', '.join(known or ())}", 'export with dialect="compressed-tensors", or "fp8" for blocks')


def exclusions(export: Export) -> Iterator[Finding]:
    """As this engine matches names, its patterns leave out every unquantized linear and no quantized one."""
    if export.dialect is None or export.dialect not in export.engine.matchers:
        return
    keys = {"modelopt": "ignore", "compressed-tensors": "ignore"}
    key = "exclude_modules" if export.stated is export.nested else keys.get(export.dialect, "modules_to_not_convert")
    for layer in export.layers.values():
        if layer.stored_quantized and export.is_excluded(layer.module):
            yield Finding("exclusions", f"{_stated_file(export)}: {key}", f"a pattern matches {layer.module}, which is stored quantized",
                          "name modules in full, or with a trailing * behind a whole name")
        if not layer.stored_quantized and not export.is_excluded(layer.module) and not _left_alone(export, layer):
            yield Finding("exclusions", f"{_stated_file(export)}: {key}", f"no pattern matches {layer.module}, which is not quantized, as "
                          f"{export.engine_name} matches names", f"add {layer.module!r}")


def _left_alone(export: Export, layer: Layer) -> bool:
    return layer.said is None or export.stated.get("quant_algo") == MIXED


def kv_cache(export: Export) -> Iterator[Finding]:
    """The format of the KV cache, and what says that its scales are static."""
    if export.dialect == "modelopt" and export.stated is export.nested:
        name = export.stated.get("kv_cache_quant_algo")
    else:
        scheme = (export.flat or {}).get("kv_cache_scheme")
        name = scheme
        if isinstance(scheme, dict):
            name = "FP8" if (scheme.get("num_bits"), scheme.get("type")) == (8, "float") else str(scheme)
        if isinstance(scheme, dict):
            wanted = {"dynamic": False} | ({"strategy": "tensor", "symmetric": True} if export.dialect == "compressed-tensors" else {})
            for key, value in wanted.items():
                if scheme.get(key) != value:
                    yield Finding("kv_cache", f"{CONFIG}.kv_cache_scheme.{key}",
                                  f"is {scheme.get(key)!r}; without {value!r} vLLM keeps the cache in bfloat16",
                                  f"write {value!r}")
    if name and name not in export.engine.kv_cache:
        yield Finding("kv_cache", f"{_stated_file(export)}: KV cache", f"{export.engine_name} has no {name} cache",
                      "quantize with FP8_KV_CFG or NVFP4_KV_CFG, or without one")
    if not name and export.kv_scales():
        yield Finding("kv_cache", next(iter(export.kv_scales())), "has k_scale or v_scale, and no config says that the cache is quantized",
                      "export again", NOTE)
    if name and export.nested is not None and not export.nested.get("kv_cache_quant_algo"):
        yield Finding("kv_cache", f"{NESTED_FILE}: kv_cache_quant_algo", "is null, config.json has a kv_cache_scheme", "export again")
