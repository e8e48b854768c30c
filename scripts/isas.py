"""Print the instruction sets that MODELQ_ISA may force here, worst first: "c avx2 avx512". With --capped, only those that are less than what is
used without it."""
import os
import subprocess
import sys


def said(**environment: str) -> str:
    """What modelq uses; nothing where it refuses."""
    code = "import modelq._core as core; print(core.cpu_info()['isa'], core.cpu_info()['features'])"
    return subprocess.run([sys.executable, "-I", "-c", code], env={**os.environ, **environment}, capture_output=True, text=True).stdout


if not (best := said(MODELQ_ISA="")):
    sys.exit("modelq is not installed for this interpreter, or does not load")
for isa in ("c", "avx2", "avx512"):
    if (used := said(MODELQ_ISA=isa)) and ("--capped" not in sys.argv[1:] or used != best):
        print(isa)
