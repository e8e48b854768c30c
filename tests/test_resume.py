"""A calibration with a checkpoint_dir goes on where it was interrupted, and ends with the same result, bit for bit."""
import json
import os
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest

import golden_data
import modelq
import modelq.quantization as mtq
from modelq import streaming
from modelq.quantizers import found_values

GPTQ = {"method": "gptq"}
INT8_GPTQ = {**mtq.INT8_DEFAULT_CFG, "algorithm": GPTQ}      # activations are quantized, so two kinds of hidden states are on their way
CONFIGS = {
    **{name: getattr(mtq, name) for name in (
        "FP8_DEFAULT_CFG", "INT8_SMOOTHQUANT_CFG", "INT4_AWQ_CFG", "INT4_GPTQ_CFG", "NVFP4_GPTQ_CFG", "NVFP4_SVDQUANT_DEFAULT_CFG",
        "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG")},
    "INT8_GPTQ": INT8_GPTQ,
    "AWQ_THEN_CLIP": {**mtq.INT4_AWQ_CFG, "algorithm": ["awq_lite", "awq_clip"]},
    "ROTATED": {**mtq.FP8_DEFAULT_CFG, "algorithm": ["rotate", "max"]},
    "HEAD": {**mtq.FP8_DEFAULT_CFG, "quant_cfg": [*mtq.FP8_DEFAULT_CFG["quant_cfg"], *(
        {"quantizer_name": f"lm_head.{side}_quantizer", "cfg": {"num_bits": (4, 3)}, "enable": True} for side in ("weight", "input"))]},
}


class Stop(Exception):
    pass


def load(golden_model):
    return modelq.load(golden_model.source, compute="bfloat16")


def quantize(golden_model, config, folder=None, model=None):
    model = model or load(golden_model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)       # few tokens: singular Gram matrices, experts that see none
        return mtq.quantize(model, config, lambda model: [model(row[None]) for row in golden_model.calib], checkpoint_dir=folder)


def everything(model, ids):
    """What calibration found and changed, and what the model computes."""
    found = {name: found_values(quantizer) for name, quantizer in model.quantizers.items()}
    found = {f"{name}:{stage}:{what}": value for name, stages in found.items() for stage, values in enumerate(stages)
             for what, value in values._asdict().items()}
    found |= {f"{name}:branch:{what}": part for name, branch in model.low_rank.items() for what, part in branch._asdict().items()}
    found |= {f"{name}:rounded": model.checkpoint.read(name) for name in getattr(model.checkpoint, "changed", ())}
    found |= {f"{name}:loss": loss for name, loss in model.search_losses.items()}
    return {**found, "logits": model(ids).logits, "unseen": repr(model.unseen_experts)}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)


class Layers:
    """Counts the passes over layers, and stops at one of them."""

    def __init__(self, monkeypatch, stop_at=None):
        self.seen, self.stop_at, self.run_layer = [], stop_at, streaming.run_layer
        monkeypatch.setattr(streaming, "run_layer", self)

    def __call__(self, model, run, layer, visitor=None):
        if len(self.seen) == self.stop_at:
            raise KeyboardInterrupt
        self.seen.append(layer)
        return self.run_layer(model, run, layer, visitor)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("golden_model", golden_data.models(names=["llama", "qwen3moe"]))
def test_it_goes_on_where_it_was_interrupted(golden_model, name, tmp_path, monkeypatch):
    config, ids = CONFIGS[name], golden_model.calib[:1]
    expected = everything(quantize(golden_model, config), ids)
    with monkeypatch.context() as patch:
        total = Layers(patch)
        quantize(golden_model, config, tmp_path / "whole")
    for stop_at in range(1, len(total.seen)):
        folder, model = tmp_path / str(stop_at), load(golden_model)
        plain = model(ids).logits
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            Layers(patch, stop_at)
            quantize(golden_model, config, folder, model)
        assert not model.quantized and not model.quantizers      # nothing half done
        np.testing.assert_array_equal(model(ids).logits, plain)
        with monkeypatch.context() as patch:
            rest = Layers(patch)
            quantize(golden_model, config, folder, model)
        assert len(rest.seen) <= len(total.seen) - (stop_at if config["algorithm"] == "max" else total.seen[:stop_at].index(
            total.seen[stop_at - 1]))
        same(everything(model, ids), expected)


@pytest.mark.parametrize("name", ["INT4_AWQ_CFG", "HEAD", "INT8_GPTQ"])
def test_a_whole_one_is_not_run_again(golden, name, tmp_path, monkeypatch):
    expected = everything(quantize(golden["llama"], CONFIGS[name], tmp_path), golden["llama"].calib[:1])
    with monkeypatch.context() as patch:
        layers = Layers(patch)
        model = quantize(golden["llama"], CONFIGS[name], tmp_path)
        assert layers.seen == []
    same(everything(model, golden["llama"].calib[:1]), expected)
    assert not list(tmp_path.glob("*/states_*"))     # hidden states are large, and not needed any more


def test_between_the_last_layer_and_the_head(golden, tmp_path, monkeypatch):
    expected = everything(quantize(golden["llama"], CONFIGS["HEAD"]), golden["llama"].calib[:1])

    def stop(self):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("modelq.calibration.walk.Walk.head", stop)
        quantize(golden["llama"], CONFIGS["HEAD"], tmp_path)
    with monkeypatch.context() as patch:
        layers = Layers(patch)
        model = quantize(golden["llama"], CONFIGS["HEAD"], tmp_path)
        assert layers.seen == []
    same(everything(model, golden["llama"].calib[:1]), expected)


@pytest.mark.parametrize("moment", ["write_tensors", "replace"])
def test_stopped_while_progress_is_being_written(golden, moment, tmp_path, monkeypatch):
    """Before a layer's file is there, before its hidden states are, before the manifest says so."""
    expected = everything(quantize(golden["llama"], CONFIGS["INT8_GPTQ"]), golden["llama"].calib[:1])
    module = "modelq.checkpoint.writer" if moment == "write_tensors" else "os"
    for count in range(5):
        folder, left, real = tmp_path / str(count), [count], __import__(module, fromlist=[moment]).__dict__[moment]

        def dies(*arguments):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return real(*arguments)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"{module}.{moment}", dies)
            quantize(golden["llama"], CONFIGS["INT8_GPTQ"], folder)
            raise KeyboardInterrupt     # it was through
        same(everything(quantize(golden["llama"], CONFIGS["INT8_GPTQ"], folder), golden["llama"].calib[:1]), expected)


KILLED = """
import os, signal, sys
import numpy as np
import modelq, modelq.quantization as mtq
from modelq import streaming
real, left = streaming.run_layer, [1]
def run_layer(*arguments):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return real(*arguments)
streaming.run_layer = run_layer
rows = np.load(sys.argv[2])
mtq.quantize(modelq.load(sys.argv[1], compute="bfloat16"), mtq.INT4_AWQ_CFG, lambda model: [model(row[None]) for row in rows],
             checkpoint_dir=sys.argv[3])
"""


def test_killed(golden, tmp_path, monkeypatch):
    llama = golden["llama"]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, llama.source, llama.folder / "calib.npy", tmp_path / "progress"],
                          env={**os.environ, "TQDM_DISABLE": "1"}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with monkeypatch.context() as patch:
        layers = Layers(patch)
        model = quantize(llama, mtq.INT4_AWQ_CFG, tmp_path / "progress")
        assert 0 not in layers.seen
    same(everything(model, llama.calib[:1]), everything(quantize(llama, mtq.INT4_AWQ_CFG), llama.calib[:1]))


def test_save_every(golden, tmp_path, monkeypatch):
    """Progress counts every other layer here: interrupted after one of two, it starts again."""
    config = {**mtq.FP8_DEFAULT_CFG, "algorithm": {"method": "max", "layerwise": {"enable": True, "save_every": 2}}}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Layers(patch, 1)
        quantize(golden["llama"], config, tmp_path)
    with monkeypatch.context() as patch:
        layers = Layers(patch)
        quantize(golden["llama"], config, tmp_path)
        assert layers.seen[0] == 0


def test_the_folder_may_be_named_by_the_algorithm(golden, tmp_path):
    """As in Model Optimizer: layerwise.checkpoint_dir."""
    quantize(golden["llama"], {**mtq.FP8_DEFAULT_CFG, "algorithm": {
        "method": "max", "layerwise": {"enable": True, "checkpoint_dir": str(tmp_path / "here")}}})
    assert (tmp_path / "here" / "manifest.json").exists()


@pytest.mark.parametrize("other", ["config", "data", "model", "rotation"])
def test_the_progress_of_another_calibration_is_refused(golden, other, tmp_path):
    quantize(golden["llama"], mtq.FP8_DEFAULT_CFG, tmp_path)
    config, data, source = mtq.FP8_DEFAULT_CFG, golden["llama"].calib, golden["llama"].source
    if other == "config":
        config = mtq.INT8_DEFAULT_CFG
    elif other == "data":
        data = data[::-1]
    elif other == "model":
        source = golden["qwen3"].source
    else:
        config = {**config, "algorithm": [{"method": "rotate", "residual": False}, "max"]}
    model = modelq.load(source, compute="bfloat16")
    with pytest.raises(ValueError, match="progress of another calibration"):
        mtq.quantize(model, config, lambda model: [model(row[None]) for row in data], checkpoint_dir=tmp_path)
    assert not model.quantized


@pytest.mark.parametrize("damage", ["manifest", "not json", "layer", "missing"])
def test_damaged_progress_is_named(golden, damage, tmp_path):
    quantize(golden["llama"], mtq.FP8_DEFAULT_CFG, tmp_path)
    manifest, layer = tmp_path / "manifest.json", tmp_path / "step_0" / "layer_0001.safetensors"
    if damage == "manifest":
        manifest.write_text(json.dumps({"version": 1}))
    elif damage == "not json":
        manifest.write_text("{")
    elif damage == "layer":
        layer.write_bytes(layer.read_bytes()[:100])
    else:
        layer.unlink()
    named = manifest if "manifest" in str(damage) or damage == "not json" else layer
    with pytest.raises((ValueError, FileNotFoundError), match=str(named)):
        quantize(golden["llama"], mtq.FP8_DEFAULT_CFG, tmp_path)
