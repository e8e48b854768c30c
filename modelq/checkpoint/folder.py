"""A Hugging Face folder: config.json, one .safetensors file or many with an index, tokenizer and other side files."""
from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from modelq.checkpoint.base import Checkpoint, TensorInfo, read_json_object
from modelq.checkpoint.safetensors import SafetensorsFile

if TYPE_CHECKING:
    from modelq.checkpoint.tokenizer import Tokenizer

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# What an export copies as it is. Weights, config.json and quantization configs are the exporter's own.
SIDE_PATTERNS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "*.tiktoken", "tekken.json", "generation_config.json",
    "chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja", "preprocessor_config.json", "processor_config.json",
    "*.py",
)  # fmt: skip


def side_files_of(folder: Path) -> tuple[Path, ...]:
    """What an export of the checkpoint in a folder copies as it is."""
    return tuple(sorted({file for pattern in SIDE_PATTERNS for file in folder.glob(pattern) if file.is_file()}))


def copy_files(files: Iterable[Path], source: Path, target: Path) -> list[Path]:
    """Copy files below one folder to the same places below another; return the copies."""
    written = []
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        written.append(Path(shutil.copyfile(file, copy)))
    return written


class FolderCheckpoint(Checkpoint):
    """A folder (or, with weights, one .safetensors file in it). Views are zero-copy. See Checkpoint.

    FileNotFoundError names what is missing; ValueError whatever the files claim wrongly.
    """

    def __init__(self, path: Path, weights: Path | None = None):
        config = _read_config(path)
        self._files: dict[Path, SafetensorsFile] = {}
        try:
            tensors = self._open_weights(path, weights)
        except BaseException:
            self.close()
            raise
        super().__init__(path, config, tensors)
        self.side_files = side_files_of(path)

    def read(self, name: str) -> np.ndarray:
        return self._files[_file_of(self._info(name))].read(name)

    def release(self, names: Iterable[str] | None = None) -> None:
        if names is None:
            for file in self._files.values():
                file.release()
            return
        for name in names:
            self._files[_file_of(self._info(name))].release([name])

    def tokenizer(self) -> Tokenizer:
        from modelq.checkpoint.tokenizer import Tokenizer

        return Tokenizer.from_folder(self.path)

    def save_tokenizer(self, directory: Path | str) -> list[Path]:
        return copy_files(self.side_files, self.path, Path(directory))

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _open_weights(self, path: Path, weights: Path | None) -> dict[str, TensorInfo]:
        if weights is None and not (path / SINGLE_FILE).exists() and (path / INDEX_FILE).exists():
            return self._open_shards(path)
        file = self._open(weights or _single_file(path))
        if not file.tensors:
            raise ValueError(f"{file.path}: the file holds no tensors; download or export it again")
        return dict(file.tensors)

    def _open(self, path: Path) -> SafetensorsFile:
        self._files[path] = SafetensorsFile(path)
        return self._files[path]

    def _open_shards(self, path: Path) -> dict[str, TensorInfo]:
        index = path / INDEX_FILE
        weight_map = _read_weight_map(index)
        for shard in dict.fromkeys(weight_map.values()):
            if not (path / shard).exists():
                raise FileNotFoundError(f"{path / shard}: the shard is missing, {INDEX_FILE} names it; download it again")
            self._open(path / shard)
        return _merge_shards(index, weight_map, self._files)


def _merge_shards(index: Path, weight_map: dict[str, str], files: dict[Path, SafetensorsFile]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for path, file in files.items():
        for name, info in file.tensors.items():
            if name in tensors:
                raise ValueError(f"{path}: tensor {name!r} is in {_file_of(tensors[name]).name} too; delete the stale shard")
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors:
            raise ValueError(f"{index.parent / shard}: no tensor {name!r}, though {index.name} says so; download the shard again")
        if _file_of(tensors[name]) != index.parent / shard:
            raise ValueError(
                f"{index}: says tensor {name!r} is in {shard}, but it is in {_file_of(tensors[name]).name}; download the index again"
            )
    return tensors


def _file_of(info: TensorInfo) -> Path:
    assert info.file is not None
    return info.file


def _read_config(path: Path) -> dict:
    config = path / "config.json"
    if not config.exists():
        raise FileNotFoundError(f"{config}: a Hugging Face checkpoint folder needs config.json beside the weights")
    return read_json_object(config, "the model's config")


def _single_file(path: Path) -> Path:
    if (path / SINGLE_FILE).exists():
        return path / SINGLE_FILE
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise FileNotFoundError(f"{path / INDEX_FILE}: {len(found)} .safetensors files but no index; download {INDEX_FILE} too")
    pickled = [file.name for pattern in ("*.bin", "*.pth", "*.pt") for file in path.glob(pattern)]
    if pickled:
        raise FileNotFoundError(f"{path}: only pickled weights ({pickled[0]}); save them as safetensors with transformers first")
    raise FileNotFoundError(f"{path}: neither {SINGLE_FILE} nor {INDEX_FILE} nor a .gguf file; is this a checkpoint folder?")


def _read_weight_map(index: Path) -> dict[str, str]:
    """The index's tensor -> shard table. Shards must lie in the folder by name; where a link there leads is the user's business
    (the Hub's cache consists of links)."""
    weight_map = read_json_object(index, "the index", unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map; download or export the index again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or "\0" in shard or "\\" in shard:
            raise ValueError(f"{index}: tensor {name!r} is said to be in {shard!r}, which is no .safetensors file name")
        parts = PurePosixPath(shard)
        if parts.is_absolute() or ".." in parts.parts:
            raise ValueError(f"{index}: tensor {name!r} is said to be in {shard!r}, outside the folder; do not trust this file")
    return weight_map
