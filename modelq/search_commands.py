"""`modelq autoquantize`: the best format for every layer, for one budget of bits or several, against the uniform formats."""
from __future__ import annotations

import os
import re
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelq.choices import kv_cache_config, preset, preset_name
from modelq.commands import Report, measured_documents, measured_text, token_ids
from modelq.measure import Steps

EXCLUDED = "excluded_module_name_patterns"


def autoquantize(args: Namespace) -> Report:
    import modelq
    from modelq.checkpoint.atomic import check_file, check_target
    from modelq.export import export_hf_checkpoint
    from modelq.plots import draw_layers, draw_trade_off, require_matplotlib
    from modelq.quantize_commands import calibration_data

    wanted, disabled = budgets(args.effective_bits), list(args.disable or ["*lm_head*"])
    formats = {name.strip(): preset(name.strip()) for name in args.formats.split(",")}
    if args.plot or args.plot_layers:
        require_matplotlib()
    for path in [*args.plot, *args.plot_layers]:
        check_file(path)
    if args.out:
        if len(wanted) > 1:
            raise ValueError("--out exports one model: give one number of --effective-bits")
        check_target(Path(os.path.realpath(args.out)), args.overwrite)
    text, steps = None if args.no_eval else measured_text(args), Steps()
    with steps("load"):
        model = modelq.load(args.source, args.compute, args.threads, device=args.device, device_memory=args.device_memory)
        loader = calibration_data(args, model, pack=True)
        ids = token_ids(args, text or measured_documents(args, model.tokenizer), model.tokenizer) if not args.no_eval else None
    with tempfile.TemporaryDirectory(prefix="modelq-") as scratch:
        search = _Search(model, formats, loader, disabled, args, scratch)
        found = [search.budget(bits, ids, steps) for bits in wanted]
        if args.out:
            with steps("export"):
                export_hf_checkpoint(model, args.out, overwrite=args.overwrite, dialect=args.dialect, engine=args.engine)
        uniform = [search.uniform(name, ids, steps) for name in formats] if ids is not None and not args.no_uniform else []
    plain = search.plain(ids, steps) if ids is not None else None
    for path in args.plot if ids is not None else ():
        draw_trade_off(path, found, uniform, plain)
    for path in args.plot_layers:
        draw_layers(path, found[-1]["state"])
    return _report(args, found, uniform, plain, steps)


def budgets(text: str) -> list[float]:
    """"5", "4.5,6,8" or "4.5..8" (in steps of 0.5, or "4.5..8:0.25"). ValueError: none of these."""
    match = re.fullmatch(r"([\d.]+)\.\.([\d.]+?)(?::([\d.]+))?", text)
    try:
        if match is None:
            return [float(one) for one in text.split(",")]
        first, last, step = float(match[1]), float(match[2]), float(match[3] or 0.5)
    except ValueError:
        raise ValueError(f"--effective-bits {text}: expected a number, numbers with commas, or a range such as 4.5..8 or "
                         "4.5..8:0.25") from None
    if step <= 0 or last < first:
        raise ValueError(f"--effective-bits {text}: an empty range")
    return [first + index * step for index in range(int((last - first) / step + 1e-9) + 1)]


class _Search:
    """The same model, searched for one budget after the other: scores are found once, and kept in a folder."""

    def __init__(self, model: Any, formats: Mapping[str, Any], loader: Any, disabled: list[str], args: Namespace, scratch: str):
        self.model, self.formats, self.disabled, self.args = model, formats, disabled, args
        self.batches = [{**batch, "labels": batch["input_ids"]} for batch in loader]
        self.folder = args.checkpoint_dir or Path(scratch) / "search"
        self.stats: Mapping[str, Any] = {}

    def budget(self, bits: float, ids: Any, steps: Steps) -> dict[str, Any]:
        import modelq.quantization as mtq

        loss = {} if self.args.method == "kl_div" else {"loss_func": lambda output, batch: output.loss}
        with steps(f"search for {bits:g} bits"):
            _, state = mtq.auto_quantize(
                self.model, {"effective_bits": bits, "cost": {EXCLUDED: self.disabled}}, list(self.formats.values()), self.batches,
                lambda model, batch: model(**batch), num_calib_steps=len(self.batches),
                num_score_steps=max(1, -(-self.args.score_samples // self.args.batch_size)), disabled_layers=self.disabled,
                checkpoint=self.folder, method=self.args.method, kv_cache_cfg=kv_cache_config(self.args.kv_cache), **loss)
        self.stats = state["candidate_stats"]
        best = state["best"]
        return {"budget": bits, "effective_bits": best["constraints"]["effective_bits"], "stored_bits": best["stored_bits"],
                "score": best["score"], "perplexity": self._perplexity(ids, steps), "recipe": best["recipe"], "state": state}

    def uniform(self, name: str, ids: Any, steps: Steps) -> dict[str, Any]:
        import modelq.quantization as mtq

        config = self.formats[name]
        off = [{"quantizer_name": f"*{pattern.strip('*')}*", "enable": False} for pattern in self.disabled]
        with steps(f"uniform {name}"):
            mtq.quantize(self.model, {**config, "quant_cfg": [*config["quant_cfg"], *off]},
                         lambda model: [model(**batch) for batch in self.batches])
        weight = bits = stored = 0.0
        for group in self.stats.values():
            item = next((i for i, words in enumerate(group["formats"]) if words.partition("(")[0] == preset_name(name)), None)
            if item is not None and group["cost_weight"]:
                weight, bits = weight + group["weights"], bits + group["bits"][item] * group["weights"]
                stored += group["stored_bits"][item]
        return {"format": name, "effective_bits": bits / weight, "stored_bits": stored / weight, "perplexity": self._perplexity(ids, steps)}

    def plain(self, ids: Any, steps: Steps) -> float | None:
        with self.model.simulating(weights=False, activations=False):
            return self._perplexity(ids, steps)

    def _perplexity(self, ids: Any, steps: Steps) -> float | None:
        if ids is None:
            return None
        with steps("evaluate"):
            return float(self.model.perplexity(ids, window=self.args.window))


def _report(args: Namespace, found: list[dict[str, Any]], uniform: list[dict[str, Any]], plain: float | None, steps: Steps) -> Report:
    counts = []
    for one in found:
        names = [words.partition("(")[0] for words in one["recipe"].values()]
        counts.append({name: names.count(name) for name in dict.fromkeys(names)})
    data = {"source": args.source, "method": args.method, "perplexity_before": plain, "uniform": uniform,
            "budgets": [{key: value for key, value in one.items() if key != "state"} for one in found],
            "seconds": steps.seconds, "steps": [vars(step) for step in steps.done]}
    rows = [[f"{one['budget']:g}", f"{one['effective_bits']:.2f}", f"{one['stored_bits']:.2f}", _number(one["perplexity"]), ", ".join(
        f"{count} {name}" for name, count in there.items())] for one, there in zip(found, counts)]
    rows += [[f"uniform {one['format']}", f"{one['effective_bits']:.2f}", f"{one['stored_bits']:.2f}", _number(one["perplexity"]), ""]
             for one in uniform]
    rows += [["unquantized", "16.00", "16.00", _number(plain), ""]] * (plain is not None)
    lines: list[Any] = [(["budget", "effective bits", "stored bits", "perplexity", "groups of layers"], rows)]
    written = [*((path, "perplexity against bits") for path in args.plot), (args.out, "the model"),
               *((path, "formats and sensitivity of layers") for path in args.plot_layers)]
    lines += [f"{path}: {what}" for path, what in written if path]
    return Report(data, lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
