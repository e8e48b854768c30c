"""quantize, dequantize and fake_quantize of every scheme, and what they refuse."""
import numpy as np
from harness import check

import modelq._core as core

weight = np.random.default_rng(0).standard_normal((32, 128)).astype(np.float32)
schemes = list(core.schemes())


def one_round():
    for scheme in schemes:
        parts = core.quantize(weight, scheme)
        core.dequantize(parts, scheme)
        core.fake_quantize(weight, scheme)
    for wrong in (lambda: core.quantize(weight, "nothing"), lambda: core.quantize(weight[:, :7], "nvfp4"),
                  lambda: core.quantize("x", "fp8"), lambda: core.dequantize({}, "fp8"), lambda: core.amax(weight, block=-3), lambda: core.encode(weight, "fp9")):
        try:
            wrong()
        except (ValueError, TypeError, KeyError):
            pass
        else:
            raise AssertionError("nothing was refused")


check(one_round, 300)
