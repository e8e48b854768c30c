"""Everything that a report says, gathered without holding either model."""
from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq import _core
from modelq._version import __version__
from modelq.fidelity import Fidelity, fidelity, input_points
from modelq.progress import progress
from modelq.report.weights import Distribution, WeightFacts, part_of, summed, weight_facts

if TYPE_CHECKING:
    from modelq.model import Model

HISTOGRAM_BINS = 2048
EXCLUSIONS = ("exclude_modules", "ignore", "modules_to_not_convert", "ignored_layers")


@dataclass(frozen=True)
class InputFacts:
    """Of what reaches linears: readers are those that share it. scheme: None where inputs stay in high precision."""
    layer: int
    part: str
    scheme: str | None
    values: Distribution


@dataclass(frozen=True)
class Kept:
    """Modules alike that stayed in high precision, and why."""
    pattern: str
    count: int
    dtype: str
    nbytes: int
    why: str


@dataclass
class Facts:
    """fidelity: None, and inputs empty, if the model cannot be run. bytes_before: in 16 bits. choices: module to the word for its format;
    scores: module to the score of the format of fewest bits in a search, and search: its choice, if one is given."""
    source: str
    directory: str
    text: str
    fidelity: Fidelity | None
    weights: list[WeightFacts]
    inputs: list[InputFacts]
    kept: list[Kept]
    choices: dict[str, str]
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    config: dict[str, Any]
    versions: dict[str, str]
    cache: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        return list(range(1 + max((one.layer for one in self.weights), default=-1)))


def gather(before: Model, after: Model, ids: Any, window: int, text: str, search: Path | None = None) -> Facts:
    """before: the original; after: an export of it, opened. ids: tokens to run both on; None: only look at weights. ValueError: not an
    export, or not of this model."""
    if not getattr(after.checkpoint, "layers", {}):
        raise ValueError(f"{after.checkpoint.path}: its weights are not stored quantized: a report is on an export, beside its source")
    found, inputs = None, []
    if ids is not None:
        after.must_compute()
        with watched_inputs(after) as calibrators:
            found = fidelity(before, after, ids, window)
        inputs = list(_inputs(after, calibrators))
    weights = [weight_facts(before, after, row) for row in progress(quantized_rows(after), "weights", unit="tensor")]
    said = json.loads(search_file(search).read_text(encoding="utf-8")).get("state", {}) if search is not None else {}
    inner, tensors = after.checkpoint.inner, after.checkpoint.tensors
    size = sum(info.nbytes for info in inner.tensors.values())
    elements = sum(int(np.prod(info.shape)) for info in tensors.values())
    return Facts(str(before.checkpoint.path), str(after.checkpoint.path), text, found, weights, inputs, kept(after),
                 {one.module: one.algorithm for one in weights}, 2 * elements, size, 8 * size / max(1, elements),
                 dict(after.checkpoint.quantization), versions(after), cache_format(after), scores_of(said), said.get("best", {}))


def quantized_rows(model: Model) -> list[dict[str, Any]]:
    return [row for row in model.modules if row["kind"] in ("linear", "embedding") and row["name"] in model.checkpoint.layers]


# Inputs --------------------------------------------------------------------------------------------------------------------------

@contextmanager
def watched_inputs(model: Model) -> Iterator[dict[str, Any]]:
    """Within it, histograms of what reaches each linear, before it is rounded: by the name of the quantizer there."""
    found = {point: _core.Calibrator("histogram", None, HISTOGRAM_BINS) for _, point in input_points(model)}
    for point, calibrator in found.items():
        model.runtime.set_calibrator(point, calibrator)
    try:
        yield found
    finally:
        for point in found:
            model.runtime.set_calibrator(point, None)


def _inputs(model: Model, calibrators: Mapping[str, Any]) -> Iterator[InputFacts]:
    for row, point in input_points(model):
        histogram = calibrators[point].histogram()
        if histogram is None:       # an expert's, that no token reached
            continue
        counts, width = histogram
        largest = float(calibrators[point].compute_amax())
        stored, quantizer = model.checkpoint.layers.get(row["name"]), model.quantizers.get(point)
        clip = None if quantizer is None or quantizer.amax is None or not quantizer.enabled else float(np.max(quantizer.amax))
        values = summed(np.asarray(counts), width * len(counts), largest, None if clip is None else (clip, clip, clip))
        yield InputFacts(row["layer"], part_of(row), stored.input_scheme if stored is not None else None, values)


# What stayed ---------------------------------------------------------------------------------------------------------------------

def kept(model: Model) -> list[Kept]:
    """The tensors that are not quantized, those of all layers together."""
    patterns = excluded_patterns(model)
    kinds = {row["weight"]: row for row in model.modules if row.get("weight")}
    found: dict[tuple[str, str, str], list[int]] = {}
    for name, info in _copied(model).items():
        row, module = kinds.get(name), name.removesuffix(".weight")
        why = _why(row, module, patterns)
        found.setdefault((re.sub(r"(?<=\.)\d+(?=\.)", "*", module), info.dtype, why), []).append(info.nbytes)
    return [Kept(pattern, len(sizes), dtype, sum(sizes), why) for (pattern, dtype, why), sizes in found.items()]


def _copied(model: Model) -> dict[str, Any]:
    stored = {f"{module}.weight" for module in model.checkpoint.layers}
    return {name: info for name, info in model.checkpoint.tensors.items() if name not in stored}


def _why(row: Mapping[str, Any] | None, module: str, patterns: list[str]) -> str:
    if row is None or row["kind"] not in ("linear", "embedding"):
        return f"{row['kind'] if row is not None else 'other'}: not a kind that is quantized"
    named = next((pattern for pattern in patterns if _fits(pattern, module)), None)
    if named is not None:
        return f"the export's config leaves it out: {named}"
    return "embedding: no rule switched it on" if row["kind"] == "embedding" else "the export's config names no format for it"


def _fits(pattern: str, module: str) -> bool:
    from fnmatch import fnmatchcase

    if pattern.startswith("re:"):
        return bool(re.match(pattern[3:], module))
    return fnmatchcase(module, pattern) or module.startswith(f"{pattern}.")


def excluded_patterns(model: Model) -> list[str]:
    said = model.checkpoint.quantization
    return [str(pattern) for key in EXCLUSIONS for pattern in said.get(key) or []]


# What the files say ----------------------------------------------------------------------------------------------------------------

def cache_format(model: Model) -> str | None:
    cache = getattr(model.checkpoint, "cache", None)
    return None if cache is None else cache.scheme + (" with biases" if cache.biases else "") + (", keys rotated" if cache.rotate else "")


def versions(model: Model) -> dict[str, str]:
    producer = model.checkpoint.quantization.get("producer") or {}
    cpu = _core.cpu_info()
    return {"export made by": f"{producer.get('name', 'not said')} {producer.get('version', '')}".strip(), "modelq": __version__,
            "Python": platform.python_version(), "NumPy": np.__version__, "processor": f"{cpu['isa']}, {cpu['threads']} threads",
            "compute": model.runtime.compute}


def search_file(folder: Path) -> Path:
    from modelq.autoquantize.saved import FILE

    path = folder / FILE if folder.is_dir() else folder
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such search: give the --checkpoint-dir of modelq autoquantize")
    return path


def scores_of(state: Mapping[str, Any]) -> dict[str, float]:
    """Module to what the lowest format would cost its group."""
    found = {}
    for key, stats in (state.get("candidate_stats") or {}).items():
        for module in stats.get("module_names") or [key.removesuffix(".quant_recipe")]:
            found[module] = float(stats["scores"][0])
    return found

