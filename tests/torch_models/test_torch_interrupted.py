"""Ctrl-C anywhere while a transformers model is quantized: it is as it was, and the next call gives what a fresh model gives.

MODELQ_EVERY_LINE=1 interrupts at every line that runs once (minutes) instead of some.
"""
import os
import shutil
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import modelq.quantization as mtq  # noqa: E402
from interrupting import interrupt, moments  # noqa: E402
from modelq.export import export_hf_checkpoint  # noqa: E402
from modelq.nn import TensorQuantizer  # noqa: E402
from modelq.quantizers import found_values  # noqa: E402

transformers.utils.logging.disable_progress_bar()
SOME = 0 if os.environ.get("MODELQ_EVERY_LINE") == "1" else 6
CONFIGS = {"FP8": mtq.FP8_DEFAULT_CFG, "AWQ": mtq.INT4_AWQ_CFG, "GPTQ": mtq.INT4_GPTQ_CFG,
           "ROTATED": {**mtq.NVFP4_DEFAULT_CFG, "algorithm": ["rotate", "max"]},
           "KV": {**mtq.INT8_DEFAULT_CFG, "quant_cfg": [*mtq.INT8_DEFAULT_CFG["quant_cfg"], *mtq.FP8_KV_CFG["quant_cfg"]]}}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def load(golden_model):
    return transformers.AutoModelForCausalLM.from_pretrained(golden_model.source, dtype=torch.bfloat16).eval()


def loop_over(golden_model):
    @torch.no_grad()
    def forward_loop(model):
        for row in golden_model.calib[:2]:
            model(torch.from_numpy(row[None]))
    return forward_loop


def quantized(golden_model, config):
    return mtq.quantize(load(golden_model), config, loop_over(golden_model))


def everything(model, golden_model):
    """Classes of modules, weights, what was found, and what the model computes."""
    found = {f"class of {name}": type(module).__name__ for name, module in model.named_modules()}
    found |= {name: value.float().numpy() for name, value in model.state_dict().items() if value.is_floating_point()}
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            values, = found_values(module.native)
            found |= {f"{name} is on": module.is_enabled} | {f"{name}:{what}": value for what, value in values._asdict().items()}
    with torch.no_grad():
        return found | {"logits": model(torch.from_numpy(golden_model.calib[:1])).logits.float().numpy()}


def same(a, b, where=""):
    assert a.keys() == b.keys(), f"interrupted at {where}: {sorted(a.keys() ^ b.keys())[:4]}"
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=f"{name}, interrupted at {where}")


def check(make, work, golden_model, count=SOME):
    """As in test_interrupted.py: as before, or as where the work is done."""
    model, fresh = make(), make()
    work(fresh)
    before, done = everything(model, golden_model), everything(fresh, golden_model)
    for moment in moments(make, work, count):
        where = interrupt(lambda: work(model), moment)
        now = everything(model, golden_model)
        if now.keys() == done.keys() and all(np.array_equal(now[name], done[name]) for name in now):
            model = make()
        else:
            same(now, before, where)
    work(model)
    same(everything(model, golden_model), done)


@pytest.mark.parametrize("first, name", [*((None, name) for name in CONFIGS), ("FP8", "GPTQ"), ("KV", "FP8")])
def test_quantize(golden, first, name):
    llama = golden["llama"]
    check(lambda: load(llama) if first is None else quantized(llama, CONFIGS[first]),
          lambda model: mtq.quantize(model, CONFIGS[name], loop_over(llama)), llama)


def test_calibrate_and_auto_quantize(golden):
    llama = golden["llama"]
    batches = [{"input_ids": torch.from_numpy(row[None]), "labels": torch.from_numpy(row[None])} for row in llama.calib[:2]]

    def search(model):
        mtq.auto_quantize(model, {"effective_bits": 6.0}, [mtq.NVFP4_DEFAULT_CFG, mtq.FP8_DEFAULT_CFG], batches,
                          lambda model, batch: model(**batch), lambda output, batch: output.loss, kv_cache_cfg=mtq.FP8_KV_CFG)
    for work in (lambda model: mtq.calibrate(model, "max", loop_over(llama)), search):
        check(lambda: quantized(llama, mtq.INT8_DEFAULT_CFG), work, llama)


def test_export(golden, tmp_path):
    llama, model = golden["llama"], quantized(golden["llama"], mtq.FP8_DEFAULT_CFG)
    before = everything(model, llama)
    for moment in moments(lambda: model, lambda model: export_hf_checkpoint(model, tmp_path / "first", overwrite=True), SOME):
        where = interrupt(lambda: export_hf_checkpoint(model, tmp_path / "out"), moment)
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {"first"} or left == {"first", "out"} and _files(tmp_path / "out") == _files(tmp_path / "first"), where
        shutil.rmtree(tmp_path / "out", ignore_errors=True)     # it came after the last rename
    same(everything(model, llama), before)
    export_hf_checkpoint(model, tmp_path / "out")
    assert _files(tmp_path / "out") == _files(tmp_path / "first")


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
