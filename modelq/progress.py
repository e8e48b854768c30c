"""Progress bars: shown after two seconds, and only on a terminal."""
from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")

DELAY_SECONDS = 2.0


def progress(items: Iterable[T], description: str, unit: str = "layer", total: int | None = None) -> Iterator[T]:
    """The items, with a bar on stderr that says how many are done and when the rest will be.

    Nothing is shown for work that ends within two seconds, nor when stderr is a file or a pipe.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if sys.stderr is None or not sys.stderr.isatty():
        yield from items
        return
    from tqdm import tqdm
    with tqdm(items, desc=description, unit=unit, total=total, delay=DELAY_SECONDS, leave=False, dynamic_ncols=True) as bar:
        yield from bar
