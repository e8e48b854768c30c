"""Print the instruction sets that MODELQ_ISA may force here, worst first: "c avx2 avx512"."""
import os
import subprocess
import sys

for isa in ("c", "avx2", "avx512"):
    done = subprocess.run([sys.executable, "-I", "-c", "import modelq._core"], env={**os.environ, "MODELQ_ISA": isa}, capture_output=True)
    if done.returncode == 0:
        print(isa)
