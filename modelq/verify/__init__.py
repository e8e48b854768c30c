"""Would an engine load this export, and compute what it stands for? Answered from the files alone, without the engine.

The contracts are tables: layouts.py (tensors per dialect), engines.py (what each engine reads), rules.py (the checks).
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

from modelq.verify.engines import ENGINES
from modelq.verify.findings import ERROR, NOTE, Finding
from modelq.verify.opened import Export
from modelq.verify.rules import RULES

__all__ = ["ENGINES", "ERROR", "NOTE", "Finding", "dequantized_errors", "verify_checkpoint"]


def verify_checkpoint(directory: str | Path, engine: str) -> list[Finding]:
    """Everything in an exported folder `directory` that the engine ("vllm", "sglang", "tensorrt-llm", "transformers") would stumble over.

    An empty list: nothing was found. Findings of level "note" do not keep the engine from loading it. ValueError: unknown engine,
    or a file that is damaged; FileNotFoundError: no such folder.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; known are {', '.join(ENGINES)}")
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such folder")
    export = Export.open(directory, engine)
    try:
        return list(_findings(export))
    finally:
        export.checkpoint.close()


def _findings(export: Export) -> Any:
    for rule in RULES:
        if rule.engines and export.engine_name not in rule.engines or rule.dialects and export.dialect not in rule.dialects:
            continue
        found = list(rule.check(export))
        yield from found
        if rule.decisive and any(finding.level == ERROR for finding in found):
            return


def dequantized_errors(directory: str | Path, source: str | Path) -> dict[str, float | None]:
    """Weight to the root mean square of (dequantized - original), as a share of the original's. Only of layers stored quantized.

    directory: an exported folder; source: the checkpoint that it was made of. What smoothing multiplied is divided again. None: the weight
    is in another basis (rotated), and its error says nothing.
    """
    from modelq.checkpoint import open_checkpoint
    from modelq.verify.errors import dequantized_error

    with open_checkpoint(directory) as stored, open_checkpoint(source) as original:
        return {f"{module}.weight": dequantized_error(stored, original, module)[0] for module in getattr(stored, "layers", {})}
