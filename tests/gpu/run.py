"""tests/gpu/run.sh: see there."""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import cuda_build  # noqa: E402 (from scripts/)

NO_GPU, NO_NVCC = 3, 4
# tests/test_cuda_*.py, and tests/test_*.py
PARITY = ["emulated", "operations", "experts", "attention", "gemm", "gram", "linear", "arrays", "device", "device_backward", "device_packed"]
# The kernels that use shared memory or exchange within warps; a sanitizer takes a hundred times as long.
SANITIZED = ["rmsnorm", "prepare", "columns", "dispatch", "embed", "causal", "hidden", "many_heads", "histogram", "loss"]
TOOLS = ["memcheck", "racecheck", "synccheck", "initcheck"]
GOAL = 0.85     # of the device's copy bandwidth


def gpu() -> tuple[str, str] | None:
    """Name and compute capability of the first one."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    if done.returncode or "," not in done.stdout:
        return None
    name, capability = done.stdout.splitlines()[0].rsplit(",", 1)
    return name.strip(), capability.strip()


def architecture(capability: str) -> str:
    number = capability.replace(".", "")
    return f"sm_{number}" + ("a" if int(number) >= 90 else "")      # what only one generation has: FP4 conversions, for one


def runtime() -> str:
    """The CUDA runtime's shared library, by which tests allocate and copy."""
    if given := os.environ.get("MODELQ_CUDART"):
        return given
    home = Path(cuda_build.nvcc() or "nvcc").resolve().parents[1]
    places = [home / "lib64", home / "lib", *home.glob("targets/*/lib"), *(Path(path) / "nvidia" for path in sys.path if path)]
    found = [file for place in places if place.is_dir() for file in sorted(place.rglob("libcudart.so*"))]
    return str(found[0]) if found else "libcudart.so"


class Table:
    """Rows that are printed as they come; whether any of them is bad."""
    def __init__(self):
        self.is_bad = False
        self.add("part", "what", "result")

    def add(self, part, what, result, is_bad=False):
        self.is_bad |= is_bad
        print(f"{part:<10} {what:<58} {result}{'   <-- NOT GOOD' if is_bad else ''}", flush=True)


def run_tests(table: Table, part: str, what: str, command: list[str], environment: dict) -> None:
    done = subprocess.run(command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()] or ["no output"]
    table.add(part, what, lines[-1], done.returncode not in (0, 5))        # 5: no test of that name
    if done.returncode not in (0, 5):
        print(done.stdout[-6000:], done.stderr[-3000:], sep="\n")


def pytest_of(files: list[str], chosen: str | None) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *(["-k", chosen] if chosen else [])]


def parity(table: Table, environment: dict, names: list[str], chosen: str | None) -> None:
    """A process for each file: an error may leave a GPU useless to the process that made it."""
    for name in names:
        file = f"test_{name}.py" if name.startswith("device") else f"test_cuda_{name}.py"
        run_tests(table, "parity", file, pytest_of([file], chosen), environment)


def sanitizer(table: Table, environment: dict) -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        table.add("sanitizer", "compute-sanitizer", "not there")
        return
    files = [f"test_cuda_{name}.py" for name in ("emulated", "operations", "experts", "attention")]
    for name in TOOLS:
        command = [tool, "--tool", name, "--error-exitcode", "9", "--target-processes", "all", *pytest_of(files, " or ".join(SANITIZED))]
        run_tests(table, "sanitizer", name, command, environment)


def script(name: str, environment: dict, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tests/gpu" / name), *options]
    return subprocess.run(command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True)


def products(table: Table, environment: dict, is_emulated: bool) -> None:
    """bench_gemm.py has a table of its own."""
    done = script("bench_gemm.py", environment, *(["--emulated"] if is_emulated else []))
    table.add("bench", "bench_gemm.py", "below" if done.returncode == 0 else f"exit code {done.returncode}", done.returncode != 0)
    print(done.stdout, done.stderr[-3000:] if done.returncode else "", sep="\n")


def add_row(table: Table, row: dict, is_emulated: bool) -> None:
    """Of a line of bench.py or bench_forward.py. Times by emulation have no goals."""
    if "milliseconds" not in row:
        table.add("bench", row["what"], row["note"], row.get("is_bad", False))
        return
    result = f"{row['milliseconds']:10.3f} ms {row['rate']:10.1f} {row['unit']}"
    has_goal, goal = row.get("has_goal", False) and not is_emulated, row.get("goal", GOAL)
    if row.get("share") is not None:
        result += f" {100 * row['share']:6.1f}% of {row.get('of', 'a copy')}" + (f" (goal {100 * goal:.0f}%)" if has_goal else "")
    table.add("bench", row["what"], result, has_goal and row["share"] < goal)


def benches(table: Table, environment: dict, is_emulated: bool) -> None:
    for name in ("bench.py", "bench_forward.py"):
        done = script(name, environment, *(["--smoke"] if is_emulated else []))
        for line in done.stdout.splitlines():
            add_row(table, json.loads(line), is_emulated)
        if done.returncode:
            table.add("bench", name, f"exit code {done.returncode}", True)
            print(done.stderr[-3000:])


def prepare(is_emulated: bool, folder: Path) -> dict:
    """The environment that tests run in, with the library that is to be tested. Exits where there is none to be had."""
    environment = dict(os.environ)
    if known := os.environ.get("PYTHONPATH"):       # tests run elsewhere
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in known.split(os.pathsep) if path)
    if is_emulated:
        environment.pop("MODELQ_CUDA_LIBRARY", None)
        if "MODELQ_CUDA_EMULATED" not in environment:
            environment["MODELQ_CUDA_EMULATED"] = str(cuda_build.emulated(folder))
        return environment
    found = gpu()
    if found is None:
        print("There is no GPU here (nvidia-smi names none), so nothing was run and nothing measured. --emulated runs the comparisons by g++'s "
              "library of the kernels.")
        sys.exit(NO_GPU)
    environment["MODELQ_CUDART"] = runtime()
    environment.setdefault("MODELQ_CAPABILITY", found[1].replace(".", ""))
    if "MODELQ_CUDA_LIBRARY" not in environment:
        if cuda_build.nvcc() is None:
            print(f"{found[0]}, but no nvcc in PATH to build the library with; MODELQ_CUDA_LIBRARY may name one that is built.")
            sys.exit(NO_NVCC)
        target = ROOT / "build/cuda/gpu"
        cuda_build.compile_all(target, [architecture(found[1])])
        environment["MODELQ_CUDA_LIBRARY"] = str(cuda_build.library(target))
    print(f"{found[0]}, compute capability {found[1]}, {environment['MODELQ_CUDA_LIBRARY']}", flush=True)
    return environment


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--emulated", action="store_true")
    parser.add_argument("--files", nargs="+", choices=PARITY, default=PARITY, help="of the comparisons: test_cuda_<name>.py, or test_<name>.py")
    parser.add_argument("--tests", help="an expression of pytest's -k")
    parser.add_argument("--only", nargs="+", choices=["parity", "sanitizer", "bench"], default=["parity", "sanitizer", "bench"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = prepare(given.emulated, Path(folder))
        table = Table()
        if "parity" in given.only:
            parity(table, environment, given.files, given.tests)
        if "sanitizer" in given.only and not given.emulated:
            sanitizer(table, environment)
        if "bench" in given.only:
            benches(table, environment, given.emulated)
            products(table, environment, given.emulated)
    return int(table.is_bad)


if __name__ == "__main__":
    sys.exit(main())
