"""How fast models decode: tokens per second of one sequence, and the bytes that memory delivers for each."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class DecodeSpeed(NamedTuple):
    """seconds: of a token, the median of all that were timed. nbytes: of the weights that a token reads. `clock` says what seconds are."""
    seconds: float
    nbytes: int

    @property
    def tokens_per_second(self) -> float:
        return 1 / self.seconds

    @property
    def bytes_per_second(self) -> float:
        return self.nbytes / self.seconds


def decode_speeds(models: Sequence[Any], prompt: list[int], tokens: int, repeat: int,
                  clock: Callable[[], float] = time.perf_counter) -> list[DecodeSpeed]:
    """The speed of each model behind a prompt, each token by itself as in generation, the weights in memory.

    The models take turns, `repeat` times `tokens` each, so that what else the machine does meanwhile slows all of them. clock: give
    time.process_time for processor time, which other programs stretch less; it says what one thread would take.
    """
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(repeat):
        for place, model in enumerate(models):
            decoding = model.decoding()
            decoding.begin([prompt])
            for index in range(tokens):
                start = clock()
                decoding.forward([0], [[prompt[index % len(prompt)]]])
                seconds[place].append(clock() - start)
    return [DecodeSpeed(statistics.median(times), model.decoding().nbytes) for model, times in zip(models, seconds)]
