"""The presets as rows: what each makes of a linear, and which engines load that."""
from __future__ import annotations

from math import prod
from typing import Any

from modelq import presets
from modelq.algorithms import normalize_algorithm
from modelq.autoquantize.recipes import stored_bits
from modelq.checkpoint.dialects import Form, Pair, input_kind
from modelq.choices import KV_CACHES, PRESETS
from modelq.config import QuantizeConfig
from modelq.export.engines import ENGINES, resolve_dialect
from modelq.quantizers import block_extents, make_quantizer, stage_quantizers
from modelq.rules import Setting, Slot, apply_rules, default_setting, stages

# A linear that every preset reaches: some are for an MLP's, some for experts'.
MODULES = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.experts.0.up_proj")
SHAPE = (1024, 1024)


def preset_rows() -> list[dict[str, Any]]:
    """name: the short one, else the preset's own; preset; weights, inputs: schemes; algorithm; bits_per_weight; engines: those that load
    it, whatever the dialect."""
    short = {preset: name for name, preset in PRESETS.items()}
    names = [*short, *sorted(presets.choices - set(short) - set(KV_CACHES.values()))]
    return [_row(short.get(name, name), name) for name in names]


def _row(name: str, preset: str) -> dict[str, Any]:
    config = QuantizeConfig.parse(getattr(presets, preset))
    weight, inputs = next(pair for module in MODULES if (pair := _settings(config, module))[0].enable)
    methods = [step["method"] for step in normalize_algorithm(config.algorithm)]
    kind = input_kind(make_quantizer(inputs)) if inputs.enable else None
    scheme = stage_quantizers(make_quantizer(weight))[0].scheme
    size = block_extents(stages(weight)[0]).get(-1) or None
    form = Form(Pair(scheme, kind), SHAPE, size, fp8_stage=len(stages(weight)) > 1, rank=32 if "svdquant" in methods else 0)
    return {"name": name, "preset": preset, "weights": scheme, "inputs": kind, "algorithm": "+".join(methods) or None,
            "bits_per_weight": round(float(stored_bits(weight)) / prod(SHAPE), 3),
            "engines": [engine for engine in ENGINES if _loads(engine, form)]}


def _settings(config: QuantizeConfig, module: str) -> tuple[Setting, Setting]:
    slots = [Slot(f"{module}.{role}_quantizer", module, role, "nn.Linear", SHAPE, 0) for role in ("weight", "input")]
    settings = apply_rules({slot.name: default_setting(slot) for slot in slots}, config.quant_cfg)[0]
    return settings[slots[0].name], settings[slots[1].name]


def _loads(engine: str, form: Form) -> bool:
    try:
        resolve_dialect(None, engine, {MODULES[0]: form}, None)
    except ValueError:
        return False
    return True
