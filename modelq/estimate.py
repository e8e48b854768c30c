"""About how long a quantization takes, measured on the model's first layer and a few samples."""
from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelq import _core
from modelq.smoothing import as_loaded, stated_weight

if TYPE_CHECKING:
    from modelq.export.plan import Plan
    from modelq.model import Model

COPY_BYTES_PER_SECOND = 1e9     # to a disk: what an export only copies is a small part of its time
SMALLEST = 1e-4                 # seconds; clocks of tasks shorter than this say nothing


@dataclass(frozen=True)
class Estimate:
    """Seconds. layer: what each layer costs besides its tokens (scales, searches); sample: what a sample costs in each layer."""
    calibrate: float
    export: float
    layer: float
    sample: float

    @property
    def seconds(self) -> float:
        return self.calibrate + self.export


def estimate(model: Model, config: Mapping[str, Any], loader: Any, plan: Plan) -> Estimate:
    """Quantizes the first layer twice, of one sample and of one batch, and one weight as the export would; where no data are needed
    (loader None), only that. The model stays as it is."""
    if loader is None:
        seconds = _export_seconds(model, plan)
        return Estimate(seconds / 2, seconds, seconds / 2 / max(1, model.num_layers), 0.0)
    batch = next(iter(loader))
    rows = len(batch["input_ids"])
    one = _seconds(model, config, {name: column[:1] for name, column in batch.items()})
    sample = max(0.0, _seconds(model, config, batch) - one) / (rows - 1) if rows > 1 else one
    layer = max(0.0, one - sample)
    return Estimate(model.num_layers * (layer + sample * loader.num_samples), _export_seconds(model, plan), layer, sample)


def _seconds(model: Model, config: Mapping[str, Any], batch: Mapping[str, Any]) -> float:
    from modelq.quantization import quantize

    first = first_layer(model)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # what is to be said is said of the whole
        quantize(first, dict(config), lambda quantized: [quantized(**batch)])
    return time.perf_counter() - start


def first_layer(model: Model) -> Model:
    """A model of the first layer alone, of the same open files."""
    from modelq.model import Model

    checkpoint = copy.copy(model.checkpoint)
    lists = {name: value[:1] for name, value in checkpoint.config.items() if isinstance(value, list) and name == "layer_types"}
    checkpoint.config = {**checkpoint.config, "num_hidden_layers": 1, **lists}
    return Model(checkpoint, model.runtime.compute)


def _export_seconds(model: Model, plan: Plan) -> float:
    linears = list(plan.linears.values())
    copies = sum(info.nbytes for info in plan.copies.values()) / COPY_BYTES_PER_SECOND
    if not linears:
        return copies
    linear = linears[0]
    start = time.perf_counter()
    weight = stated_weight(model, linear.row, as_loaded(model, model.checkpoint.read(linear.weight)))
    _core.quantize(weight, linear.pair.weight, block_size=linear.group_size, name=linear.weight)
    spent = max(SMALLEST, time.perf_counter() - start)
    elements = [math.prod(one.row["shape"]) for one in linears]
    return copies + spent * sum(elements) / elements[0]
