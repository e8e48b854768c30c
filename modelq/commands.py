"""What the command line does: each command takes the parsed arguments and returns a Report."""
from __future__ import annotations

import copy
import math
import os
import re
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelq.measure import Steps
from modelq.tables import megabytes, table

# As Model Optimizer's hf_ptq.py calls them, and GPTQ.
PRESETS = {
    "nvfp4": "NVFP4_DEFAULT_CFG", "nvfp4_awq": "NVFP4_AWQ_LITE_CFG", "nvfp4_mse": "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG",
    "nvfp4_local_hessian": "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG", "nvfp4_svdquant": "NVFP4_SVDQUANT_DEFAULT_CFG",
    "nvfp4_gptq": "NVFP4_GPTQ_CFG", "nvfp4_wo": "W4A16_NVFP4_CFG", "nvfp4_mlp_only": "NVFP4_MLP_ONLY_CFG",
    "fp8": "FP8_DEFAULT_CFG", "fp8_pb_wo": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "fp8_pc_pt": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "int8": "INT8_DEFAULT_CFG", "int8_sq": "INT8_SMOOTHQUANT_CFG", "int8_wo": "INT8_WEIGHT_ONLY_CFG",
    "int4_awq": "INT4_AWQ_CFG", "int4_gptq": "INT4_GPTQ_CFG", "int4_wo": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "w4a8_awq": "W4A8_AWQ_BETA_CFG",
    "w4a8_nvfp4_fp8": "W4A8_NVFP4_FP8_CFG", "mxfp8": "MXFP8_DEFAULT_CFG", "mxfp4": "MXFP4_DEFAULT_CFG",
}


@dataclass
class Report:
    """data: what --json prints; lines: what a person reads, tables being (header, rows); code: what the process ends with."""
    data: dict[str, Any]
    lines: list[str | tuple[list[str], list[list[Any]]]] = field(default_factory=list)
    code: int = 0

    def text(self, color: bool) -> str:
        return "\n".join(line if isinstance(line, str) else table(*line, color=color) for line in self.lines)


# modelq quantize -----------------------------------------------------------------------------------------------------------

def quantize(args: Namespace) -> Report:
    config = read_config(args.config) if args.config else preset(args.format)
    if args.block_size:
        config = with_block_size(config, args.block_size)
    import modelq
    from modelq.checkpoint.atomic import check_target
    from modelq.export import check_exportable, export_hf_checkpoint, needs_data
    from modelq.quantization import quantize as quantize_model
    from modelq.summary import high_precision_lines, unseen_lines
    from modelq.utils.dataset_utils import create_forward_loop, get_dataset_dataloader
    check_target(Path(os.path.realpath(args.out)), args.overwrite)   # before the work that would be in vain
    steps = Steps()
    with steps("load"):
        model = modelq.load(args.source, compute=args.compute, num_threads=args.threads, weights_only=args.weights_only)
        dialect = check_exportable(model, config, args.dialect, args.engine)
        loader, loop = None, None
        if needs_data(model, config):
            loader = get_dataset_dataloader(args.calib, model.tokenizer, args.batch_size, args.samples, args.seq_len)
            loop = create_forward_loop(dataloader=loader)
    with steps("calibrate"):
        quantize_model(model, config, loop, checkpoint_dir=args.checkpoint_dir)
    with steps("export"):
        export_hf_checkpoint(model, args.out, overwrite=args.overwrite, dialect=args.dialect, engine=args.engine)
    before, after = stored_bytes(Path(model.checkpoint.path)), stored_bytes(args.out)
    on = sum(quantizer.enabled for quantizer in model.quantizers.values())
    data = {"source": args.source, "out": str(args.out), "format": args.config or args.format, "dialect": dialect,
            "calibration": str(args.calib) if loader else None,
            "samples": loader.num_samples if loader else 0, "bytes_before": before, "bytes_after": after, "quantizers": on,
            "steps": [vars(step) for step in steps.done]}
    rows = [[step.name, f"{step.seconds:.1f} s", megabytes(step.peak_bytes)] for step in steps.done]
    seen = f"calibrated on {loader.num_samples} samples of {args.calib}" if loader else "without calibration data"
    return Report(data, [(["step", "time", "peak memory"], rows), "", *high_precision_lines(model), *unseen_lines(model), "",
                         f"{args.out}: {megabytes(after)} (before: {megabytes(before)}), {on} quantizers, {seen}"])


def preset_name(name: str) -> str:
    """The full name of a short one."""
    return PRESETS.get(name.lower(), name)


def preset(name: str) -> dict[str, Any]:
    """A preset by its short or its full name."""
    from modelq import presets
    full = preset_name(name)
    if full not in presets.choices:
        raise ValueError(f"--format {name}: unknown; known are {', '.join(PRESETS)} and the presets {', '.join(sorted(presets.choices))}")
    return getattr(presets, full)


def with_block_size(config: dict[str, Any], size: int) -> dict[str, Any]:
    """The same with another block size for INT4 weights."""
    changed, found = copy.deepcopy(config), False
    for rule in changed["quant_cfg"]:
        attributes = rule.get("cfg") or {}
        for stage in attributes if isinstance(attributes, (list, tuple)) else [attributes]:
            blocks = stage.get("block_sizes") or {}
            if stage.get("num_bits") == 4 and -1 in blocks:
                blocks[-1], found = size, True
    if not found:
        raise ValueError("--block-size is for INT4 weights in blocks, and this config has none")
    return changed


def read_config(path: Path) -> dict[str, Any]:
    """A quantization config from a YAML or JSON file. JSON has only strings for keys: "-1" is meant as the axis -1."""
    import yaml
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: neither YAML nor JSON: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a mapping with 'quant_cfg', got {type(config).__name__}")
    return _integer_keys(config)


def _integer_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {int(key) if isinstance(key, str) and re.fullmatch(r"-?\d+", key) else key: _integer_keys(v) for key, v in value.items()}
    return [_integer_keys(item) for item in value] if isinstance(value, list) else value


def stored_bytes(path: Path) -> int:
    """The size of a checkpoint's weights on disk."""
    path = Path(path)
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.gguf")]
    return sum(file.stat().st_size for file in files)


# modelq eval ---------------------------------------------------------------------------------------------------------------

def evaluate(args: Namespace) -> Report:
    import modelq
    from modelq.utils.texts import running_text
    text = running_text(args.text)
    steps = Steps()
    with steps("load"):
        model = modelq.load(args.source, compute=args.compute, num_threads=args.threads)
        model.must_compute()
        ids = model.tokenizer.encode(text, add_special_tokens=False)
    if len(ids) < 2:
        raise ValueError(f"--text {args.text}: {len(ids)} tokens, at least 2 are needed")
    if args.max_windows:
        ids = ids[:args.max_windows * args.window]
    with steps("evaluate"):
        value = model.perplexity(ids, window=args.window)
    window = min(args.window, len(ids))
    count = len(ids) // window
    if not math.isfinite(value):
        raise ValueError(f"{args.source}: the perplexity is {value}: its weights are damaged, or not of this architecture")
    data = {"source": args.source, "text": str(args.text), "perplexity": value, "window": window, "windows": count,
            "predicted_tokens": count * (window - 1), "seconds": steps.seconds, "peak_bytes": max(step.peak_bytes for step in steps.done)}
    return Report(data, [f"perplexity {value:.4f}  ({count} windows of {window} tokens, {steps.seconds:.1f} s)"])


# modelq inspect ------------------------------------------------------------------------------------------------------------

def inspect(args: Namespace) -> Report:
    from modelq.checkpoint import open_checkpoint
    with open_checkpoint(args.source) as checkpoint:
        tensors = list(_describe(checkpoint))
    elements, size = sum(row["elements"] for row in tensors), sum(row["bytes"] for row in tensors)
    formats: dict[str, list[int]] = {}
    for row in tensors:
        total = formats.setdefault(row["format"], [0, 0, 0])
        total[:] = total[0] + 1, total[1] + row["elements"], total[2] + row["bytes"]
    bits = 8 * size / max(1, elements)
    data = {"source": args.source, "architecture": checkpoint.config.get("model_type"), "bytes": size, "elements": elements,
            "bits_per_weight": bits, "tensors": tensors}
    rows = [[row["name"], "x".join(map(str, row["shape"])), row["format"], _scales(row), round(row["bits_per_weight"], 2)]
            for row in tensors]
    totals = [[name, count, n, megabytes(b), round(8 * b / max(1, n), 2)] for name, (count, n, b) in formats.items()]
    return Report(data, [(["tensor", "shape", "format", "scales", "bits"], rows), "",
                         (["format", "tensors", "weights", "size", "bits"], totals), "",
                         f"{args.source}: {checkpoint.config.get('model_type')}, {elements / 1e6:.1f} M weights, {megabytes(size)}, "
                         f"{bits:.2f} bits per weight"])


def _describe(checkpoint: Any) -> Iterator[dict[str, Any]]:
    """One row per weight; the scales of a quantized one are counted with it, and named by their role."""
    layers, inner = getattr(checkpoint, "layers", {}), getattr(checkpoint, "inner", checkpoint)
    for name, info in checkpoint.tensors.items():
        layer = layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        parts = {role: inner.tensors[tensor] for role, tensor in layer.tensors.items()} if layer else {"weight": info}
        elements, size = math.prod(info.shape), sum(part.nbytes for part in parts.values())
        yield {"name": name, "shape": list(info.shape), "format": layer.algorithm if layer else info.dtype,
               "scheme": layer.scheme if layer else None, "elements": elements, "bytes": size,
               "bits_per_weight": 8 * size / max(1, elements),
               "scales": {role: {"shape": list(part.shape), "dtype": part.dtype, "value": _value(inner, part)}
                          for role, part in parts.items() if role != "weight"}}


def _value(checkpoint: Any, info: Any) -> float | None:
    """Of a scale that is one number; None of one that is an array."""
    return float(checkpoint.read(info.name).reshape(())) if math.prod(info.shape) == 1 else None


def _scales(row: dict[str, Any]) -> str:
    texts = [f"{role}={scale['value']:.3g}" if scale["value"] is not None else f"{role} {scale['dtype']}{scale['shape']}"
             for role, scale in row["scales"].items()]
    return ", ".join(texts)


# modelq convert ------------------------------------------------------------------------------------------------------------

def convert(args: Namespace) -> Report:
    from modelq.export import convert_checkpoint
    if not args.dialect and not args.engine:
        raise ValueError("give --dialect or --engine")
    out = convert_checkpoint(args.directory, args.out, args.dialect, args.engine, overwrite=args.overwrite)
    data = {"directory": str(args.directory), "out": str(out), "dialect": args.dialect, "engine": args.engine}
    return Report(data, [f"{out}: {args.directory} for {args.engine or args.dialect}"])


# modelq verify -------------------------------------------------------------------------------------------------------------

def verify(args: Namespace) -> Report:
    from modelq.verify import ERROR, dequantized_errors, verify_checkpoint
    findings = verify_checkpoint(args.directory, args.engine)
    errors = sum(finding.level == ERROR for finding in findings)
    data: dict[str, Any] = {"directory": str(args.directory), "engine": args.engine, "errors": errors,
                            "findings": [f._asdict() for f in findings]}
    lines: list[Any] = [str(finding) for finding in findings]
    if args.source:
        data["dequantized_errors"] = dequantized_errors(args.directory, args.source)
        lines += [(["tensor", "error of the weights, relative"], [[name, error] for name, error in data["dequantized_errors"].items()]), ""]
    verdict = f"{errors} errors, {len(findings) - errors} notes" if findings else "nothing found"
    return Report(data, [*lines, f"{args.directory} for {args.engine}: {verdict}"], code=1 if errors else 0)


# modelq formats ------------------------------------------------------------------------------------------------------------

def formats(args: Namespace) -> Report:
    from modelq import _core
    elements = {name: dict(row) for name, row in _core.formats().items()}
    schemes = {name: dict(row) for name, row in _core.schemes().items()}
    element_rows = [[name, row["kind"], row["bits"], row["exponent_bits"], row["mantissa_bits"], row["max"], row["smallest"]]
                    for name, row in elements.items()]
    scheme_rows = [[name, row["element"], "x".join("all" if n == 0 else str(n) for n in row["block"]), row["scale"],
                    round(row["bits_per_weight"], 3), _export_names(row)] for name, row in schemes.items()]
    return Report({"formats": elements, "schemes": schemes},
                  ["Number formats", (["name", "kind", "bits", "exponent", "mantissa", "max", "smallest"], element_rows), "",
                   "Block schemes (block: rows x columns that share a scale)",
                   (["name", "element", "block", "scale", "bits per weight", "exported as"], scheme_rows)])


def _export_names(row: dict[str, Any]) -> str:
    names = [row[key] for key in ("modelopt", "modelopt_weight_only", "modelopt_fp8_input") if row.get(key)]
    return ", ".join(dict.fromkeys(names)) or "-"
