"""Charts as inline SVG, with a title and a description for those who do not see them."""
from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from modelq.report.weights import BINS, Distribution

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 300, 130, 34, 6, 6, 26


def number(value: float) -> str:
    """Three figures: "0.0123", "12.3", "4.1e-05"."""
    if value == 0:
        return "0"
    return f"{value:.0f}" if 1000 <= abs(value) < 1e5 else f"{value:.3g}"


def picture(title: str, description: str, body: str, width: int = WIDTH, height: int = HEIGHT) -> str:
    return (f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}: {escape(description)}">'
            f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{body}</svg>")


def histogram(title: str, values: Distribution, unit: str) -> str:
    """Counts of magnitudes, on a logarithmic scale so that the few large ones show; clip points as a line, or the range of many."""
    width, height = 230, 112
    right, bottom = width - RIGHT, height - BOTTOM
    most = max(max(values.counts), 1)
    decades = math.log10(most) or 1
    step = (right - LEFT) / BINS
    path = "".join(f"M{LEFT + index * step:.1f} {bottom}h{step:.1f}v-{(bottom - TOP) * (0.04 + 0.96 * math.log10(count) / decades):.1f}"
                   f"h-{step:.1f}z" for index, count in enumerate(values.counts) if count)

    def across(value: float) -> float:
        return LEFT + (right - LEFT) * value / values.top
    said = f"magnitudes up to {number(values.largest)}, half below {number(values.quantiles[0])}"
    body = [_frame(right, bottom)]
    if values.clips:
        low, middle, high = values.clips
        if across(high) - across(low) > 1:
            body.append(f'<rect class="clips" x="{across(low):.1f}" y="{TOP}" width="{across(high) - across(low):.1f}" '
                        f'height="{bottom - TOP}"/>')
        said += "" if low == high else f", blocks clip from {number(low)} to {number(high)}"
    body.append(f'<path class="bar" d="{path}"/>')
    if values.clips:
        body.append(f'<path class="clip" d="M{across(middle):.1f} {TOP}V{bottom}"/>')
        said += f", clipped at {number(middle)}"
    body += [_text(LEFT, bottom + 11, "0", "middle"), _text(right, bottom + 11, number(values.top), "end"),
             _text((LEFT + right) / 2, bottom + 22, unit, "middle"), _text(LEFT - 3, TOP + 8, f"10{_power(decades)}", "end"),
             _text(LEFT - 3, bottom, "1", "end")]
    return picture(title, said, "".join(body), width, height)


def ranges(title: str, layers: Sequence[int], values: Sequence[Distribution], unit: str) -> str:
    """By layer: a band from half of the magnitudes to 99 in 100, a broken line of 9999 in 10000, rings of the largest, clip points."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    found = [one for value in values for one in (*value.quantiles, value.largest, *(value.clips or ())) if one > 0]
    if not found:
        return picture(title, "all zeros", "")
    low, high = math.floor(math.log10(min(found))), math.ceil(math.log10(max(found)) + 1e-9)
    high = max(high, low + 1)
    first, last = min(layers), max(layers)

    def across(layer: float) -> float:
        return LEFT + 6 + (right - LEFT - 12) * ((layer - first) / (last - first) if last > first else 0.5)

    def up(value: float) -> float:
        return bottom - (bottom - TOP) * min(1.0, max(0.0, (math.log10(max(value, 10.0 ** low)) - low) / (high - low)))
    points = sorted(zip(layers, values), key=lambda pair: pair[0])
    ways = (0.0,) if len(points) > 1 else (-5.0, 5.0)       # one layer alone is as wide as a mark
    lines = {name: " ".join(f"{across(layer) + way:.1f},{up(value.quantiles[index]):.1f}" for layer, value in points for way in ways)
             for index, name in enumerate(("half", "most", "tail"))}
    back = " ".join(f"{across(layer) - way:.1f},{up(value.quantiles[0]):.1f}" for layer, value in reversed(points) for way in ways)
    body = [_frame(right, bottom), *_decades(low, high, up, right), f'<polygon class="band" points="{lines["most"]} {back}"/>',
            f'<polyline class="middle" points="{lines["half"]}"/>', f'<polyline class="tail" points="{lines["tail"]}"/>']
    body += [f'<circle class="dot" cx="{across(layer):.1f}" cy="{up(value.largest):.1f}" r="1.8"/>' for layer, value in points]
    half = min(4.0, (right - LEFT) / (2.4 * max(1, len(points))))
    body += [f'<path class="clip" d="M{across(layer) - half:.1f} {up(value.clips[1]):.1f}h{2 * half:.1f}"/>'
             for layer, value in points if value.clips]
    body += [_text(across(layer), bottom + 11, str(layer), "middle") for layer in _ticks(first, last)]
    body.append(_text((LEFT + right) / 2, bottom + 22, f"layer; {unit} upwards", "middle"))
    worst = max(points, key=lambda pair: pair[1].largest)
    return picture(title, f"largest {number(worst[1].largest)}, in layer {worst[0]}", "".join(body))


def _decades(low: int, high: int, up, right: float) -> list[str]:
    every = max(1, math.ceil((high - low) / 5))
    return [f'<path class="axis" opacity=".6" d="M{LEFT} {up(10.0 ** power):.1f}H{right}"/>'
            + _text(LEFT - 3, up(10.0 ** power) + 3, f"10{_power(power)}", "end") for power in range(low, high + 1, every)]


def _ticks(first: int, last: int) -> list[int]:
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100) if (last - first) / step <= 8)
    return [layer for layer in range(first, last + 1) if layer % every == 0]


def _power(exponent: float) -> str:
    text = str(round(exponent))
    return f'<tspan dy="-3" font-size="8">{text}</tspan>'


def _frame(right: float, bottom: float) -> str:
    return f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
