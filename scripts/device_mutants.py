"""Takes the waits between the streams of a device's runtime (csrc/backend/device_*.c) out, one at a time, and sees whether the tests
notice, whose streams do nothing before they must. Prints a line for each; exit code 1 if one was not noticed.

    python scripts/device_mutants.py [FILE ...]      of these files alone
"""
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import cuda_build

ROOT = cuda_build.ROOT
WAIT = re.compile(r"(?:[\w.]+->)*backend->(?:event_after|event_wait|stream_wait)\([^()]*\)")
TESTS = ["test_device_ahead.py", "test_device.py", "test_device_backward.py"]
CHOSEN = "results_are_those or experts_come or late or random or backward or losses_are_sums"
# Waits that others make up for, wherever these are: settle and what is freed come after all else was waited for.
REDUNDANT = {"mq_device_settle", "mq_device_give_spare"}


def function_of(text: str, place: int) -> str:
    """The name of the function around a place."""
    return re.findall(r"^(?:static )?(?:\w+ \**)+(\w+)\(", text[:place], flags=re.M)[-1]


def waits(tree: Path, files: list[str]) -> list[tuple[Path, re.Match[str]]]:
    found = []
    for path in sorted((tree / "csrc/backend").glob("device*.c")):
        text = path.read_text()
        found += [(path, match) for match in WAIT.finditer(text)
                  if (not files or path.name in files) and function_of(text, match.start()) not in REDUNDANT]
    return found


def built(tree: Path) -> None:
    command, environment = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], {**os.environ, "MODELQ_TESTING": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)


def is_noticed(tree: Path, library: Path) -> bool:
    """Whether tests fail, or crash, and not for another reason."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS, "-k", CHOSEN]
    environment = {**os.environ, "PYTHONPATH": str(tree), "MODELQ_CUDA_EMULATED": str(library)}
    done = subprocess.run(command, cwd=tree / "tests", env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1, -signal.SIGSEGV, -signal.SIGABRT):
        raise RuntimeError(f"{done.stdout}{done.stderr}")
    return done.returncode != 0


def main() -> int:
    missed = 0
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "notebooks", "*.egg-info"))
        library = cuda_build.emulated(Path(temporary) / "objects")
        built(tree)
        if is_noticed(tree, library):
            raise RuntimeError("the tests fail as it is")
        for path, match in waits(tree, sys.argv[1:]):
            text = path.read_text()
            path.write_text(text[:match.start()] + "MQ_OK" + text[match.end():])
            built(tree)
            noticed = is_noticed(tree, library)
            path.write_text(text)
            missed += not noticed
            where = f"{path.relative_to(tree)}:{text.count(chr(10), 0, match.start()) + 1} {function_of(text, match.start())}"
            print(f"{where} {'noticed' if noticed else 'NOT NOTICED'}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
