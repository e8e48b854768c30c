"""auto_quantize on a native model of every family: scores against torch's autograd and NumPy, choices within budgets, exports."""
import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import modelq
import modelq._core as core
import modelq.quantization as mtq
from micro_models import MODELS, build, inputs, save
from modelq.export import export_hf_checkpoint
from modelq.torch_models.experts import is_experts, is_llama4, matrix_of

# One of each row; the first of each family has all of it.
FAMILIES = list({name.split()[0]: name for name in reversed(MODELS)}.values())[::-1]
STACKED = ("gpt_oss", "llama4")     # experts that an export keeps in one tensor


def made(name):
    """With weights of more bits than bfloat16 has, so that none is half way between two codes."""
    model, random = build(name), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-3 * torch.rand(parameter.shape, generator=random))
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """(name, the folder of a transformers model)."""
    return request.param, save(made(request.param), tmp_path_factory.mktemp("model") / "source")


def search(model, bits, formats, **options):
    ids, _, right = inputs()
    batches = [{"input_ids": ids, "attention_mask": right, "labels": np.where(right == 1, ids, -100)},
               {"input_ids": ids[:1], "labels": ids[:1]}]
    return mtq.auto_quantize(model, {"effective_bits": bits}, formats, batches, lambda model, batch: model(**batch),
                             loss_func=lambda output, batch: output.loss, **options), batches


def rounded(weight):
    """To INT8, by the largest of each row."""
    scale = weight.abs().amax(-1, keepdim=True) / 127
    return torch.round(weight / scale) * scale


def summed(module, output):
    """Llama 4's outputs are of every expert, one after the other, before they are added up."""
    return output.view(module.num_experts, -1, output.shape[-1]) if is_experts(module) and is_llama4(module) else output[None]


class Seen:
    """Inputs and outputs of a module while a loss is computed, and the gradient by the outputs."""

    def __init__(self, module):
        self.module, self.calls = module, []
        self.hook = module.register_forward_hook(self.look)

    def look(self, module, args, output):
        output.retain_grad()
        self.calls.append((args, output, output.detach().clone()))      # Llama 4 adds to the one of its shared expert


def expected_scores(theirs, batches):
    """Module to sum((gradient by its output * change of its output by INT8 weights)^2), all in torch."""
    modules = {name: module for name, module in theirs.named_modules() if is_experts(module) or
               (isinstance(module, torch.nn.Linear) and "router" not in name)}
    seen = {name: Seen(module) for name, module in modules.items()}
    for batch in batches:
        theirs(**{key: torch.from_numpy(array) for key, array in batch.items()}).loss.backward()
    for one in seen.values():
        one.hook.remove()
    scores = {}
    with torch.no_grad():
        for name, one in seen.items():
            views = [matrix_of(one.module, getattr(one.module, stack), expert) for stack in ("gate_up_proj", "down_proj")
                     for expert in range(one.module.num_experts)] if is_experts(one.module) else [one.module.weight]
            for view in views:
                view.copy_(rounded(view))
            scores[name] = sum(float((summed(one.module, output.grad)[0] * summed(one.module, one.module(*args) - was).sum(0))
                                     .double().square().sum()) for args, output, was in one.calls)
    return scores


def test_scores_are_torch_s(case):
    """Of linears of every kind (fused, latent, of shared experts, with biases) and of experts; by a gradient that goes through soft caps,
    sinks, norms of every place, multipliers."""
    name, folder = case
    model = modelq.load(folder, compute="float32")
    warned = pytest.warns(UserWarning, match="experts.*: a checkpoint of this family has a layer's experts in one tensor")
    with warned if name.startswith(STACKED) else nullcontext():
        (_, state), batches = search(model, 9.0, [mtq.INT8_WEIGHT_ONLY_CFG, mtq.FP8_DEFAULT_CFG], disabled_layers=[])
    wanted = expected_scores(made(name), batches)
    for stats in state["candidate_stats"].values():
        found = dict(zip(stats["formats"], stats["scores"]))
        assert found.pop("NONE(effective-bits: 16.0)") == 0
        int8 = next(score for recipe, score in found.items() if recipe.startswith("INT8_WEIGHT_ONLY"))
        modules = [module for module in stats["module_names"] if module in wanted]
        assert modules == stats["module_names"]
        np.testing.assert_allclose(int8, sum(wanted.pop(module) for module in modules), rtol=1e-3, err_msg=str(modules))
        assert all(0 < score < 1e3 for score in found.values()), stats
    assert not [module for module in wanted if "gate" not in module.rpartition(".")[2] and "router" not in module]


@pytest.mark.parametrize("name", ["granitemoe", "deepseek_v2", "deepseek_v3", "phi3", "gemma2"])
def test_a_model_in_torch_is_searched_alike(name, tmp_path):
    """The same groups, scores and choice, inputs quantized too; and an export of the same tensors."""
    native, theirs = modelq.load(save(made(name), tmp_path / "source"), compute="float32"), made(name)
    formats = [mtq.INT8_WEIGHT_ONLY_CFG, mtq.FP8_DEFAULT_CFG]
    (native, found), batches = search(native, 8.0, formats)
    data = [{key: torch.from_numpy(array) for key, array in batch.items()} for batch in batches]
    theirs, state = mtq.auto_quantize(theirs, {"effective_bits": 8.0}, formats, data, lambda model, batch: model(**batch),
                                      loss_func=lambda output, batch: output.loss)
    assert list(found["candidate_stats"]) == list(state["candidate_stats"])
    for key, stats in found["candidate_stats"].items():
        assert stats["module_names"] == state["candidate_stats"][key]["module_names"]
        np.testing.assert_allclose(stats["scores"], state["candidate_stats"][key]["scores"], rtol=0.02, err_msg=key)
    assert found["best"]["recipe"] == state["best"]["recipe"]
    for model, folder in ((native, tmp_path / "native"), (theirs, tmp_path / "torch")):
        export_hf_checkpoint(model, export_dir=folder)
    names = [set(modelq.load(tmp_path / folder).checkpoint.inner.tensors) for folder in ("native", "torch")]
    assert names[0] == names[1]


@pytest.mark.parametrize("bits", [6.0, 7.0])
def test_choices_keep_to_the_budget_and_are_written(case, bits, tmp_path):
    name, folder = case
    formats = [mtq.NVFP4_DEFAULT_CFG, mtq.FP8_DEFAULT_CFG]
    if name.startswith(("qwen2_moe", "deepseek_v3")):       # sizes that 16 does not divide
        formats[0] = copy.deepcopy(mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
        for rule in formats[0]["quant_cfg"]:
            if (rule.get("cfg") or {}).get("block_sizes"):
                rule["cfg"]["block_sizes"] = {-1: 4}
    model = modelq.load(folder, compute="bfloat16")
    (model, state), _ = search(model, bits, formats)
    best = state["best"]
    assert best["is_satisfied"] and best["constraints"]["effective_bits"] <= bits
    chosen = {recipe.split("(")[0] for recipe in best["recipe"].values()}
    assert len(chosen - {"NONE"}) >= 1 and len(chosen) >= 2
    ids, _, _ = inputs()
    simulated, plain = model(ids).logits, modelq.load(folder, compute="bfloat16")(ids).logits
    assert 0 < np.linalg.norm(simulated - plain) < 0.7 * np.linalg.norm(plain)
    export_hf_checkpoint(model, export_dir=tmp_path / "export")
    again = modelq.load(tmp_path / "export", compute="bfloat16")
    assert np.linalg.norm(again(ids).logits - simulated) < 0.03 * np.linalg.norm(simulated)


def test_every_family_is_searched():
    """Llama's relatives are in test_auto_quantize.py, with golden files; Llama-Nemotron in tests/test_nemotron.py."""
    elsewhere = {"qwen2", "qwen3", "qwen3_moe", "mixtral", "nemotron_nas"}
    assert {row["family"] for row in core.archs()} - {name.split()[0] for name in FAMILIES} == elsewhere
