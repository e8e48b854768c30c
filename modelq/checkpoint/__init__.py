"""Checkpoints in and out: Hugging Face folders, GGUF files and Hub ids are read lazily; exports are streamed and crash-safe."""
from __future__ import annotations

import re
from pathlib import Path

from modelq.checkpoint.base import Checkpoint, TensorInfo

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def open_checkpoint(path: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint folder (Hugging Face's, Megatron-LM's or NeMo's), a .safetensors, .gguf or .nemo file, or a Hub id ("org/name",
    with an optional revision).

    Everything is validated here; tensors are read later, on demand. FileNotFoundError if nothing is there, ValueError if a file
    is damaged or lies, ImportError if a Hub id is given without huggingface_hub.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return _open_folder(local)
    if local.is_file():
        return _open_file(local)
    if local.exists():
        raise ValueError(f"{local}: neither a folder nor a regular file")
    if isinstance(path, Path) or not _HUB_ID.fullmatch(path):
        raise FileNotFoundError(f"{local}: no such checkpoint folder or file, and no Hub id of the form 'org/name' either")
    return _open_folder(_download(path, revision))


def _open_folder(path: Path) -> Checkpoint:
    from modelq.checkpoint.folder import FolderCheckpoint
    from modelq.checkpoint.quantized import open_quantized

    ggufs = sorted(path.glob("*.gguf"))
    if ggufs and not any(path.glob("*.safetensors")):
        if len(ggufs) > 1:
            raise ValueError(f"{path}: {len(ggufs)} .gguf files; give the path of one of them, such as {ggufs[0]}")
        return _open_file(ggufs[0])
    if not (path / "config.json").exists():
        from modelq.checkpoint.megatron import MegatronCheckpoint, is_megatron

        if is_megatron(path):
            return MegatronCheckpoint(path)
    return open_quantized(FolderCheckpoint(path))


def _open_file(path: Path) -> Checkpoint:
    if path.suffix == ".gguf":
        from modelq.checkpoint.gguf_file import GGUFCheckpoint

        return GGUFCheckpoint(path)
    if path.suffix == ".nemo":
        from modelq.checkpoint.megatron import MegatronCheckpoint

        return MegatronCheckpoint(path)
    if path.suffix == ".safetensors":
        from modelq.checkpoint.folder import FolderCheckpoint
        from modelq.checkpoint.quantized import open_quantized

        return open_quantized(FolderCheckpoint(path.parent, weights=path))
    raise ValueError(f"{path}: neither a .safetensors nor a .gguf nor a .nemo file; give the checkpoint's folder")


def _download(hub_id: str, revision: str | None) -> Path:
    from modelq.checkpoint.folder import SIDE_PATTERNS

    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(
            f"{hub_id!r} is no local path; to fetch it from the Hub, install huggingface_hub: pip install modelq[hub]"
        ) from None
    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json", *SIDE_PATTERNS]
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*.safetensors"]))
    except Exception as error:  # huggingface_hub raises many kinds: HTTP, offline mode, missing repository, bad id
        where = hub_id if revision is None else f"{hub_id} at revision {revision}"
        raise FileNotFoundError(
            f"{where}: no such local path, and the Hub has no answer ({type(error).__name__}: {error}); check the spelling, "
            "the network, and for gated models `hf auth login`"
        ) from error
