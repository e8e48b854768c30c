"""Progress bars: shown after two seconds, on a terminal and in a notebook, and nowhere else."""
from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

T = TypeVar("T")

DELAY_SECONDS = 2.0


def progress(items: Iterable[T], description: str, unit: str = "layer", total: int | None = None) -> Iterator[T]:
    """The items, with a bar that says how many are done and when the rest will be: on stderr, or below a notebook's cell.

    Nothing is shown for work that ends within two seconds, nor when stderr is a file or a pipe; TQDM_DISABLE=1 shows none at all. Bars
    within bars take a line each, and leave none behind.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    bar_class = _bar_class()
    if bar_class is None:
        yield from items
        return
    with bar_class(items, desc=description, unit=unit, total=total, delay=DELAY_SECONDS, leave=False, dynamic_ncols=True) as bar:
        yield from bar


def _bar_class() -> Any:
    """tqdm's bar for who looks on: a notebook (by widgets where ipywidgets is there, else as text), or a terminal. None: nobody does."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None and "IPKernelApp" in shell.config:
        with warnings.catch_warnings():     # of a notebook without ipywidgets
            warnings.simplefilter("ignore")
            from tqdm.auto import tqdm as notebook_bar
        return notebook_bar
    if sys.stderr is None or not sys.stderr.isatty():
        return None
    from tqdm import tqdm
    return tqdm
