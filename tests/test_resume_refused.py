"""The folder of a calibration's progress: whose it is, and what is said where it is not as it should be."""
import json

import numpy as np
import pytest

import modelq.quantization as mtq
from test_resume import copy_of, counted, everything, interrupted, load, quantize, same


@pytest.mark.parametrize("other", ["config", "layerwise", "data", "model", "weights", "rotation"])
def test_the_progress_of_another_calibration_is_refused(golden, other, tmp_path):
    config, golden_model, data = mtq.FP8_DEFAULT_CFG, golden["llama"], golden["llama"].calib
    plain = copy_of(golden_model, tmp_path / "plain", dict) if other == "weights" else golden_model
    quantize(plain, config, tmp_path / "progress")
    if other == "config":
        config = mtq.INT8_DEFAULT_CFG
    elif other == "layerwise":
        config = {**config, "algorithm": {"method": "max", "layerwise": {"enable": True, "get_qdq_activations_from_prev_layer": True}}}
    elif other == "data":
        data = data[::-1]
    elif other == "model":
        golden_model = golden["qwen3"]
    elif other == "weights":        # trained further: the same shapes, in files of the same size
        golden_model = copy_of(golden_model, tmp_path / "tuned", lambda tensors: {
            name: tensor * np.asarray(1.05, tensor.dtype) for name, tensor in tensors.items()})
    else:
        config = {**config, "algorithm": [{"method": "rotate", "residual": False}, "max"]}
    model = load(golden_model)
    with pytest.raises(ValueError, match=f"{tmp_path / 'progress'}.*progress of another calibration.*remove it, or give another"):
        quantize(golden_model, config, tmp_path / "progress", model, data)
    assert not model.quantized


def test_the_same_weights_elsewhere_are_the_same(golden, tmp_path, monkeypatch):
    interrupted(monkeypatch, 1, copy_of(golden["llama"], tmp_path / "here", dict), mtq.INT4_AWQ_CFG, tmp_path / "progress")
    _, rest = counted(monkeypatch, copy_of(golden["llama"], tmp_path / "there", dict), mtq.INT4_AWQ_CFG, tmp_path / "progress")
    assert rest == [1]


def test_calibrate_goes_on_only_from_the_same_start(golden, tmp_path):
    """What a second algorithm finds depends on what the first has left."""
    llama, ids = golden["llama"], golden["llama"].calib[:1]

    def clipped(first):
        model = quantize(llama, {**mtq.INT4_AWQ_CFG, "algorithm": first})
        return mtq.calibrate(model, "awq_clip", lambda model: [model(row[None]) for row in llama.calib], checkpoint_dir=tmp_path)
    expected = everything(clipped("max"), ids)
    same(everything(clipped("max"), ids), expected)
    with pytest.raises(ValueError, match="progress of another calibration"):
        clipped("awq_lite")


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"version": 1}), *(
    json.dumps({"version": 3, "digest": "", "layers_done": steps}) for steps in (3, [1], {"0": "2"}, {"0": None}))])
def test_a_damaged_manifest_is_named(golden, text, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path / 'manifest.json'}: not the state of a calibration .*remove the folder"):
        quantize(golden["llama"], mtq.FP8_DEFAULT_CFG, tmp_path)


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
@pytest.mark.parametrize("file", ["layer_0000", "states_0000"])
def test_damaged_progress_is_named(golden, file, damage, tmp_path, monkeypatch):
    interrupted(monkeypatch, 1, golden["llama"], mtq.FP8_DEFAULT_CFG, tmp_path)
    path = tmp_path / "step_0" / f"{file}.safetensors"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1 if damage == "cut" else 0])
    said, model = "missing" if damage == "missing" else "damaged", load(golden["llama"])
    with pytest.raises(ValueError, match=f"{path}: this part of a calibration's progress is {said}: remove {tmp_path} to begin anew"):
        quantize(golden["llama"], mtq.FP8_DEFAULT_CFG, tmp_path, model)
    assert not model.quantized
