"""Plain text tables and sizes for the terminal."""
from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[object]], color: bool = False) -> str:
    """Aligned columns: those whose every cell is a number to the right, others to the left. None is an empty cell."""
    rows = [list(row) for row in rows]
    numeric = [all(row[i] is None or isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
    texts = [list(header), *[[_text(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in texts) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, numeric)).rstrip()
             for row in texts]
    lines.insert(1, "  ".join("-" * width for width in widths))
    if color:
        lines[0] = f"\033[1m{lines[0]}\033[0m"
    return "\n".join(lines)


def _text(cell: object) -> str:
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def listed(names: Sequence[object], most: int = 3, separator: str = ", ") -> str:
    """The first few of many, and how many more there are."""
    return separator.join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def wants_color(stream: object = None) -> bool:
    """Whether to use bold: on a terminal, unless NO_COLOR is set (https://no-color.org)."""
    stream = sys.stdout if stream is None else stream
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and bool(getattr(stream, "isatty", lambda: False)())


def megabytes(count: int) -> str:
    """Bytes as "12.3 MB", of 10^6 bytes."""
    return f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """"0.4 s", "12 s", "3 min", "1.5 h"."""
    for limit, text in ((9.95, f"{seconds:.1f} s"), (99.5, f"{seconds:.0f} s"), (5400, f"{seconds / 60:.0f} min")):
        if seconds < limit:
            return text
    return f"{seconds / 3600:.1f} h"
