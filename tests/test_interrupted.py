"""A notebook's kernel interrupted in the middle of anything: the model is as it was, and the next call gives what a fresh model gives.

MODELQ_EVERY_LINE=1 interrupts at every line that runs once (minutes) instead of some.
"""
import os
import shutil
import warnings

import numpy as np
import pytest

import modelq
import modelq.quantization as mtq
from golden_data import read_safetensors
from interrupting import interrupt, moments
from modelq.export import export_hf_checkpoint
from test_resume import everything, same

pytestmark = pytest.mark.slow
SOME = 0 if os.environ.get("MODELQ_EVERY_LINE") == "1" else 12
CONFIGS = {
    "FP8": mtq.FP8_DEFAULT_CFG, "AWQ": mtq.INT4_AWQ_CFG, "GPTQ": mtq.INT4_GPTQ_CFG, "SVDQUANT": mtq.NVFP4_SVDQUANT_DEFAULT_CFG,
    "ROTATED": {**mtq.NVFP4_DEFAULT_CFG, "algorithm": ["rotate", "max"]},
    "KV": {**mtq.INT8_DEFAULT_CFG, "quant_cfg": [*mtq.INT8_DEFAULT_CFG["quant_cfg"], *mtq.NVFP4_AFFINE_KV_CFG["quant_cfg"]]},
}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)        # few tokens: singular Gram matrices, experts that see none
        yield


def load(golden_model):
    return modelq.load(golden_model.source, compute="bfloat16")


def loop_over(golden_model):
    return lambda model: [model(row[None]) for row in golden_model.calib[:2]]


def quantized(golden_model, config):
    return mtq.quantize(load(golden_model), config, loop_over(golden_model))


def check(model, work, after, golden_model, ids):
    """Interrupt the work at many moments: the model must be as before, as it is where the work is done, if that was on its last lines, or
    nothing. Then the work is done, and the model must be as a fresh one."""
    before, fresh = everything(model, ids), after(golden_model)
    work(fresh)
    done = everything(fresh, ids)
    for moment in moments(lambda: after(golden_model), work, SOME):
        where = interrupt(lambda: work(model), moment)
        now = everything(model, ids)
        if now.keys() == done.keys() and all(np.array_equal(now[name], done[name]) for name in now):
            model = after(golden_model)
            continue
        try:
            same(now, before)
        except AssertionError as error:
            raise AssertionError(f"interrupted at {where}: {error}") from error
    work(model)
    same(everything(model, ids), done)


@pytest.mark.parametrize("first, name", [*((None, name) for name in CONFIGS), ("FP8", "GPTQ"), ("AWQ", "KV"), ("ROTATED", "FP8")])
def test_quantize(golden, first, name):
    llama = golden["llama"]
    after = load if first is None else lambda golden_model: quantized(golden_model, CONFIGS[first])
    check(after(llama), lambda model: mtq.quantize(model, CONFIGS[name], loop_over(llama)), after, llama, llama.calib[:1])


def test_quantize_experts(golden):
    moe = golden["qwen3moe"]
    check(load(moe), lambda model: mtq.quantize(model, mtq.NVFP4_AWQ_LITE_CFG, loop_over(moe)), load, moe, moe.calib[:1])


def test_calibrate_and_set(golden):
    llama = golden["llama"]

    def work(model):
        mtq.calibrate(model, "mse", loop_over(llama))

    def change(model):
        mtq.set_quantizer_by_cfg(model, [{"quantizer_name": "*mlp*", "enable": False}])
    for one in (work, change):
        check(quantized(llama, mtq.INT8_DEFAULT_CFG), one, lambda golden_model: quantized(golden_model, mtq.INT8_DEFAULT_CFG), llama,
              llama.calib[:1])


@pytest.mark.parametrize("method", ["gradient", "kl_div"])
def test_auto_quantize(golden, method):
    llama = golden["llama"]
    batches = [{"input_ids": row[None], "labels": row[None]} for row in llama.calib[:2]]
    loss = {} if method == "kl_div" else {"loss_func": lambda output, batch: output.loss}

    def work(model):
        mtq.auto_quantize(model, {"effective_bits": 6.0}, [mtq.NVFP4_DEFAULT_CFG, mtq.FP8_DEFAULT_CFG], batches,
                          lambda model, batch: model(**batch), method=method, kv_cache_cfg=mtq.FP8_KV_CFG, **loss)
    check(quantized(llama, mtq.INT8_DEFAULT_CFG), work, lambda golden_model: quantized(golden_model, mtq.INT8_DEFAULT_CFG), llama,
          llama.calib[:1])


@pytest.mark.parametrize("name", ["FP8", "GPTQ"])
def test_compress_and_fold(golden, name):
    llama = golden["llama"]
    for work in (mtq.compress, mtq.fold_weight):
        check(quantized(llama, CONFIGS[name]), work, lambda golden_model: quantized(golden_model, CONFIGS[name]), llama, llama.calib[:1])


def test_generate(golden):
    llama = golden["llama"]
    model = quantized(llama, CONFIGS["KV"])
    before, ids = everything(model, llama.calib[:1]), llama.calib[:2, :5]

    def work(model):
        return model.generate(ids, max_new_tokens=4, temperature=0.8, seed=1, eos_token_id=[])
    answer = work(quantized(llama, CONFIGS["KV"]))
    for moment in moments(lambda: quantized(llama, CONFIGS["KV"]), work, SOME):
        where = interrupt(lambda: work(model), moment)
        np.testing.assert_array_equal(work(model), answer, err_msg=where)
        model.forget_decoding()
    same(everything(model, llama.calib[:1]), before)


@pytest.mark.parametrize("name", ["FP8", "AWQ"])
@pytest.mark.parametrize("old", [False, True])
def test_export(golden, tmp_path, name, old):
    """Nothing is left of it, and the old folder is whole until the new one is."""
    llama = golden["llama"]
    model, folder, target = quantized(llama, CONFIGS[name]), tmp_path / "out", tmp_path / "out" / "export"
    before = everything(model, llama.calib[:1])
    expected = export_hf_checkpoint(model, tmp_path / "expected", engine="vllm")
    there = {"config.json"} if old else set()

    def work():
        export_hf_checkpoint(model, target, engine="vllm", overwrite=old)

    def begin():
        shutil.rmtree(folder, ignore_errors=True)
        target.mkdir(parents=True)
        for file in there:
            (target / file).write_text("old")
    for moment in moments(begin, lambda _: work(), SOME):
        begin()
        where = interrupt(work, moment)
        found = {file.name for file in target.iterdir()}
        assert found == there and [path.name for path in folder.iterdir()] == ["export"] or _is_complete(target, expected), where
    begin()
    work()
    assert _is_complete(target, expected)
    same(everything(model, llama.calib[:1]), before)


def _is_complete(folder, expected):
    """The interrupt came after the last rename."""
    return {file.name: file.read_bytes() for file in folder.iterdir()} == {file.name: file.read_bytes() for file in expected.iterdir()} \
        and bool(read_safetensors(folder))
