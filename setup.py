"""Build logic only: sources by folder, flags, switches. Metadata is in pyproject.toml.

Environment: MODELQ_DEBUG=1 (asserts, no optimisation), MODELQ_SANITIZE=1 (ASan and UBSan), MODELQ_WERROR=1 (warnings are
errors), MODELQ_TESTING=1 (also build modelq._testing).
"""
import os
from glob import glob

import numpy
from setuptools import Extension, setup


def switch(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


compile_args = ["-std=c11", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
                "-Wall", "-Wextra", "-Wconversion"]
link_args = ["-pthread", "-lm"]
macros = []
if switch("MODELQ_DEBUG") or switch("MODELQ_SANITIZE"):
    compile_args += ["-O1", "-g", "-UNDEBUG"]
else:
    macros.append(("NDEBUG", None))
if switch("MODELQ_SANITIZE"):
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    compile_args += sanitizers
    link_args += sanitizers
if switch("MODELQ_WERROR"):
    compile_args.append("-Werror")

FOLDERS = ["core", "format", "kernels", "quant", "calib", "model", "export", "backend"]
core_sources = sorted(path for folder in FOLDERS for path in glob(f"csrc/{folder}/*.c"))
headers = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inc", recursive=True) + glob("csrc/**/*.def", recursive=True))


def extension(name: str, folder: str) -> Extension:
    return Extension(name, core_sources + sorted(glob(f"csrc/{folder}/*.c")), include_dirs=["csrc", numpy.get_include()],
                     define_macros=macros, extra_compile_args=compile_args, extra_link_args=link_args, depends=headers)


extensions = [extension("modelq._core", "py")]
if switch("MODELQ_TESTING"):
    extensions.append(extension("modelq._testing", "testing"))

setup(ext_modules=extensions)
