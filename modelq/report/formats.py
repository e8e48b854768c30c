"""Which layer of an export has which format: the choices of AutoQuantize, or of a config."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

from modelq.report.facts import Facts
from modelq.report.style import CATEGORIES

UNQUANTIZED = "high precision"


def heat_table(parts: Sequence[str], last: str, rows: Sequence[str]) -> str:
    head = "".join(f"<th scope=col>{part_name(part)}</th>" for part in parts)
    return (f"<div class=wide tabindex=0><table class=heat><thead><tr><th scope=col>layer</th>{head}{last}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table></div>")


def part_name(part: str) -> str:
    """"self_attn.q_proj" in two lines."""
    parent, _, leaf = part.rpartition(".")
    return f"{escape(leaf)}<span>{escape(parent)}</span>" if parent else escape(leaf)


def choices(facts: Facts) -> str:
    """Which layer has which format, where that differs: the choices of AutoQuantize, or of a config."""
    counts = Counter(facts.choices.values())
    rows, parts = _grid(facts)
    best = facts.search
    if len(counts) < 2 and not best and all(cell is not None for row in rows.values() for cell in row.values()):
        return ""
    colors = {word: index % len(CATEGORIES) for index, word in enumerate(counts)}
    keys = "".join(f'<span><span class="key c{color}">{escape(word)}</span> {counts[word]} modules</span>'
                   for word, color in colors.items())
    body = [f"<tr><th scope=row>{layer}</th>" + "".join(_choice_cell(row.get(part), colors, facts) for part in parts) + "</tr>"
            for layer, row in sorted(rows.items())]
    said = (f"AutoQuantize chose them within {best['constraints']['effective_bits']:.2f} effective bits per weight "
            f"({best['stored_bits']:.2f} as stored). Numbers: the logarithm to base 10 of what the format of fewest bits would cost that "
            "group of modules." if best else "Where a format differs from layer to layer, a search or a config chose it.")
    return (f"<section><h2>Formats by layer</h2>\n<p>{said}</p><div class=legend>{keys}<span class=soft>– {UNQUANTIZED}</span></div>"
            f"{heat_table(parts, '', body)}</section>")


def _grid(facts: Facts) -> tuple[dict[int, dict[str, Any]], list[str]]:
    rows: dict[int, dict[str, Any]] = {layer: {} for layer in facts.layers}
    for one in facts.weights:
        if one.layer >= 0:
            rows[one.layer][one.part] = one
    parts = list(dict.fromkeys(one.part for one in facts.weights if one.layer >= 0))
    return {layer: {part: row.get(part) for part in parts} for layer, row in rows.items()}, parts


def _score(facts: Facts, module: str) -> float:
    """Of the module, or of what it is in: experts are scored together."""
    while module and module not in facts.scores:
        module = module.rpartition(".")[0]
    return facts.scores.get(module, 0.0)


def _choice_cell(one: Any, colors: dict[str, int], facts: Facts) -> str:
    if one is None:
        return f'<td class=none title="{UNQUANTIZED}">–</td>'
    score = _score(facts, one.module)
    text = f"{math.log10(score):.1f}" if score > 0 else escape(one.algorithm)
    return f'<td class="c{colors[one.algorithm]}" title="{escape(one.module)}: {escape(one.algorithm)}">{text}</td>'
