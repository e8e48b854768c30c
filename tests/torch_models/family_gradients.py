"""A native model's gradients against those of the transformers model that it was saved from."""
from pathlib import Path

import numpy as np
import torch

import modelq
from micro_models import build, inputs, save
from modelq.checkpoint import open_checkpoint
from modelq.gradients import backward

GRADIENTS = 2e-5    # of a gradient's norm


def check_gradients(name: str, folder: Path, tmp_path: Path, **place) -> None:
    """Of every weight, by the names that the checkpoint has them under. place: where the native model computes."""
    theirs = build(name)
    ids, _, right = inputs()
    labels = np.where(right == 1, ids, -100)
    loss = theirs(torch.from_numpy(ids), attention_mask=torch.from_numpy(right), labels=torch.from_numpy(labels)).loss
    loss.backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    wanted = open_checkpoint(save(theirs, tmp_path / "gradients")).read      # experts that are stacked as linears
    model = modelq.load(folder, compute="float32", **place)
    assert (model.runtime.device is not None) == bool(place)
    names = dict.fromkeys(module[kind] for module in model.modules for kind in ("weight", "bias")
                          if module[kind] is not None and (module["kind"] != "vector" or module[kind].endswith("sinks")))
    assert name != "gpt_oss" or "model.layers.3.self_attn.sinks" in names
    found = backward(model, [{"input_ids": ids, "attention_mask": right, "labels": labels}], names)
    np.testing.assert_allclose(found.losses, loss.item(), rtol=1e-5)
    for weight, gradient in found.weights.items():
        assert np.linalg.norm(wanted(weight)) > 0 or "experts" in weight, weight
        assert np.linalg.norm(gradient - wanted(weight)) <= GRADIENTS * np.linalg.norm(wanted(weight)) + 1e-7, weight
