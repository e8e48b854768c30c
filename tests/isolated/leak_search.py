"""The searches for scales and weights, objects of Gram matrices, and what all of them refuse."""
import numpy as np
from harness import check

import modelq._core as core

rng = np.random.default_rng(0)
weight, inputs = rng.standard_normal((20, 48)).astype(np.float32), rng.standard_normal((90, 48)).astype(np.float32)
narrow = weight.astype(np.float16)
gram = inputs.T @ inputs
blocks = np.stack([gram[i:i + 16, i:i + 16] for i in range(0, 48, 16)])
upper = gram.copy()
curvature = core.factor(upper)
factors = np.linspace(0.5, 1, 4, dtype=np.float32)
scales = np.exp(rng.standard_normal((3, 48))).astype(np.float32)
order = np.arange(48, dtype=np.int32)[::-1]      # of a dtype and strides that need a copy

int4, rows = core.Quantizer(num_bits=4, block_sizes={-1: 16}), core.Quantizer(num_bits=8, axis=0)
int4.amax, rows.amax = core.amax(weight, block=16), core.amax(weight, axis=0)
dynamic = core.Quantizer(num_bits=(2, 1), block_sizes={-1: 16, "type": "dynamic", "scale_bits": (4, 3)})
kept = core.GramLoss(gram)
other_amax = core.Quantizer(num_bits=8, axis=0)
other_amax.amax = np.ones((7, 1), np.float32)


def searches():
    whole, parts = core.GramLoss(gram, "bfloat16"), core.GramLoss(blocks, "float32", 48)
    assert (whole.columns, whole.blocks, parts.blocks) == (48, 1, 3)
    of_weight = core.awq_weight_scale(narrow[:, ::-1], 16)
    core.awq_scales(np.ones(48), of_weight, factors)
    core.smoothquant_scale(np.ones(48, np.float16), of_weight, 0.5, "bfloat16")
    core.quantization_losses(weight, int4, whole, scales, 1 / scales)
    core.quantization_losses(narrow, dynamic, kept, scales.astype(np.float16))
    core.best_amax(weight, int4, factors, parts)
    core.best_amax(narrow.T.copy().T, rows, factors, None, "float16")
    core.sweep_block_scales(weight, 3.0, hessian=blocks)
    core.factor(gram.copy())
    core.gptq(weight, int4, upper, curvature, regroup=True, block_size=16)
    core.gptq(narrow, rows, upper, curvature, order)
    core.subtract_product(narrow, np.ones((20, 2), np.float32), np.ones((2, 48), np.float16))


REFUSED = [
    lambda: core.GramLoss(gram[:3]), lambda: core.GramLoss(blocks, "float32", 49), lambda: core.GramLoss(gram, "float64"),
    lambda: core.GramLoss("gram"), lambda: core.GramLoss(), lambda: core.awq_weight_scale(weight[0]),
    lambda: core.awq_weight_scale(weight.astype(np.int32)), lambda: core.awq_scales(np.ones(3), np.ones(4), factors),
    lambda: core.awq_scales(np.ones(3), np.ones(3), "x"), lambda: core.smoothquant_scale(np.ones(3), np.ones(3), 0.5, "int8"),
    lambda: core.smoothquant_scale(np.ones(3), np.ones(4), 0.5), lambda: core.quantization_losses(weight, "quantizer"),
    lambda: core.quantization_losses(weight, int4, "gram"), lambda: core.quantization_losses(weight[:, :32].copy(), int4),
    lambda: core.quantization_losses(weight, rows, core.GramLoss(gram[:5, :5].copy())),
    lambda: core.quantization_losses(weight, int4, kept, scales, scales[:2]),
    lambda: core.quantization_losses(weight, int4, kept, None, scales),
    lambda: core.quantization_losses(weight, int4, kept, scales[:, :47]), lambda: core.quantization_losses(weight, other_amax),
    lambda: core.best_amax(weight, int4, factors, kept), lambda: core.best_amax(weight, int4, factors[:0]),
    lambda: core.best_amax(weight, int4, factors, None, "float64"), lambda: core.sweep_block_scales(weight[:, :30].copy(), 1.0),
    lambda: core.sweep_block_scales(weight, 1.0, hessian=blocks[:2]), lambda: core.factor(gram.astype(np.float64)),
    lambda: core.factor(gram[:4]), lambda: core.factor(np.zeros((4, 4), np.float32)), lambda: core.factor(gram.T[::2, ::2]),
    lambda: core.gptq(weight, dynamic, upper, curvature), lambda: core.gptq(weight, int4, upper, curvature[:7]),
    lambda: core.gptq(weight, int4, None, curvature), lambda: core.gptq(weight, int4, upper, curvature, order, regroup=True),
    lambda: core.gptq(weight, int4, upper, curvature, order[:5]), lambda: core.gptq(weight, int4, upper, curvature, np.zeros(48, np.int64)),
    lambda: core.gptq(weight, int4, upper, curvature, block_size=0),
    lambda: core.gptq(weight, core.Quantizer(num_bits=8), upper, curvature),
    lambda: core.subtract_product(weight, np.ones((20, 2)), np.ones((3, 48))), lambda: core.subtract_product(weight, None, None)]


def one_round():
    searches()
    for number, wrong in enumerate(REFUSED):
        try:
            wrong()
        except (ValueError, TypeError):
            pass
        else:
            raise AssertionError(f"{number} was not refused")


check(one_round, 300)
