"""Which dialect an engine loads a model's formats from. What each engine reads is the table of `modelq.verify.engines`.

An engine takes a dialect if it takes every layer's format in it, and the KV cache's; of several the first of PREFERRED wins.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from modelq.checkpoint import dialects
from modelq.checkpoint.compressed import METHOD, weight_args
from modelq.checkpoint.dialects import Form
from modelq.checkpoint.kv_cache import SAYABLE
from modelq.verify.engines import ENGINES, Engine

PREFERRED = ("modelopt", METHOD, "fp8", "autoawq", "gptq")
# Engines with kernels run weights of an element beside these inputs in compressed-tensors' words; transformers simulates any.
_BESIDE = {"fp8": (None, "fp8", "fp8_channel"), "fp8_channel": (None, "fp8", "fp8_channel"), "int8": (None, "int8", "int8_token"),
           "int4": (None, "fp8_channel"), "nvfp4": (None, "nvfp4"), "mxfp4": (None, "mxfp4"), "mxfp8": ("mxfp8",), "fp8_block": (None,)}


def resolve_dialect(dialect: str | None, engine: str | None, forms: Mapping[str, Form], cache: str | None) -> str:
    """The dialect to write: the one given if the engine (where one is given) loads it, else the engine's first choice, else modelopt.

    forms: module to what its linear is. cache: the KV cache's format ("FP8", "NVFP4", ...) or None. ValueError: a name that is not known, or
    a layer that the engine does not load, with what would work.
    """
    if dialect is not None and dialect not in dialects.NAMES:
        raise ValueError(f"unknown dialect {dialect!r}; known are {', '.join(dialects.NAMES)}")
    if engine is None:
        return dialect or PREFERRED[0]
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; known are {', '.join(ENGINES)}")
    _check_cache(engine, cache)
    candidates = PREFERRED if dialect is None else (dialect,)
    refusals = {candidate: _refusal(engine, candidate, forms, cache) for candidate in candidates}
    for candidate, refusal in refusals.items():
        if refusal is None:
            return candidate
    raise ValueError(f"{engine} does not load this model: {_advice(engine, refusals, forms)}")


def _refusal(name: str, dialect: str, forms: Mapping[str, Form], cache: str | None) -> str | None:
    """Why the engine would not load the model in this dialect, naming a layer; None if it would."""
    if cache is not None and cache not in SAYABLE.get(dialect, ()):
        return f"the {dialect} dialect has no words for a KV cache in {cache}"
    words = set()
    for module, form in forms.items():
        try:
            word = dialects.algorithm(dialect, form)
            dialects.stored_layout(dialect, form)
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
    return f"{word} {weight_args(form.pair.weight, form.group_size)['strategy']}" in engine.formats


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
    module, form = next(((module, form) for module, form in forms.items() if not any(_takes(engine, dialect, form) for dialect in refusals)),
                        next(iter(forms.items())))
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
