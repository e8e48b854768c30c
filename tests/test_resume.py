"""A calibration with a checkpoint_dir goes on where it was interrupted, and ends with the same result, bit for bit."""
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save_file

import golden_data
import modelq
import modelq.quantization as mtq
from modelq import streaming
from modelq.calibration import METHODS
from modelq.quantizers import found_values

GPTQ = {"method": "gptq"}
HEAD = [{"quantizer_name": f"lm_head.{side}_quantizer", "cfg": {"num_bits": (4, 3)}, "enable": True} for side in ("weight", "input")]
INT8_GPTQ = {**mtq.INT8_DEFAULT_CFG, "algorithm": GPTQ}      # activations are quantized, so two kinds of hidden states are on their way
CONFIGS = {
    **{name: getattr(mtq, name) for name in (
        "FP8_DEFAULT_CFG", "INT8_SMOOTHQUANT_CFG", "INT4_AWQ_CFG", "INT4_GPTQ_CFG", "NVFP4_GPTQ_CFG", "NVFP4_SVDQUANT_DEFAULT_CFG",
        "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG")},
    "INT8_GPTQ": INT8_GPTQ,
    "AWQ_THEN_CLIP": {**mtq.INT4_AWQ_CFG, "algorithm": ["awq_lite", "awq_clip"]},
    "ROTATED": {**mtq.FP8_DEFAULT_CFG, "algorithm": ["rotate", "max"]},
    "HEAD": {**mtq.FP8_DEFAULT_CFG, "quant_cfg": [*mtq.FP8_DEFAULT_CFG["quant_cfg"], *HEAD]},
    "HEAD_GPTQ": {**INT8_GPTQ, "quant_cfg": [*INT8_GPTQ["quant_cfg"], *HEAD]},
}


def load(golden_model):
    return modelq.load(golden_model.source, compute="bfloat16")


def quantize(golden_model, config, folder=None, model=None, tokens=None):
    model = model or load(golden_model)
    tokens = golden_model.calib if tokens is None else tokens
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)       # few tokens: singular Gram matrices, experts that see none
        return mtq.quantize(model, config, lambda model: [model(row[None]) for row in tokens], checkpoint_dir=folder)


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

    def __call__(self, model, run, layer, *how, **more):
        if len(self.seen) == self.stop_at:
            raise KeyboardInterrupt
        self.seen.append(layer)
        return self.run_layer(model, run, layer, *how, **more)


def interrupted(monkeypatch, stop_at, *arguments, **options):
    """quantize(), stopped before the pass with this number."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Layers(patch, stop_at)
        quantize(*arguments, **options)


def counted(monkeypatch, *arguments, **options):
    """What quantize() gives, and the layers that it ran."""
    with monkeypatch.context() as patch:
        layers = Layers(patch)
        return quantize(*arguments, **options), layers.seen


def begin_of_layer(seen, at):
    """The first of the passes over the same layer."""
    while at and seen[at - 1] == seen[at]:
        at -= 1
    return at


def copy_of(golden_model, folder, change, **config):
    """A copy of a checkpoint with other tensors, as a golden_data.Model has it."""
    shutil.copytree(golden_model.source, folder / "source", ignore=shutil.ignore_patterns("*.safetensors*"), copy_function=shutil.copyfile)
    tensors = {name: np.array(tensor) for name, tensor in golden_data.read_safetensors(golden_model.source).items()}
    save_file(change(tensors), folder / "source" / "model.safetensors")
    said = json.loads((folder / "source" / "config.json").read_text())
    (folder / "source" / "config.json").write_text(json.dumps({**said, **config}))
    return Copy(folder / "source", golden_model.calib)


class Copy(NamedTuple):
    source: Path
    calib: np.ndarray


@pytest.fixture
def deep(golden, tmp_path):
    """golden llama with four layers instead of two."""
    def twice(tensors):
        again = {name.replace(f"layers.{i}.", f"layers.{i + 2}."): np.ascontiguousarray(tensor[..., ::-1])
                 for i in range(2) for name, tensor in tensors.items() if f"layers.{i}." in name}
        return {**tensors, **again}
    return copy_of(golden["llama"], tmp_path / "deep", twice, num_hidden_layers=4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("golden_model", golden_data.models(names=["llama", "qwen3moe"]))
def test_it_goes_on_where_it_was_interrupted(golden_model, name, tmp_path, monkeypatch):
    config, ids = CONFIGS[name], golden_model.calib[:1]
    expected = everything(quantize(golden_model, config), ids)
    _, total = counted(monkeypatch, golden_model, config, tmp_path / "whole")
    for stop_at in range(1, len(total)):
        folder, model = tmp_path / str(stop_at), load(golden_model)
        plain = model(ids).logits
        interrupted(monkeypatch, stop_at, golden_model, config, folder, model)
        assert not model.quantized and not model.quantizers and not hasattr(model.checkpoint, "changed")      # nothing half done
        np.testing.assert_array_equal(model(ids).logits, plain)
        _, rest = counted(monkeypatch, golden_model, config, folder, model)
        assert rest == total[begin_of_layer(total, stop_at):]       # finished layers are not run again
        same(everything(model, ids), expected)


@pytest.mark.parametrize("name", ["INT8_SMOOTHQUANT_CFG", "INT4_AWQ_CFG", "NVFP4_GPTQ_CFG", "NVFP4_SVDQUANT_DEFAULT_CFG"])
def test_interrupted_when_a_layer_has_changed_but_is_not_kept(golden, name, tmp_path, monkeypatch):
    """After each search: what it gave the layer is not there twice."""
    config, ids = CONFIGS[name], golden["llama"].calib[:1]
    expected, method = everything(quantize(golden["llama"], config), ids), METHODS[
        config["algorithm"] if isinstance(config["algorithm"], str) else config["algorithm"]["method"]]
    real, calls = method.search, []

    def search(self, part, inputs):
        real(self, part, inputs)
        calls.append(part.layer)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
    for stop_at in range(1, 5):      # embedding, head, and two layers
        calls.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(method, "search", search)
            quantize(golden["llama"], config, tmp_path / str(stop_at))
        assert calls == [-1, -1, 0, 1][:stop_at]
        model, rest = counted(monkeypatch, golden["llama"], config, tmp_path / str(stop_at))
        assert (0 in rest) == (stop_at < 4)
        same(everything(model, ids), expected)


@pytest.mark.parametrize("name", ["INT4_AWQ_CFG", "HEAD", "INT8_GPTQ", "AWQ_THEN_CLIP"])
def test_a_whole_one_is_not_run_again(golden, name, tmp_path, monkeypatch):
    expected = everything(quantize(golden["llama"], CONFIGS[name], tmp_path), golden["llama"].calib[:1])
    model, rest = counted(monkeypatch, golden["llama"], CONFIGS[name], tmp_path)
    assert rest == []
    same(everything(model, golden["llama"].calib[:1]), expected)
    assert not list(tmp_path.glob("*/states_*"))     # hidden states are large, and not needed any more


@pytest.mark.parametrize("name", ["HEAD", "HEAD_GPTQ"])
def test_between_the_last_layer_and_the_head(golden, name, tmp_path, monkeypatch):
    expected = everything(quantize(golden["llama"], CONFIGS[name]), golden["llama"].calib[:1])

    def stop(self, watch):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("modelq.calibration.walk.Walk._finish", stop)
        quantize(golden["llama"], CONFIGS[name], tmp_path)
    model, rest = counted(monkeypatch, golden["llama"], CONFIGS[name], tmp_path)
    assert rest == []
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
                          env={**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": str(Path(modelq.__file__).parents[1])}, cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with monkeypatch.context() as patch:
        layers = Layers(patch)
        model = quantize(llama, mtq.INT4_AWQ_CFG, tmp_path / "progress")
        assert 0 not in layers.seen
    same(everything(model, llama.calib[:1]), everything(quantize(llama, mtq.INT4_AWQ_CFG), llama.calib[:1]))


@pytest.mark.parametrize("method", ["max", "gptq"])
@pytest.mark.parametrize("stop_at, begins", [(1, 0), (2, 2), (3, 2)])
def test_save_every(deep, method, stop_at, begins, tmp_path, monkeypatch):
    """Progress counts every other layer here: interrupted after one of two, both are run again. How often may change meanwhile."""
    def config(save_every):
        return {**mtq.INT8_DEFAULT_CFG, "algorithm": {"method": method, "layerwise": {"enable": False, "save_every": save_every}}}
    passes = 2 if method == "gptq" else 1
    interrupted(monkeypatch, stop_at * passes, deep, config(2), tmp_path / "progress")
    model, rest = counted(monkeypatch, deep, config(1), tmp_path / "progress")
    assert rest == [layer for layer in range(begins, 4) for _ in range(passes)]
    same(everything(model, deep.calib[:1]), everything(quantize(deep, config(1)), deep.calib[:1]))


@pytest.mark.parametrize("algorithm", ["max", ["awq_lite", "awq_clip"], "gptq"])
def test_experts_that_saw_no_token_are_remembered(golden, algorithm, tmp_path, monkeypatch):
    """Those of this calibration: also where the model was calibrated before, and where a later step does without the data."""
    moe, one = golden["qwen3moe"], golden["qwen3moe"].calib[:1, :1]
    config = {**(mtq.FP8_DEFAULT_CFG if algorithm == "max" else mtq.INT4_AWQ_CFG), "algorithm": algorithm}
    few, all_ = (quantize(moe, config, tokens=tokens) for tokens in (one, moe.calib))
    assert few.unseen_experts.keys() == {0, 1} and all_.unseen_experts == {}
    for tokens, expected, other in ((one, few, all_), (moe.calib, all_, few)):
        folder, before = tmp_path / str(len(tokens)), dict(other.unseen_experts)
        interrupted(monkeypatch, 3 if isinstance(algorithm, list) else 1, moe, config, folder, tokens=tokens)
        interrupted(monkeypatch, 0, moe, config, folder, model=other, tokens=tokens)
        assert other.unseen_experts == before
        same(everything(quantize(moe, config, folder, other, tokens), one), everything(expected, one))
        quantize(moe, config, model=other, tokens=one if other is few else moe.calib)        # as it was
    assert quantize(moe, {**mtq.INT4_AWQ_CFG, "algorithm": ["awq_lite", "mse"]}, tokens=one).unseen_experts == few.unseen_experts
    assert quantize(moe, mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG, model=few).unseen_experts == {}


def test_the_folder_may_be_named_by_the_algorithm(golden, tmp_path):
    """As in Model Optimizer: layerwise.checkpoint_dir."""
    quantize(golden["llama"], {**mtq.FP8_DEFAULT_CFG, "algorithm": {
        "method": "max", "layerwise": {"enable": True, "checkpoint_dir": str(tmp_path / "here")}}})
    assert (tmp_path / "here" / "manifest.json").exists()
