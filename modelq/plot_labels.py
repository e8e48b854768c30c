"""Names beside the points of a picture, where they cover neither each other nor a point, and end within the axes."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# Directions from a point, best first: right, left, above, below, and between. Distances in points of the picture.
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8))
DISTANCES = (8, 16, 26, 38, 52, 70)
NEAR = 16           # from here on, a line leads to the point
MARKER = 6          # half of what a point covers


def place_labels(axes: Any, points: Sequence[tuple[float, float]], names: Sequence[str], size: float = 9) -> None:
    """Write each point's name. Called when the limits of the axes are what they will be: it draws the figure once to know sizes."""
    axes.figure.canvas.draw()
    renderer, scale = axes.figure.canvas.get_renderer(), axes.figure.dpi / 72
    screen = axes.transData.transform(list(points))
    taken = [(x - MARKER * scale, y - MARKER * scale, x + MARKER * scale, y + MARKER * scale) for x, y in screen]
    frame = axes.get_window_extent(renderer).extents
    for place in sorted(range(len(points)), key=lambda index: (screen[index][1], screen[index][0])):
        text = axes.annotate(names[place], points[place], xytext=(0, 0), textcoords="offset points", fontsize=size, ha="center",
                             va="center", bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.5})
        box = text.get_window_extent(renderer)
        half = (box.width / 2 + 2, box.height / 2 + 1)
        offset, chosen = _best(screen[place], half, [one for index, one in enumerate(taken) if index != place], frame, scale)
        taken.append(chosen)
        text.set_position((offset[0] / scale, offset[1] / scale))
        if max(abs(offset[0]) - half[0], abs(offset[1]) - half[1]) > NEAR * scale:
            axes.annotate("", points[place], xytext=(offset[0] / scale, offset[1] / scale), textcoords="offset points", zorder=1,
                          arrowprops={"arrowstyle": "-", "color": "#888888", "linewidth": 0.7, "shrinkA": 8, "shrinkB": 3})


def _best(point: Any, half: tuple[float, float], taken: Sequence[Any], frame: Any, scale: float) -> tuple[tuple[float, float], Any]:
    """(offset of the text's middle, its box), in pixels: the nearest place where it covers least."""
    found = []
    for distance in DISTANCES:
        for across, up in DIRECTIONS:
            offset = tuple(way * distance * scale + math.copysign(extent, way) * bool(way) for way, extent in zip((across, up), half))
            middle = (point[0] + offset[0], point[1] + offset[1])
            box = (middle[0] - half[0], middle[1] - half[1], middle[0] + half[0], middle[1] + half[1])
            outside = max(0.0, frame[0] - box[0], frame[1] - box[1], box[2] - frame[2], box[3] - frame[3])
            covered = sum(_common(box, other) for other in taken) + 100 * outside
            if distance > NEAR:
                covered += sum(_crosses(point, middle, other) for other in taken)
            if not covered:
                return offset, box
            found.append((covered, len(found), offset, box))
    return min(found)[2:]


def _crosses(start: Any, end: Any, box: Any) -> float:
    """How bad it is that a line goes over a box: by how much of it does. Where it begins in one, nothing can be done."""
    if box[0] <= start[0] <= box[2] and box[1] <= start[1] <= box[3]:
        return 0.0
    along = [(start[0] + (end[0] - start[0]) * step / 24, start[1] + (end[1] - start[1]) * step / 24) for step in range(24)]
    return 20.0 * sum(box[0] < x < box[2] and box[1] < y < box[3] for x, y in along)


def _common(one: Any, other: Any) -> float:
    """The area that two boxes (left, bottom, right, top) share."""
    return max(0.0, min(one[2], other[2]) - max(one[0], other[0])) * max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
