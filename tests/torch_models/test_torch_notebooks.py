"""The notebooks where torch is: their part on a transformers model runs, too."""
import re

import pytest

from test_notebooks import NAMES, run, script


@pytest.mark.parametrize("name", NAMES)
def test_runs_from_top_to_bottom(smollm2, name, tmp_path):
    pytest.importorskip("gguf", reason="transformers reads the embedded model with it")
    book = run(name, tmp_path)
    assert script().mistakes(book, name) == []
    torch_cell, = (cell for cell in book.cells if script().name_of(cell) == "torch")
    said = script().printed(torch_cell)
    before, *_, after = (float(number) for number in re.findall(r"perplexity [^:]*: ([\d.]+)", said))
    assert 1 < before < after < 3 * before, said
