"""GPTQ's and AutoAWQ's folders: what their linears are."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from modelq.checkpoint.base import Checkpoint
from modelq.checkpoint.codes import LAYOUTS, words_for
from modelq.checkpoint.said import AGAIN
from modelq.checkpoint.scaled import ScaledLinear

_BITS = (2, 3, 4, 8)
_SYMMETRIC = {"awq": 0x88888888, "gptq": 0x77777777}       # words of zero points of symmetric codes


def find_awq(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, ScaledLinear] | None:
    """quant_method awq. None: symmetric, as exports of ours are."""
    _one_of(checkpoint, config, "bits", (4,))
    _one_of(checkpoint, config, "w_bit", (4,))
    _one_of(checkpoint, config, "version", ("gemm", "GEMM"))
    if _is_symmetric(checkpoint, "awq"):
        return None
    return {module: _integer_linear(checkpoint, module, "awq", 4) for module in _modules(checkpoint)}


def find_gptq(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, ScaledLinear] | None:
    """quant_method gptq. None: 4 bits, symmetric, columns in their order, as exports of ours are."""
    _one_of(checkpoint, config, "bits", _BITS)
    _one_of(checkpoint, config, "checkpoint_format", ("gptq", "gptq_v2"))
    layout = config.get("checkpoint_format", "gptq")
    if layout == "gptq" and config.get("bits") == 4 and config.get("sym", True) and not config.get("desc_act") \
            and _is_symmetric(checkpoint, "gptq"):
        return None
    linears = {}
    for module in _modules(checkpoint):
        weight, index = checkpoint.tensors[f"{module}.qweight"], checkpoint.tensors.get(f"{module}.g_idx")
        bits = config.get("bits") if index is None else weight.shape[0] * 32 // max(1, index.shape[0])      # `dynamic` gives some others
        if bits not in _BITS:
            raise ValueError(f"{weight.file}: tensor {weight.name!r} has the shape {list(weight.shape)}: codes of {bits} bits are not read")
        linears[module] = _integer_linear(checkpoint, module, layout, bits)
    return linears


def _one_of(checkpoint: Checkpoint, config: Mapping[str, Any], key: str, known: tuple[Any, ...]) -> None:
    if key in config and config[key] not in known:
        raise ValueError(f"{checkpoint.path}: {config['quant_method']} with {key} {config[key]!r} is not read; modelq reads {key} "
                         f"{' or '.join(map(repr, known))}")


def _modules(checkpoint: Checkpoint) -> Iterator[str]:
    return (name.removesuffix(".qweight") for name in checkpoint.tensors if name.endswith(".qweight"))


def _is_symmetric(checkpoint: Checkpoint, layout: str) -> bool:
    """Whether all zero points are those of symmetric codes, and all groups of neighbours: as our exports have them."""
    word = np.uint32(_SYMMETRIC[layout]).view(np.int32)
    for module in _modules(checkpoint):
        zeros, index = checkpoint.tensors.get(f"{module}.qzeros"), checkpoint.tensors.get(f"{module}.g_idx")
        if zeros is not None and (checkpoint.read(zeros.name) != word).any():
            return False
        if index is not None:
            groups = checkpoint.tensors[f"{module}.scales"].shape[0] if f"{module}.scales" in checkpoint.tensors else 1
            size = -(-index.shape[0] // max(1, groups))
            if (checkpoint.read(index.name) != np.arange(index.shape[0]) // size).any():
                return False
    return True


def _integer_linear(checkpoint: Checkpoint, module: str, layout: str, bits: int) -> ScaledLinear:
    infos = {}
    for role in ("qweight", "scales", "qzeros"):
        infos[role] = checkpoint.tensors.get(f"{module}.{role}")
        if infos[role] is None or len(infos[role].shape) != 2:
            found = "is missing" if infos[role] is None else f"has the shape {list(infos[role].shape)}, two axes are needed"
            raise ValueError(f"{checkpoint.path}: tensor '{module}.{role}' {found}; {AGAIN}")
    rows, columns = LAYOUTS[layout].shape(infos["qweight"].shape, bits)
    groups = infos["scales"].shape[0]
    index = checkpoint.tensors.get(f"{module}.g_idx")
    if infos["qweight"].dtype != "int32" or infos["qzeros"].dtype != "int32" or not groups or columns % groups and index is None \
            or infos["qzeros"].shape != (groups, words_for(rows, bits)):
        raise ValueError(f"{infos['qzeros'].file}: tensors {module}.qweight, .scales and .qzeros are {infos['qweight'].dtype} "
                         f"{list(infos['qweight'].shape)}, {list(infos['scales'].shape)} and {infos['qzeros'].dtype} "
                         f"{list(infos['qzeros'].shape)}, which do not belong together with codes of {bits} bits; {AGAIN}")
    tensors = {"weight": infos["qweight"].name, "scale": infos["scales"].name, "zero": infos["qzeros"].name}
    if index is not None:
        tensors["groups"] = index.name
    return ScaledLinear((rows, columns), layout, bits, (1, -(-columns // groups)), tensors)
