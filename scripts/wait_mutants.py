"""Takes the waits and the records of events out of the device runtime (csrc/backend), one at a time, and sees whether the tests of order
notice, by the emulated library's late and random streams. Prints a line for each; exit code 1 if one was not noticed.

    python scripts/wait_mutants.py [--sample N] [FILE ...]      of these files alone; every N-th
"""
import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

import cuda_build
import numpy

ROOT = cuda_build.ROOT
WAIT = re.compile(r"\b[\w>.-]+->(event_after|event_wait|event_record|stream_wait)\(")
NOTHING = "static int mq_nothing(const void *first, ...) { (void)first; return 0; }\n"
# File: its tests, by where they are and which, the quickest first. What is in no file of these is not tried, and named.
ORDER, WAITS, BACKWARD = "test_device_order.py", "test_device_waits.py", "test_device_backward.py"
TESTS = {
    "device.c": [(ORDER, "maxima")],
    "device_backward.c": [(WAITS, "chunks_on_the_way_back"), (BACKWARD, "streams")],
    "device_backward_experts.c": [(BACKWARD, "streams and qwen3moe")],
    "device_backward_head.c": [(WAITS, "slices_on_the_way_back")],
    "device_backward_parts.c": [(WAITS, "way_back")],
    "device_chunks.c": [(WAITS, "not_alike"), (ORDER, "maxima or histograms")],
    "device_experts.c": [("test_device_mixture.py", "sums"), (ORDER, "experts")],
    "device_findings.c": [(ORDER, "maxima or finite")],
    "device_head.c": [(WAITS, "head_in_slices and not back")],
    "device_mixture.c": [("test_device_mixture.py", "sums")],
    "device_observe.c": [(WAITS, "observers")],
    "device_packed.c": [("test_device_packed.py", "streams")],
    "device_quantizer.c": [(ORDER, "two_streams")],
    "device_score.c": [(WAITS, "candidates")],
    "device_score_experts.c": [(WAITS, "candidates")],
    "device_sums.c": [(ORDER, "histograms")],
    "device_weights.c": [(ORDER, "maxima or low_rank")],
}
FLAGS = ["-std=c11", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DNDEBUG", "-w"]
ERRORS = "only an error leaves anything to wait for (test_device_faults.py)"
FREED = "memory is freed behind it, which waits too"
COPIED = "a copy to memory of the host that is not pinned has waited (CUDA Runtime API, synchronization behavior); it says late errors"
# Waits that no order of the emulated streams can show to be needed, by file, function and call, and why they are there.
KNOWN = {
    ("device_backward_head.c", "leave_rows", "stream_wait"): COPIED,
    ("device_backward_parts.c", "mq_device_back_fetch", "stream_wait"): COPIED,
    ("device_findings.c", "take_maxima", "stream_wait"): COPIED,
    ("device_findings.c", "collect_on_host", "stream_wait"): COPIED,
    ("device_head.c", "give_logits", "stream_wait"): COPIED,
    ("device_head.c", "end", "stream_wait"): COPIED,
    ("device_mixture.c", "mq_device_end_experts", "stream_wait"): FREED,
    ("device_observe.c", "show", "stream_wait"): COPIED,
    ("device_score.c", "mq_device_score", "stream_wait"): COPIED,
    ("device_score_experts.c", "mq_device_take_changes", "stream_wait"): COPIED,
    ("device_sums.c", "fetch", "stream_wait"): COPIED,
    ("device.c", "mq_device_settle", "stream_wait"): ERRORS,
}


class Wait(NamedTuple):
    path: Path
    match: re.Match

    @property
    def function(self) -> str:
        """The name of the function around it: the last head before it."""
        heads = re.findall(r"^\w[\w *]*?(\w+)\([^;]*?\)\n\{", self.match.string[:self.match.start()], re.M | re.S)
        return heads[-1] if heads else ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.path.name, self.function, self.match[1]

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.match.string.count(chr(10), 0, self.match.start()) + 1} {self.function}: {self.match[1]}"


def waits() -> list[Wait]:
    files = sorted((ROOT / "csrc/backend").glob("device*.c"))
    return [Wait(path, match) for path in files for match in WAIT.finditer(path.read_text())]


class Build:
    """modelq in a folder of its own, of which one file at a time is compiled anew."""
    def __init__(self, folder: Path) -> None:
        self.folder, self.site = folder, folder / "site"
        shutil.copytree(ROOT / "modelq", self.site / "modelq", ignore=shutil.ignore_patterns("*.so", "__pycache__", "_cuda"))
        names = [name for part in ("core", "format", "kernels", "quant", "calib", "model", "export", "backend", "py")
                 for name in sorted((ROOT / "csrc" / part).glob("*.c"))]
        self.objects = {path: folder / f"{path.parent.name}-{path.name}.o" for path in names}
        cuda_build.run([self.command(path, path, made) for path, made in self.objects.items()])
        self.extension = self.site / "modelq" / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"

    def command(self, path: Path, source: Path, made: Path) -> list[str]:
        includes = [ROOT / "csrc", ROOT / "cuda", path.parent, numpy.get_include(), sysconfig.get_path("include")]
        return ["gcc", *FLAGS, *(f"-I{place}" for place in includes), "-c", str(source), "-o", str(made)]

    def link(self, instead: dict[Path, Path]) -> None:
        objects = [str(instead.get(path, made)) for path, made in self.objects.items()]
        cuda_build.run([["gcc", "-shared", "-pthread", *objects, "-lm", "-ldl", "-o", str(self.extension)]])

    def without(self, wait: Wait) -> None:
        text, (start, end) = wait.match.string, wait.match.span()
        source, made = self.folder / "mutant.c", self.folder / "mutant.o"
        source.write_text(NOTHING + text[:start] + "mq_nothing(" + text[end:])
        cuda_build.run([self.command(wait.path, source, made)])
        self.link({wait.path: made})

    def fails(self, file: str) -> bool:
        """Whether one of that file's tests does, or crashes, or hangs."""
        return any(self._fails(*tests) for tests in TESTS[file])

    def _fails(self, tests: str, wanted: str) -> bool:
        environment = {**os.environ, "PYTHONPATH": str(self.site)}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests, "-k", wanted]
        try:
            done = subprocess.run(command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True, timeout=600)
        except subprocess.TimeoutExpired:
            return True
        if done.returncode not in (0, 1, -signal.SIGSEGV, -signal.SIGABRT):
            raise RuntimeError(f"{done.stdout}{done.stderr}")
        return done.returncode != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=1)
    parser.add_argument("files", nargs="*")
    given, missed, found = parser.parse_args(), 0, waits()
    wanted = [wait for wait in found if wait.key not in KNOWN and wait.path.name in (given.files or TESTS)]
    chosen = wanted[::given.sample]
    for key in sorted(KNOWN):
        print(f"{' '.join(key)} not tried: {KNOWN[key]}")
    for name in sorted({wait.path.name for wait in found} - set(TESTS)):
        print(f"csrc/backend/{name} not tried")
    if unknown := set(KNOWN) - {wait.key for wait in found}:
        raise RuntimeError(f"KNOWN names what is not there any longer: {sorted(unknown)}")
    with tempfile.TemporaryDirectory() as folder:
        build = Build(Path(folder))
        build.link({})
        for file in sorted({wait.path.name for wait in chosen}):
            if build.fails(file):
                raise RuntimeError(f"the tests of {file} fail as it is")
        for wait in chosen:
            build.without(wait)
            noticed = build.fails(wait.path.name)
            missed += not noticed
            print(f"{wait} {'noticed' if noticed else 'NOT NOTICED'}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
