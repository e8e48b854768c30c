"""Ctrl-C anywhere: KeyboardInterrupt raised before a chosen line of modelq is run, as a signal may be at any of them."""
from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import modelq

SOURCES = str(Path(modelq.__file__).parent)


class _Watch:
    """Counts the lines of modelq that run. stop_at: the number of the one that is interrupted."""

    def __init__(self, stop_at: int | None = None):
        self.count, self.stop_at, self.first = 0, stop_at, {}
        self.where = ""

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(SOURCES):
            return None
        if event == "line":
            place = (frame.f_code.co_filename, frame.f_lineno)
            self.first.setdefault(place, self.count)
            if self.count == self.stop_at:
                self.where = f"{place[0].removeprefix(SOURCES)}:{place[1]}"
                raise KeyboardInterrupt
            self.count += 1
        return self


@contextmanager
def watching(watch: _Watch) -> Iterator[None]:
    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


def moments(make: Callable[[], Any], work: Callable[[Any], object], count: int, seed: int = 0) -> list[int]:
    """When to interrupt this work on what `make` gives, which is done twice to find out (the first time imports and caches): the first time
    of each of `count` different lines, picked at random and in order. 0: of all."""
    for _ in range(2):
        watch, made = _Watch(), make()
        with watching(watch):
            work(made)
    firsts = sorted(watch.first.values())
    return sorted(random.Random(seed).sample(firsts, min(count, len(firsts)))) if count else firsts


def interrupt(work: Callable[[], object], moment: int) -> str:
    """Do the work up to that moment. Returns the line that was not run. AssertionError: there was no interrupt, or it was swallowed."""
    watch = _Watch(moment)
    try:
        with watching(watch):
            work()
    except KeyboardInterrupt:
        return watch.where
    raise AssertionError(f"the interrupt at {watch.where or moment} did not come out")
