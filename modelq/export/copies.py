"""What an export copies, and what of it its config has to name."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from modelq.checkpoint.base import TensorInfo
from modelq.foreign import NOT_WRITTEN, foreign_tensors, ties

FLOATS = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
LINEAR_LIKE = ("linear", "router", "head", "further layer")      # of `modelq.foreign.others_of`: what engines may make a linear of


def planned_copies(model: Any, linears: Mapping[str, str], dtype: str) -> tuple[dict[str, TensorInfo], list[str]]:
    """(source name to what is written of tensors that are copied, all names in the order of the files). linears: name that a quantized
    weight has of old to the name of the tensor that it is made of, which is another's where weights are tied.

    The model's own floats are cast to dtype. What its family does not have, and all of an architecture that is not known, is copied bit for
    bit.
    """
    known, copies, order = not getattr(model, "weights_only", False), {}, []
    foreign = set(model.checkpoint.tensors) if not known else set(foreign_tensors(model)) | _vectors(model)
    untied = {weight: key for key, weight in linears.items() if weight != key}
    for name, info in model.checkpoint.tensors.items():
        if known and (name.endswith(NOT_WRITTEN) or (name.endswith("lm_head.weight") and ties(model))):
            continue
        order.append(name)
        if name not in linears:
            copies[name] = as_written(info, info.dtype if name in foreign else dtype)
        if name in untied:
            order.append(untied[name])
    return copies, order


def _vectors(model: Any) -> set[str]:
    """Small tensors that are no module's (what corrects a router's scores, attention sinks): they stay as precise as they are."""
    return {row["weight"] for row in model.modules if row["kind"] == "vector"}


def most_common_float(tensors: Mapping[str, TensorInfo]) -> str:
    """The dtype of most float numbers; bfloat16 if there are none."""
    counts: dict[str, int] = {}
    for info in tensors.values():
        if info.dtype in FLOATS:
            counts[info.dtype] = counts.get(info.dtype, 0) + info.nbytes // FLOATS[info.dtype]
    return max(counts, key=lambda dtype: counts[dtype], default="bfloat16")


def as_written(info: TensorInfo, dtype: str) -> TensorInfo:
    return tensor_info(info.name, dtype if info.dtype in FLOATS else info.dtype, info.shape)


def tensor_info(name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    from modelq.checkpoint.safetensors import numpy_dtype

    return TensorInfo(name, dtype, shape, int(np.prod(shape, dtype=np.int64)) * numpy_dtype(dtype).itemsize)
