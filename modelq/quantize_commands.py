"""`modelq quantize`: a checkpoint in, an export out; or, with --dry-run, what that would be."""
from __future__ import annotations

import math
import os
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from modelq.choices import chosen_config
from modelq.commands import Report, stored_bytes
from modelq.measure import Steps
from modelq.tables import duration, megabytes


def quantize(args: Namespace) -> Report:
    config = chosen_config(args)
    if args.dry_run:
        return dry_run(args, config)
    if args.out is None:
        raise ValueError("--out DIR: say where the export goes (or --dry-run to see what it would be)")
    from modelq.checkpoint.atomic import check_target
    from modelq.export import check_exportable, export_hf_checkpoint, needs_data
    from modelq.quantization import quantize as quantize_model
    from modelq.summary import coverage_lines, high_precision_lines, unseen_lines
    from modelq.utils.dataset_utils import create_forward_loop

    check_target(Path(os.path.realpath(args.out)), args.overwrite)   # before the work that would be in vain
    steps = Steps()
    with steps("load"):
        model = opened(args)
        dialect = check_exportable(model, config, args.dialect, args.engine)
        loader = calibration_data(args, model) if needs_data(model, config) else None
    with steps("calibrate"):
        loop = None if loader is None else create_forward_loop(dataloader=loader)
        quantize_model(model, config, loop, checkpoint_dir=args.checkpoint_dir)
    with steps("export"):
        export_hf_checkpoint(model, args.out, overwrite=args.overwrite, dialect=args.dialect, engine=args.engine)
    before, after = stored_bytes(Path(model.checkpoint.path)), stored_bytes(args.out)
    on = sum(quantizer.enabled for quantizer in model.quantizers.values())
    data = {**_asked(args, loader), "out": str(args.out), "dialect": dialect, "bytes_before": before,
            "bytes_after": after, "quantizers": on,
            "expert_tokens": {layer: tokens.tolist() for layer, tokens in model.expert_tokens.items()},
            "steps": [vars(step) for step in steps.done]}
    rows = [[step.name, f"{step.seconds:.1f} s", megabytes(step.peak_bytes)] for step in steps.done]
    said = [*high_precision_lines(model), *coverage_lines(model), *unseen_lines(model)]
    return Report(data, [(["step", "time", "peak memory"], rows), *said, "",
                         f"{args.out}: {megabytes(after)} (before: {megabytes(before)}), {on} quantizers, {_calibrated(args, loader)}"])


def opened(args: Namespace) -> Any:
    import modelq

    return modelq.load(args.source, args.compute, args.threads, args.weights_only, args.device, args.device_memory)


def _calibrated(args: Namespace, loader: Any) -> str:
    return "without data" if loader is None else f"calibrated on {loader.num_samples} samples of {args.calib}"


def calibration_data(args: Namespace, model: Any, pack: bool = False) -> Any:
    from modelq.utils.dataset_utils import get_dataset_dataloader

    return get_dataset_dataloader(args.calib, model.tokenizer, args.batch_size, args.samples, args.seq_len, pack=pack)


def _asked(args: Namespace, loader: Any) -> dict[str, Any]:
    return {"source": args.source, "format": str(args.config or args.format or "nvfp4"), "kv_cache": args.kv_cache,
            "calibration": None if loader is None else str(args.calib), "samples": 0 if loader is None else loader.num_samples}


# --dry-run -----------------------------------------------------------------------------------------------------------------------

def dry_run(args: Namespace, config: dict[str, Any]) -> Report:
    from modelq.estimate import estimate
    from modelq.export.check import needs_data, planned_export

    model = opened(args)
    probe, plan = planned_export(model, config, args.dialect, args.engine)
    loader = calibration_data(args, model) if needs_data(model, config) else None
    layers = planned_layers(probe, plan)
    bytes_before, bytes_after = stored_bytes(Path(model.checkpoint.path)), sum(info.nbytes for info in plan.tensors)
    guess = estimate(model, config, loader, plan)
    data = {**_asked(args, loader), "dry_run": True, "dialect": plan.dialect, "layers": layers,
            "kv_cache_format": plan.cache.algorithm, "bytes_before": bytes_before, "bytes_after": bytes_after,
            "estimated_seconds": {"calibrate": guess.calibrate, "export": guess.export}}
    rows = [[row["pattern"], row["count"], "x".join(map(str, row["shape"])), row["format"] or "as it is", row["inputs"] or "-",
             round(row["bits_per_weight"], 2), megabytes(row["bytes"]), row["reason"] or ""] for row in layers]
    header = ["layers", "count", "shape", "weights", "inputs", "bits", "size", "why"]
    cache = f", keys and values in {plan.cache.algorithm}" if plan.cache.algorithm else ""
    return Report(data, [(header, rows), "",
                         f"{megabytes(bytes_after)} in the {plan.dialect} dialect (now: {megabytes(bytes_before)}){cache}",
                         f"about {duration(guess.seconds)} on this machine: {duration(guess.calibrate)} for scales, "
                         f"{_calibrated(args, loader)}, {duration(guess.export)} to export; nothing was written"])


def planned_layers(probe: Any, plan: Any) -> list[dict[str, Any]]:
    """What will be done, layers alike on one row: a row per pattern of names, format and reason."""
    from modelq.summary import why_high_precision

    by_weight = {name: module for module in reversed(probe.modules) if (name := module.get("weight"))}     # the embedding's, if tied
    found: dict[tuple[Any, ...], dict[str, Any]] = {}

    def add(name: str, shape: Any, size: int, words: str | None, inputs: str | None, why: str | None) -> None:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        row = found.setdefault((pattern, tuple(shape), words, inputs, why), {
            "pattern": pattern, "count": 0, "shape": list(shape), "format": words, "inputs": inputs, "bytes": 0, "reason": why})
        row["count"], row["bytes"] = row["count"] + 1, row["bytes"] + size

    for linear in plan.linears.values():
        size = sum(info.nbytes for info in linear.tensors.values())
        add(linear.module, linear.form.shape, size, linear.algorithm, linear.pair.input, None)
    for name, info in plan.copies.items():
        module = by_weight.get(name)
        why = None if module is None else why_high_precision(probe, module)
        add(name.removesuffix(".weight"), info.shape, info.nbytes, None, None, why)
    for row in found.values():
        row["bits_per_weight"] = 8 * row["bytes"] / max(1, row["count"] * math.prod(row["shape"]))
    return list(found.values())
