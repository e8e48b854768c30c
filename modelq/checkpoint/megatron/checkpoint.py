"""A checkpoint of Megatron-LM or NeMo as a checkpoint: Hugging Face names, config in the shape of config.json, tensors merged on demand.

Read are folders of Megatron-LM (mp_rank_XX files per rank, and torch_dist), NeMo 2's (context/ and weights/), and NeMo 1's .nemo archives
and unpacked folders, of Llama-like and Mixtral-like models. See pickles.py for why a hostile file can do nothing.
"""
from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq.checkpoint.base import Checkpoint
from modelq.checkpoint.folder import copy_files, side_files_of
from modelq.checkpoint.megatron.distributed import METADATA, DistributedFolder
from modelq.checkpoint.megatron.names import Entry, Piece, entries_of_folder, entries_of_shards, pieces_of
from modelq.checkpoint.megatron.places import Archive, Folder, Place
from modelq.checkpoint.megatron.ranks import WEIGHT_FILES, Shards, rank_files, settings_of
from modelq.checkpoint.megatron.settings import Settings, config_of
from modelq.checkpoint.megatron.torch_file import TorchFile

if TYPE_CHECKING:
    from modelq.checkpoint.tokenizer import Tokenizer

log = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
COMMON = "common.pt"
NEMO_CONFIGS = ("model_config.yaml", "context/model.yaml")
_TOKENIZER_FOLDERS = ("", "tokenizer", "hf_tokenizer", "context/nemo_tokenizer", "context/tokenizer")


def is_megatron(path: Path) -> bool:
    """Whether a folder looks like a checkpoint of Megatron-LM or NeMo."""
    return any((path / name).is_file() for name in (TRACKER, METADATA, COMMON)) or any((path / name).is_file() for name in NEMO_CONFIGS) \
        or any(any(path.glob(f"*_rank_*/{name}")) for name in WEIGHT_FILES)


class MegatronCheckpoint(Checkpoint):
    """An open checkpoint of Megatron-LM or NeMo: a folder, the folder of one iteration, or a .nemo archive. See Checkpoint.

    Tensors that lie in one piece are views of the file, others are put together anew at every `read`. ValueError if a file is damaged,
    names anything but weights and settings, or is of a model that modelq would compute wrongly.
    """

    def __init__(self, path: Path):
        place: Place = Folder(_iteration(path)) if path.is_dir() else Archive(path)
        self._place: Place | None = place
        try:
            entries, settings = _open(place)
            self._folder = _tokenizer_folder(path) if path.is_dir() else None
            config = _config(settings, entries, self._folder)
            self._pieces = _pieces(place.path, entries, config, settings)
        except BaseException:
            place.close()
            raise
        super().__init__(path, config, {name: piece.info for name, piece in self._pieces.items()})
        self.side_files = side_files_of(self._folder) if self._folder else ()

    def read(self, name: str) -> np.ndarray:
        self._info(name)
        if self._place is None:
            raise ValueError(f"{self.path}: the checkpoint is closed; open it again to read tensor {name!r}")
        piece = self._pieces[name]
        array = np.ascontiguousarray(piece.take(piece.entry.read()))
        array.flags.writeable = False
        return array

    def release(self, names: Iterable[str] | None = None) -> None:
        for name in self.tensors if names is None else names:
            self._info(name)
            if self._place is not None:
                self._pieces[name].entry.release()

    def tokenizer(self) -> Tokenizer:
        from modelq.checkpoint.tokenizer import Tokenizer

        if self._folder is None:
            raise FileNotFoundError(f"{self.path}: no tokenizer.json in it (Megatron-LM keeps tokenizers elsewhere); put the Hugging Face "
                                    "tokenizer of the model beside it, in a folder 'tokenizer', or pass one")
        return Tokenizer.from_folder(self._folder)

    def save_tokenizer(self, directory: Path | str) -> list[Path]:
        return copy_files(self.side_files, self._folder, Path(directory)) if self._folder else []

    def close(self) -> None:
        place, self._place = self._place, None
        if place is not None:
            place.close()


def _iteration(path: Path) -> Path:
    """The folder of the latest iteration, where there are several."""
    tracker = path / TRACKER
    if not tracker.is_file():
        return path
    said = tracker.read_text(errors="replace").strip()
    folder = path / (said if said == "release" else f"iter_{int(said):07d}" if said.isdigit() else "?")
    if not folder.is_dir():
        raise FileNotFoundError(f"{tracker}: says {said[:40]!r}, and there is no folder {folder.name}; copy it again")
    return folder


def _open(place: Place) -> tuple[dict[str, Entry], Settings]:
    """What tensors there are, and the settings they were trained with."""
    told = _nemo_settings(place)
    metadata = sorted((name for name in place.names if name.endswith(METADATA) and Path(name).name == METADATA), key=len)
    if metadata:
        prefix = metadata[0].removesuffix(METADATA)
        folder = DistributedFolder(place, prefix)
        file = place.path / metadata[0]
        return entries_of_folder(folder, file), told or _common_settings(place, prefix)
    if files := rank_files(place):
        shards = Shards(place.path, {rank: TorchFile(place.region(name)) for rank, name in files.items()})
        return entries_of_shards(shards), told or Settings(shards.settings, f"{place.path}: args")
    if zarr := next((name for name in sorted(place.names) if name.endswith(".zarray")), None):
        raise ValueError(f"{place.path / zarr}: a checkpoint in zarr, which is not read: load and save it with Megatron-LM's "
                         "--ckpt-convert-format torch_dist, or NeMo's dist_ckpt_format: torch_dist")
    raise FileNotFoundError(f"{place.path}: no weights of Megatron-LM or NeMo: neither {METADATA} and .distcp files, nor mp_rank_XX "
                            "folders, nor model_weights.ckpt")


def _nemo_settings(place: Place) -> Settings | None:
    import yaml

    name = next((name for name in NEMO_CONFIGS if name in place.names), None)
    if name is None:
        return None
    region = place.region(name)
    try:
        values = yaml.load(region.bytes(), Loader=_loader())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{region.path}: not valid YAML ({' '.join(str(error).split())[:200]})") from None
    if isinstance(values, dict) and isinstance(values.get("config"), dict):      # NeMo 2: a model object with its config
        values = {**values, **values["config"]}
    if not isinstance(values, dict):
        raise ValueError(f"{region.path}: expected settings by name, found {type(values).__name__}")
    return Settings(values, str(region.path))


def _loader() -> Any:
    """yaml's safe loader, to which objects of unknown kinds are None."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("", lambda loader, suffix, node: None)
    return Loader


def _common_settings(place: Place, prefix: str) -> Settings:
    if prefix + COMMON not in place.names:
        raise FileNotFoundError(f"{place.path / prefix / COMMON}: it is missing, and holds the settings of the model; copy it too")
    file = TorchFile(place.region(prefix + COMMON))
    state = settings_of(file.value)
    if not state:
        raise ValueError(f"{file.region.path}: no settings of Megatron-LM (args) in it")
    return Settings(state, f"{file.region.path}: args")


def _tokenizer_folder(path: Path) -> Path | None:
    return next((path / name for name in _TOKENIZER_FOLDERS if (path / name / "tokenizer.json").is_file()), None)


def _config(settings: Settings, entries: dict[str, Entry], folder: Path | None) -> dict[str, Any]:
    if "embedding.word_embeddings.weight" not in entries:
        raise ValueError(f"{settings.where}: no tensor 'embedding.word_embeddings.weight': not a language model of Megatron-LM?")
    rows = entries["embedding.word_embeddings.weight"].shape[0]
    known = settings.size("vocab_size", default=None)
    if known is None and folder is not None:
        from modelq.checkpoint.tokenizer import Tokenizer

        known = Tokenizer.from_folder(folder).backend.get_vocab_size()
    if known is None:
        log.warning("%s: no vocab_size and no tokenizer: the vocabulary keeps its padding, %d rows", settings.where, rows)
    return config_of(settings, frozenset(entries), rows, known)


def _pieces(path: Path, entries: dict[str, Entry], config: dict[str, Any], settings: Settings) -> dict[str, Piece]:
    zero_centered = settings.flag("apply_layernorm_1p", "layernorm_zero_centered_gamma") or settings.get(
        "normalization", default="") == "layernorm1p"
    try:
        return pieces_of(entries, config, zero_centered)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
