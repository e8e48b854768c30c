"""Scripts as Model Optimizer's users write them, of which only the names of imports are changed."""
import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import modelq  # noqa: E402
import modelq.quantization as mtq  # noqa: E402
from byte_tokenizer import byte_tokenizer  # noqa: E402

SCRIPTS = Path(__file__).parent / "scripts"
# longest first
IMPORTS = {"modelopt.torch.quantization.utils": "modelq.quantization.utils", "modelopt.torch.quantization.nn": "modelq.nn",
           "modelopt.torch.utils.dataset_utils": "modelq.utils.dataset_utils", "modelopt.torch.quantization": "modelq.quantization",
           "modelopt.torch.export": "modelq.export", "modelopt.torch.opt": "modelq"}
ALGORITHMS = {"FP8_DEFAULT_CFG": "FP8", "NVFP4_DEFAULT_CFG": "NVFP4", "INT4_AWQ_CFG": "W4A16_AWQ", "INT8_SMOOTHQUANT_CFG": "W8A8_SQ_PER_CHANNEL",
              "NVFP4_AWQ_LITE_CFG": "NVFP4_AWQ", "W4A8_AWQ_BETA_CFG": "W4A8_AWQ", "NVFP4_SVDQUANT_DEFAULT_CFG": "NVFP4_SVD"}


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    """The micro llama with a tokenizer of bytes, as from the hub; and a text."""
    made = tmp_path_factory.mktemp("model")
    shutil.copytree(golden["llama"].source, made, dirs_exist_ok=True)
    tokenizer = byte_tokenizer()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=tokenizer.id_to_token(0),
                                         padding_side="left").save_pretrained(made)
    (made / "data.txt").write_text("\n\n".join(f"Calibration sample number {i}: the quick brown fox jumps over the lazy dog." for i in range(40)))
    return made


def run(script, folder, tmp_path, **names):
    text = (SCRIPTS / script).read_text()
    for theirs, ours in IMPORTS.items():
        text = text.replace(f"import {theirs} ", f"import {ours} ").replace(f"from {theirs} ", f"from {ours} ")
    assert "modelopt" not in text
    scope = {"MODEL": str(folder), "DATA": str(folder / "data.txt"), "EXPORT": str(tmp_path / "export"), "STATE": str(tmp_path / "state"), **names}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(text, script, "exec"), scope)
    return said.getvalue(), scope


@pytest.mark.parametrize("preset", ALGORITHMS)
def test_quickstart(folder, preset, tmp_path):
    """Load, calibrate, quantize, generate before and after, export; the export opens and computes what the model does."""
    said, scope = run("quickstart.py", folder, tmp_path, FORMAT=preset)
    assert "TensorQuantizers found in model" in said and "before:" in said
    assert json.loads((tmp_path / "export/hf_quant_config.json").read_text())["quantization"]["quant_algo"] == ALGORITHMS[preset]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "export").decode([5, 6])
    ids = scope["before"][:1]
    opened = modelq.load(tmp_path / "export", compute="bfloat16")(ids.numpy()).logits
    with torch.no_grad():
        ours = scope["model"](ids).logits.float().numpy()
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder)(ids).logits.float().numpy()
    assert np.linalg.norm(opened - plain) < 1.5 * np.linalg.norm(ours - plain) and scope["after"].shape == scope["before"].shape


@pytest.mark.parametrize("script", ["kv_cache.py", "custom_config.py", "save_restore.py", "training.py", "mlp.py"])
def test_script(folder, script, tmp_path):
    """They assert what matters themselves."""
    run(script, folder, tmp_path)
    if script == "kv_cache.py":
        assert json.loads((tmp_path / "export/hf_quant_config.json").read_text())["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert mtq.FP8_KV_CFG["quant_cfg"]      # nothing has changed a preset
