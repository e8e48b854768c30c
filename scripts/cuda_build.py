"""Builds what lies in cuda/: the emulated library (g++ and cuda/shim) and, to see that they compile, the kernels with nvcc.

    python scripts/cuda_build.py emulated FOLDER [--sanitize]
    python scripts/cuda_build.py nvcc FOLDER [ARCHITECTURE ...]     sm_90a is the default
    python scripts/cuda_build.py library FOLDER [ARCHITECTURE ...]  the same, linked to libmodelq_cuda.so
"""
import argparse
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = ["csrc/core/alloc.c", "csrc/core/error.c", "csrc/format/format.c"]        # what the CUDA library needs of the C side
EMULATED = "libmodelq_cuda_emulated.so"
# No contraction to fused operations: the bits are those of the C kernels. Division and square roots are correctly rounded and
# denormals are kept by nvcc's defaults, which -use_fast_math would change.
GXX = ["-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror"]
SANITIZERS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
NVCC = ["-std=c++17", "-O3", "--fmad=false", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-fPIC,-fvisibility=hidden"]


def kernels(root: Path = ROOT) -> list[Path]:
    return sorted((root / "cuda").glob("*.cu"))


def run(commands: list[list[str]], jobs: int | None = None) -> None:
    """All of them, some at once; what a compiler says is the error's text."""
    def one(command):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        list(pool.map(one, commands))


def emulated(folder: Path, sanitize: bool = False, root: Path = ROOT, only: list[str] | None = None) -> Path:
    """The library that g++ makes of root's kernels; only: of these files alone."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = [path for path in kernels(root) if only is None or path.name in only]
    extra = SANITIZERS if sanitize else []
    includes = [f"-I{root / 'cuda'}", f"-I{root / 'csrc'}"]
    commands, objects = [], []
    for path in [*sources, *sorted((root / "cuda/shim").glob("*.cc")), *(root / name for name in CORE)]:
        objects.append(str(folder / f"{path.name}.o"))
        language = ["gcc", "-std=c11"] if path.suffix == ".c" else ["g++", "-std=c++17", "-fno-exceptions", "-DMQ_CUDA_SHIM", "-x", "c++"]
        commands.append([*language, *GXX, *extra, *includes, "-c", str(path), "-o", objects[-1]])
    run(commands)
    library = folder / EMULATED
    run([["g++", "-shared", "-pthread", *extra, *objects, "-o", str(library)]])
    return library


def nvcc_commands(folder: Path, architectures: list[str], root: Path = ROOT) -> list[list[str]]:
    targets = [flag for name in architectures for flag in ("-gencode", f"arch=compute_{name.removeprefix('sm_')},code={name}")]
    return [["nvcc", *NVCC, *targets, f"-I{root / 'cuda'}", f"-I{root / 'csrc'}", "-c", str(path), "-o", str(folder / f"{path.name}.o")]
            for path in kernels(root)]


def library(folder: Path) -> Path:
    """What nvcc_commands compiled, linked with the C side that it needs and the static CUDA runtime."""
    objects = [str(folder / f"{path.name}.o") for path in kernels()]
    for name in CORE:
        objects.append(str(folder / f"{Path(name).name}.o"))
        run([["gcc", "-std=c11", *GXX, f"-I{ROOT / 'csrc'}", "-c", str(ROOT / name), "-o", objects[-1]]])
    made = folder / "libmodelq_cuda.so"
    run([["nvcc", "-shared", *objects, "-o", str(made)]])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["emulated", "nvcc", "library"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("architectures", nargs="*", default=["sm_90a"])
    parser.add_argument("--sanitize", action="store_true")
    given = parser.parse_args()
    if given.what == "emulated":
        print(emulated(given.folder, given.sanitize))
    else:
        if shutil.which("nvcc") is None:
            parser.error("no nvcc in PATH")
        given.folder.mkdir(parents=True, exist_ok=True)
        run(nvcc_commands(given.folder, given.architectures))
        if given.what == "library":
            print(library(given.folder))


if __name__ == "__main__":
    main()
