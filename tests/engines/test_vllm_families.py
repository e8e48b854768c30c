"""vLLM's CPU build loads an export of every family, and generates the tokens that the reopened export generates here.

Its kernels for quantized experts want AMX, or a GPU; emulated_experts.py computes in their place, with the parameters that vLLM loaded.
"""
import modelq
import numpy as np
import pytest
from exports import FAMILY_EXPORTS, Export
from families import FAMILIES, VOCABULARY, WITH_EXPERTS
from greedy import choices
from modelq.verify import ERROR, verify_checkpoint
from test_vllm import AGREEMENT, check

LOOSE = {"margin_least": 0, "tries": 256}      # quicker than test_vllm.py: what has to show is that names and scales are right
ROWS = [row for row in FAMILY_EXPORTS if row.vllm]


@pytest.fixture(scope="module")
def exports(families_of, vllm_emulating):
    return families_of("vllm", vllm_emulating)


@pytest.mark.parametrize("family", FAMILIES)
def test_unquantized(family, exports):
    check(exports.process, exports.source(family), AGREEMENT, **LOOSE)


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens(family, row, exports):
    folder = exports.export(family, row, "bfloat16")
    answer = check(exports.process, folder, attainable(folder) if row.activations else AGREEMENT, **LOOSE)
    assert answer["quantization"] == row.quantization


def attainable(folder) -> float:
    """How far tokens can agree: with activations in NVFP4, a rounding error becomes one of few steps, and norms behind a layer (Gemma's)
    pass it on in full. So not much less than bfloat16 agrees with float32 here."""
    rows = np.random.default_rng(5).integers(2, VOCABULARY, size=(8, 64))
    ours, clear = choices(modelq.load(folder, compute="bfloat16"), rows)
    exact, _ = choices(modelq.load(folder, compute="float32"), rows)
    return min(AGREEMENT, float(np.mean((ours == exact)[clear])) - 0.06)


@pytest.mark.parametrize(("family", "config", "dialect", "words"), [
    ("gpt_oss", "FP8_DEFAULT_CFG", "modelopt", "w2_bias"), ("llama4", "FP8_DEFAULT_CFG", "modelopt", "w2_weight_input_scale"),
    ("mixtral", "INT8_DEFAULT_CFG", "compressed-tensors", "Unsupported FusedMoe scheme")])
def test_experts_that_verify_refuses_vllm_refuses(family, config, dialect, words, exports):
    """What families.rules_for leaves out, or has otherwise, it does for a reason."""
    assert family in WITH_EXPERTS
    folder = exports.export(family, Export(config, dialect), "bfloat16", rules=[])
    assert {finding.rule for finding in verify_checkpoint(folder, "vllm") if finding.level == ERROR} == {"vllm_experts"}
    with pytest.raises(AssertionError, match=words):
        exports.process.ask(folder=str(folder), prompts=[[3, 4, 5]], tokens=2)
