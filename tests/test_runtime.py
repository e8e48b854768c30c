"""The native runtime against logits that transformers computed."""
import json

import numpy as np
import pytest

import modelq._core as core
from golden_data import models, read_safetensors


def flat_config(config: dict) -> dict:
    """config.json's numbers under the flat names that the runtime takes."""
    rope = config.get("rope_parameters") or {}
    renamed = {"rope_" + key.removeprefix("rope_"): value for key, value in rope.items() if key != "partial_rotary_factor"}
    return {**config, **renamed}


class Source:
    """A folder with config.json and model.safetensors, as a Runtime and its tensors."""

    def __init__(self, folder, compute="float32", **changes):
        self.config = flat_config(json.loads((folder / "config.json").read_text())) | changes
        self.tensors = read_safetensors(folder)
        self.runtime = core.Runtime(self.config["model_type"].removeprefix("mistral") or "llama", self.config, compute)

    def pick(self, names):
        return {name: self.tensors[name] for name in names}

    def run(self, ids, masks=None, **options):
        run = self.runtime.start(ids, masks, **options)
        run.embed(self.pick(self.runtime.embed_tensors()))
        for layer in range(self.runtime.layers):
            self.runtime.load_layer(layer, self.pick(self.runtime.layer_tensors(layer)))
            run.layer(layer)
            self.runtime.drop_layer(layer)
        return run

    def logits(self, ids, masks=None):
        return self.run([ids], None if masks is None else [masks]).logits(0, self.pick(self.runtime.head_tensors()))


@pytest.mark.parametrize("model", [p for p in models() if p.values[0].name in ("llama", "qwen3")])
def test_golden_logits(model):
    source = Source(model.source)
    np.testing.assert_allclose(source.logits(model.calib[:1]), model.logits, rtol=0, atol=2e-4)
