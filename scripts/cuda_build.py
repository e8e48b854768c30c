"""Builds what lies in cuda/: the emulated library (g++ and cuda/shim) and, to see that they compile, the kernels with nvcc.

    python scripts/cuda_build.py emulated FOLDER [--sanitize]
    python scripts/cuda_build.py nvcc FOLDER [ARCHITECTURE ...]     sm_90a is the default
    python scripts/cuda_build.py library FOLDER [ARCHITECTURE ...]  the same, linked to libmodelq_cuda.so

An architecture is code for one generation of GPUs (sm_90a), or what newer ones compile when they load it (compute_100: PTX). setup.py uses
this file where MODELQ_CUDA=1 asks for the library.
"""
import argparse
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = ["csrc/core/alloc.c", "csrc/core/error.c", "csrc/format/format.c"]        # what the CUDA library needs of the C side
EMULATED, LIBRARY = "libmodelq_cuda_emulated.so", "libmodelq_cuda.so"
# What is shipped: Ampere, its consumer GPUs, Ada, Hopper, Blackwell (90a, 100a: with what only they have), and PTX for what comes.
SHIPPED = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "compute_100"]
# No contraction to fused operations: the bits are those of the C kernels. Division and square roots are correctly rounded and
# denormals are kept by nvcc's defaults, which -use_fast_math would change.
GXX = ["-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror"]
SANITIZERS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
NVCC = ["-std=c++17", "-O3", "--fmad=false", "--compress-mode=size", "-Werror", "all-warnings", "-Xcompiler",
        "-Wall,-Wextra,-fPIC,-fvisibility=hidden"]
QUICK = ["--Ofast-compile=max"]        # behind NVCC: slow code, in a tenth of the time


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
    """The library that g++ makes of root's kernels; only: these are compiled, and the other objects are there from before."""
    folder.mkdir(parents=True, exist_ok=True)
    extra = SANITIZERS if sanitize else []
    includes = [f"-I{root / 'cuda'}", f"-I{root / 'csrc'}"]
    commands, objects = [], []
    for path in [*kernels(root), *sorted((root / "cuda/shim").glob("*.cc")), *(root / name for name in CORE)]:
        objects.append(str(folder / f"{path.name}.o"))
        if only is not None and path.name not in only:
            continue
        language = ["gcc", "-std=c11"] if path.suffix == ".c" else ["g++", "-std=c++17", "-fno-exceptions", "-DMQ_CUDA_SHIM", "-x", "c++"]
        commands.append([*language, *GXX, *extra, *includes, "-c", str(path), "-o", objects[-1]])
    run(commands)
    library = folder / EMULATED
    run([["g++", "-shared", "-pthread", *extra, *objects, "-ldl", "-o", str(library)]])
    return library


def architectures_of(text: str) -> list[str]:
    """Of "80;90a", "sm_80 sm_90a" or "90+PTX" (code and PTX), as sm_ and compute_ names; of nothing, those that are shipped."""
    names: list[str] = [] if text.strip() else list(SHIPPED)
    for name in re.split(r"[;,\s]+", text.strip()) if text.strip() else []:
        number, _, ptx = name.removeprefix("sm_").removeprefix("compute_").partition("+")
        if not re.fullmatch(r"\d+[af]?", number) or ptx.upper() not in ("", "PTX"):
            raise ValueError(f"MODELQ_CUDA_ARCHITECTURES: {name!r} is no architecture; expected for example 80;90a or 90+PTX")
        names += [] if name.startswith("compute_") else [f"sm_{number}"]
        names += [f"compute_{number}"] if ptx or name.startswith("compute_") else []
    return list(dict.fromkeys(names))


def nvcc() -> str | None:
    """NVCC, or the one in PATH, or of CUDA_HOME."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def nvcc_commands(folder: Path, architectures: list[str], root: Path = ROOT, flags: Sequence[str] = ()) -> list[list[str]]:
    targets = [flag for name in architectures
               for flag in ("-gencode", f"arch=compute_{name.removeprefix('sm_').removeprefix('compute_')},code={name}")]
    return [[nvcc() or "nvcc", *NVCC, *flags, *targets, f"-I{root / 'cuda'}", f"-I{root / 'csrc'}", "-c", str(path), "-o",
             str(folder / f"{path.name}.o")] for path in kernels(root)]


def is_fresh(made: Path, root: Path = ROOT) -> bool:
    sources = [*(root / "cuda").glob("*.*"), *(root / "csrc").rglob("*.[chd]*"), root / "scripts/cuda_build.py"]
    return made.exists() and made.stat().st_mtime > max(path.stat().st_mtime for path in sources)


def compile_all(folder: Path, architectures: list[str], root: Path = ROOT, jobs: int | None = None, flags: Sequence[str] = ()) -> None:
    """Each kernel file to folder, but for those that are newer than all sources: an interrupted build goes on where it was."""
    folder.mkdir(parents=True, exist_ok=True)
    run([command for command in nvcc_commands(folder, architectures, root, flags) if not is_fresh(Path(command[-1]), root)], jobs)


def library(folder: Path, made: Path | None = None, root: Path = ROOT) -> Path:
    """What compile_all compiled, linked with the C side that it needs and the static CUDA runtime: it needs no library of NVIDIA's to be
    opened, and finds driver and cuBLASLt when it is used."""
    objects = [str(folder / f"{path.name}.o") for path in kernels(root)]
    for name in CORE:
        objects.append(str(folder / f"{Path(name).name}.o"))
        run([["gcc", "-std=c11", *GXX, f"-I{root / 'csrc'}", "-c", str(root / name), "-o", objects[-1]]])
    made = made or folder / LIBRARY
    run([[nvcc() or "nvcc", "-shared", "-cudart", "static", *objects, "-ldl", "-o", str(made)]])
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
        if nvcc() is None:
            parser.error("no nvcc in PATH")
        compile_all(given.folder, given.architectures)
        if given.what == "library":
            print(library(given.folder))


if __name__ == "__main__":
    main()
