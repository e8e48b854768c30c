"""The progress of a search in a folder: what calibration found, a file per format; scores and the last state, JSON. Files appear whole."""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modelq.autoquantize.candidates import Calibrated, Scores
from modelq.quantizers import Found

FILE, VERSION, QUANTIZERS, SEARCH = "search.json", 1, "modelq.quantizers", "modelq.search"


class Saved:
    """signature: what the results depend on, by a word for each thing; a folder of another is refused. Without a folder nothing is kept."""

    def __init__(self, folder: Any, signature: Mapping[str, Any]):
        self.folder = None if folder is None else Path(folder)
        self.signature = {word: hashlib.sha256(json.dumps(thing, sort_keys=True, default=str).encode()).hexdigest()
                          for word, thing in signature.items()}
        self.digest = hashlib.sha256(repr(sorted(self.signature.items())).encode()).hexdigest()
        self.scores: Scores = {}
        self.batches = 0
        if self.folder is None:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"checkpoint: {self.folder} is a file, and this search keeps its state in a folder: give another path")
        if (self.folder / FILE).exists():
            self._read(self.folder / FILE)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)

    def _read(self, path: Path) -> None:
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            version, signature, self.scores, self.batches = (said[word] for word in ("version", "signature", "scores", "batches"))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not the state of a search ({error}): remove the folder, or give another checkpoint") from None
        others = [word for word, digest in self.signature.items() if signature.get(word) != digest]
        if version != VERSION or others:
            raise ValueError(f"{path}: the state of another search (other {', '.join(others) or 'version'}): give another checkpoint, or "
                             "remove that folder")

    def values(self, recipe: str) -> dict[str, Calibrated] | None:
        """What was found for a format before, None if it was not."""
        from modelq.checkpoint.safetensors import SafetensorsFile

        path = self._file(recipe)
        if path is None or not path.exists():
            return None
        try:
            file = SafetensorsFile(path)
            tensors = {name: np.array(file.read(name)) for name in file.tensors}
            said, search = json.loads(file.metadata[QUANTIZERS]), file.metadata[SEARCH]
            file.close()
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}: damaged ({error}): remove {path.parent} to begin anew") from None
        if search != self.digest:       # of one whose search.json was removed
            return None
        found: dict[str, list[dict[str, Any]]] = {name: [{} for _ in range(count)] for name, (_, count) in said.items()}
        for key, value in tensors.items():
            name, stage, what = key.split(":")
            found[name][int(stage)][what] = value
        return {name: Calibrated(enabled, [Found(**parts) for parts in found[name]]) for name, (enabled, _) in said.items()}

    def keep_values(self, recipe: str, values: Mapping[str, Calibrated]) -> None:
        from modelq.checkpoint.writer import write_tensors

        if (path := self._file(recipe)) is None:
            return
        tensors = {f"{name}:{stage}:{what}": np.asarray(value) for name, one in values.items() for stage, found in enumerate(one.found)
                   for what, value in found._asdict().items() if value is not None}
        said = json.dumps({name: [one.enabled, len(one.found)] for name, one in values.items()})
        write_tensors(path, tensors, {QUANTIZERS: said, SEARCH: self.digest})
        self.keep_scores()

    def keep_scores(self, state: Mapping[str, Any] | None = None) -> None:
        """state: once all is done, the search's, for whoever reads the file."""
        if self.folder is None:
            return
        text = json.dumps({"version": VERSION, "signature": self.signature, "batches": self.batches, "scores": self.scores,
                           **({} if state is None else {"state": state})}, indent=1)
        partial = self.folder / f"{FILE}.partial"
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.folder / FILE)

    def _file(self, recipe: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{recipe.partition('(')[0]}.safetensors"
