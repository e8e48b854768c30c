"""`modelq report`: gathers the facts and writes the page."""
from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from modelq.commands import Report, measured_documents, measured_text, text_name, token_ids
from modelq.measure import Steps
from modelq.tables import megabytes


def report(args: Namespace) -> Report:
    import modelq
    from modelq.report import gather, html_page
    from modelq.report.facts import search_file

    check_file(args.out, args.overwrite)
    text, steps = measured_text(args), Steps()
    if args.search is not None:
        search_file(args.search)
    with steps("load"):
        before, after = (modelq.load(source, compute=args.compute, num_threads=args.threads, weights_only=args.weights_only)
                         for source in (args.source, args.directory))
        computed = not (before.weights_only or after.weights_only)
        ids = token_ids(args, text or measured_documents(args, before.tokenizer), before.tokenizer) if computed else None
    with steps("measure"):
        facts = gather(before, after, ids, args.window, text_name(args), args.search)
    write_file(args.out, html_page(facts).encode())
    errors = [one for one in facts.weights if one.error is not None]
    worst = max(errors, key=lambda one: one.error or 0, default=None)
    data: dict[str, Any] = {
        "source": args.source, "directory": str(args.directory), "out": str(args.out), "text": text_name(args) if computed else None,
        **(facts.fidelity.as_data() if facts.fidelity else {}),
        "bits_per_weight": facts.bits_per_weight, "bytes_after": facts.bytes_after, "formats": sorted(set(facts.choices.values())),
        "errors": {one.module: one.error for one in facts.weights}, "seconds": steps.seconds,
        "hidden_errors": facts.fidelity.hidden if facts.fidelity else None,
        "peak_bytes": max(step.peak_bytes for step in steps.done)}
    found = facts.fidelity
    lines = [f"perplexity {found.perplexity_after:.4f} (before: {found.perplexity_before:.4f}), KL divergence {found.divergence:.4g} nats, "
             f"the same likeliest token at {found.agreement:.1%} of {found.positions} places"] if found else [
        "the model cannot be run here: weights alone were compared"]
    lines.append(f"{facts.bits_per_weight:.2f} bits per weight, {megabytes(facts.bytes_after)}")
    lines += [f"largest error of a weight: {worst.error:.2%}, {worst.module}"] if worst is not None and worst.error is not None else []
    return Report(data, [*lines, f"{args.out}: the report ({steps.seconds:.1f} s)"])


def check_file(path: Path, overwrite: bool) -> None:
    """Before the work that would be in vain: whether a file can be written there."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, expected the name of a file")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: is there already; give --overwrite to replace it")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{path}: cannot write into {folder}")


def write_file(path: Path, content: bytes) -> None:
    """Whole, or as it was."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
