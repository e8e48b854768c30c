"""FP8 weights with a scale for the whole, for rows, or for blocks of any size: what the linears of such a folder are."""
from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from modelq.checkpoint.base import Checkpoint, TensorInfo
from modelq.checkpoint.said import AGAIN
from modelq.checkpoint.scaled import ScaledLinear
from modelq.checkpoint.static_fp8 import dialect_of

DTYPES = ("float8_e4m3fn", "float8_e5m2")
USUAL_BLOCK = 128
_INPUT_SCALES = (".input_scale", ".activation_scale")
_SCALES = ("weight_scale", "weight_scale_inv")


def find_fp8(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, ScaledLinear] | None:
    """quant_method fp8. None: in blocks of 128 x 128, as exports of ours have them, or with static scales of inputs."""
    if dialect_of(checkpoint, config) is not None:
        return None
    block = config.get("weight_block_size")
    pairs = _scaled(checkpoint)
    if block == [USUAL_BLOCK] * 2 or block is None and pairs and all(_in_usual_blocks(*pair) for pair in pairs):
        return None
    if block is not None and (not isinstance(block, list) or len(block) != 2 or any(type(size) is not int or size < 1 for size in block)):
        raise ValueError(f"{checkpoint.path}: weight_block_size must be two positive integers, found {block!r}; {AGAIN}")
    return _linears(checkpoint, block)


def find_fbgemm(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, ScaledLinear] | None:
    """quant_method fbgemm_fp8: a scale for each row."""
    return _linears(checkpoint, None)


def find_unsaid(checkpoint: Checkpoint) -> dict[str, ScaledLinear] | None:
    """FP8 weights with scales beside them, of which no config says anything."""
    return _linears(checkpoint, None) if any(scale is not None for _, scale in _scaled(checkpoint)) else None


def _scaled(checkpoint: Checkpoint) -> list[tuple[TensorInfo, TensorInfo | None]]:
    """FP8 weights, each with its scale."""
    found = []
    for name, info in checkpoint.tensors.items():
        if info.dtype in DTYPES and name.endswith(".weight"):
            scales = (f"{name.removesuffix('weight')}{role}" for role in _SCALES)
            found.append((info, next((checkpoint.tensors[scale] for scale in scales if scale in checkpoint.tensors), None)))
    return found


def _in_usual_blocks(info: TensorInfo, scale: TensorInfo | None) -> bool:
    return scale is not None and scale.name.endswith("_inv") and scale.shape == tuple(-(-size // USUAL_BLOCK) for size in info.shape)


def _linears(checkpoint: Checkpoint, block: list[int] | None) -> dict[str, ScaledLinear]:
    linears = {}
    if any(name.endswith(_INPUT_SCALES) for name in checkpoint.tensors):
        warnings.warn(f"{checkpoint.path}: how inputs are quantized is not simulated: weights are read, and inputs stay as they are (it is "
                      "where config.json says activation_scheme static, and each weight and its input have one scale)", stacklevel=4)
    for info, scale in _scaled(checkpoint):
        if scale is None:
            raise ValueError(f"{info.file}: tensor {info.name!r} is {info.dtype} and has no {' or '.join(_SCALES)} beside it; {AGAIN}")
        if len(info.shape) != 2:
            raise ValueError(f"{info.file}: tensor {info.name!r} has the shape {list(info.shape)}, a linear's weight has two axes")
        rows, columns = info.shape
        single, by_rows = int(np.prod(scale.shape)) == 1, scale.shape in ((rows,), (rows, 1))
        found = (rows, columns) if single else (1, columns) if by_rows else block
        if found is None:
            raise ValueError(f"{scale.file}: tensor {scale.name!r} has the shape {list(scale.shape)}: neither one scale nor one for each "
                             f"of {rows} rows, and no weight_block_size says which block has which")
        linears[info.name.removesuffix(".weight")] = ScaledLinear((rows, columns), "plain", 8, (found[0], found[1]),
                                                                  {"weight": info.name, "scale": scale.name})
    if not linears:
        raise ValueError(f"{checkpoint.path}: the config says FP8, but no weight is stored so; {AGAIN}")
    return linears
