"""Folders of Megatron-LM with a file per rank (mp_rank_XX): what tensor parallelism split is put together, what pipeline and expert
parallelism numbered from 0 on every rank gets the number that it has in the model.
"""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modelq.checkpoint.megatron.grouped import ungrouped
from modelq.checkpoint.megatron.pickles import Opaque
from modelq.checkpoint.megatron.places import AGAIN, Place
from modelq.checkpoint.megatron.torch_file import FileTensor, TorchFile
from modelq.checkpoint.safetensors import numpy_dtype

# mp_rank_01, mp_rank_01_002, mp_rank_01_002_003: tensor, pipeline and expert rank; NeMo's tp_rank_01_pp_rank_002
RANK = re.compile(r"(?:.*/)?(?:mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?|tp_rank_(\d{2,})_pp_rank_(\d{3,}))/([^/]+)")
WEIGHT_FILES = ("model_optim_rng.pt", "model_rng.pt", "model_weights.ckpt")

_LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..*)")
_EXPERT = re.compile(r"(.*\blocal_experts\.|.*\bexperts\.linear_fc[12]\.(?:weight|bias))(\d+)(.*)")


class Rank(NamedTuple):
    tensor: int
    pipeline: int
    expert: int


class Piece(NamedTuple):
    file: TorchFile
    tensor: FileTensor


class Shards:
    """The tensors of all ranks: Megatron's names with the model's numbers of layers and experts -> pieces by tensor rank.

    settings: of the training run, as the first rank's file has them.
    """

    def __init__(self, path: Path, opened: dict[Rank, TorchFile]):
        self.settings = settings_of(next(iter(opened.values())).value)
        self.opened = _without_pipeline(opened) if self.settings.get("pipeline_model_parallel_size") == 1 else opened
        self.pieces: dict[str, dict[int, Piece]] = {}
        ranks = list(self.opened)
        expected = [Rank(t, p, e) for t in range(1 + max(r.tensor for r in ranks)) for p in range(1 + max(r.pipeline for r in ranks))
                    for e in range(1 + max(r.expert for r in ranks))]
        if missing := sorted(set(expected) - set(ranks)):
            raise ValueError(f"{path}: no file of tensor rank {missing[0].tensor}, pipeline rank {missing[0].pipeline}, expert rank "
                             f"{missing[0].expert}; {AGAIN}")
        self._expert_ranks = 1 + max(r.expert for r in ranks)
        for expert in range(self._expert_ranks):
            for tensor in range(1 + max(r.tensor for r in ranks)):
                self._take([self.opened[rank] for rank in ranks if rank.tensor == tensor and rank.expert == expert], tensor, expert)

    def shape(self, name: str, axis: int | None) -> tuple[str, tuple[int, ...]]:
        """dtype and shape of a tensor that is split along an axis (None: every rank has all of it)."""
        pieces = self.pieces[name]
        first = pieces[0].tensor
        if axis is None:
            return first.dtype, first.shape
        sizes = sum(piece.tensor.shape[axis] for piece in pieces.values())
        return first.dtype, (*first.shape[:axis], sizes, *first.shape[axis + 1:])

    def read(self, name: str, axis: int | None, parts: int = 1) -> np.ndarray:
        """A whole tensor. parts: what stands one behind the other on each rank (gate and up), and is put together part by part."""
        arrays = [piece.file.read(piece.tensor) for _, piece in sorted(self.pieces[name].items())]
        if axis is None or len(arrays) == 1:
            return arrays[0]
        dtype, shape = self.shape(name, axis)
        whole = np.empty((parts, shape[0] // parts, *shape[1:]) if parts > 1 else shape, numpy_dtype(dtype))
        if parts > 1:
            arrays, axis = [array.reshape(parts, -1, *array.shape[1:]) for array in arrays], axis + 1
        np.concatenate(arrays, axis=axis, out=whole)
        return whole.reshape(shape)

    def release(self, name: str) -> None:
        for piece in self.pieces[name].values():
            piece.file.release(piece.tensor)

    def _take(self, stages: list[TorchFile], tensor: int, expert: int) -> None:
        """The files of one tensor and expert rank, in the order of the pipeline: virtual stages go round them."""
        models = [[ungrouped(file.region.path, model, self._expert_ranks) for model in _models(file)] for file in stages]
        before = 0
        for chunk in range(max(map(len, models))):
            for file, chunks in zip(stages, models):
                if chunk < len(chunks):
                    before += self._take_stage(file, chunks[chunk], tensor, expert, before)

    def _take_stage(self, file: TorchFile, model: dict[str, FileTensor], tensor: int, expert: int, before: int) -> int:
        """Returns how many layers the stage has."""
        layers = {int(found[2]) for name in model if (found := _LAYER.fullmatch(name))}
        experts = {int(found[2]) for name in model if (found := _EXPERT.fullmatch(name))}
        if layers and layers != set(range(len(layers))) and min(layers) < before:
            raise ValueError(f"{file.region.path}: its layers are {sorted(layers)}; expected 0 to {len(layers) - 1}")
        shift = before if layers and min(layers) == 0 else 0      # NeMo's and newer Megatron's names already count from the model's first
        for name, leaf in model.items():
            renumbered = _renumber(_renumber(name, _LAYER, shift), _EXPERT, expert * len(experts))
            if expert and not _EXPERT.fullmatch(name):
                continue        # every expert rank has all that is no expert's
            pieces = self.pieces.setdefault(renumbered, {})
            pieces.setdefault(tensor, Piece(file, leaf))       # tied embeddings are on the last stage too
        return len(layers)


def rank_files(place: Place) -> dict[Rank, str]:
    """The file of weights of every rank that a place has, in the order of the ranks. A single rank's may lie at the top (NeMo)."""
    files: dict[Rank, str] = {}
    for name in sorted(place.names):
        found = RANK.fullmatch(name)
        if name in WEIGHT_FILES:
            files.setdefault(Rank(0, 0, 0), name)
        if found and found[6] in WEIGHT_FILES:
            files.setdefault(Rank(int(found[1] or found[4]), int(found[2] or found[5] or 0), int(found[3] or 0)), name)
    return dict(sorted(files.items()))


def _without_pipeline(opened: dict[Rank, TorchFile]) -> dict[Rank, TorchFile]:
    """Where there is one stage, mp_rank_00_001 is expert rank 1."""
    return {Rank(rank.tensor, 0, rank.pipeline or rank.expert): file for rank, file in opened.items()}


def _renumber(name: str, pattern: re.Pattern[str], shift: int) -> str:
    found = pattern.fullmatch(name)
    return f"{found[1]}{int(found[2]) + shift}{found[3]}" if found else name


def settings_of(value: Any) -> dict[str, Any]:
    """The settings of the training run in what a file of Megatron-LM holds; none if there are none."""
    args = value.get("args") if isinstance(value, dict) else None
    state = args.state if isinstance(args, Opaque) else args
    return state if isinstance(state, dict) else {}


def _models(file: TorchFile) -> list[dict[str, FileTensor]]:
    """The weights of a file, per virtual stage of the pipeline."""
    value = file.value
    if isinstance(value, dict) and any(isinstance(value.get(key), dict) for key in ("model", "model0")):
        keys = ["model"] if isinstance(value.get("model"), dict) else sorted(
            (key for key in value if isinstance(key, str) and re.fullmatch(r"model\d+", key)), key=lambda key: int(key[5:]))
        return [flat(value[key]) for key in keys]
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        return [flat(value["state_dict"])]
    if isinstance(value, dict) and flat(value):
        return [flat(value)]
    raise ValueError(f"{file.region.path}: no weights of a model in it (neither model nor state_dict); {AGAIN}")


def flat(state: dict[str, Any], prefix: str = "") -> dict[str, FileTensor]:
    """Nested dictionaries as one, names joined by dots; what is no tensor is left out."""
    found: dict[str, FileTensor] = {}
    for name, value in state.items():
        if isinstance(value, FileTensor):
            found[f"{prefix}{name}"] = value
        elif isinstance(value, dict):
            found.update(flat(value, f"{prefix}{name}."))
    return found
