"""convert_checkpoint: from one dialect to another without the original weights, where both can say the same.

Bytes are rearranged, scales renamed or inverted, tensor by tensor; nothing is quantized anew. What the other dialect has no words for is
refused before a byte is written. (Dialects with float16 scales round them, as they do in a direct export.)
"""
from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modelq.checkpoint import dialects
from modelq.checkpoint.base import TensorInfo
from modelq.checkpoint.dialects import Form, Pair
from modelq.checkpoint.kv_cache import ALGORITHMS, TENSORS
from modelq.export.hf_checkpoint import WRITERS, copy_tensor
from modelq.export.kv_cache import Cache, check_sayable, stored_scale
from modelq.export.copies import LINEAR_LIKE
from modelq.export.plan import Plan, stored_tensors
from modelq.export.side_files import copy_side_files, patched_config, write_json
from modelq.foreign import OWN_QUANTIZERS


@dataclass(frozen=True)
class StoredLinear:
    """One quantized linear on its way: what it is, the dialect's word for it, and the tensors that it becomes by role."""
    module: str
    form: Form
    algorithm: str
    tensors: dict[str, TensorInfo]

    @property
    def pair(self) -> Pair:
        return self.form.pair

    @property
    def group_size(self) -> int | None:
        return self.form.group_size


def convert_checkpoint(directory: str | os.PathLike[str], out: str | os.PathLike[str], dialect: str | None = None,
                       engine: str | None = None, *, max_shard_size: int | str = "10GB", overwrite: bool = False) -> Path:
    """Write a quantized checkpoint in another dialect; returns the folder `out`.

    directory: a quantized folder of any dialect. dialect: see `export_hf_checkpoint`; engine: choose the dialect that this engine
    ("vllm", "sglang", "tensorrt-llm", "transformers") loads. max_shard_size, overwrite: as there. ValueError before any byte is written:
    the folder is not quantized, or the dialect cannot say one of its layers (named), its smoothing or its KV cache. Memory stays at one
    tensor.
    """
    from modelq.checkpoint import open_checkpoint
    from modelq.checkpoint.writer import ShardedWriter, atomic_directory
    from modelq.export.engines import check_written, resolve_dialect

    with open_checkpoint(Path(directory)) as source:
        if not getattr(source, "layers", None):
            layout = " of an export's layout" if hasattr(source, "linears") else ""
            raise ValueError(f"{source.path}: not a quantized checkpoint{layout}: quantize it, and export it in the dialect that is wanted")
        forms = {module: layer.form for module, layer in source.layers.items()}
        dialect = resolve_dialect(dialect, engine, forms, _cache_algorithm(source))
        plan = _plan(source, dialect)
        files = WRITERS[dialect](plan)
        with atomic_directory(Path(out), overwrite=overwrite) as folder:
            with ShardedWriter(folder, plan.tensors, max_shard_size=max_shard_size) as writer:
                _write_tensors(source, plan, writer)
            copy_side_files(source, folder)
            for name, content in files.others.items():
                write_json(folder / name, content)
            write_json(folder / "config.json", patched_config(source, _dtype(source), files.quantization))
            if engine is not None:
                check_written(folder, engine)
    return Path(out)


def _plan(source: Any, dialect: str) -> Plan:
    plan = Plan(dialect, cache=_cache(source, dialect))
    linears: dict[str, Any] = plan.linears
    for module, kind in _modules(source):
        if module in source.layers:
            linears[f"{module}.weight"] = _linear(source, module, dialect)
        elif kind in OWN_QUANTIZERS:
            plan.unquantized.append(module)
            plan.unquantized_linears.extend([module] if kind in LINEAR_LIKE else [])
    for name, info in source.tensors.items():
        plan.order.append(name)
        if name not in linears:
            plan.copies[name] = info
    return plan


def _modules(source: Any) -> list[tuple[str, str]]:
    """Names and kinds of the model's matrices, in its order; of a family that the runtime does not have, as the files tell."""
    from modelq import _core
    from modelq.checkpoint.config import runtime_config
    from modelq.checkpoint.matrices import rows_of

    try:
        rows = list(_core.Runtime(*runtime_config(source.config, source.tensors), "bfloat16").modules)
    except (TypeError, ValueError):
        rows = []
    known = {row["weight"] for row in rows}
    others = rows_of({name: info for name, info in source.tensors.items() if name not in known}, source.config, source.layers)
    return [(row["name"], row["kind"]) for row in rows] + [
        (row["name"], "linear" if row["kind"] in LINEAR_LIKE else row["kind"]) for row in others]


def _linear(source: Any, module: str, dialect: str) -> StoredLinear:
    form = source.layers[module].form
    try:
        word = dialects.algorithm(dialect, form)
    except ValueError as error:
        raise ValueError(f"{module}: {error}") from None
    if not form.input_scaled and dialect != "modelopt":
        raise ValueError(f"{module}: its input was never calibrated, which the {dialect} dialect has no words for; quantize with a "
                         "forward_loop, or keep the modelopt dialect")
    return StoredLinear(module, form, word, stored_tensors(module, form, dialect, _dtype(source)))


def _write_tensors(source: Any, plan: Plan, writer: Any) -> None:
    from modelq.progress import progress

    for name in progress(plan.order, "convert", unit="tensor"):
        if name in plan.linears:
            linear = plan.linears[name]
            parts = source.parts(linear.module)
            for role, info in linear.tensors.items():
                writer.write(info.name, np.asarray(dialects.stored(plan.dialect, linear.form, role, parts)))
            source.release([name])
        else:
            copy_tensor(source, name, plan.copies[name].dtype, writer)
    for name, array in plan.cache.tensors.items():
        writer.write(name, array)


# The cache ---------------------------------------------------------------------------------------------------------------------

def _cache_algorithm(source: Any) -> str | None:
    if source.cache is None:
        return None
    named = {(scheme, word.endswith("AFFINE")): word for word, scheme in ALGORITHMS.items()}
    return named.get((source.cache.scheme, bool(source.cache.biases))) or named[source.cache.scheme, False]


def _cache(source: Any, dialect: str) -> Cache:
    algorithm = _cache_algorithm(source)
    if algorithm is None:
        return Cache()
    check_sayable(algorithm, source.cache.rotate, dialect)
    return Cache(algorithm, source.cache.rotate, dict(_cache_tensors(source, dialect)))


def _cache_tensors(source: Any, dialect: str) -> Iterator[tuple[str, np.ndarray]]:
    for (module, which), scale in source.cache.scales.items():
        yield f"{module}.{TENSORS[dialect][which][0]}", stored_scale(np.asarray(scale, np.float32), dialect)
    for module, which in source.cache.biases:
        suffix = TENSORS[dialect][which][1]
        if not suffix:
            raise ValueError(f"{module}: the {dialect} dialect has no place for the bias of {which}; keep the modelopt dialect")
        stored = f"{module}.{TENSORS[source.said.dialect][which][1]}"
        yield f"{module}.{suffix}", source.inner.read(stored)


def _dtype(source: Any) -> str:
    from modelq.checkpoint.quantized import model_dtype

    return model_dtype(source.inner.config)
