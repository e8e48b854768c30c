"""What every checkpoint offers, whatever its file format: names, shapes, arrays on demand, side files, a tokenizer.

Tensor names are always the Hugging Face ones. Nothing is read until `read` asks for it, and `release` gives pages back.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from modelq.checkpoint.tokenizer import Tokenizer


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: what `read` will return, and where it lies.

    dtype is NumPy's or ml_dtypes' spelling ("float32", "bfloat16", "float8_e4m3fn"); nbytes is the size of the array of that
    dtype and shape; file is the file that holds it (None for a tensor that is yet to be written).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path | None = None


class Checkpoint:
    """An open checkpoint. Use as a context manager, or call `close`.

    path: the folder or file; config: a dict in the shape of Hugging Face's config.json; tensors: name -> TensorInfo;
    side_files: files that an export copies as they are (tokenizer, generation config, chat template, custom code).
    """

    path: Path
    config: dict[str, Any]
    side_files: tuple[Path, ...] = ()

    def __init__(self, path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]):
        self.path = path
        self.config = config
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)

    def read(self, name: str) -> np.ndarray:
        """The tensor as a NumPy array of the dtype and shape of `tensors[name]`, read-only where it is a view of the file.

        KeyError if there is no such tensor (the message names near ones); ValueError if the file is closed.
        """
        raise NotImplementedError

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """The rows of a tensor (along its first axis) from start to stop."""
        return self.read(name)[start:stop]

    def is_made_by_rows(self, name: str) -> bool:
        """Whether `read_rows` makes these rows alone, of a tensor that `read` would make as a whole."""
        return False

    def release(self, names: Iterable[str] | None = None) -> None:
        """Let go of the memory of these tensors' pages (all: None). Views stay valid; touching them reads the file again."""
        raise NotImplementedError

    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. FileNotFoundError if it has none, ValueError if it is of an unknown kind."""
        raise NotImplementedError

    def save_tokenizer(self, directory: Path | str) -> list[Path]:
        """Write the tokenizer and the other side files into directory (which exists); return the files written."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the files. Arrays already handed out stay valid."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {str(self.path)!r}: {len(self.tensors)} tensors>"

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise KeyError(missing_tensor(name, self.tensors, self.path)) from None


class WrappedCheckpoint(Checkpoint):
    """A checkpoint whose tensors are made of another's, and the rest is that one's. inner: the other one, which it closes with itself."""

    def __init__(self, inner: Checkpoint, config: dict[str, Any], tensors: dict[str, TensorInfo]):
        super().__init__(inner.path, config, tensors)
        self.inner = inner
        self.side_files = inner.side_files

    def tokenizer(self) -> Tokenizer:
        return self.inner.tokenizer()

    def save_tokenizer(self, directory: Path | str) -> list[Path]:
        return self.inner.save_tokenizer(directory)

    def close(self) -> None:
        self.inner.close()


def missing_tensor(name: str, names: Iterable[str], where: Path) -> str:
    """The text of the error for a tensor that is not there, with the nearest names."""
    import difflib

    near = difflib.get_close_matches(name, list(names), n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; `modelq inspect` lists what there is"
    return f"{where}: no tensor {name!r}{hint}"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object_pairs_hook for json that refuses a key that is there twice: which one counts would be anybody's guess."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{twice!r} is there twice")
    return result


def read_json_object(path: Path, what: str, unique: bool = False) -> dict[str, Any]:
    """The JSON object in path. OSError if it cannot be read, ValueError (naming path and `what`) if it is no JSON object, or
    if unique is set and a key is there twice."""
    import json

    try:
        value = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=unique_keys if unique else None)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {what} is not valid JSON ({error}); download or export it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {what} must be a JSON object, found {type(value).__name__}; download or export it again")
    return value
