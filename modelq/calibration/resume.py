"""Progress of a calibration, kept in a folder layer by layer, so that an interrupted one goes on where it was.

    manifest.json              what is being calibrated (a digest of config, weights and data), and how far it is
    step_0/layer_0003.safetensors   what calibration found for the quantizers of layer 3 in the first step of the algorithm
    step_0/states_0003.safetensors  the hidden states behind layer 3, from where the next one goes on; empty if none is run any more

Files appear whole (written beside, synced, renamed), and the manifest after what it speaks of. No pickle.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq.changed import ChangedCheckpoint, Rounded
from modelq.inputs import Batch
from modelq.low_rank import LowRank
from modelq.quantizers import named_values, set_named_value
from modelq.rotation import rotation_of

if TYPE_CHECKING:
    from modelq.model import Model

MANIFEST, VERSION, LOSS = "manifest.json", 3, ":loss"
TOKENS = "layer:expert_tokens"
SAMPLES, SAMPLE_BYTES = 256, 4096       # of each file: enough to tell weights from others of the same shapes


class Progress:
    """How far one step of a calibration is. This one keeps nothing."""

    is_complete = False

    def restore(self, layer: int, losses: dict[str, Any]) -> Mapping[str, np.ndarray] | None:
        """Put back what was found for a layer, and its losses, if it was done before: then there is nothing to do for it but to go on from
        the states that this gives; none if the next layer was done, too. None if the layer was not done."""
        return None

    def save(self, layer: int, states: Mapping[str, np.ndarray], losses: Mapping[str, Any]) -> None:
        """A layer is done. states: from where the next one goes on. losses: of searches so far, by module or quantizer."""


class Saved(Progress):
    """Progress of one step in a folder."""

    def __init__(self, model: Model, folder: Path, step: int, digest: str, save_every: int):
        self.model, self.step, self.save_every = model, step, save_every
        self.folder, self.manifest = folder / f"step_{step}", folder / MANIFEST
        self.digest = digest
        self._kept: set[str] = set()        # whose losses are in files
        self.count = _read_manifest(self.manifest, digest).get(str(step), 0)      # layers done, and the head behind them
        self.is_complete = self.count > model.num_layers

    def restore(self, layer: int, losses: dict[str, Any]) -> Mapping[str, np.ndarray] | None:
        if layer >= self.count:
            return None
        found = _read(self.folder / _file(layer))
        losses |= {key.removesuffix(LOSS): found.pop(key) for key in list(found) if key.endswith(LOSS)}
        give_back(self.model, layer, found)
        self._kept.update(losses)
        return _read(self._states(layer)) if layer == self.count - 1 and not self.is_complete else {}

    def save(self, layer: int, states: Mapping[str, np.ndarray], losses: Mapping[str, Any]) -> None:
        from modelq.checkpoint.writer import write_tensors

        self.folder.mkdir(parents=True, exist_ok=True)
        found = collect(self.model, layer if layer < self.model.num_layers else -1)
        found |= {name + LOSS: np.asarray(loss) for name, loss in losses.items() if name not in self._kept}
        write_tensors(self.folder / _file(layer), found)
        self._kept.update(losses)
        if (layer + 1) % self.save_every and layer + 1 < self.model.num_layers:
            return
        write_tensors(self._states(layer), states)
        self._note(layer + 1)
        self._remove_states(but=self._states(layer))

    def finish(self) -> None:
        self._note(self.model.num_layers + 1)
        self._remove_states()

    def _states(self, layer: int) -> Path:
        return self.folder / f"states_{layer:04d}.safetensors"

    def _remove_states(self, but: Path | None = None) -> None:
        for path in self.folder.glob("states_*.safetensors"):
            if path != but:
                path.unlink(missing_ok=True)

    def _note(self, count: int) -> None:
        steps = _read_manifest(self.manifest, self.digest)
        text = json.dumps({"version": VERSION, "digest": self.digest, "layers_done": {**steps, str(self.step): count}}, indent=2)
        partial = self.manifest.with_name(MANIFEST + ".partial")
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.manifest)


def digest_of(model: Model, steps: Sequence[Mapping[str, Any]], batches: Sequence[Batch], compat: str | None) -> str:
    """What a calibration depends on: rules, steps, the weights and their rotation, what was found for them before, the data, the
    precision."""
    found = hashlib.sha256()
    found.update(repr([(name, setting.enable, setting.attributes) for name, setting in model.settings.items()]).encode())
    found.update(json.dumps([_that_matter(step) for step in steps], sort_keys=True, default=str).encode())
    found.update(repr((model.runtime.compute, model.float32_weights, compat, rotation_of(model.checkpoint))).encode())
    files = {info.file for info in model.checkpoint.tensors.values() if info.file is not None}
    found.update(repr(sorted((str(file.name), file.stat().st_size, _sample(file)) for file in files)).encode())
    found.update(repr([(name, info.dtype, info.shape) for name, info in model.checkpoint.tensors.items()]).encode())
    for layer in range(-1, model.num_layers):
        for name, array in collect(model, layer).items():
            if name != TOKENS:
                found.update(name.encode() + array.tobytes())
    for batch in batches:
        found.update(repr(batch.ids.shape).encode() + batch.ids.tobytes() + (b"" if batch.mask is None else batch.mask.tobytes()))
    return found.hexdigest()


def _that_matter(step: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a step that its result depends on."""
    return {**step, "layerwise": {name: value for name, value in step["layerwise"].items() if name not in ("checkpoint_dir", "save_every")}}


def _sample(path: Path) -> str:
    """A digest of some of a file's bytes."""
    found, size = hashlib.sha256(), path.stat().st_size
    with open(path, "rb") as file:
        for start in range(0, size, max(size // SAMPLES, SAMPLE_BYTES)):
            file.seek(start)
            found.update(file.read(SAMPLE_BYTES))
    return found.hexdigest()


def _read_manifest(path: Path, digest: str) -> dict[str, int]:
    """Steps to layers done. ValueError if the folder is of another calibration."""
    try:
        said = json.loads(path.read_text())
        steps, version, other = said["layers_done"], said["version"], said["digest"]
        if not isinstance(steps, dict) or any(type(count) is not int for count in steps.values()):
            raise TypeError("layers_done maps steps to numbers")
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the state of a calibration ({error}): remove the folder, or give another checkpoint_dir") from None
    if other != digest or version != VERSION:
        raise ValueError(f"{path}: the folder holds the progress of another calibration (other config, model, data or version): remove it, "
                         "or give another checkpoint_dir")
    return steps


def _file(layer: int) -> str:
    return f"layer_{layer:04d}.safetensors"


# What calibration found ------------------------------------------------------------------------------------------------------------

def collect(model: Model, layer: int) -> dict[str, np.ndarray]:
    """Everything that calibration found for a layer (-1: outside the layers), by names that say where it belongs."""
    found: dict[str, np.ndarray] = {}
    for name, slot in model.slots.items():
        if slot.layer == layer:
            found |= named_values(name, model.quantizers[name])
    for row in model.modules:
        if row["layer"] == layer and row["name"] in model.low_rank:
            branch = model.low_rank[row["name"]]
            found |= {f"{row['name']}:low_rank:down": branch.down, f"{row['name']}:low_rank:up": branch.up}
        changed = getattr(model.checkpoint, "changed", {}).get(row["weight"]) if row["layer"] == layer else None
        if changed is not None:
            word = f"{changed.scheme},{changed.block_size or 0},{changed.dtype}"
            found |= {f"{row['weight']}:rounded:{word}:{role}": part for role, part in changed.parts.items()}
    if layer in model.expert_tokens:
        found[TOKENS] = np.asarray(model.expert_tokens[layer], np.int64)
    return found


def give_back(model: Model, layer: int, found: dict[str, np.ndarray]) -> None:
    if (tokens := found.pop(TOKENS, None)) is not None:
        model.expert_tokens[layer] = tokens
    branches: dict[str, dict[str, np.ndarray]] = {}
    rounded: dict[str, tuple[str, dict[str, np.ndarray]]] = {}
    for key, array in found.items():
        name, kind, *rest = key.split(":")
        if kind == "low_rank":
            branches.setdefault(name, {})[rest[0]] = array
        elif kind == "rounded":
            rounded.setdefault(name, (rest[0], {}))[1][rest[1]] = array
        else:
            set_named_value(model.quantizers, key, array)
    model.low_rank |= {name: LowRank(parts["down"], parts["up"]) for name, parts in branches.items()}
    for name, (word, parts) in rounded.items():
        scheme, size, dtype = word.split(",")
        if not isinstance(model.checkpoint, ChangedCheckpoint):
            model.checkpoint = ChangedCheckpoint(model.checkpoint)
        model.checkpoint.put(name, Rounded(parts, scheme, int(size) or None, dtype))


# Files -----------------------------------------------------------------------------------------------------------------------------

def _read(path: Path) -> dict[str, np.ndarray]:
    from modelq.checkpoint.safetensors import read_tensors

    try:
        return read_tensors(path)
    except (ValueError, FileNotFoundError) as error:
        what = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise ValueError(f"{path}: this part of a calibration's progress is {what}: remove {path.parent.parent} to begin anew") from error
