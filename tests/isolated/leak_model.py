"""A model: opened, called, quantized, measured, closed; calls that are refused in the middle."""
import sys
from pathlib import Path

import numpy as np
from harness import check

sys.path.insert(0, str(Path(__file__).parents[1]))
import golden_data

import modelq
import modelq.quantization as mtq

source = golden_data.ROOT / "llama" / "source"
ids = np.load(golden_data.ROOT / "llama" / "calib.npy")[:2, :24]


def one_round():
    model = modelq.load(source)
    model(ids).logits
    mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, lambda m: m(ids))
    model(ids).logits
    model.loss([ids])
    model.generate(ids, max_new_tokens=2, temperature=1.0)
    next(model.stream(ids))
    for wrong in (lambda: model(ids + 10_000), lambda: model([[]]), lambda: model("text"), lambda: model(ids, np.zeros((1, 1), int)),
                  lambda: model.generate(ids, top_p=2), lambda: model.decoding().decoder.forward([0, 0], [[1], [1]]),
                  lambda: mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda m: m(ids * -1)),
                  lambda: mtq.quantize(model, {"quant_cfg": [], "algorithm": "max"})):
        try:
            wrong()
        except (ValueError, TypeError):
            pass
        else:
            raise AssertionError("nothing was refused")
    model.close()


check(one_round, 250)
