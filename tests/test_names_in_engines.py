"""What an export's config says of modules that stay as they are, by the names and in the words that engines match; and what `modelq verify`
makes of routers. tests/engines has the engines themselves read it."""
import json
import re

import numpy as np
import pytest

import modelq
import modelq.quantization as mtq
from family_models import CONFIGS, save
from modelq.export import export_hf_checkpoint
from modelq.verify import ERROR, verify_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:experts that saw no token")
LEFT_OUT = {"quantizer_name": "*experts.*", "enable": False}
NAMES = sorted(name for name in CONFIGS if " " not in name and "experts" in json.dumps(CONFIGS[name]))


def exported(name, folder, config, dialect):
    model = modelq.load(save(name, folder / "source"), compute="float32")
    mtq.quantize(model, config, lambda m: m(np.random.default_rng(0).integers(2, 60, (8, 24))))
    return export_hf_checkpoint(model, folder / "out", dtype="bfloat16", dialect=dialect)


def preset(*more):
    return mtq.FP8_DEFAULT_CFG | {"quant_cfg": [*mtq.FP8_DEFAULT_CFG["quant_cfg"], *more]}


def is_left_out(module, ignored):
    return any(re.match(word[3:], module) if word.startswith("re:") else word == module for word in ignored)


@pytest.mark.parametrize("name", NAMES)
def test_routers_and_experts_that_stay_are_named(name, tmp_path):
    """An engine makes a linear of a router, and looks for the first expert to know what all are (vLLM's compressed_tensors_moe.py)."""
    folder = exported(name, tmp_path, preset(LEFT_OUT), "compressed-tensors")
    ignored = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    model = modelq.load(tmp_path / "source")
    routers = [row["name"].removesuffix(".layer") for row in model.modules if row["kind"] == "router"]
    experts = [row["name"] for row in model.modules if row["expert"] is not None]
    attention = [row["name"] for row in model.modules if row["name"].endswith("o_proj")]
    assert routers and experts and all(is_left_out(module, ignored) for module in [*routers, *experts, "lm_head"])
    assert not any(is_left_out(module, ignored) for module in attention)
    for engine in ("vllm", "transformers"):
        assert not [finding for finding in verify_checkpoint(folder, engine) if finding.level == ERROR]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("gpt_oss", "llama4")])
def test_quantized_experts_satisfy_vllm(name, tmp_path):
    """Also where a router has a vector of its own beside its weight (DeepSeek-V3)."""
    folder = exported(name, tmp_path, preset(), "modelopt")
    assert not [finding for finding in verify_checkpoint(folder, "vllm") if finding.level == ERROR]
