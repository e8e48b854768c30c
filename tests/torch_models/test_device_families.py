"""Every family on a GPU (emulated, as in tests/test_device.py) against transformers: logits with padding on either side, windows, chunks and ropes
for longer sequences; gradients of every weight."""
import numpy as np
import pytest
import torch

import family_models
import modelq
from cuda_library import library_to_test
from data.make_family_configs import config_of
from family_gradients import check_gradients
from micro_models import MODELS, build, inputs, save

LOGITS = 2e-4       # absolute, in float32


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setenv("MODELQ_CUDA_LIBRARY", str(library_to_test()))


@pytest.mark.parametrize("name", MODELS)
def test_logits(name, tmp_path):
    theirs = build(name)
    model = modelq.load(save(theirs, tmp_path / "source"), compute="float32", device="cuda", device_memory="64MiB")
    ids, left, right = inputs()
    for mask in (None, left, right):
        with torch.no_grad():
            wanted = theirs(torch.from_numpy(ids), attention_mask=None if mask is None else torch.from_numpy(mask)).logits.numpy()
        seen = np.ones(ids.shape, bool) if mask is None else mask.astype(bool)
        np.testing.assert_allclose(model(ids, attention_mask=mask).logits[seen], wanted[seen], rtol=0, atol=LOGITS)


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name, tmp_path):
    check_gradients(name, save(build(name), tmp_path / "source"), tmp_path, device="cuda", device_memory="64MiB")


def test_configs_without_transformers_are_these():
    assert {name: config_of(name) for name in MODELS} == family_models.CONFIGS, "run tests/data/make_family_configs.py"
