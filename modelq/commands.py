"""What the command line does: each command takes the parsed arguments and returns a Report."""
from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelq.measure import Steps
from modelq.tables import megabytes, table

MOST_FINDINGS = 5       # of each of several engines
TESTED = ("logits with and without padding", "gradients", "generation with a cache", "calibration", "export and opening it again")
MOST_WINDOWS = 1024      # of a data set, if nothing else is said: hub data sets may have no end


@dataclass
class Report:
    """data: what --json prints; lines: what a person reads, tables being (header, rows); code: what the process ends with."""
    data: dict[str, Any]
    lines: list[str | tuple[list[str], list[list[Any]]]] = field(default_factory=list)
    code: int = 0

    def text(self, color: bool) -> str:
        return "\n".join(line if isinstance(line, str) else table(*line, color=color) for line in self.lines)


# What several commands do -----------------------------------------------------------------------------------------------------

def stored_bytes(path: Path) -> int:
    """The size of a checkpoint's weights on disk."""
    path = Path(path)
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.gguf")]
    return sum(file.stat().st_size for file in files)


def text_name(args: Namespace) -> str:
    return str(args.dataset or args.text)


def measured_text(args: Namespace) -> str | None:
    """The text of --text, before any model is loaded; None if it comes from --dataset."""
    from modelq.utils.texts import running_text

    return None if args.dataset else running_text(args.text)


def measured_documents(args: Namespace, tokenizer: Any) -> str:
    """As many documents of --dataset as fill the windows, one after the other."""
    from modelq.utils.dataset_utils import get_dataset_samples

    wanted, number = args.window * (args.max_windows or MOST_WINDOWS), 64
    while True:
        documents = get_dataset_samples(args.dataset, number, tokenizer=tokenizer, max_sample_length=args.window)
        text = "\n\n".join(documents)
        if len(documents) < number or len(tokenizer.encode(text, add_special_tokens=False)) >= wanted:
            return text
        number *= 4


def token_ids(args: Namespace, text: str, tokenizer: Any) -> list[int]:
    """Of the windows to measure. ValueError if there is nothing to predict."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) < 2:
        raise ValueError(f"{'--dataset' if args.dataset else '--text'} {text_name(args)}: {len(ids)} tokens, at least 2 are needed")
    return ids[:args.max_windows * args.window] if args.max_windows else ids


# modelq eval ---------------------------------------------------------------------------------------------------------------

def evaluate(args: Namespace) -> Report:
    import modelq
    text, steps = measured_text(args), Steps()
    with steps("load"):
        model = modelq.load(args.source, args.compute, args.threads, device=args.device, device_memory=args.device_memory)
        model.must_compute()
        ids = token_ids(args, text or measured_documents(args, model.tokenizer), model.tokenizer)
    with steps("evaluate"):
        value = model.perplexity(ids, window=args.window)
    window = min(args.window, len(ids))
    count = len(ids) // window
    if not math.isfinite(value):
        raise ValueError(f"{args.source}: the perplexity is {value}: its weights are damaged, or not of this architecture")
    data = {"source": args.source, "text": text_name(args), "perplexity": value, "window": window, "windows": count,
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
    stacks, linears = getattr(checkpoint, "stacks", {}), getattr(checkpoint, "linears", {})
    for name, info in checkpoint.tensors.items():
        layer = layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        parts = {role: inner.tensors[tensor] for role, tensor in layer.tensors.items()} if layer else {"weight": info}
        if name in stacks:
            parts = {"weight": inner.tensors[stacks[name].blocks], "weight_scale": inner.tensors[stacks[name].scales]}
        scaled = linears.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if scaled:
            parts = {role: inner.tensors[tensor] for role, tensor in scaled.tensors.items()}
        word = layer.algorithm if layer else scaled.word if scaled else "mxfp4" if name in stacks else info.dtype
        elements, size = math.prod(info.shape), sum(part.nbytes for part in parts.values())
        yield {"name": name, "shape": list(info.shape), "format": word,
               "scheme": layer.scheme if layer else "mxfp4" if name in stacks else None, "elements": elements, "bytes": size,
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
    from modelq.export import convert_checkpoint, convert_to_hugging_face
    if args.dialect or args.engine:
        out = convert_checkpoint(args.directory, args.out, args.dialect, args.engine, overwrite=args.overwrite)
    else:
        out = convert_to_hugging_face(args.directory, args.out, overwrite=args.overwrite)
    data = {"directory": str(args.directory), "out": str(out), "dialect": args.dialect, "engine": args.engine}
    return Report(data, [f"{out}: {args.directory} for {args.engine or args.dialect or 'Hugging Face'}"])


# modelq verify -------------------------------------------------------------------------------------------------------------

def verify(args: Namespace) -> Report:
    from modelq.verify import ENGINES, ERROR, dequantized_errors, verify_checkpoint

    found = {engine: verify_checkpoint(args.directory, engine) for engine in ([args.engine] if args.engine else ENGINES)}
    errors = {engine: sum(finding.level == ERROR for finding in findings) for engine, findings in found.items()}
    data: dict[str, Any] = {"directory": str(args.directory), "engines": {
        engine: {"loads": not errors[engine], "errors": errors[engine], "findings": [f._asdict() for f in findings]}
        for engine, findings in found.items()}}
    lines: list[Any] = []
    if args.source:
        data["dequantized_errors"] = dequantized_errors(args.directory, args.source)
        errors_of = [[name, "rotated" if error is None else f"{error:.4g}"] for name, error in data["dequantized_errors"].items()]
        lines += [(["tensor", "error of the weights, relative"], errors_of), ""]
    for engine, findings in found.items():
        verdict = f"{errors[engine]} errors, {len(findings) - errors[engine]} notes" if findings else "nothing found"
        lines += [*(f"{engine}: {finding}" for finding in findings[:MOST_FINDINGS if len(found) > 1 else None]),
                  f"{args.directory} for {engine}: {verdict}"]
    return Report(data, lines, code=0 if 0 in errors.values() else 1)


# modelq formats ------------------------------------------------------------------------------------------------------------

def formats(args: Namespace) -> Report:
    from modelq import _core, cuda
    from modelq.preset_table import preset_rows

    cpu = _core.cpu_info()
    elements = {name: dict(row) for name, row in _core.formats().items()}
    schemes = {name: dict(row) for name, row in _core.schemes().items()}
    presets = preset_rows()
    preset_cells = [["" if row["name"] == row["preset"] else row["name"], row["preset"], row["weights"], row["inputs"] or "-",
                     row["algorithm"] or "-", row["bits_per_weight"], ", ".join(row["engines"]) or "-"] for row in presets]
    element_rows = [[name, row["kind"], row["bits"], row["exponent_bits"], row["mantissa_bits"], row["max"], row["smallest"]]
                    for name, row in elements.items()]
    scheme_rows = [[name, row["element"], "x".join("all" if n == 0 else str(n) for n in row["block"]), row["scale"],
                    round(row["bits_per_weight"], 3), _export_names(row)] for name, row in schemes.items()]
    return Report({"presets": presets, "formats": elements, "schemes": schemes, "cpu": cpu, "cuda": cuda.describe()},
                  ["Presets (--format)",
                   (["name", "preset", "weights", "inputs", "algorithm", "bits", "engines that load it"], preset_cells), "",
                   "Number formats", (["name", "kind", "bits", "exponent", "mantissa", "max", "smallest"], element_rows), "",
                   "Block schemes (block: rows x columns that share a scale)",
                   (["name", "element", "block", "scale", "bits per weight", "exported as"], scheme_rows), "",
                   f"CPU: {cpu['isa']}, {cpu['threads']} threads", f"GPU: {cuda.describe()}"])


def families(args: Namespace) -> Report:
    from modelq import _core

    from modelq.verify.expert_rules import loaded_by

    rows = [{key: row[key] for key in ("family", "models", "model_types", "architectures", "flags", "oracle")} | {
        "tested": TESTED, "loaded_by": loaded_by(row["family"])} for row in _core.archs()]
    cells = [[row["family"], row["models"], ", ".join(row["model_types"]), ", ".join(row["architectures"]), row["oracle"],
              row["loaded_by"]] for row in rows]
    return Report({"families": rows}, [(["family", "models", "model_type", "architectures", "tested against", "loaded by"], cells), "",
                                       f"Tested of each: {', '.join(TESTED)}. Loaded by, with the same tokens or logits: tests/engines.",
                                       "Other architectures take the formats that need no activations."])


def _export_names(row: dict[str, Any]) -> str:
    names = [row[key] for key in ("modelopt", "modelopt_weight_only", "modelopt_fp8_input") if row.get(key)]
    return ", ".join(dict.fromkeys(names)) or "-"
