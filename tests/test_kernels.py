"""Every ISA's kernels and every number of threads give the same bits."""
from pathlib import Path

import pytest


PROGRAM = (Path(__file__).parent / "kernel_digests.py").read_text()
ISAS = ["c", "avx2", "avx512"]


@pytest.fixture(scope="module")
def scalar_digests(run_python):
    return run_python(PROGRAM, MODELQ_ISA="c", MODELQ_NUM_THREADS="1").splitlines()


def supported(run_python, isa):
    from modelq._core import cpu_info
    features = cpu_info()["features"].split()
    return isa == "c" or isa in features


@pytest.mark.parametrize("isa, threads", [("c", 3), ("avx2", 1), ("avx2", 3), ("avx512", 1), ("avx512", 3)])
def test_same_bits(scalar_digests, run_python, isa, threads):
    if not supported(run_python, isa):
        pytest.skip(f"this processor has no {isa}, or MODELQ_ISA forbids it")
    assert run_python(PROGRAM, MODELQ_ISA=isa, MODELQ_NUM_THREADS=str(threads)).splitlines() == scalar_digests


@pytest.mark.parametrize("isa", ISAS)
def test_forced_isa_is_used(run_python, isa):
    if not supported(run_python, isa):
        pytest.skip(f"this processor has no {isa}, or MODELQ_ISA forbids it")
    assert run_python("import modelq._core as c; print(c.cpu_info()['isa'])", MODELQ_ISA=isa) == isa
