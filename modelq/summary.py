"""What became of a model: one line per quantizer, what stayed in high precision and why, and the counts."""
from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq.attributes import QuantizerAttributeConfig
from modelq.checkpoint.matrices import LEFT_ALONE
from modelq.experts import place_of
from modelq.foreign import others_of
from modelq.quantizers import KV_CAST_AMAX, MICROSCALING, has_static_levels, stage_quantizers
from modelq.rotation import rotation_of
from modelq.rules import Setting, describe_rule, stages
from modelq.smoothing import own_scale
from modelq.torch_models import is_torch_model, unwrapped

if TYPE_CHECKING:
    from modelq.model import Model

SUMMARY_FILE = ".quant_summary.txt"
FOREIGN = "copied: not part of the model that is computed"
CALIBRATORS = {"histogram": "HistogramCalibrator"}


def print_quant_summary(model: Model, output_dir: str | Path | None = None) -> None:
    """Print the summary of a quantized model, or write it to output_dir/.quant_summary.txt."""
    text = "\n".join(summary_lines(model))
    if output_dir is None:
        print(text)
        return
    path = Path(output_dir) / SUMMARY_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    print(f"Quant summary saved to {path}")


def summary_lines(model: Model) -> list[str]:
    """Model Optimizer's lines, one per quantizer and the count at the end, and before it what stayed in high precision and why."""
    if is_torch_model(model):
        from modelq.torch_models.quantize import quantizers_of

        described = [line for name, quantizer in quantizers_of(unwrapped(model)).items() for line in quantizer.describe_stages(name)]
        lines = [f"{name:80} {text}" for name, text in described]
        return [*lines, f"{len(lines)} TensorQuantizers found in model"]
    lines = [f"{name:80} {text}" for whole, quantizer in model.quantizers.items()
             for name, text in describe_stages(whole, model.settings[whole], quantizer)]
    reports = [*high_precision_lines(model), *coverage_lines(model), *unseen_lines(model), *changed_lines(model), *count_lines(model)]
    return [*lines, *reports, f"{len(lines)} TensorQuantizers found in model"]


def describe_stages(name: str, setting: Setting, quantizer: Any) -> list[tuple[str, str]]:
    """A line for a quantizer, or one for each of several in a row."""
    found = stage_quantizers(quantizer)
    names = [name] if len(found) == 1 else [f"{name}.{stage}" for stage in range(len(found))]
    return [(name, describe_quantizer(attributes, stage)) for name, attributes, stage in zip(names, stages(setting), found)]


def describe_quantizer(attributes: QuantizerAttributeConfig, quantizer: Any) -> str:
    """As Model Optimizer prints a TensorQuantizer: bits, blocks or axis, amax, calibrator."""
    if not quantizer.enabled:
        smoothed = "" if quantizer.pre_quant_scale is None else f" pre_quant_scale={_short(quantizer.pre_quant_scale)}"
        rotated = " rotated" if quantizer.rotate else ""
        return f"TensorQuantizer(disabled{smoothed}{rotated})"
    words = [f"{'unsigned ' if attributes.unsigned else ''}{attributes.num_bits} bit"]
    words += ["narrow"] * attributes.narrow_range + ["fake"] * attributes.fake_quant
    if attributes.block_sizes is not None:
        words.append(f"block_sizes={attributes.block_sizes},")
    else:
        words.append("per-tensor" if attributes.axis is None else f"axis={attributes.axis}")
    words.append(f"amax={_short_amax(attributes, quantizer)}")
    if quantizer.pre_quant_scale is not None:
        words.append(f"pre_quant_scale={_short(quantizer.pre_quant_scale)}")
    words += ["rotated"] * bool(quantizer.rotate) + [f"calibrator={CALIBRATORS.get(attributes.calibrator, 'MaxCalibrator')}"]
    words += [f"bias={attributes.bias}"] * (attributes.bias is not None)
    return f"TensorQuantizer({' '.join(words)} quant)"


def _short_amax(attributes: QuantizerAttributeConfig, quantizer: Any) -> str:
    if (attributes.block_sizes or {}).get("scale_bits") == MICROSCALING:
        return "None"
    if attributes.use_constant_amax:
        return f"{KV_CAST_AMAX:.2e}(const)"
    if quantizer.amax is None and has_static_levels(quantizer):
        return "kept"       # blocks as they are stored in MXFP4
    return "dynamic" if quantizer.amax is None else _short(quantizer.amax)


def _short(values: Any) -> str:
    values = np.asarray(values, dtype=np.float32)
    if values.size < 2:
        return f"{values.item():.2e}" if values.size else "[](0)"
    return f"[{values.min():.2e}, {values.max():.2e}]({values.size})"


def high_precision_lines(model: Model) -> list[str]:
    """The modules whose weights were left alone, those of all layers on one line, each with the reason."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for module in model.modules:
        if module.get("weight") and (why := why_high_precision(model, module)) is not None:
            name = re.sub(r"(?<=\.)\d+(?=\.)", "*", module["name"])
            reasons.setdefault((name, why), []).append(module["layer"])
    for row in () if model.weights_only else others_of(model):
        reasons.setdefault((re.sub(r"(?<=\.)\d+(?=\.)", "*", row["name"]), FOREIGN), []).append(-1)
    if not reasons:
        return []
    return ["", "In high precision:"] + [f"  {name:78} {why}{_which(layers, model.num_layers)}" for (name, why), layers in reasons.items()]


def why_high_precision(model: Model, module: dict[str, Any]) -> str | None:
    """Why a module's weight is not quantized; None if it is."""
    if module["name"] in model.stored_layers:
        return None
    setting = model.settings.get(place_of(model, f"{module['name']}.weight_quantizer").name)
    if setting is None:
        return LEFT_ALONE.get(module["kind"], f"{module['kind']}: not a kind that is quantized")
    if setting.enable and model.quantized:
        return None
    if setting.why:
        return setting.why
    if setting.rule is None or (setting.rule.quantizer_name == "*" and setting.rule.parent_class is None):
        return "no rule switched it on"
    return f"switched off by rule {describe_rule(setting.rule)}"


def _which(layers: list[int], total: int) -> str:
    layers = sorted(set(layers))
    if layers[0] < 0 or len(layers) == total:
        return ""
    return f" (layers {', '.join(map(str, layers))})" if len(layers) <= 8 else f" ({len(layers)} of {total} layers)"


def coverage_lines(model: Model) -> list[str]:
    """How many tokens of the calibration reached the experts of each layer."""
    if not model.expert_tokens:
        return []
    rows = [(row["name"], model.expert_tokens[row["layer"]]) for row in model.modules
            if row["kind"] == "experts" and row["layer"] in model.expert_tokens]
    return ["", "Tokens that reached each expert in calibration (fewest, median, most):"] + [
        f"  {name:78} {tokens.min()}, {int(np.median(tokens))}, {tokens.max()}" for name, tokens in rows]


def unseen_lines(model: Model) -> list[str]:
    """The experts that calibration reached with no token."""
    if not model.unseen_experts:
        return []
    return ["", "Experts that saw no token, calibrated from their weights alone (their inputs have the scale of the layer's others):"] + [
        f"  {container['name']:78} {len(unseen)} of {container['shape'][0]}: {_numbers(unseen)}"
        for container in model.modules if container["kind"] == "experts" and (unseen := model.unseen_experts.get(container["layer"]))]


def changed_lines(model: Model) -> list[str]:
    """What became of weights before they were quantized."""
    rotation, rounded = rotation_of(model.checkpoint), len(getattr(model.checkpoint, "changed", ()))
    smoothed = sum(row["kind"] == "linear" and own_scale(model, row["name"]) is not None for row in model.modules)
    ranks = sorted({len(branch.down) for branch in model.low_rank.values()})
    said = [f"rotated: {' and '.join(rotation.places)} (seed {rotation.seed})"] if rotation is not None else []
    said += [f"smoothed by a pre_quant_scale: {smoothed} linears"] * bool(smoothed)
    said += [f"beside a branch of rank {' or '.join(map(str, ranks))}: {len(model.low_rank)} linears"] * bool(ranks)
    said += [f"rounded by GPTQ: {rounded} linears"] * bool(rounded)
    return ["", "Weights before quantization:"] + [f"  {line}" for line in said] if said else []


def _numbers(experts: list[int]) -> str:
    return ", ".join(map(str, experts[:8])) + (", ..." if len(experts) > 8 else "")


def count_lines(model: Model) -> list[str]:
    """How many modules, and how much of all weights, are quantized."""
    weights = [module for module in model.modules if module.get("weight")]
    quantized = [module for module in weights if why_high_precision(model, module) is None]
    sizes = {module["weight"]: int(np.prod(module["shape"])) for module in weights}  # tied weights count once
    share = sum(sizes[name] for name in {module["weight"] for module in quantized}) / max(1, sum(sizes.values()))
    linears = sum(module["kind"] in ("linear", "embedding") for module in weights)
    return ["", f"{len(quantized)} of {linears} linear and embedding modules quantized: {share:.1%} of all weights"]
