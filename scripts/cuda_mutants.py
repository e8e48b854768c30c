"""Takes the barriers and the waits for copies out of the CUDA kernels, one at a time, and sees whether the tests notice. Prints a line for
each; exit code 1 if one was not noticed.

    python scripts/cuda_mutants.py [--objects FOLDER] [FILE ...]     of these files alone; with what `cuda_build.py emulated FOLDER` made
"""
import argparse
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
BARRIER = re.compile(r"__syncthreads\(\);|mq_copy_wait\(\);|mq_sync_warp\(\);")
# File: the kernels that are compiled anew without its barriers (a header's are in them), and their tests.
TESTS = {
    "common.cuh": ("amax.cu", "test_cuda_emulated.py", "test_amax"),
    "histogram.cu": ("histogram.cu", "test_cuda_emulated.py", "histogram"),
    "rows.cuh": ("norm.cu", "test_cuda_operations.py", "rmsnorm"),
    "rope.cu": ("rope.cu", "test_cuda_operations.py", "part"),
    "route.cu": ("route.cu", "test_cuda_experts.py", "groups"),
    "columns.cu": ("columns.cu", "test_cuda_operations.py", "columns"),
    "rotate.cuh": ("prepare.cu", "test_cuda_operations.py", "prepare"),
    "embed.cu": ("embed.cu", "test_cuda_experts.py", "embed"),
    "dispatch.cu": ("dispatch.cu", "test_cuda_experts.py", "dispatch"),
    "attention.cu": ("attention.cu", "test_cuda_attention.py", "causal"),
    "attention_step.cu": ("attention_step.cu", "test_cuda_attention.py", "past or many"),
    "attention_backward.cu": ("attention_backward.cu", "test_cuda_attention.py", "test_backward"),
}


def barriers() -> list[tuple[Path, int]]:
    """Files and places of all barriers in kernels."""
    files = sorted(path for path in (ROOT / "cuda").glob("*.cu*"))
    return [(path, match.start()) for path in files for match in BARRIER.finditer(path.read_text())]


def without(path: Path, place: int, folder: Path, objects: Path) -> Path:
    """The emulated library, in which one file was compiled from a copy of the sources that lacks that barrier."""
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT / "cuda", tree / "cuda")
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    shutil.copytree(objects, folder / "mutant", dirs_exist_ok=True)
    text = path.read_text()
    (tree / path.relative_to(ROOT)).write_text(text[:place] + BARRIER.sub("", text[place:], count=1))
    return cuda_build.emulated(folder / "mutant", root=tree, only=[TESTS[path.name][0]])


def is_noticed(library: Path, file: str) -> bool:
    """Whether tests fail, or crash for an index that is rubbish, and not for another reason."""
    _, tests, chosen = TESTS[file]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests, "-k", chosen]
    environment = {**os.environ, "MODELQ_CUDA_EMULATED": str(library)}
    done = subprocess.run(command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1, -signal.SIGSEGV):
        raise RuntimeError(f"{done.stdout}{done.stderr}")
    return done.returncode != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=Path)
    parser.add_argument("files", nargs="*")
    given, missed = parser.parse_args(), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        objects = given.objects or cuda_build.emulated(folder / "objects").parent
        for path, place in barriers():
            if given.files and path.name not in given.files:
                continue
            line = path.read_text().count("\n", 0, place) + 1
            noticed = is_noticed(without(path, place, folder, objects), path.name)
            missed += not noticed
            print(f"{path.relative_to(ROOT)}:{line} {'noticed' if noticed else 'NOT NOTICED'}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
