"""transformers loads our compressed-tensors and native exports, and computes the logits and tokens that the reopened export gives here.

In float32, where two implementations of one model differ by rounding alone, so that a scale that is off by one step shows.
"""
import modelq
import numpy as np
import pytest
from conftest import rewrite
from exports import EXPORTS, Export
from greedy import clear_prompts, logits, without_input_quantizers
from modelq.verify import ERROR, verify_checkpoint
from small_model import VOCABULARY

ROWS = [row for row in EXPORTS if row.transformers]
LEFT_OVER = ("input_scale", "input_global_scale", "k_scale", "v_scale")    # what decompressed modules have no place for


def test_the_unquantized_model(transformers_engine, source, tmp_path):
    error, _, exact = compare(transformers_engine, modelq.load(source, compute="float32"), source, tmp_path)
    assert error.max() < 1e-5 and exact


@pytest.mark.parametrize("row", [row for row in ROWS if row.transformers == "dequantize"], ids=str)
def test_weights(row, transformers_engine, make_export, tmp_path):
    """Every logit and every token, with activations as they are."""
    folder = make_export(row, "float32")
    model = without_input_quantizers(modelq.load(folder, compute="float32"))
    error, _, exact = compare(transformers_engine, model, folder, tmp_path, dequantize=True)
    assert error.max() < row.near and exact


@pytest.mark.parametrize("row", [row for row in ROWS if row.transformers == "modules"], ids=str)
def test_activations(row, transformers_engine, make_export, tmp_path):
    """With fake-quantized activations. A rounding error before a quantizer can become one of its steps, which everything behind it
    inherits: so the middle position is judged, and 95 of 100 tokens."""
    folder = make_export(row, row.dtype)
    error, agreement, _ = compare(transformers_engine, modelq.load(folder, compute=row.dtype), folder, tmp_path, dtype=row.dtype)
    assert np.median(error) < row.near and agreement >= 0.95


def test_a_wrong_scale_is_seen(transformers_engine, make_export, tmp_path):
    """What would be wrong with the tests above if they could not fail."""
    folder = make_export(Export("FP8_PER_CHANNEL_PER_TOKEN_CFG", "compressed-tensors"), "float32")
    model = without_input_quantizers(modelq.load(folder, compute="float32"))

    def change(tensors):
        tensors["model.layers.1.self_attn.o_proj.weight_scale"] = tensors["model.layers.1.self_attn.o_proj.weight_scale"][::-1]
    error, _, _ = compare(transformers_engine, model, rewrite(folder, tmp_path / "wrong", change), tmp_path, dequantize=True)
    assert np.median(error) > 1e-2


def compare(engine, model, folder, tmp_path, dequantize: bool = False, dtype: str = "float32"):
    """(error of the logits of each position, share of the tokens that are first choice there too, whether generation is the same)"""
    assert not [finding for finding in verify_checkpoint(folder, "transformers") if finding.level == ERROR]
    prompts, tokens, margin = clear_prompts(model, VOCABULARY)
    rows = np.concatenate([prompts, tokens], axis=1)
    ours = logits(model, rows)
    answer = engine.ask(folder=str(folder), prompts=prompts.tolist(), tokens=tokens.shape[1], rows=rows.tolist(),
                        logits=str(tmp_path / "logits.npy"), dequantize=dequantize, dtype=dtype)
    theirs = np.load(tmp_path / "logits.npy")
    error = np.abs(theirs - ours).max(axis=-1) / np.abs(ours).max()
    agreement = np.mean(theirs.argmax(axis=-1)[:, prompts.shape[1] - 1:-1] == tokens)
    print(f"\n{folder.name}: logits differ by {error.max():.1e} of the largest, in the middle {np.median(error):.1e}; {agreement:.1%} of tokens; "
          f"margin {margin:.2f}")
    unexpected = [name for name in answer["unexpected"] if not (dequantize and name.endswith(LEFT_OVER))]
    assert not unexpected and not answer["missing"] and margin > 0.1
    return error, agreement, answer["tokens"] == tokens.tolist()
