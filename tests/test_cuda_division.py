"""cuda/quantize_wide.cuh divides by multiplying: beside every limit between codes of formats with up to three bits of mantissa, one correction
gives the quotient of IEEE division; two give it for any numbers."""
import ctypes as C
import shutil

import pytest

from cuda_library import cuda_build

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")

SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>
static float of(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static float corrected(float a, float b, float r, float q) { return fmaf(fmaf(-q, b, a), r, q); }

/* Divisors of every step-th mantissa; dividends of up to three units beside divisor * limit / 32. */
long beside_limits(uint32_t step)
{
    long wrong = 0;
    for (uint32_t mantissa = 0; mantissa < 1u << 23; mantissa += step) {
        const float b = of(127u << 23 | mantissa), r = 1.0f / b;
        for (int limit = 32; limit <= 64; limit++)
            for (int unit = -3; unit <= 3; unit++) {
                const float a = of(bits_of(b * ((float)limit / 32.0f)) + (uint32_t)unit);
                wrong += corrected(a, b, r, a * r) != a / b;
            }
    }
    return wrong;
}

long anywhere(long count)
{
    uint64_t state = 88172645463325252u;
    long wrong = 0;
    for (long i = 0; i < count; i++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        const float a = of((67u + (uint32_t)(state >> 46) % 120u) << 23 | ((uint32_t)state & 0x7fffffu));
        const float b = of((67u + (uint32_t)(state >> 53) % 121u) << 23 | ((uint32_t)(state >> 23) & 0x7fffffu)), r = 1.0f / b;
        wrong += corrected(a, b, r, corrected(a, b, r, a * r)) != a / b;
    }
    return wrong;
}
"""


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("division")
    (folder / "check.c").write_text(SOURCE)
    cuda_build.run([["gcc", "-O2", "-ffp-contract=off", "-shared", "-fPIC", str(folder / "check.c"), "-o", str(folder / "check.so"), "-lm"]])
    made = C.CDLL(str(folder / "check.so"))
    made.beside_limits.restype = made.anywhere.restype = C.c_long
    return made


def test_beside_limits(checks):
    assert checks.beside_limits(C.c_uint32(97)) == 0        # 1 was tried: it takes a minute


def test_anywhere(checks):
    assert checks.anywhere(C.c_long(5_000_000)) == 0
