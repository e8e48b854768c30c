"""Searches on what a device found: the same choices as on the CPU's statistics, but where two lie as close as sums in another order do."""
import numpy as np
import pytest

import modelq
import modelq.quantization as mtq
from cuda_library import library_to_test
from golden_data import read_safetensors
from modelq.calibration.gptq import Gptq
from modelq.export import export_hf_checkpoint


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setenv("MODELQ_CUDA_LIBRARY", str(library_to_test()))


class Gptqs:
    """GPTQ of one model, whose Gram matrices are written down, and may be replaced by others."""

    def __init__(self, golden, monkeypatch, folder, ids):
        self.source, self.folder, self.ids = golden["llama"].source, folder, ids
        self.grams, self.given = {}, lambda name, gram: gram
        plain = Gptq._factor

        def factor(search, name, seen):
            self.grams[name] = seen.__dict__["gram"] = self.given(name, np.array(seen.gram))
            return plain(search, name, seen)
        monkeypatch.setattr(Gptq, "_factor", factor)

    def run(self, name, given=lambda name, gram: gram, **options):
        """(export, Gram matrices, losses)."""
        model = modelq.load(self.source, compute="float32", **options)
        self.grams, self.given = {}, given
        mtq.quantize(model, mtq.NVFP4_GPTQ_CFG, lambda model: [model(ids) for ids in self.ids])
        export_hf_checkpoint(model, export_dir=self.folder / name)
        return read_safetensors(self.folder / name), self.grams, model.search_losses


def other_rows(one, two, layer):
    """Share of the rows of a layer's weights that differ."""
    names = [name for name in one if name.startswith(f"model.layers.{layer}.") and name.endswith(".weight") and one[name].ndim == 2]
    differ = [np.any(one[name] != two[name], axis=1) for name in names]
    assert len(names) == 7
    return float(np.concatenate(differ).mean())


def noise(size):
    def added(name, gram):
        random = np.random.default_rng(len(name)).standard_normal(gram.shape).astype(np.float32)
        return gram * (1 + np.float32(size) * (random + random.T) / 2)
    return added


@pytest.mark.filterwarnings("ignore:gptq")
@pytest.mark.parametrize("tokens", [512, 64])
def test_gptq(golden, monkeypatch, tmp_path, tokens):
    """The Gram matrices of the first layer are the CPU's to float32's rounding, and of its rounded rows hardly one is another. In later
    layers one code of the first that is another makes all inputs others, above all where tokens are fewer than channels; that is GPTQ's own:
    it does as much to the CPU's to change its Gram matrices by a millionth. By one and the same Gram matrices, both round to the same
    bytes."""
    calib = golden["llama"].calib
    runs = Gptqs(golden, monkeypatch, tmp_path, [calib[at:at + 2] for at in range(0, tokens // 64, 2)])
    here, grams, losses = runs.run("cpu")
    there, found, found_losses = runs.run("cuda", device="cuda", device_memory="64MiB")
    for name, gram in grams.items():
        if name.startswith("model.layers.0."):
            assert np.linalg.norm(found[name] - gram) <= 3e-6 * np.linalg.norm(gram), name
    for name, loss in losses.items():
        if name.startswith("model.layers.0."):
            assert found_losses[name] == pytest.approx(loss, rel=1e-3), name
    assert other_rows(here, there, 0) <= 0.01
    again, _, _ = runs.run("again", lambda name, gram: found[name])
    for name in here:
        if not name.endswith("input_scale"):
            assert again[name].tobytes() == there[name].tobytes(), name
    shaken = [runs.run(f"shaken {size}", noise(size))[0] for size in (1e-6, 1e-5)]
    assert max(other_rows(here, one, 1) for one in shaken) >= 0.5 * other_rows(here, there, 1)
