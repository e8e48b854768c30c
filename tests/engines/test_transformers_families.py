"""transformers loads a compressed-tensors export of every family that it has, and computes the logits that the reopened export gives here.

In float32 and with activations as they are, so that names, directions and every scale show; test_transformers.py has the rest.
"""
import modelq
import numpy as np
import pytest
from exports import BFLOAT16, FAMILY_EXPORTS, Export
from families import FAMILIES, LEAVE_EXPERTS, VOCABULARY, loads
from greedy import logits, without_input_quantizers
from modelq.verify import ERROR, verify_checkpoint
from test_transformers import LEFT_OVER

CASES = [(family, row) for family in FAMILIES for row in FAMILY_EXPORTS if row.transformers and loads("transformers", family, row.config)]


@pytest.fixture(scope="module")
def exports(families_of, transformers_engine):
    return families_of("transformers", transformers_engine)


@pytest.mark.parametrize(("family", "row"), CASES, ids=str)
def test_weights(family, row, exports, tmp_path):
    folder = exports.export(family, row, "float32")
    assert not errors(folder)
    error, strangers = compare(exports.process, folder, tmp_path)
    worst = np.median(error) if row.near == BFLOAT16 else error.max()       # in bfloat16 a token may go to another expert
    assert worst < row.near and not strangers


@pytest.mark.parametrize(("family", "config", "rules"), [
    ("granitemoe", "FP8_DEFAULT_CFG", []), ("qwen3_moe", "NVFP4_DEFAULT_CFG", []), ("mixtral", "INT8_DEFAULT_CFG", []),
    ("mixtral", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", [LEAVE_EXPERTS])])
def test_experts_that_verify_refuses_are_not_read(family, config, rules, exports, tmp_path):
    """What families.py says an engine cannot load is not loaded."""
    folder = exports.export(family, Export(config, "compressed-tensors"), "float32", rules=rules)
    assert {finding.rule for finding in errors(folder)} == {"fused_experts"}
    try:
        error, strangers = compare(exports.process, folder, tmp_path)
    except AssertionError as refusal:
        assert "conversion of the weights" in str(refusal)
    else:
        assert strangers or error.max() > 0.1


def errors(folder):
    return [finding for finding in verify_checkpoint(folder, "transformers") if finding.level == ERROR]


def compare(engine, folder, tmp_path):
    """(error of the logits of each position, as a share of the largest; tensors that one side lacks)"""
    rows = np.random.default_rng(5).integers(2, VOCABULARY, size=(4, 40))       # beyond sliding windows
    ours = logits(without_input_quantizers(modelq.load(folder, compute="float32")), rows)
    answer = engine.ask(folder=str(folder), prompts=rows.tolist(), tokens=0, rows=rows.tolist(), logits=str(tmp_path / "logits.npy"),
                        dequantize=True, dtype="float32")
    error = np.abs(np.load(tmp_path / "logits.npy") - ours).max(axis=-1) / np.abs(ours).max()
    print(f"\n{folder.name}: logits differ by {error.max():.1e} of the largest")
    return error, [name for name in answer["unexpected"] if not name.endswith(LEFT_OVER)] + answer["missing"]
