"""Time and peak memory of the steps of a job."""
from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Step:
    """name; seconds of wall time; peak_bytes: the most memory this process had resident within the step."""
    name: str
    seconds: float
    peak_bytes: int


@dataclass
class Steps:
    """with steps("load"): ... appends a Step to steps.done."""
    done: list[Step] = field(default_factory=list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        reset_peak_memory()
        start = time.perf_counter()
        yield
        self.done.append(Step(name, time.perf_counter() - start, peak_memory()))

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.done)


def peak_memory() -> int:
    """Bytes: the most that was resident since the last reset (VmHWM), or since the start where /proc cannot say."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory() -> None:
    """Start a new peak from what is resident now (proc(5), clear_refs); where that is not allowed, peaks only grow."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass
