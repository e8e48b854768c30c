"""The command line: what it prints, its exit codes, and that a mistake is one line."""
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import modelq
from modelq import cli, tables


def run(*arguments, **environment):
    """(exit code, stdout, stderr) of a process of its own."""
    where = str(Path(modelq.__file__).parents[1])
    done = subprocess.run([sys.executable, "-m", "modelq", *map(str, arguments)], capture_output=True, text=True, cwd=Path(__file__).parent,
                          env={**os.environ, "PYTHONPATH": f"{where}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", **environment})
    return done.returncode, done.stdout, done.stderr


def call(capsys, *arguments):
    """The same in this process: quicker."""
    code = cli.main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return code, out, err


def assert_one_line(err, *words):
    assert err.endswith("\n") and err.count("\n") == 1, err
    assert err.startswith("modelq")
    for word in words:
        assert word in err


def test_version():
    assert run("--version") == (0, f"modelq {modelq.__version__}\n", "")


@pytest.mark.parametrize("arguments, words", [
    ([], ["COMMAND"]),
    (["bogus"], ["bogus", "quantize", "inspect"]),
    (["quantize", "somewhere"], ["--out"]),
    (["quantize", "x", "--out", "y", "--samples", "0"], ["--samples", "1 or more"]),
    (["quantize", "x", "--out", "y", "--samples", "many"], ["--samples", "many"]),
    (["quantize", "x", "--out", "y", "--format", "fp3"], ["fp3", "nvfp4, fp8", "NVFP4_DEFAULT_CFG"]),
    (["quantize", "x", "--out", "y", "--format", "fp8", "--config", "z"], ["not both"]),
    (["quantize", "x", "--out", "y", "--config", "/nowhere.yaml"], ["/nowhere.yaml"]),
    (["quantize", "/nowhere", "--out", "/tmp/never-made"], ["/nowhere"]),
    (["eval", "/nowhere"], ["/nowhere"]),
    (["eval", "x", "--text", "/nowhere.txt"], ["/nowhere.txt", "python_docs"]),
    (["eval", "x", "--compute", "int3"], ["--compute", "bfloat16"]),
    (["inspect", "/nowhere"], ["/nowhere"]),
])
def test_bad_use_is_one_line_and_code_2(capsys, arguments, words):
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert_one_line(err, *words)


def test_bad_use_in_a_process_of_its_own():
    code, out, err = run("inspect", "/nowhere")
    assert (code, out) == (2, "")
    assert_one_line(err, "/nowhere")


def test_debug_shows_the_traceback():
    code, _, err = run("inspect", "/nowhere", MODELQ_DEBUG="1")
    assert code == 1 and "Traceback" in err and "FileNotFoundError" in err


def test_a_bug_is_told_from_bad_input(capsys, monkeypatch):
    monkeypatch.setattr("modelq.commands.formats", lambda args: {}["x"].y)
    monkeypatch.setattr("modelq.commands.inspect", lambda args: None.y)
    code, _, err = call(capsys, "inspect", "x")
    assert code == 1
    assert_one_line(err, "AttributeError", "MODELQ_DEBUG=1")


def test_interrupted(capsys, monkeypatch):
    def stop(args):
        raise KeyboardInterrupt
    monkeypatch.setattr("modelq.commands.formats", stop)
    assert call(capsys, "formats") == (130, "", "modelq: interrupted\n")


def test_warnings_are_one_line(capsys, monkeypatch):
    import warnings

    def warn(args):
        warnings.warn("first\n  second", stacklevel=1)
        from modelq.commands import Report
        return Report({}, ["fine"])
    monkeypatch.setattr("modelq.commands.formats", warn)
    assert call(capsys, "formats") == (0, "fine\n", "modelq: warning: first second\n")


def test_a_reader_that_has_enough():
    where = str(Path(modelq.__file__).parents[1])
    script = f"{sys.executable} -m modelq formats | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": where},
                          cwd=Path(__file__).parent)
    assert done.stderr == "" and done.stdout.strip() in ("0", "141")


def test_formats(capsys):
    import modelq._core as core

    code, out, err = call(capsys, "formats")
    assert (code, err) == (0, "")
    for name in [*core.formats(), *core.schemes()]:
        assert re.search(rf"^{name} ", out, flags=re.M)
    assert re.search(r"^nvfp4 +fp4_e2m1 +1x16 +fp8_e4m3 +4\.5 ", out, flags=re.M)
    data = json.loads(call(capsys, "formats", "--json")[1])
    assert set(data["formats"]) == set(core.formats()) and data["schemes"]["nvfp4"]["block"] == [1, 16]


def test_inspect_an_unquantized_folder(capsys, golden):
    source = golden["llama"].source
    code, out, err = call(capsys, "inspect", source)
    assert (code, err) == (0, "")
    assert re.search(r"^model.layers.1.mlp.down_proj.weight +128x256 +bfloat16 +16$", out, flags=re.M)
    data = json.loads(call(capsys, "inspect", source, "--json")[1])
    assert data["bits_per_weight"] == 16 and data["architecture"] == "llama"
    header = 8 + int.from_bytes((source / "model.safetensors").read_bytes()[:8], "little")
    assert data["bytes"] == (source / "model.safetensors").stat().st_size - header


def test_tables():
    text = tables.table(["name", "n"], [["a", 1], ["long name", 12.5], ["none", None]])
    assert text == "name          n\n---------  ----\na             1\nlong name  12.5\nnone"


@pytest.mark.parametrize("environment, terminal, expected", [({}, True, True), ({}, False, False), ({"NO_COLOR": "1"}, True, False),
                                                             ({"NO_COLOR": ""}, True, True), ({"TERM": "dumb"}, True, False)])
def test_color(monkeypatch, environment, terminal, expected):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    assert tables.wants_color(stream) is expected
