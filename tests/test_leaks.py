"""Runs tests/isolated/leak_*.py, each in an interpreter of its own: many rounds, and nothing left behind."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

import modelq

SCRIPTS = sorted((Path(__file__).parent / "isolated").glob("leak_*.py"))


@pytest.mark.leaks
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script(script):
    where = str(Path(modelq.__file__).parents[1])
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=script.parent,
                          env={**os.environ, "PYTHONPATH": f"{where}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "no leak\n"


@pytest.mark.leaks
@pytest.mark.parametrize("one_round", ["kept.append(object())", "kept.append(core.Quantizer())"])
def test_the_harness_sees_a_leak(run_python, one_round):
    code = f"import sys; sys.path.insert(0, 'isolated'); import modelq._core as core; from harness import check; kept = []\n" \
           f"def one_round(): {one_round}\ntry: check(one_round)\nexcept AssertionError as error: print('left after' in str(error) or error)"
    assert run_python(code) == "True"
