"""A report's facts as one HTML page that needs nothing else."""
from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from modelq.fidelity import Fidelity
from modelq.report import charts
from modelq.report.charts import number
from modelq.report.facts import Facts
from modelq.report.formats import UNQUANTIZED, choices, heat_table
from modelq.report.style import CSS
from modelq.tables import megabytes

STEPS = 10
LEAST_RATIO = 4
OTHER_BASIS = 0.5   # an error of the hidden states behind the embedding alone: they were rotated, not rounded
LONG_LIST = 12      # entries of a config's list that are shown


def html_page(facts: Facts) -> str:
    """The whole page, UTF-8 text."""
    name = Path(facts.directory).name
    sections = (_head(facts, name), _errors(facts), choices(facts), _ranges(facts), _histograms(facts), _kept(facts), _config(facts),
                _versions(facts))
    body = "\n".join(section for section in sections if section)
    return ('<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
            f"<title>modelq report: {escape(name)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n"
            "</html>\n")


def _head(facts: Facts, name: str) -> str:
    formats = ", ".join(dict.fromkeys(facts.choices.values()))
    share = facts.bytes_after / facts.bytes_before
    cards = [*_measured(facts.fidelity),
             ("Bits per weight", f"{facts.bits_per_weight:.2f}", "scales and what stayed as it was included"),
             ("Size", megabytes(facts.bytes_after), f"{share:.0%} of {megabytes(facts.bytes_before)} in 16 bits"),
             ("Formats", escape(formats), f"cache of keys and values: {escape(facts.cache or 'as it was')}")]
    inner = "".join(f"<div class=card><dt>{title}</dt><dd>{value}<small>{more}</small></dd></div>" for title, value, more in cards)
    measured = (f"measured against it on {facts.fidelity.positions} tokens of <code>{escape(facts.text)}</code> in windows of "
                f"{facts.fidelity.window}" if facts.fidelity else "whose weights are compared with it; it was not run")
    return (f"<header><h1>{escape(name)}</h1>\n<p class=soft>An export of <code>{escape(facts.source)}</code>, {measured}.</p></header>\n"
            f"<dl class=cards>{inner}</dl>")


def _measured(found: Fidelity | None) -> list[tuple[str, str, str]]:
    return [] if found is None else [
        ("Perplexity", f"{found.perplexity_after:.3f}", f"{found.perplexity_before:.3f} before: {found.ratio:.1%} kept"),
        ("Same likeliest token", f"{found.agreement:.1%}", f"at {found.positions} places"),
        ("KL divergence", number(found.divergence), f"nats, mean; largest {number(found.largest_divergence)}")]


# Errors --------------------------------------------------------------------------------------------------------------------------

def _errors(facts: Facts) -> str:
    layered = [one for one in facts.weights if one.layer >= 0]
    parts = list(dict.fromkeys(one.part for one in layered))
    cells: dict[tuple[int, str], list[Any]] = {}
    for one in layered:
        cells.setdefault((one.layer, one.part), []).append(one)
    errors = {key: mean([one.error for one in ones]) for key, ones in cells.items()}
    hidden = facts.fidelity.hidden if facts.fidelity else []
    rotated = bool(hidden) and hidden[0] > OTHER_BASIS
    hidden = [] if rotated else hidden[1:]
    scale, hidden_scale = Scale(errors.values()), Scale(hidden)
    rows = []
    for layer in range(len(hidden)) if hidden else facts.layers:
        row = "".join(_heat_cell(errors.get((layer, part)), scale, "h", _cell_title(cells.get((layer, part)))) for part in parts)
        row += f"<td class=gap></td>{_heat_cell(hidden[layer], hidden_scale, 'o', '')}" if hidden else ""
        rows.append(f"<tr><th scope=row>{layer}</th>{row}</tr>")
    last = "" if not hidden else "<th class=gap></th><th scope=col>hidden<span>states</span></th>"
    noted = Counter(one.note for one in facts.weights if one.note)
    notes = "".join(f"<li>{escape(note)}: {count} weights</li>" for note, count in noted.items())
    others = "".join(f"<li><code>{escape(one.module)}</code> ({escape(one.algorithm)}): {percent(one.error)}</li>"
                     for one in facts.weights if one.layer < 0)
    of_states = ("Hidden states are in another basis than the original's (rotated): they are not compared." if rotated else
                 "The last column is that of the hidden states behind each layer, for the token in the middle." if hidden else "")
    return ("<section><h2>Errors by layer and module</h2>\n<p>Root mean square of the difference between a weight as the export stands for "
            f"it and the original, as a share of the original, in percent. {of_states}</p>\n"
            f"{scale.legend('h', 'weights')}{hidden_scale.legend('o', 'hidden states')}{heat_table(parts, last, rows)}"
            + (f"<ul class=soft>{others}{notes}</ul>" if others or notes else "") + "</section>")


class Scale:
    """Steps of equal ratios from the smallest to the largest, which are a factor of 4 apart at least: what is alike looks alike."""

    def __init__(self, values: Iterable[float | None]):
        found = [value for value in values if value]
        self.low, self.high = (min(found), max(found)) if found else (0.0, 0.0)
        if self.high < LEAST_RATIO * self.low:
            middle = math.sqrt(self.low * self.high)
            self.low, self.high = middle / math.sqrt(LEAST_RATIO), middle * math.sqrt(LEAST_RATIO)

    def step(self, value: float) -> int:
        if value <= 0 or self.high <= self.low:
            return 0
        at = math.log(value / self.low) / math.log(self.high / self.low)
        return min(STEPS - 1, max(0, int(at * STEPS)))

    def legend(self, letter: str, what: str) -> str:
        if not self.high:
            return ""
        steps = "".join(f'<span class="{letter}{step}"></span>' for step in range(STEPS))
        return (f"<div class=legend><span>{what}</span><span>{percent(self.low)}</span><span class=ramp aria-hidden=true>{steps}</span>"
                f"<span>{percent(self.high)}</span></div>")


def _heat_cell(value: float | None, scale: Scale, letter: str, title: str) -> str:
    said = f' title="{escape(title)}"' if title else ""
    if value is None:
        return f"<td class=none{said}>–</td>"
    text = f"{100 * value:#.3g}".rstrip(".")
    return f'<td class="{letter}{scale.step(value)}"{said}>{text}</td>'


def _cell_title(ones: Sequence[Any] | None) -> str:
    if not ones:
        return "not quantized"
    first = ones[0]
    if len(ones) == 1:
        return f"{first.module}: {first.algorithm}, {percent(first.error)}" + (f", {first.note}" if first.note else "")
    worst = max(ones, key=lambda one: one.error or 0)
    return (f"{len(ones)} of {first.part}: {first.algorithm}, mean {percent(mean([one.error for one in ones]))}, largest "
            f"{percent(worst.error)} in {worst.module}")


def mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def percent(value: float | None) -> str:
    return "not comparable" if value is None else f"{100 * value:.3g}%"


# Distributions -------------------------------------------------------------------------------------------------------------------

def _ranges(facts: Facts) -> str:
    figures = []
    for kind, items, unit in (("inputs of", facts.inputs, "|x|"), ("weights of", facts.weights, "|w|")):
        for part in dict.fromkeys(one.part for one in items if one.layer >= 0):
            ones = [one for one in _one_each(items, part)]
            title = f"{kind} {part}"
            figures.append(f"<figure><figcaption><b>{escape(part)}</b> <span class=soft>{kind.split()[0]}</span></figcaption>"
                           f"{charts.ranges(title, [one.layer for one in ones], [one.values for one in ones], unit)}</figure>")
    return ("<section><h2>Ranges of activations and weights</h2>\n<p>Magnitudes by layer. The line is the middle one, the band reaches "
            "from there to the 99th percentile, the broken line is 99.99%, rings are the largest. Orange: where the format clips (the "
            "middle of all blocks). Inputs are as the quantizer gets them; siblings such as q, k and v share one.</p>\n"
            f"<div class=grid>{''.join(figures)}</div></section>")


def _one_each(items: Sequence[Any], part: str) -> list[Any]:
    """One per layer; of experts, the one with the largest error."""
    found: dict[int, Any] = {}
    for one in items:
        if one.part == part and one.layer >= 0:
            if one.layer not in found or (getattr(one, "error", None) or 0) > (getattr(found[one.layer], "error", None) or 0):
                found[one.layer] = one
    return list(found.values())


def _histograms(facts: Facts) -> str:
    """Of the layer with the largest error; those of the others can be opened."""
    layers = sorted({one.layer for one in facts.weights if one.layer >= 0})
    if not layers:
        return ""
    worst = max(layers, key=lambda layer: mean([one.error for one in facts.weights if one.layer == layer]) or 0)
    others = "".join(f"<details><summary>Layer {layer}</summary>{_layer_histograms(facts, layer)}</details>"
                     for layer in layers if layer != worst)
    rest = "The other layer" if len(layers) == 2 else f"The other {len(layers) - 1} layers"
    return ("<section><h2>Histograms</h2>\n<p>How many numbers (on a logarithmic scale) have which magnitude. The orange line is the clip "
            f"point, of many blocks the middle one, with their range shaded.</p>\n"
            f"<h3>Layer {worst}, whose weights have the largest error</h3>"
            f"{_layer_histograms(facts, worst)}"
            + (f"<details><summary>{rest}</summary>{others}</details>" if others else "") + "</section>")


def _layer_histograms(facts: Facts, layer: int) -> str:
    figures = []
    for kind, items, unit in (("input", facts.inputs, "|x|"), ("weight", facts.weights, "|w|")):
        of_layer = [one for one in items if one.layer == layer]
        for part in dict.fromkeys(one.part for one in of_layer):
            one = _one_each(of_layer, part)[0]
            word = getattr(one, "algorithm", None) or getattr(one, "scheme", None) or UNQUANTIZED
            figures.append(f"<figure><figcaption><b>{escape(one.part)}</b> <span class=soft>{kind}, {escape(word)}</span></figcaption>"
                           f"{charts.histogram(f'layer {layer}, {one.part}, {kind}', one.values, unit)}</figure>")
    return f'<div class="grid small">{"".join(figures)}</div>'


# What the files say --------------------------------------------------------------------------------------------------------------

def _kept(facts: Facts) -> str:
    rows = "".join(f"<tr><td><code>{escape(one.pattern)}</code></td><td class=n>{one.count}</td><td>{escape(one.dtype)}</td>"
                   f"<td class=n>{megabytes(one.nbytes)}</td><td>{escape(one.why)}</td></tr>" for one in facts.kept)
    return ("<section><h2>What stayed in high precision, and why</h2>\n<div class=wide><table><thead><tr><th scope=col>tensors</th>"
            "<th scope=col class=n>count</th><th scope=col>stored as</th><th scope=col class=n>size</th><th scope=col>why</th></tr></thead>"
            f"<tbody>{rows}</tbody></table></div></section>")


def _config(facts: Facts) -> str:
    text = json.dumps(_shortened(facts.config), indent=2, default=str)
    return f"<section><h2>Quantization config</h2>\n<pre>{escape(text)}</pre></section>"


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        more = {"...": f"{len(value) - LONG_LIST} more"} if len(value) > LONG_LIST else {}
        return {key: _shortened(item) for key, item in list(value.items())[:LONG_LIST]} | more
    if isinstance(value, list) and len(value) > LONG_LIST:
        return [*map(_shortened, value[:LONG_LIST]), f"... {len(value) - LONG_LIST} more"]
    return [_shortened(item) for item in value] if isinstance(value, list) else value


def _versions(facts: Facts) -> str:
    rows = "".join(f"<tr><th scope=row>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.versions.items())
    return f"<section><h2>Versions</h2>\n<div class=wide><table><tbody>{rows}</tbody></table></div></section>"
