"""Experts of megatron.core's first grouped products (GroupedMLP, --moe-use-legacy-grouped-gemm): a layer's in two matrices, told apart.

`weight1` [hidden, experts x inner] is stored as [experts, hidden, inner], `weight2` [experts x inner, hidden] as [experts, inner, hidden]:
the weights of linears turned over (megatron/core/transformer/moe/experts.py). The parts are views of the file, as all tensors are.
"""
from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from modelq.checkpoint.megatron.torch_file import FileTensor

_GROUPED = re.compile(r"(.*\.mlp)\.experts\.weight([12])")


def ungrouped(path: Path, model: dict[str, FileTensor], expert_ranks: int) -> dict[str, FileTensor]:
    """The tensors of one file, a linear for each expert that is in it. expert_ranks: over how many files a layer's experts are spread.
    ValueError names a tensor whose shape is not that of its router's experts."""
    found: dict[str, FileTensor] = {}
    for name, tensor in model.items():
        match = _GROUPED.fullmatch(name)
        if match is None:
            found[name] = tensor
            continue
        router = model.get(f"{match[1]}.router.weight")
        experts = router.shape[0] // expert_ranks if router is not None and len(router.shape) == 2 else 0
        for expert, part in enumerate(_parts(path, name, tensor, experts, int(match[2]))):
            found[f"{match[1]}.experts.local_experts.{expert}.linear_fc{match[2]}.weight"] = part
    return found


def _parts(path: Path, name: str, tensor: FileTensor, experts: int, which: int) -> list[FileTensor]:
    shape = tensor.shape
    if not experts or len(shape) != 2 or tensor.strides != (shape[1], 1) or shape[2 - which] % experts:
        raise ValueError(f"{path}: tensor {name!r} has the shape {list(shape)}, which is not that of {experts or 'unknown'} experts in one "
                         "matrix (its router says how many); copy or save it again")
    rows, columns = (shape[0], shape[1] // experts) if which == 1 else (shape[0] // experts, shape[1])
    return [replace(tensor, offset=tensor.offset + expert * rows * columns, shape=(columns, rows), strides=(1, columns))
            for expert in range(experts)]
