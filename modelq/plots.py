"""Pictures: what a search for formats found, and formats against each other. matplotlib is imported where something is drawn."""
from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
DARK = ("#0072B2",)      # white text can be read on it, black on the others
MARKERS = "osD^vP*X<>ph"        # so that a print without colours tells them apart, too
UNQUANTIZED = "#BBBBBB"


def require_matplotlib() -> Any:
    """matplotlib.pyplot for files. A notebook that draws already keeps its backend. ImportError says how to get it."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'modelq[plot]'") from None
    if "matplotlib.pyplot" not in sys.modules:
        matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def draw_trade_off(path: Path | str, budgets: Sequence[Mapping[str, Any]], uniform: Sequence[Mapping[str, Any]],
                   plain: float | None) -> None:
    """Perplexity against effective bits, into a file: the searched choices (budgets) as a line, uniform formats as marks, the unquantized
    model (plain) as a level. path: .png, .svg or .pdf. budgets, uniform: rows with effective_bits and perplexity; of uniform ones also
    format. ImportError: matplotlib is missing."""
    plt = require_matplotlib()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot([one["effective_bits"] for one in budgets], [one["perplexity"] for one in budgets], "o-", color=COLORS[0],
              label="AutoQuantize")
    for index, one in enumerate(uniform, 1):
        axes.plot(one["effective_bits"], one["perplexity"], MARKERS[index % len(MARKERS)], markersize=11, fillstyle="none",
                  markeredgewidth=2.2, color=COLORS[index % len(COLORS)], label=f"all {one['format']}")
    if plain is not None:
        axes.axhline(plain, linestyle="--", color="#555555", label="unquantized")
    axes.set_xlabel("effective bits per weight (mean)")
    axes.set_ylabel("perplexity (lower is better)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_layers(path: Path | str, state: Mapping[str, Any]) -> None:
    """Which layer got which format (colour), and what the lowest format would cost it (the number, a power of ten of its score), into a
    file. path: .png, .svg or .pdf. state: what `auto_quantize` returned. ImportError: matplotlib is missing."""
    plt = require_matplotlib()
    import numpy as np

    cells, rows, columns = {}, [], 0
    for key, recipe in state["best"]["recipe"].items():
        name = key.removesuffix(".quant_recipe")
        layer = re.search(r"\.(\d+)\.", name)
        row = name[layer.end():] if layer else name
        rows += [row] if row not in rows else []
        column = int(layer[1]) if layer else 0
        columns = max(columns, column + 1)
        score = state["candidate_stats"][key]["scores"][0]
        cells[rows.index(row), column] = (recipe.partition("(")[0], score)
    formats = sorted({name for name, _ in cells.values() if name != "NONE"})
    colors = {**{name: COLORS[index % len(COLORS)] for index, name in enumerate(formats)}, "NONE": UNQUANTIZED}
    figure, axes = plt.subplots(figsize=(max(6, 0.42 * columns + 3), 0.5 * len(rows) + 1.8), layout="constrained")
    for (row, column), (name, score) in cells.items():
        axes.add_patch(plt.Rectangle((column, row), 1, 1, facecolor=colors[name], edgecolor="white"))
        if score > 0:
            axes.text(column + 0.5, row + 0.5, f"{np.log10(score):.1f}", ha="center", va="center", fontsize=7,
                      color="white" if colors[name] in DARK else "black")
    axes.set_xlim(0, columns)
    axes.set_ylim(len(rows), 0)
    axes.set_xticks([column + 0.5 for column in range(columns)], [str(column) for column in range(columns)])
    axes.set_yticks([row + 0.5 for row in range(len(rows))], rows)
    axes.set_xlabel("layer (numbers: log10 of the score in the lowest format)")
    handles = [plt.Rectangle((0, 0), 1, 1, facecolor=color) for color in colors.values()]
    labels = ["not quantized" if name == "NONE" else name for name in colors]
    axes.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_bench(path: Path | str, models: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy kept against decode speed-up, twice: by perplexity, and by how often the likeliest token is the same. path: .png,
    .svg or .pdf. models: the unquantized one first; rows of `modelq bench --json`. ImportError: matplotlib is missing."""
    from modelq.plot_labels import place_labels

    plt = require_matplotlib()
    figure, both = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained", sharex=True)
    for axes, key, label in zip(both, ("perplexity_kept", "top1_agreement"),
                                ("perplexity kept, % (unquantized / quantized)", "same likeliest token, % of positions")):
        points = [(row["speed_up"], 100 * row[key]) for row in models]
        for index, point in enumerate(points):
            color = "#555555" if index == 0 else COLORS[(index - 1) % len(COLORS)]
            axes.plot(*point, MARKERS[index % len(MARKERS)], markersize=9, color=color, markeredgecolor="#333333", markeredgewidth=0.6)
        axes.axhline(100, linestyle=":", color="#999999", linewidth=1, zorder=0)
        axes.axvline(1, linestyle=":", color="#999999", linewidth=1, zorder=0)
        _widen(axes, points)
        axes.set_xlabel("decode speed-up, times the unquantized model's tokens per second")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.suptitle("Upper right is better")
    for axes, key in zip(both, ("perplexity_kept", "top1_agreement")):
        place_labels(axes, [(row["speed_up"], 100 * row[key]) for row in models], [row["name"] for row in models])
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _widen(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    """Limits with room for names around the points."""
    for limits, share, values in ((axes.set_xlim, 0.25, [x for x, _ in points]), (axes.set_ylim, 0.15, [y for _, y in points])):
        low, high = min(values), max(values)
        room = share * (high - low) or 0.1 * abs(high) or 1.0
        limits(low - room, high + room)
