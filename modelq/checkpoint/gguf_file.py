"""A GGUF file as a checkpoint: Hugging Face names, tensors dequantized one at a time, config and tokenizer from the metadata.

The `gguf` library parses the file and dequantizes. Here are the names, the order of the query and key rows (llama.cpp interleaves
them for its rotary embedding) and the checks that keep a damaged file from being read as something else.
"""
from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq.checkpoint.base import Checkpoint, TensorInfo
from modelq.checkpoint.gguf_config import config_from_metadata, hugging_face_name
from modelq.checkpoint.gguf_reader import parse
from modelq.checkpoint.safetensors import close_mapping, drop_pages, numpy_dtype

if TYPE_CHECKING:
    from modelq.checkpoint.tokenizer import Tokenizer

_NATIVE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_CHUNK_BYTES = 4 << 20  # dequantized at a time: bounds the library's temporaries


class GGUFCheckpoint(Checkpoint):
    """An open GGUF file. Quantized tensors read as float32, others in their own type; see Checkpoint.

    ValueError if the file is damaged, or of an architecture or of tensor types that cannot be read.
    """

    def __init__(self, path: Path):
        reader, self._metadata = parse(path)
        self._mapping = reader.data._mmap
        self._tensors: dict[str, tuple[Any, int]] = {}
        try:
            shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
            factors = next((tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
            config = config_from_metadata(path, self._metadata, shapes, factors)
            heads = (config["num_attention_heads"], config["num_key_value_heads"])
            infos = {}
            for tensor in reader.tensors:
                if tensor.name == "rope_freqs.weight":  # a config value in llama.cpp's clothes: config_from_metadata has read it
                    continue
                name = hugging_face_name(path, tensor.name)
                interleaved = _interleaved_heads(config["model_type"], tensor.name, *heads)
                infos[name] = _tensor_info(path, name, tensor, shapes[tensor.name], interleaved)
                self._tensors[name] = (tensor, interleaved)
        except TypeError as error:  # a list where a number should be
            raise ValueError(f"{path}: damaged GGUF metadata ({error}); download the file again") from None
        super().__init__(path, config, infos)

    def read(self, name: str) -> np.ndarray:
        info = self._info(name)
        if not self._tensors:
            raise ValueError(f"{self.path}: the file is closed; open the checkpoint again to read tensor {name!r}")
        tensor, heads = self._tensors[name]
        array = _dequantize(tensor, info)
        if heads:  # [heads, half, 2] as llama.cpp pairs the rows -> [heads, 2, half] as Hugging Face does
            array = array.reshape(heads, info.shape[0] // heads // 2, 2, *info.shape[1:]).swapaxes(1, 2).reshape(info.shape)
        return array

    def release(self, names: Iterable[str] | None = None) -> None:
        for name in list(self._tensors) if names is None else names:
            self._info(name)
            if self._tensors:
                tensor, _ = self._tensors[name]
                drop_pages(self._mapping, int(tensor.data_offset), int(tensor.n_bytes))

    def tokenizer(self) -> Tokenizer:
        from modelq.checkpoint.gguf_tokenizer import build_tokenizer

        return build_tokenizer(self.path, self._metadata)

    def save_tokenizer(self, directory: Path | str) -> list[Path]:
        from modelq.checkpoint.gguf_tokenizer import save_tokenizer

        return save_tokenizer(self.tokenizer(), Path(directory), self.config)

    def close(self) -> None:
        self._tensors = {}
        mapping, self._mapping = self._mapping, None
        close_mapping(mapping)


def _tensor_info(path: Path, name: str, tensor: Any, shape: tuple[int, ...], interleaved: int) -> TensorInfo:
    kind = tensor.tensor_type
    if kind.name not in _NATIVE and not _can_dequantize(kind):
        raise ValueError(f"{path}: tensor {tensor.name!r} has the type {kind.name}, which cannot be dequantized; take another GGUF file")
    if interleaved and shape[0] % (2 * interleaved):
        raise ValueError(f"{path}: tensor {tensor.name!r} has the shape {shape}, whose rows are no whole pairs of {interleaved} heads")
    dtype = _NATIVE.get(kind.name, "float32")
    return TensorInfo(name, dtype, shape, int(np.prod(shape, dtype=object)) * numpy_dtype(dtype).itemsize, path)


@lru_cache(maxsize=None)
def _can_dequantize(kind: Any) -> bool:
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _dequantize(tensor: Any, info: TensorInfo) -> np.ndarray:
    """The tensor's values, some rows at a time."""
    from gguf.quants import dequantize

    kind = tensor.tensor_type
    if kind.name in _NATIVE:
        return np.asarray(tensor.data).view(numpy_dtype(info.dtype)).reshape(info.shape)
    rows = np.asarray(tensor.data).reshape(-1, tensor.data.shape[-1])
    result = np.empty((len(rows), info.shape[-1]), np.float32)
    step = max(1, _CHUNK_BYTES // (4 * info.shape[-1]))
    for start in range(0, len(rows), step):
        result[start : start + step] = dequantize(rows[start : start + step], kind)
    return result.reshape(info.shape)


def _interleaved_heads(model_type: str, gguf_name: str, heads: int, kv_heads: int) -> int:
    """How many heads' rows are interleaved in this tensor: only the llama architecture's query and key projections are."""
    if model_type != "llama":
        return 0
    return heads if ".attn_q." in gguf_name else kv_heads if ".attn_k." in gguf_name else 0
