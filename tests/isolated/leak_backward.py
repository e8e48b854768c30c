"""Gradients: asked for, observed, refused, given up in the middle of a layer with experts."""
import sys
from pathlib import Path

import numpy as np
from harness import check

sys.path.insert(0, str(Path(__file__).parents[1]))
import golden_data

import modelq
import modelq._core as core
from modelq import streaming
from modelq.gradients import backward
from modelq.inputs import make_batch

models = [modelq.load(golden_data.ROOT / name / "source") for name in ("llama", "qwen3moe")]
ids = np.load(golden_data.ROOT / "llama" / "calib.npy")[:2, :12]
linear, norm = "model.layers.1.self_attn.v_proj", "model.layers.1.input_layernorm.weight"
quantizer = core.Quantizer(num_bits=8)
quantizer.amax = np.float32(3)


def given_up(model):
    run = streaming.start(model, [make_batch(model.vocab_size, ids)])
    for layer in range(model.num_layers):
        state = run.state()
        streaming.run_layer(model, run, layer)
    back = run.backward({norm: np.zeros(128, np.float32)})
    back.head(streaming.head_tensors(model))
    back.layer(1, state, streaming.read(model, model.runtime.layer_tensors(1), model.modules_of(1)))
    model.runtime.drop_layer(1)


def one_round():
    for model in models:
        score = core.OutputScore([model.checkpoint.read(f"{linear}.weight")] * 2, [quantizer, None])
        backward(model, [ids], [norm], {linear: score, "lm_head": core.OutputGradient(24, model.vocab_size)}, keep_bytes=0)
        assert score.scores[0] > 0 == score.scores[1]
        given_up(model)
        experts = core.ExpertsScore(1)
        experts.load(0, [(np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float16), np.zeros((4, 3), np.float32), quantizer, None)])
        for wrong in (lambda: backward(model, [ids], ["nothing"]), lambda: backward(model, [ids], observers={"nothing": score}),
                      lambda: backward(model, [ids], observers={linear: core.OutputGradient(3, 3)}), lambda: core.OutputScore([ids]),
                      lambda: core.OutputScore([np.zeros((2, 2), np.float32)], ["x"]), lambda: experts.load(0, ["x"]),
                      lambda: experts.load(0, [(np.zeros((3, 4), np.float32),) * 3 + (quantizer, "x")])):
            try:
                wrong()
            except (ValueError, KeyError, TypeError):
                pass
            else:
                raise AssertionError("nothing was refused")


check(one_round, 100)
