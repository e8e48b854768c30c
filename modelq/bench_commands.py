"""`modelq bench`: what each format keeps of a model's accuracy, and how much faster it decodes."""
from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from modelq.choices import preset, with_block_size
from modelq.commands import Report, measured_documents, measured_text, stored_bytes, text_name, token_ids
from modelq.decode_bench import decode_speeds
from modelq.measure import Steps
from modelq.tables import megabytes

PROMPT_TOKENS = 32


def bench(args: Namespace) -> Report:
    import modelq
    from modelq.plots import draw_bench, require_matplotlib
    from modelq.report_commands import check_file

    configs = {name: _config(name, args.block_size) for name in _names(args.formats)}
    if not configs and not args.directories:
        raise ValueError("nothing to measure: give exported folders of SRC, or --formats nvfp4,fp8,...")
    for path in args.plot:
        check_file(path, args.overwrite)
    if args.plot:
        require_matplotlib()
    text, steps = measured_text(args), Steps()
    with steps("load"):
        source = modelq.load(args.source, compute=args.compute, num_threads=args.threads)
        ids = token_ids(args, text or measured_documents(args, source.tokenizer), source.tokenizer)
        _check(args, source, configs)
    rows, kept = [_unquantized(source)], []
    for name, folder in _exports(args, configs, steps):
        with closing(modelq.load(folder, compute=args.compute)) as export:
            rows.append(_measured(name, source, export, ids, args, steps, kept))
    rows[0] |= {"perplexity": rows[1]["perplexity_before"],
                "tokens_per_second": max(row["unquantized_tokens_per_second"] for row in rows[1:]),
                "bytes_per_token": rows[1]["unquantized_bytes_per_token"]}
    for path in args.plot:
        draw_bench(path, rows)
    return _report(args, rows, steps)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()] if text else []


def _config(name: str, block_size: int | None) -> dict[str, Any]:
    """--block-size is for the formats among them that have INT4 blocks."""
    config = preset(name)
    try:
        return with_block_size(config, block_size) if block_size else config
    except ValueError:
        return config


def _check(args: Namespace, source: Any, configs: dict[str, Any]) -> None:
    """What cannot be measured is refused before anything is."""
    import modelq
    from modelq.export import check_exportable
    from modelq.fidelity import check_alike

    source.must_compute()
    for folder in args.directories:
        with closing(modelq.load(folder, compute=args.compute)) as export:
            check_alike(source, export)
    for config in configs.values():
        check_exportable(source, config)


def _exports(args: Namespace, configs: dict[str, Any], steps: Steps) -> Iterator[tuple[str, Path]]:
    """The folders to measure: those given, then one for each format, there only while it is measured."""
    import modelq
    from modelq.export import export_hf_checkpoint
    from modelq.quantization import quantize
    from modelq.quantize_commands import calibration_data
    from modelq.utils.dataset_utils import create_forward_loop

    for folder in args.directories:
        yield folder.resolve().name, folder
    for name, config in configs.items():
        with tempfile.TemporaryDirectory(prefix="modelq-bench-") as scratch:
            with closing(modelq.load(args.source, compute=args.compute)) as model, steps(f"quantize {name}"):
                quantize(model, config, create_forward_loop(dataloader=calibration_data(args, model)))
                folder = export_hf_checkpoint(model, Path(scratch) / "export")
            yield name, folder


def _unquantized(model: Any) -> dict[str, Any]:
    return {"name": "unquantized", "perplexity_kept": 1.0, "top1_agreement": 1.0, "kl_divergence": 0.0, "bits_per_weight": 16.0,
            "bytes": 2 * _elements(model), "speed_up": 1.0}


def _elements(model: Any) -> int:
    from math import prod

    return sum(prod(info.shape) for info in model.checkpoint.tensors.values())


def _measured(name: str, source: Any, export: Any, ids: list[int], args: Namespace, steps: Steps, kept: list[Any]) -> dict[str, Any]:
    from modelq.fidelity import fidelity

    with steps(f"accuracy of {name}"):
        found = fidelity(source, export, ids, args.window, kept)
    with steps(f"decode, {name}"):
        plain, speed = decode_speeds([source, export], ids[:PROMPT_TOKENS], args.decode_tokens, args.repeat)
    source.forget_decoding()
    size = stored_bytes(export.checkpoint.path)
    data = found.as_data()
    return {"name": name, "perplexity": data.pop("perplexity_after"), **data, "bits_per_weight": 8 * size / max(1, _elements(export)),
            "bytes": size, "tokens_per_second": speed.tokens_per_second, "unquantized_tokens_per_second": plain.tokens_per_second,
            "speed_up": speed.tokens_per_second / plain.tokens_per_second, "bytes_per_token": speed.nbytes,
            "unquantized_bytes_per_token": plain.nbytes}


def _report(args: Namespace, rows: list[dict[str, Any]], steps: Steps) -> Report:
    data = {"source": args.source, "text": text_name(args), "window": args.window, "decode_tokens": args.decode_tokens, "models": rows,
            "seconds": steps.seconds, "steps": [vars(step) for step in steps.done]}
    header = ["model", "perplexity", "kept", "top-1", "KL, nats", "bits", "size", "tokens/s", "speed-up", "MB/token", "GB/s"]
    cells = [[row["name"], f"{row['perplexity']:.3f}", f"{row['perplexity_kept']:.1%}", f"{row['top1_agreement']:.1%}",
              f"{row['kl_divergence']:.4f}", f"{row['bits_per_weight']:.2f}", megabytes(row["bytes"]), f"{row['tokens_per_second']:.1f}",
              f"{row['speed_up']:.2f}x", f"{row['bytes_per_token'] / 1e6:.1f}",
              f"{row['bytes_per_token'] * row['tokens_per_second'] / 1e9:.1f}"] for row in rows]
    said = "kept: the unquantized model's perplexity as a share of this one's; top-1: how often both have the same likeliest token"
    return Report(data, [(header, cells), "", said, *(f"{path}: accuracy against speed" for path in args.plot)])
