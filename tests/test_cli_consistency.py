"""All commands are of one kind: what their help says, how options are called, what they print, how a shell completes them."""
import argparse
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import modelq
from modelq import choices, cli, completion, parsers

ROOT = Path(__file__).resolve().parents[1]
PARSERS = parsers.parsers()
COMMANDS = {command.name: command for command in parsers.COMMANDS}


def actions(name):
    return [action for action in PARSERS[name]._actions if action.dest != "help"]


# ---- parsers ----

@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, capsys):
    """Each option and example is in what --help prints."""
    assert cli.main([name, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "examples:" in text and COMMANDS[name].help.lower() in text.lower()
    for action in actions(name):
        assert action.help and not action.help.endswith("."), f"{action.dest}: a line of help, without a full stop"
        assert all(flag in text for flag in action.option_strings)
        if action.option_strings:
            assert len(action.option_strings) == 1 and re.fullmatch(r"--[a-z]+(-[a-z]+)*", action.option_strings[0])
    for example in COMMANDS[name].examples:
        assert f"modelq {example}" in text


@pytest.mark.parametrize("name, example", [(name, example) for name, command in COMMANDS.items() for example in command.examples])
def test_examples_are_understood(name, example):
    args = parsers.make_parser().parse_args(shlex.split(example.partition(">")[0]))
    assert args.command == name
    if "format" in vars(args) and args.format:
        choices.preset(args.format)
    for one in (getattr(args, "formats", None) or "nvfp4").split(","):
        choices.preset(one)


def test_one_name_for_one_thing():
    """An option that several commands have takes the same kind of value in all of them, and the same default but for a few."""
    seen = {}
    for name in COMMANDS:
        for action in actions(name):
            for flag in action.option_strings:
                seen.setdefault(flag, {})[name] = action
    for flag, found in seen.items():
        kinds = {(type(action).__name__, action.type, action.nargs, None if action.choices is None else tuple(action.choices))
                 for action in found.values()}
        assert len(kinds) == 1, f"{flag} is not the same in {', '.join(found)}"
        if flag not in ("--out", "--formats", "--max-windows", "--prompt"):
            assert len({str(action.default) for action in found.values()}) == 1, f"{flag} has several defaults"
    destinations = {name: [action.dest for action in actions(name)] for name in COMMANDS}
    for name, found in destinations.items():
        assert ("json" in found) == (name != "completion"), name
        assert ("compute" in found) == ("threads" in found), name
        assert ("overwrite" in found) >= ("out" in found), name


def test_tables_say_what_the_program_says():
    from modelq.checkpoint.dialects import WRITTEN
    from modelq.verify import ENGINES

    assert set(parsers.DIALECTS) == set(WRITTEN) and set(parsers.ENGINES) == set(ENGINES) and set(parsers.KV_CACHES) == set(choices.KV_CACHES)
    for command in parsers.COMMANDS:
        module, _, function = command.function.partition(".")
        assert callable(getattr(importlib.import_module(f"modelq.{module}"), function))


def test_the_page_is_fresh():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "cli_page.py"], capture_output=True, text=True, cwd=ROOT / "scripts",
                          env={"PYTHONPATH": str(Path(modelq.__file__).parents[1])})
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "docs" / "cli.md").read_text(), "python scripts/cli_page.py > docs/cli.md"
    for name in COMMANDS:
        for action in actions(name):
            assert all(f"`{flag}" in done.stdout for flag in action.option_strings)


def test_parsers_import_nothing_heavy(run_python):
    code = "import sys, modelq.parsers; modelq.parsers.make_parser(); print(sorted({'numpy', 'yaml', 'matplotlib'} & set(sys.modules)))"
    assert run_python(code) in ("[]", "['numpy']")      # numpy comes with modelq itself


# ---- presets ----

def test_every_preset_by_every_name():
    from modelq import presets

    for name in presets.choices - set(choices.KV_CACHES.values()):
        assert choices.preset(name) == getattr(presets, name) == choices.preset(name.lower())
        assert choices.preset(name.removesuffix("_CFG").removesuffix("_CONFIG")) == getattr(presets, name)
    for short, name in choices.PRESETS.items():
        assert choices.preset(f" {short.upper()} ") == getattr(presets, name)
    with pytest.raises(ValueError, match="--kv-cache nvfp4_rotate"):
        choices.preset("NVFP4_KV_ROTATE_CFG")


def test_the_presets_table(capsys):
    assert cli.main(["formats", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["presets"]}
    assert rows["nvfp4"] == {"name": "nvfp4", "preset": "NVFP4_DEFAULT_CFG", "weights": "nvfp4", "inputs": "nvfp4", "algorithm": "max",
                             "bits_per_weight": 4.5, "engines": ["vllm", "sglang", "tensorrt-llm", "transformers"]}
    assert rows["w4a8_awq"]["engines"] == ["tensorrt-llm"] and rows["nvfp4_svdquant"]["engines"] == []     # spec/loaders.md, section 1
    assert rows["int8_sq"]["engines"] == ["vllm", "sglang", "transformers"] and rows["int4_awq"]["inputs"] is None


# ---- what is printed ----

def test_json_is_json(capsys, monkeypatch):
    """Numbers that JSON lacks are null, and every object says which command made it."""
    from modelq.commands import Report

    found = {"nan": float("nan"), "list": [float("inf"), 1.5, {"path": Path("x")}], 3: True}
    monkeypatch.setattr("modelq.commands.formats", lambda args: Report(found))
    assert cli.main(["formats", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out, parse_constant=pytest.fail) == {
        "command": "formats", "modelq_version": modelq.__version__, "nan": None, "list": [None, 1.5, {"path": "x"}], "3": True}


NEEDED = {"--effective-bits": "6", "--prompt": "Hi", "--out": "/nowhere/out", "--engine": "vllm", "--formats": "fp8", "--dialect": "modelopt"}


def with_source(name, source, *more):
    """A command line with this in every place, and what the command cannot do without."""
    places = [source for action in actions(name) if not action.option_strings and action.nargs != "*"]
    needed = [word for flag, value in NEEDED.items() if any(flag in action.option_strings for action in actions(name))
              and (flag not in ("--out", "--formats") or name in ("quantize", "convert", "bench")) for word in (flag, value)]
    return [name, *map(str, places), *map(str, needed), *map(str, more)]


@pytest.mark.parametrize("name", [name for name in COMMANDS if any(
    not action.option_strings and action.choices is None for action in actions(name))])
def test_a_source_that_is_not_there(name, capsys, tmp_path, monkeypatch):
    """Exit code 2 and one line that names it; nothing is made, nothing is on stdout, with --json neither."""
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--json"]):
        assert cli.main([*with_source(name, "/nowhere/model"), *more]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and "/nowhere" in err, err
    assert list(tmp_path.iterdir()) == []


def test_every_object_has_the_same_frame(capsys, golden):
    """command and modelq_version first, then words in snake_case; tables for people are not in it."""
    source = golden["llama"].source
    export = golden["llama"].folder / "bfloat16" / "FP8_DEFAULT_CFG"
    for line in (["formats"], ["inspect", source], ["inspect", export], ["verify", export]):
        assert cli.main([*map(str, line), "--json"]) in (0, 1)
        out = capsys.readouterr().out
        data = json.loads(out, parse_constant=pytest.fail)
        assert list(data)[:2] == ["command", "modelq_version"] and data["command"] == line[0] and out.count("\n") == 1
        assert all(re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", key) for key in data), list(data)


# ---- completion ----

@pytest.fixture(scope="module")
def bash_completes(tmp_path_factory):
    """bash_completes("quantize", "--fo"): the words that bash offers for the last one."""
    folder = tmp_path_factory.mktemp("bash")
    args = argparse.Namespace(shell="bash")
    (folder / "modelq.bash").write_text(completion.completion(args).text(False))
    (folder / "a folder").mkdir()
    (folder / "file.txt").write_text("")

    def complete(*words):
        script = f"source modelq.bash; COMP_WORDS=(modelq {shlex.join(words)}); COMP_CWORD={len(words)}; _modelq; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, cwd=folder)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.split("\n")[:-1]
    return complete


def test_bash_completes_commands_and_options(bash_completes):
    assert bash_completes("") == list(COMMANDS)
    assert bash_completes("c") == [name for name in COMMANDS if name.startswith("c")]
    for name in COMMANDS:
        assert bash_completes(name, "--") == [flag for action in PARSERS[name]._actions for flag in action.option_strings[-1:]]
    assert bash_completes("quantize", "--fo") == ["--format"] and bash_completes("--ver") == ["--version"]
    assert bash_completes("quantize", "x", "--json", "--dia") == ["--dialect"]


def test_bash_completes_values(bash_completes):
    assert bash_completes("quantize", "--format", "int4") == [name for name in choices.PRESETS if name.startswith("int4")]
    assert bash_completes("verify", "x", "--engine", "") == list(parsers.ENGINES)
    assert bash_completes("bench", "x", "--formats", "fp8,mx") == ["fp8,mxfp8", "fp8,mxfp4"]
    assert bash_completes("quantize", "--kv-cache", "fp8") == ["fp8", "fp8_affine"]
    assert bash_completes("completion", "") == ["bash", "zsh", "fish"]
    assert bash_completes("quantize", "--samples", "") == [""]
    assert bash_completes("quantize", "x", "--out", "") == ["a folder"] and bash_completes("eval", "x", "--text", "f") == ["file.txt"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_theirs(shell, tmp_path):
    import shutil

    script = completion.completion(argparse.Namespace(shell=shell)).text(False)
    for name in COMMANDS:
        assert all(action.option_strings[-1].lstrip("-") in script for action in actions(name) if action.option_strings)
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell} to read it")
    (tmp_path / "script").write_text(script)
    done = subprocess.run([shell, "-n", tmp_path / "script"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    if shell == "fish":
        asked = subprocess.run([shell, "-N", "-c", f"source {tmp_path / 'script'}; complete -C 'modelq quantize --format int4_g'"],
                               capture_output=True, text=True, cwd=tmp_path)
        assert asked.stdout.split("\t")[0] == "int4_gptq", asked.stderr
