"""Searching algorithms on the command line: formats by short names, a block size, a folder for progress."""
import json

import pytest

from modelq import streaming
from modelq.cli import main

INTERRUPTED = 130


@pytest.fixture
def arguments(tiny_checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy.\n" * 40)
    return ["quantize", str(tiny_checkpoint), "--calib", str(text), "--samples", "4", "--seq-len", "64", "--batch-size", "2"]


@pytest.mark.parametrize("name, said", [("int4_awq", "W4A16_AWQ"), ("int4_gptq", "W4A16_AWQ")])
def test_formats_and_block_sizes(arguments, name, said, tmp_path, capsys):
    assert main([*arguments, "--format", name, "--block-size", "32", "--out", str(tmp_path / "out")]) == 0, capsys.readouterr()
    config = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert (config["quant_algo"], config["group_size"]) == (said, 32)


def test_the_same_command_goes_on(arguments, tmp_path, monkeypatch, capsys):
    run_layer, seen = streaming.run_layer, []

    def stops(model, run, layer, *how, **more):
        if layer == 1:
            raise KeyboardInterrupt
        return run_layer(model, run, layer, *how, **more)

    def counts(model, run, layer, *how, **more):
        seen.append(layer)
        return run_layer(model, run, layer, *how, **more)
    arguments += ["--format", "int4_awq", "--block-size", "32"]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0, capsys.readouterr()
    resumed = [*arguments, "--out", str(tmp_path / "out"), "--checkpoint-dir", str(tmp_path / "progress")]
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "run_layer", stops)
        assert main(resumed) == INTERRUPTED
    assert not (tmp_path / "out").exists() and (tmp_path / "progress" / "manifest.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "run_layer", counts)
        assert main(resumed) == 0, capsys.readouterr()
    assert seen == [1]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_the_folder_of_another_command_is_named(arguments, tmp_path, capsys):
    arguments += ["--out", str(tmp_path / "out"), "--overwrite", "--checkpoint-dir", str(tmp_path / "progress")]
    assert main([*arguments, "--format", "int4_awq"]) == 0, capsys.readouterr()
    capsys.readouterr()
    assert main([*arguments, "--format", "fp8"]) == 2
    err = capsys.readouterr().err
    assert str(tmp_path / "progress") in err and "progress of another calibration" in err and err.count("\n") == 1
