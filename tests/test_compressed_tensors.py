"""Our compressed-tensors exports as its own library unpacks them. Needs torch and compressed-tensors; skipped without."""
import json

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")

import modelq  # noqa: E402
import modelq.quantization as mtq  # noqa: E402
from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationConfig  # noqa: E402
from golden_data import models  # noqa: E402
from modelq.export import export_hf_checkpoint  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from test_dialects import FORMATS, simulated  # noqa: E402


@pytest.mark.parametrize("name", FORMATS)
def test_the_library_reads_our_exports(name, tmp_path):
    llama = models(["llama"])[0].values[0]
    model = mtq.quantize(modelq.load(llama.source, compute="bfloat16"), FORMATS[name], lambda model: model(llama.calib[:2]))
    folder = export_hf_checkpoint(model, tmp_path / "out", dialect="compressed-tensors")
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate({key: value for key, value in said.items() if key in QuantizationConfig.model_fields})
    tensors = load_file(folder / "model.safetensors")
    for module in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.gate_proj"):
        scheme = next(scheme for scheme in config.config_groups.values() if scheme.targets == ["Linear"] or module in scheme.targets)
        parts = {key.removeprefix(f"{module}."): tensor for key, tensor in tensors.items() if key.startswith(f"{module}.")}
        weight = BaseCompressor.get_value_from_registry(scheme.format).decompress(parts, scheme)["weight"]
        ours = weight.float().numpy().astype(ml_dtypes.bfloat16).astype(np.float32)
        expected = simulated(model, module)
        assert ours.shape == expected.shape
        # the library multiplies some scales in bfloat16 before it uses them
        assert np.abs(ours - expected).max() <= 2.0**-7 * np.abs(expected).max(), module
        assert np.abs(ours - expected).mean() <= 2.0**-9 * np.abs(expected).mean(), module
