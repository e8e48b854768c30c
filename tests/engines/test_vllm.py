"""vLLM's CPU build loads our exports, knows them for what they are, and generates the tokens that the reopened export generates here."""
import ml_dtypes
import modelq
import numpy as np
import pytest
from conftest import rewrite
from exports import EXPORTS, Export
from greedy import choices, clear_prompts
from modelq import _core
from modelq.verify import ERROR, verify_checkpoint
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
    if row.flag not in _core.cpu_info()["features"]:
        pytest.skip(f"vLLM needs {row.flag} for this")
    answer = check(engine, make_export(row, "bfloat16"), AGREEMENT if row.activations else 1.0)
    assert (answer["quantization"], answer["kv_cache_dtype"]) == (row.quantization, row.kv_cache)


def transpose_scale(tensors):
    tensors[f"{O}.weight_scale"] = tensors[f"{O}.weight_scale"].reshape(-1, 1)


def add_smoothing(tensors):
    tensors[f"{O}.pre_quant_scale"] = np.ones(256, dtype=ml_dtypes.bfloat16)


O = "model.layers.1.self_attn.o_proj"


@pytest.mark.parametrize("change", [transpose_scale, add_smoothing])
def test_what_verify_finds_vllm_refuses(change, vllm_engine, make_export, tmp_path):
    folder = rewrite(make_export(Export("FP8_PER_CHANNEL_PER_TOKEN_CFG"), "bfloat16"), tmp_path / "broken", change)
    assert [finding for finding in verify_checkpoint(folder, "vllm") if finding.level == ERROR]
    with pytest.raises(AssertionError, match="Error"):
        vllm_engine.ask(folder=str(folder), prompts=[[3, 4, 5]], tokens=2)


def test_a_wrong_scale_is_seen(vllm_engine, make_export, tmp_path):
    """What would be wrong with the tests above if they could not fail."""
    folder = make_export(Export("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "gptq"), "bfloat16")
    prompts, tokens, _ = clear_prompts(modelq.load(folder, compute="bfloat16"), VOCABULARY)

    def change(tensors):
        tensors.update({name: array[:, ::-1] for name, array in tensors.items() if name.endswith(".scales")})
    answer = vllm_engine.ask(folder=str(rewrite(folder, tmp_path / "wrong", change)), prompts=prompts.tolist(), tokens=tokens.shape[1])
    assert np.mean(np.array(answer["tokens"]) == tokens) < AGREEMENT


def check(engine, folder, agreement: float, margin_least: float = 0.1, tries: int = 1536) -> dict:
    """agreement 1: generation must be the same. Less: that share of our tokens, and of what is a clear choice on random rows."""
    assert not [finding for finding in verify_checkpoint(folder, "vllm") if finding.level == ERROR]
    model = modelq.load(folder, compute="bfloat16")
    prompts, tokens, margin = clear_prompts(model, VOCABULARY, tries=tries)
    random = np.random.default_rng(5).integers(2, VOCABULARY, size=(8, 64))
    ours, clear = choices(model, random)
    assert margin > margin_least and clear.sum() > 200
    answer = engine.ask(folder=str(folder), prompts=prompts.tolist(), tokens=tokens.shape[1],
                        forced=random.tolist() + np.concatenate([prompts, tokens], axis=1).tolist())
    chosen = np.array([row[prompts.shape[1] - 1:] for row in answer["predicted"][len(random):]])
    predicted = np.mean((np.array(answer["predicted"][:len(random)]) == ours[:, :-1])[clear[:, :-1]])
    exact = answer["tokens"] == tokens.tolist()
    print(f"\n{folder.name}: generation {'the same' if exact else 'differs'}, {np.mean(chosen == tokens):.1%} of its tokens, "
          f"{predicted:.1%} of clear predictions; margin {margin:.2f}")
    assert np.mean(chosen == tokens) >= agreement and predicted >= agreement
    assert exact or agreement < 1
    return answer
