"""Which dialect an engine loads a model's formats from. What each engine reads is the table of `modelq.verify.engines`.

An engine takes a dialect if it takes every layer's format in it, and the KV cache's; of several the first of PREFERRED wins.
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelq.checkpoint import dialects
from modelq.checkpoint.compressed import METHOD, weight_args
from modelq.checkpoint.dialects import Form
from modelq.checkpoint.kv_cache import SAYABLE
from modelq.export.kv_cache import plan_cache
from modelq.export.plan import planned_forms
from modelq.smoothing import folding_norm
from modelq.verify import ERROR, verify_checkpoint
from modelq.verify.engines import ENGINES, Engine
from modelq.verify.opened import format_of

PREFERRED = ("modelopt", METHOD, "fp8", "autoawq", "gptq")
# Engines with kernels run weights beside these inputs, in compressed-tensors' words; transformers simulates any.
_BESIDE = {"fp8": (None, "fp8", "fp8_channel"), "fp8_channel": (None, "fp8", "fp8_channel"), "int8": (None, "int8", "int8_token"),
           "int4": (None, "fp8_channel"), "nvfp4": (None, "nvfp4"), "mxfp4": (None, "mxfp4"), "mxfp8": ("mxfp8",), "fp8_block": (None,)}


# Of weights in blocks both ways: the layout in which they are published. (SGLang renames its scales for Llama and then misses them.)
_BLOCKS_FIRST = {"vllm": ("fp8",), "tensorrt-llm": ("fp8",), "transformers": ("fp8",)}
# TensorRT-LLM looks these up on linears that share their input with no other, whether or not they were smoothed.
NEEDS_PRE_QUANT_SCALE = {"tensorrt-llm": ("W4A16_AWQ", "W4A8_AWQ", "NVFP4_AWQ")}


def choose_dialect(model: Any, dtype: str, dialect: str | None, engine: str | None) -> str:
    """`resolve_dialect` for a quantized model that is about to be exported."""
    if engine is None:
        return resolve_dialect(dialect, None, {}, None)
    cache = plan_cache(model, dtype)
    if cache.rotate:
        raise ValueError(f"the KV cache is of rotated keys, which {engine} does not load: use NVFP4_KV_CFG or FP8_KV_CFG")
    word = cache.algorithm
    if word and not word.endswith("AFFINE") and any(name.endswith("_bias") for name in cache.tensors):
        word += "_AFFINE"
    forms = planned_forms(model)
    folded = {row["name"] for row in model.modules if row["name"] in forms and folding_norm(model, row) is not None}
    return resolve_dialect(dialect, engine, forms, word, folded)


def resolve_dialect(dialect: str | None, engine: str | None, forms: Mapping[str, Form], cache: str | None,
                    folded: Collection[str] = ()) -> str:
    """The dialect to write: the one given if the engine (where one is given) loads it, else the engine's first choice, else modelopt.

    forms: module to what its linear is. cache: the KV cache's format ("FP8", "NVFP4", ...) or None. folded: modules whose smoothing a norm
    takes up. ValueError: a name that is not known, or a layer that the engine does not load, with what would work.
    """
    if dialect is not None and dialect not in dialects.WRITTEN:
        raise ValueError(f"unknown dialect {dialect!r}; known are {', '.join(dialects.WRITTEN)}")
    if engine is None:
        return dialect or PREFERRED[0]
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; known are {', '.join(ENGINES)}")
    _check_cache(engine, cache)
    blocks = all(dialects.schemes()[form.pair.weight]["block"][0] > 1 for form in forms.values())
    ordered = _BLOCKS_FIRST.get(engine, ()) + PREFERRED if blocks else PREFERRED
    candidates = ordered if dialect is None else (dialect,)
    refusals = {candidate: _refusal(engine, candidate, forms, cache, folded) for candidate in candidates}
    for candidate, refusal in refusals.items():
        if refusal is None:
            return candidate
    raise ValueError(f"{engine} does not load this model: {_advice(engine, refusals, forms)}")


def _refusal(name: str, dialect: str, forms: Mapping[str, Form], cache: str | None, folded: Collection[str] = ()) -> str | None:
    """Why the engine would not load the model in this dialect, naming a layer; None if it would."""
    if cache is not None and cache not in SAYABLE.get(dialect, ()):
        return f"the {dialect} dialect has no words for a KV cache in {cache}"
    words = set()
    for module, form in forms.items():
        try:
            word = dialects.algorithm(dialect, form)
            dialects.stored_layout(dialect, replace(form, smoothed=form.smoothed and module not in folded))
        except ValueError as error:
            return f"{module}: {error}"
        if not _loads(name, dialect, word, form):
            return f"{module}: {name} does not load {_describe(form)} as {word} of the {dialect} dialect"
        words.add((word, form.group_size))
    return _mixture_refusal(name, dialect, {word for word, _ in words}, len(words))


def _loads(name: str, dialect: str, word: str, form: Form) -> bool:
    return _LOADS.get(dialect, _loads_native)(ENGINES[name], word, form) and (
        dialect != METHOD or name == "transformers" or form.pair.input in _BESIDE.get(form.pair.weight, ()))


def _loads_modelopt(engine: Engine, word: str, form: Form) -> bool:
    return word in engine.algorithms


def _loads_compressed(engine: Engine, word: str, form: Form) -> bool:
    return format_of({"format": word, "weights": weight_args(form.pair.weight, form.group_size)}, {}) in engine.formats


def _loads_native(engine: Engine, word: str, form: Form) -> bool:
    return word in engine.methods


_LOADS: dict[str, Callable[[Engine, str, Form], bool]] = {"modelopt": _loads_modelopt, METHOD: _loads_compressed}


def _mixture_refusal(name: str, dialect: str, words: set[str], formats: int) -> str | None:
    """SGLang takes a mixed model without an NVFP4 layer for another format; the native dialects say one format for the whole model."""
    if formats > 1 and dialect not in _LOADS:
        return f"the {dialect} dialect says one format for the whole model"
    if len(words) > 1 and (name, dialect) == ("sglang", "modelopt") and not any("NVFP4" in word for word in words):
        return "sglang misreads a mixed model of the modelopt dialect that has no NVFP4 layer"
    return None


def _check_cache(engine: str, cache: str | None) -> None:
    known = ENGINES[engine].kv_cache
    if cache is not None and cache not in known:
        raise ValueError(f"{engine} does not load a KV cache in {cache}; it loads {' and '.join(known)}: use "
                         f"{' or '.join(f'{word}_KV_CFG' for word in known)}, or leave the cache in high precision")


def _advice(engine: str, refusals: Mapping[str, str | None], forms: Mapping[str, Form]) -> str:
    reasons = "; ".join(reason for reason in refusals.values() if reason)
    if len(refusals) == 1:
        return reasons
    module, form = next(((module, form) for module, form in forms.items()
                         if not any(_takes(engine, dialect, form) for dialect in refusals)), next(iter(forms.items())))
    loads = ", ".join(dict.fromkeys(_loadable(engine)))
    return f"{module} is {_describe(form)}; what {engine} loads is {loads} ({reasons})"


def _takes(engine: str, dialect: str, form: Form) -> bool:
    return _refusal(engine, dialect, {"": form}, None) is None


def _loadable(engine: str) -> Iterator[str]:
    for dialect in PREFERRED:
        for pair in dialects.algorithms(dialect):
            form = Form(pair, (128, 128))
            if _takes(engine, dialect, form):
                yield _describe(form)


def _describe(form: Form) -> str:
    smoothed = " that are smoothed (pre_quant_scale)" if form.smoothed else ""
    return f"{form.pair.weight} weights with {form.pair.input or 'unquantized'} inputs{smoothed}"


def check_written(folder: Path, engine: str) -> None:
    """ValueError for the first thing in a written folder that the engine would stumble over, by `modelq verify`."""
    errors = [finding for finding in verify_checkpoint(folder, engine) if finding.level == ERROR]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise ValueError(f"{engine} would not load this export: {errors[0].where} {errors[0].problem}; {errors[0].remedy}{more}")
