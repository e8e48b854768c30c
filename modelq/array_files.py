"""Trees of arrays, packed ones among them, in one safetensors file.

    modelq.save_arrays(packed, "params.safetensors")
    packed = modelq.load_arrays("params.safetensors", like=params)

An array is stored under its path in the tree ("layers.0.kernel"), a packed one as a checkpoint would hold it: "layers.0.kernel" (codes),
"layers.0.kernel_scale", "layers.0.kernel_scale_2"; what they stand for is in the file's metadata, as JSON.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from modelq import _core
from modelq.arrays import origin_of, take
from modelq.packed_array import QuantizedArray
from modelq.trees import map_leaves

SAID = "modelq.arrays"       # the key of the metadata
DTYPES = ("float32", "bfloat16", "float16")
FIELDS = ("scheme", "shape", "dtype", "block_size", "axis")


def save_arrays(tree: Any, path: str | Path) -> Path:
    """Write every array of a tree; returns the path. Leaves that are no arrays (numbers, texts, None) are not written.

    path: of the file. ValueError: there is none, or two would have one name. OSError: it cannot be written.

    >>> import tempfile, numpy as np
    >>> from modelq.packed_array import quantize_array
    >>> tree = {"layer": {"kernel": quantize_array(np.ones((2, 32), np.float32), "mxfp4"), "bias": np.zeros(2, np.float32)}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     found = load_arrays(save_arrays(tree, folder + "/arrays.safetensors"))
    >>> sorted(found), found["layer.kernel"].scheme
    (['layer.bias', 'layer.kernel'], 'mxfp4')
    """
    from modelq.checkpoint.writer import write_tensors

    tensors: dict[str, np.ndarray] = {}
    packed: dict[str, dict[str, Any]] = {}

    def visit(name: str, leaf: Any) -> None:
        if isinstance(leaf, QuantizedArray):
            packed[name] = {field: getattr(leaf, field) for field in FIELDS}
        elif not hasattr(leaf, "dtype"):
            return
        parts = leaf.parts if isinstance(leaf, QuantizedArray) else {"weight": take(leaf, name)}
        for role, part in parts.items():
            if (key := _key(name, role)) in tensors:
                raise ValueError(f"two arrays of this tree would be stored as {key!r}")
            tensors[key] = part
    map_leaves(visit, tree)
    if not tensors:
        raise ValueError("there is no array in this tree")
    write_tensors(Path(path), tensors, {SAID: json.dumps(packed)})
    return Path(path)


def load_arrays(path: str | Path, like: Any = None) -> Any:
    """What save_arrays wrote: {path in the tree: NumPy or QuantizedArray}, or with `like` (such a tree, packed or not) a tree again.

    Then arrays are of the framework and device of those in their place; leaves that were not written are as in `like`. ValueError: not
    such a file, a damaged one, or one of another tree.
    """
    from modelq.checkpoint.safetensors import SafetensorsFile

    file = SafetensorsFile(path)
    try:
        tensors = {name: np.array(file.read(name)) for name in file.tensors}
    finally:
        file.close()
    found: dict[str, Any] = {name: _packed(name, said, tensors, file.path) for name, said in _said(file.metadata, file.path).items()}
    found |= tensors
    return found if like is None else _placed(found, like, file.path)


def _key(name: str, role: str) -> str:
    return name + role.removeprefix("weight")


def _said(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    try:
        said = json.loads(metadata[SAID])
    except (KeyError, ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise ValueError(f"{path}: not a file that modelq.save_arrays wrote")
    return said


def _packed(name: str, said: Any, tensors: dict[str, np.ndarray], path: Path) -> QuantizedArray:
    """Takes its parts out of tensors. Whether their sizes fit is asked by who computes with them."""
    fields: list[Any] = [said.get(field) if isinstance(said, dict) else None for field in FIELDS]
    scheme, shape, dtype, block_size, axis = fields
    is_sound = isinstance(scheme, str) and scheme in _core.schemes() and dtype in DTYPES and (block_size is None or _is_count(block_size))
    is_placed = isinstance(shape, list) and all(_is_count(n) for n in shape) and type(axis) is int and -len(shape) <= axis < len(shape)
    if not (is_sound and is_placed):
        raise ValueError(f"{path}: what it says of {name} is no packed array: {said}")
    roles = ["weight", "weight_scale"] + ["weight_scale_2"] * (_core.schemes()[scheme]["second_divisor"] is not None)
    missing = [key for role in roles if (key := _key(name, role)) not in tensors]
    if missing:
        raise ValueError(f"{path}: {name} needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not there")
    return QuantizedArray({role: tensors.pop(_key(name, role)) for role in roles}, scheme, tuple(shape), dtype, block_size, axis)


def _is_count(n: Any) -> bool:
    return type(n) is int and n >= 0


def _placed(found: Mapping[str, Any], like: Any, path: Path) -> Any:
    left = set(found)

    def visit(name: str, leaf: Any) -> Any:
        if name not in found:
            if hasattr(leaf, "dtype"):
                raise ValueError(f"{path}: there is no array {name!r}; the file holds {', '.join(sorted(found)[:5])}, ...")
            return leaf
        left.discard(name)
        origin = leaf.origin if isinstance(leaf, QuantizedArray) else origin_of(leaf)
        made = found[name]
        return replace(made, origin=origin) if isinstance(made, QuantizedArray) else origin.give(made)
    made = map_leaves(visit, like)
    if left:
        raise ValueError(f"{path}: there is no place in this tree for {min(left)!r}")
    return made
