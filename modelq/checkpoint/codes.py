"""How low-precision weights are stored elsewhere: codes, zero points and scales of a [out, in] matrix out of a layout's own arrays.

Integers of 1 to 8 bits are packed as a stream of bits, the first in the lowest ones, along one axis of an int32 array; AutoAWQ's order
within a word is its own. All functions give unsigned codes as uint8, or numbers as the array has them (int8, FP8).
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# AutoAWQ's words: nibble k holds column _AWQ[k] of eight (awq/utils/packing_utils.py of autoawq 0.2.9)
_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


class Layout(NamedTuple):
    """codes(array, bits, start, stop, columns) -> [stop - start, columns] of rows start to stop; zeros(array, bits, (rows, columns)) -> the
    zero points of a grid of blocks, in the numbers that codes are; scales(array) -> the same grid. shape(array's shape, bits) -> (out, in),
    of which in may be that of the last word's end."""
    codes: Callable[[np.ndarray, int, int, int, int], np.ndarray]
    zeros: Callable[[np.ndarray, int, tuple[int, int]], np.ndarray]
    scales: Callable[[np.ndarray], np.ndarray]
    shape: Callable[[tuple[int, ...], int], tuple[int, int]]


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """uint8 [rows, count]: the first codes of each row of int32 [rows, words]."""
    data = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        return data[:, :count]
    if bits == 4:
        return np.stack([data & 15, data >> 4], axis=-1).reshape(len(data), -1)[:, :count]
    flat = np.unpackbits(data, axis=1, bitorder="little", count=count * bits)
    return np.packbits(flat.reshape(len(data), count, bits), axis=2, bitorder="little")[:, :, 0]


def words_for(count: int, bits: int) -> int:
    """How many 32-bit words hold this many codes."""
    return -(-count * bits // 32)


def _awq_codes(array: np.ndarray, bits: int, start: int, stop: int, columns: int) -> np.ndarray:
    first = start // 8
    return _awq_rows(array[:columns, first:-(-stop // 8)])[start - first * 8:stop - first * 8]


def _awq_rows(words: np.ndarray) -> np.ndarray:
    """uint8 [8 words, rows] of int32 [rows, words]: the codes, turned over."""
    data = np.ascontiguousarray(words.T).astype("<i4", copy=False).view(np.uint8).reshape(words.shape[1], -1, 4)
    found = np.empty((words.shape[1], 8, words.shape[0]), np.uint8)
    for place, column in enumerate(_AWQ):
        found[:, column] = data[:, :, place // 2] >> 4 if place % 2 else data[:, :, place // 2] & 15
    return found.reshape(-1, words.shape[0])


def _awq_zeros(array: np.ndarray, bits: int, grid: tuple[int, int]) -> np.ndarray:
    return _awq_rows(array)[:grid[0]]


def _gptq_codes(array: np.ndarray, bits: int, start: int, stop: int, columns: int) -> np.ndarray:
    return unpack(array[:, start:stop].T, bits, columns)


def _gptq_zeros(array: np.ndarray, bits: int, grid: tuple[int, int]) -> np.ndarray:
    return unpack(array, bits, grid[0]).T


def _gptq_first_zeros(array: np.ndarray, bits: int, grid: tuple[int, int]) -> np.ndarray:
    """Its first format stores them minus 1. ValueError for a zero point of 0, which readers take for 0 or for 2 ** bits."""
    stored = _gptq_zeros(array, bits, grid)
    if (stored == 2 ** bits - 1).any():
        raise ValueError(f"holds {2 ** bits - 1}, a zero point of 0 minus 1, on which readers of this format do not agree; save it as "
                         "gptq_v2")
    return stored + np.uint8(1)


def _packed_codes(array: np.ndarray, bits: int, start: int, stop: int, columns: int) -> np.ndarray:
    return unpack(array[start:stop], bits, columns)


def _packed_zeros(array: np.ndarray, bits: int, grid: tuple[int, int]) -> np.ndarray:
    return unpack(array.T, bits, grid[0]).T


def _plain_codes(array: np.ndarray, bits: int, start: int, stop: int, columns: int) -> np.ndarray:
    return array[start:stop]


def _plain_zeros(array: np.ndarray, bits: int, grid: tuple[int, int]) -> np.ndarray:
    return array.reshape(grid)


def _turned(array: np.ndarray) -> np.ndarray:
    return array.T


def _as_they_are(array: np.ndarray) -> np.ndarray:
    return array


LAYOUTS = {
    "awq": Layout(_awq_codes, _awq_zeros, _turned, lambda shape, bits: (shape[1] * 8, shape[0])),
    "gptq": Layout(_gptq_codes, _gptq_first_zeros, _turned, lambda shape, bits: (shape[1], shape[0] * 32 // bits)),
    "gptq_v2": Layout(_gptq_codes, _gptq_zeros, _turned, lambda shape, bits: (shape[1], shape[0] * 32 // bits)),
    "pack-quantized": Layout(_packed_codes, _packed_zeros, _as_they_are, lambda shape, bits: (shape[0], shape[1] * 32 // bits)),
    "plain": Layout(_plain_codes, _plain_zeros, _as_they_are, lambda shape, bits: (shape[0], shape[1])),
}
TURNED = ("awq", "gptq", "gptq_v2")      # with a column where others have a row
