"""Takes the barriers out of the CUDA kernels, one at a time, and sees whether the tests notice. Prints a line for each; exit code 1 if
one was not noticed.

    python scripts/cuda_mutants.py [FOLDER]
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import cuda_build

ROOT = cuda_build.ROOT
BARRIER = re.compile(r"__syncthreads\(\);")
TESTS = "amax or histogram"     # the kernels with barriers


def barriers() -> list[tuple[Path, int]]:
    """Files and places of all barriers in kernels."""
    files = sorted(path for path in (ROOT / "cuda").glob("*.cu*"))
    return [(path, match.start()) for path in files for match in BARRIER.finditer(path.read_text())]


def without(path: Path, place: int, folder: Path) -> Path:
    """The emulated library of a copy of the sources that lacks that barrier."""
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT / "cuda", tree / "cuda")
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    text = path.read_text()
    (tree / path.relative_to(ROOT)).write_text(text[:place] + BARRIER.sub("", text[place:], count=1))
    return cuda_build.emulated(folder, root=tree)


def is_noticed(library: Path) -> bool:
    """Whether tests fail, and not for another reason than that they do."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "test_cuda_emulated.py", "-k", TESTS]
    environment = {**os.environ, "MODELQ_CUDA_EMULATED": str(library)}
    done = subprocess.run(command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{done.stdout}{done.stderr}")
    return done.returncode == 1


def main() -> int:
    missed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        for path, place in barriers():
            line = path.read_text().count("\n", 0, place) + 1
            noticed = is_noticed(without(path, place, folder))
            missed += not noticed
            print(f"{path.relative_to(ROOT)}:{line} {'noticed' if noticed else 'NOT NOTICED'}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
