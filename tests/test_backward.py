"""Gradients: of every operation against differences, of whole models against transformers' and against differences; what is observed on the
way; order, errors, threads and memory."""
import re
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

import golden_data
import modelq
import modelq._core as core
import modelq.quantization as mtq
from modelq.gradients import backward

DATA = Path(__file__).parent / "data"
NAMES = sorted(path.stem for path in (DATA / "gradients").glob("*.npz"))
RELATIVE = 1e-4     # of a gradient's norm: two float32 computations that add in different orders


@pytest.fixture(autouse=True)
def default_threads():
    yield
    core.set_threads(0)


class Golden:
    """data/gradients/<name>.npz, and its model."""

    def __init__(self, name):
        self.folder = DATA / "families" / name[7:] if name.startswith("family_") else golden_data.Model(name).source
        self.arrays = dict(np.load(DATA / "gradients" / f"{name}.npz"))
        self.names = self.arrays["names"].tolist()
        self.batches = [{"input_ids": self.arrays[f"ids_{i}"], "attention_mask": self.arrays[f"mask_{i}"], "labels": self.arrays[f"labels_{i}"]}
                        for i in range(2)]

    def load(self, compute="float32"):
        return modelq.load(self.folder, compute=compute)

    def error(self, name, gradient):
        """Distance to transformers' gradient, relative to its norm, as far as the norm and four products with +-1 show it. The root of a
        mean square of such products is what a norm is on the average."""
        index = self.names.index(name)
        flat, norm = gradient.astype(np.float64).ravel(), self.arrays["norms"][index]
        signs = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 2, (4, flat.size), np.int8) * 2 - 1
        apart = np.sqrt(np.mean((signs @ flat - self.arrays["signs"][index]) ** 2))
        return max(apart, abs(np.linalg.norm(flat) - norm)) / norm


@pytest.fixture(params=NAMES)
def case(request):
    return Golden(request.param)


def gradients_of(case, compute="float32", **options):
    """{name as in the golden file: gradient} of every weight, of every layer's input, of every linear's output; and the losses."""
    model = case.load(compute)
    weights = [module[kind] for module in model.modules for kind in ("weight", "bias") if module[kind] is not None]
    rows = [batch["input_ids"].size for batch in case.batches]
    linears = {module["name"]: module["shape"][0] for module in model.modules if module["kind"] == "linear" and module["expert"] is None}
    observers = {name: core.OutputGradient(sum(rows), width) for name, width in linears.items()}
    found = {}

    def look(layer, back):
        found.update({f"input {layer} {batch}": back.gradient(batch) for batch in range(2)})
    gradients = backward(model, case.batches, dict.fromkeys(weights), observers, look=look, **options)
    for name, observer in observers.items():
        found |= {f"output {name} {batch}": part for batch, part in enumerate(np.split(observer.array, np.cumsum(rows)[:-1]))}
    return found | gradients.weights, gradients


# Against transformers --------------------------------------------------------------------------------------------------------

def test_gradients_equal_transformers(case):
    found, gradients = gradients_of(case)
    np.testing.assert_allclose(gradients.losses, case.arrays["losses"], rtol=1e-5)
    assert set(case.names) <= set(found)
    errors = {name: case.error(name, found[name]) for name in case.names}
    assert max(errors.values()) < RELATIVE, sorted(errors.items(), key=lambda item: -item[1])[:5]
    for name, wanted in case.arrays.items():
        if name.startswith("full "):
            got = found[name[5:]]
            assert np.linalg.norm(got - wanted) < RELATIVE * np.linalg.norm(wanted), name


def test_gradients_in_bfloat16_are_near(case):
    """Activations and products rounded to 2^-9, a dozen of them one after the other."""
    found, gradients = gradients_of(case, "bfloat16")
    np.testing.assert_allclose(gradients.losses, case.arrays["losses"], rtol=0.01)
    errors = {name: case.error(name, found[name]) for name in case.names if name.startswith("input")}
    assert max(errors.values()) < 0.1, errors
