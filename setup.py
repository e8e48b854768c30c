"""Build logic only: sources by folder, flags, switches. Metadata is in pyproject.toml.

Environment: MODELQ_DEBUG=1 (asserts, no optimisation), MODELQ_SANITIZE=1 (ASan and UBSan), MODELQ_WERROR=1 (warnings are
errors), MODELQ_TESTING=1 (also build modelq._testing), MODELQ_JOBS=n (files compiled at once, default the number of cores);
MODELQ_CUDA=1 (also build modelq/_cuda/libmodelq_cuda.so with nvcc), MODELQ_CUDA_ARCHITECTURES ("80;90a+PTX", default all).
"""
import importlib.util
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def switch(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


DEBUG, SANITIZE, TESTING = (switch(f"MODELQ_{name}") for name in ("DEBUG", "SANITIZE", "TESTING"))

compile_args = ["-std=c11", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
                "-Wall", "-Wextra", "-Wconversion"]
link_args = ["-pthread", "-lm", "-ldl"]
ARCHITECTURES = os.environ.get("MODELQ_CUDA_ARCHITECTURES", "")
macros = []
if DEBUG or SANITIZE:
    compile_args += ["-O1", "-g", "-UNDEBUG"]
else:
    macros.append(("NDEBUG", None))
if SANITIZE:
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    compile_args += sanitizers
    link_args += sanitizers
if switch("MODELQ_WERROR"):
    compile_args.append("-Werror")

FOLDERS = ["core", "format", "kernels", "quant", "calib", "model", "export", "backend"]
core_sources = sorted(path for folder in FOLDERS for path in glob(f"csrc/{folder}/*.c"))
headers = sorted(path for suffix in ("h", "inc", "def") for path in glob(f"csrc/**/*.{suffix}", recursive=True)) + sorted(glob("cuda/*.h"))


def extension(name: str, sources: list[str]) -> Extension:
    return Extension(name, core_sources + sorted(sources), include_dirs=["csrc", "cuda", numpy.get_include()], define_macros=macros,
                     extra_compile_args=compile_args, extra_link_args=link_args, depends=headers)


class ParallelBuild(build_ext):
    """Compiles several files at once, each object once for both extensions, and not again while it is newer than all it may include."""

    def build_extensions(self) -> None:
        cuda_build = load_cuda_build() if switch("MODELQ_CUDA") else None
        self.parallel = None
        compile_one, stale_before = self.compiler.compile, max(map(os.path.getmtime, ["setup.py", *headers]))
        done: set[str] = set()

        def compile_many(sources, output_dir=None, **options):
            objects = self.compiler.object_filenames(sources, output_dir=output_dir)
            todo = [source for source, made in zip(sources, objects) if made not in done and not fresh(source, made)]
            with ThreadPoolExecutor(int(os.environ.get("MODELQ_JOBS", 0)) or len(os.sched_getaffinity(0))) as pool:
                list(pool.map(lambda source: compile_one([source], output_dir=output_dir, **options), todo))
            done.update(objects)
            return objects

        def fresh(source, made):
            return os.path.exists(made) and os.path.getmtime(made) > max(stale_before, os.path.getmtime(source))

        self.compiler.compile = compile_many
        super().build_extensions()
        if cuda_build is not None:
            folder = Path(self.build_temp) / "cuda" / "-".join(architectures := cuda_build.architectures_of(ARCHITECTURES))
            cuda_build.compile_all(folder, architectures, jobs=int(os.environ.get("MODELQ_JOBS", 0)) or None)
            target = Path(self.get_ext_fullpath("modelq._core")).parent / "_cuda"
            target.mkdir(parents=True, exist_ok=True)
            cuda_build.library(folder, target / cuda_build.LIBRARY)


def load_cuda_build():
    """scripts/cuda_build.py: the GPU's library is one of its own, and nothing else that is linked knows of CUDA."""
    spec = importlib.util.spec_from_file_location("cuda_build", "scripts/cuda_build.py")
    cuda_build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cuda_build)
    if cuda_build.nvcc() is None:
        raise SystemExit("MODELQ_CUDA=1: no nvcc in PATH, CUDA_HOME or NVCC: install the CUDA Toolkit 13, or leave MODELQ_CUDA away")
    return cuda_build


extensions = [extension("modelq._core", glob("csrc/py/*.c"))]
if TESTING:
    shared = [path for path in glob("csrc/py/*.c") if os.path.basename(path) in ("convert.c", "dlpack.c", "faults.c", "ndarray.c", "parts.c")]
    extensions.append(extension("modelq._testing", glob("csrc/testing/*.c") + shared))

# One build folder per set of switches and interpreter: objects of one are of no use to another, and a plain wheel must not pick
# up what a testing build left behind.
flavour = "-".join(["release", "debug"][DEBUG:DEBUG + 1] + ["sanitize"] * SANITIZE + ["testing"] * TESTING + [sys.implementation.cache_tag])
setup(ext_modules=extensions, cmdclass={"build_ext": ParallelBuild}, options={"build": {"build_base": f"build/{flavour}"}})
