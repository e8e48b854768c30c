"""`import modelq` is instant, and pulls in nothing heavy."""
import sys
from pathlib import Path

import pytest

import modelq

HEAVY = ["torch", "transformers", "datasets", "matplotlib", "huggingface_hub", "pandas", "pyarrow", "gguf", "tokenizers", "tqdm", "yaml"]
EXTENSION_LIMIT = 5 << 20   # bytes


@pytest.mark.measures
def test_import_is_fast(run_python):
    code = "import time; start = time.perf_counter(); import modelq; print(time.perf_counter() - start)"
    best = min(float(run_python(code)) for _ in range(7))
    assert best < 0.2


def test_import_pulls_in_nothing_heavy(run_python):
    modules = ["modelq", "modelq.quantization", "modelq.export", "modelq.utils.dataset_utils", "modelq.cli"]
    code = f"import {', '.join(modules)}, sys; print(*sorted(set(sys.modules) & {set(HEAVY)!r}))"
    assert run_python(code) == ""


def test_nothing_heavy_is_needed(run_python):
    """Not only not imported: modelq works where it cannot be."""
    code = "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'datasets', 'matplotlib']))\n" \
           "import modelq, modelq.quantization, modelq.export, modelq.utils.dataset_utils, modelq.cli\nprint('fine')"
    assert run_python(code) == "fine"


@pytest.mark.measures
def test_the_extension_is_small():
    file, = Path(modelq.__file__).parent.glob("_core*.so")
    assert file.stat().st_size < EXTENSION_LIMIT


def test_version_is_one(run_python):
    import modelq._core as core
    assert modelq.__version__ == core.__version__
    assert sys.modules["modelq"].__version__
