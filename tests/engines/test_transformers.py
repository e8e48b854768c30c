"""transformers loads our compressed-tensors and native exports, and computes the logits and tokens that the reopened export gives here.

In float32, where two implementations of one model differ by rounding alone, so that a scale that is off by one step shows.
"""
import modelq
import numpy as np
import pytest
from exports import EXPORTS
from greedy import clear_prompts, logits, without_input_quantizers
from small_model import VOCABULARY

ROWS = [row for row in EXPORTS if row.transformers]
NEAR = 2e-4     # of the logits' largest


def test_the_unquantized_model(transformers_engine, source, tmp_path):
    check(transformers_engine, modelq.load(source, compute="float32"), source, tmp_path, dequantize=False)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_tokens(row, transformers_engine, make_export, tmp_path):
    folder = make_export(row, "float32")
    model = modelq.load(folder, compute="float32")
    if row.transformers == "dequantize":
        without_input_quantizers(model)
    check(transformers_engine, model, folder, tmp_path, dequantize=row.transformers == "dequantize")


def check(engine, model, folder, tmp_path, dequantize: bool) -> None:
    prompts, tokens, margin = clear_prompts(model, VOCABULARY)
    ours = logits(model, prompts)
    answer = engine.ask(folder=str(folder), prompts=prompts.tolist(), tokens=tokens.shape[1], logits=str(tmp_path / "logits.npy"),
                        dequantize=dequantize, dtype="float32")
    error = np.abs(np.load(tmp_path / "logits.npy") - ours).max() / np.abs(ours).max()
    print(f"\n{folder.name}: logits differ by {error:.1e} of the largest; margin {margin:.2f}")
    assert not answer["unexpected"] and not answer["missing"]
    assert error < NEAR and margin > 0.1
    assert answer["tokens"] == tokens.tolist()
