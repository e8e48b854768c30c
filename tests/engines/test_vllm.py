"""vLLM's CPU build loads our exports, knows them for what they are, and generates the tokens that the reopened export generates here."""
import modelq
import numpy as np
import pytest
from exports import EXPORTS
from greedy import choices, clear_prompts
from small_model import VOCABULARY

ROWS = [row for row in EXPORTS if row.vllm]
AGREEMENT = 0.95    # of tokens, where activations are quantized: a rounding error before a quantizer becomes one of its steps


@pytest.fixture
def engine(request, row):
    return request.getfixturevalue("vllm_emulating" if row.vllm == "emulate" else "vllm_engine")


def test_the_unquantized_model(vllm_engine, source):
    """What the other tests stand on: without quantization there is no difference."""
    check(vllm_engine, source, 1.0)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_tokens(row, engine, make_export):
    answer = check(engine, make_export(row, "bfloat16"), AGREEMENT if row.activations else 1.0)
    assert (answer["quantization"], answer["kv_cache_dtype"]) == (row.quantization, row.kv_cache)


def check(engine, folder, agreement: float) -> dict:
    model = modelq.load(folder, compute="bfloat16")
    prompts, tokens, margin = clear_prompts(model, VOCABULARY)
    rows = np.random.default_rng(5).integers(2, VOCABULARY, size=(8, 64))
    ours, clear = choices(model, rows)
    assert margin > 0.1 and clear.sum() > 200
    answer = engine.ask(folder=str(folder), prompts=prompts.tolist(), tokens=tokens.shape[1], forced=rows.tolist())
    generated = np.mean(np.array(answer["tokens"]) == tokens)
    predicted = np.mean((np.array(answer["predicted"]) == ours[:, :-1])[clear[:, :-1]])
    print(f"\n{folder.name}: {generated:.1%} of generated tokens, {predicted:.1%} of clear predictions; margin {margin:.2f}")
    assert generated >= agreement and predicted >= agreement
    return answer
