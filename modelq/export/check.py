"""Whether a config could be exported, asked before the calibration that would be in vain."""
from __future__ import annotations

import copy
from typing import Any

import numpy as np

from modelq.calibration import why_data
from modelq.config import QuantizeConfig
from modelq.export.hf_checkpoint import export_dtype, plan_export
from modelq.export.plan import Plan
from modelq.low_rank import LowRank
from modelq.quantization.api import as_original, planned_quantizers
from modelq.quantizers import needs_amax, stage_quantizers
from modelq.rules import stages
from modelq.weights_only import refuse_data

SMOOTHING = ("smoothquant", "awq_lite", "awq_full", "svdquant")     # methods that give linears a pre_quant_scale


def check_exportable(model_or_path: Any, config: Any, dialect: str | None = None, engine: str | None = None) -> str:
    """The dialect that an export of this model, quantized by this config, would be written in.

    model_or_path: a model from modelq.load, or what it takes; it is not changed, and no weight is read. dialect, engine: as for
    `export_hf_checkpoint`. ValueError names the layer and what would work: a block size that does not divide it, a format that the
    dialect cannot say or the engine does not load, siblings of unlike formats, a config that quantizes nothing.
    """
    from modelq.model import Model
    from modelq.opening import load

    model = model_or_path if isinstance(model_or_path, Model) else load(model_or_path)
    return planned_export(model, config, dialect, engine)[1].dialect


def planned_export(model: Any, config: Any, dialect: str | None = None, engine: str | None = None) -> tuple[Any, Plan]:
    """(a stand-in for the model, quantized by this config and not calibrated; what an export of it would write). As `check_exportable`."""
    model = as_original(model)
    parsed = QuantizeConfig.parse(config)
    probe = as_if_calibrated(model, parsed)
    refuse_data(probe, why_data(probe, parsed.steps))
    return probe, plan_export(probe, export_dtype(None, model.config, model.checkpoint.tensors), dialect, engine)[1]


def needs_data(model: Any, config: Any) -> bool:
    """Whether quantizing a model from modelq.load by this config looks at activations."""
    parsed, model = QuantizeConfig.parse(config), as_original(model)
    probe = copy.copy(model)
    probe.settings, probe.quantizers, _ = planned_quantizers(model, parsed)
    return bool(why_data(probe, parsed.steps))


def as_if_calibrated(model: Any, parsed: QuantizeConfig) -> Any:
    """A stand-in for the model with this config's quantizers, every amax 1, every smoothing scale 1, and every branch of low rank 0."""
    probe = copy.copy(model)
    probe.low_rank = {}
    probe.settings, probe.quantizers, _ = planned_quantizers(model, parsed)
    probe.quantized = True
    for name, setting in probe.settings.items():
        if setting.enable and needs_amax(setting):
            for quantizer, attributes in zip(stage_quantizers(probe.quantizers[name]), stages(setting)):
                quantizer.amax = np.float32(1) if attributes.constant_amax is None else quantizer.amax
                if attributes.bias is not None:
                    quantizer.bias = np.zeros(int(np.prod(setting.slot.shape)), np.float32)
    if any(step["method"] in SMOOTHING for step in parsed.steps):
        for row in model.modules:
            setting = probe.settings.get(f"{row['name']}.weight_quantizer")
            if row["kind"] == "linear" and setting is not None and setting.enable:
                probe.quantizers[f"{row['name']}.input_quantizer"].pre_quant_scale = np.ones(row["shape"][1], np.float32)
    for step in parsed.steps:
        if step["method"] == "svdquant":
            probe.low_rank = {row["name"]: _zeros(row, step["lowrank"]) for row in model.modules
                              if probe.quantizers.get(f"{row['name']}.input_quantizer") is not None
                              and probe.quantizers[f"{row['name']}.input_quantizer"].pre_quant_scale is not None}
    return probe


def _zeros(row: dict[str, Any], rank: int) -> LowRank:
    """A branch that takes no memory."""
    return LowRank(np.broadcast_to(np.float32(0), (rank, row["shape"][1])), np.broadcast_to(np.float32(0), (row["shape"][0], rank)))
