"""Quantizer objects: made, set, called, refused, part of a reference cycle."""
import numpy as np
from harness import check

import modelq._core as core

x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)


def one_round():
    quantizer = core.Quantizer(num_bits=(4, 3))
    quantizer.amax = np.float32(2)
    quantizer.amax = np.float32(3)
    quantizer.pre_quant_scale = np.ones(64, np.float32)
    quantizer(x)
    cycle = [quantizer]
    cycle.append(cycle)
    for wrong in (lambda: core.Quantizer(num_bits="x"), lambda: core.Quantizer(num_bits=(99, 99)), lambda: quantizer("x"),
                  lambda: setattr(quantizer, "amax", "x"), lambda: core.Quantizer(block_sizes={-1: "x"})):
        try:
            wrong()
        except (ValueError, TypeError):
            pass


check(one_round)
