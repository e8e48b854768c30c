"""The command line: what it prints, its exit codes, and that a mistake is one line."""
import io
import json
import os
import re
import shutil
import signal
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
    (["quantize", "x", "--out", "y", "--format", "fp3"], ["fp3", "known are nvfp4, ", "NVFP4_DEFAULT_CFG"]),
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


def test_families(capsys):
    import modelq._core as core

    code, out, err = call(capsys, "families")
    data = json.loads(call(capsys, "families", "--json")[1])
    assert (code, err) == (0, "") and [row["family"] for row in data["families"]] == [row["family"] for row in core.archs()]
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for row in core.archs():
        assert re.search(rf"^{row['family']} .*{row['architectures'][0]}.*{row['oracle']}", out, flags=re.M)
        assert row["models"].split(",")[0] in readme, "README's list of families"
    from modelq.verify.expert_rules import _LOADED_BY
    assert set(_LOADED_BY) < {row["family"] for row in core.archs()} and all("vLLM" in row["loaded_by"] for row in data["families"])


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


# With a model ----------------------------------------------------------------------------------------------------------------

@pytest.fixture
def calibration(tmp_path):
    path = tmp_path / "calib.txt"
    path.write_text("".join(chr(32 + (7 * i * i + 3 * i) % 90) for i in range(4000)))
    return path


QUICK = ["--samples", 4, "--seq-len", 64, "--batch-size", 2, "--compute", "float32"]


@pytest.fixture(scope="module")
def quantized(tiny_checkpoint, tmp_path_factory):
    """An export of the tiny model, made on the command line, and what that printed as JSON."""
    out = tmp_path_factory.mktemp("quantized") / "nvfp4"
    code, text, err = run("quantize", tiny_checkpoint, "--out", out, "--json", *QUICK)
    assert (code, err) == (0, "")   # quiet when piped
    return out, json.loads(text)


def test_quantize_reports_what_it_did(quantized, tiny_checkpoint):
    out, report = quantized
    assert [step["name"] for step in report["steps"]] == ["load", "calibrate", "export"]
    assert all(step["seconds"] >= 0 and step["peak_bytes"] > 1 << 20 for step in report["steps"])
    assert report["bytes_before"] == (tiny_checkpoint / "model.safetensors").stat().st_size
    assert report["bytes_after"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert report["samples"] == 4 and report["format"] == "nvfp4" and report["quantizers"] > 0
    assert (out / "tokenizer.json").read_bytes() == (tiny_checkpoint / "tokenizer.json").read_bytes()


def test_inspect_a_quantized_folder(capsys, quantized):
    out, _ = quantized
    data = json.loads(call(capsys, "inspect", out, "--json")[1])
    rows = {row["name"]: row for row in data["tensors"]}
    down = rows["model.layers.0.mlp.down_proj.weight"]
    assert down["format"] == "NVFP4" and down["shape"] == [128, 256] and set(down["scales"]) == {
        "weight_scale", "weight_scale_2", "input_scale"}
    assert down["bytes"] == 128 * 256 // 2 + 128 * 256 // 16 + 4 + 4
    assert rows["lm_head.weight"]["format"] == "bfloat16"
    text = call(capsys, "inspect", out)[1]
    assert re.search(r"down_proj.weight +128x256 +NVFP4 +weight_scale float8_e4m3fn\[128, 16\], weight_scale_2=\d\S*, "
                     r"input_scale=\d\S* +4.5$", text, flags=re.M)


def test_formats_of_every_preset_name(capsys, tiny_checkpoint, calibration, tmp_path):
    for number, name in enumerate(["fp8", "FP8", "FP8_DEFAULT_CFG"]):
        code, out, err = call(capsys, "quantize", tiny_checkpoint, "--format", name, "--calib", calibration, "--out",
                              tmp_path / str(number), *QUICK)
        assert code == 0, err
    files = {(tmp_path / str(number) / "model.safetensors").read_bytes() for number in range(3)}
    assert len(files) == 1


@pytest.mark.parametrize("suffix, dump", [("yaml", None), ("json", json.dumps)])
def test_a_config_file(capsys, tiny_checkpoint, calibration, tmp_path, suffix, dump):
    import yaml
    config = {"quant_cfg": {"*weight_quantizer": {"num_bits": [2, 1], "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": [4, 3]},
                                                  "enable": True},
                            "*input_quantizer": {"num_bits": [2, 1], "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": [4, 3]},
                                                 "enable": True}, "*lm_head*": {"enable": False}, "*embed*": {"enable": False},
                            "*output_quantizer": {"enable": False}, "*[kvq]_bmm_quantizer": {"enable": False}}, "algorithm": "max"}
    path = tmp_path / f"config.{suffix}"
    path.write_text(dump(config) if dump else yaml.safe_dump(config, sort_keys=False))   # the order of rules counts
    code, out, err = call(capsys, "quantize", tiny_checkpoint, "--config", path, "--calib", calibration, "--out", tmp_path / "out", *QUICK)
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]["quant_algo"] == "NVFP4"


def test_an_output_folder_that_is_there(capsys, tiny_checkpoint, calibration, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    arguments = ["quantize", tiny_checkpoint, "--calib", calibration, "--out", out, *QUICK]
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert_one_line(err, str(out), "--overwrite")
    assert (out / "mine.txt").read_text() == "keep me"
    code, _, err = call(capsys, *arguments, "--overwrite")
    assert code == 2
    assert_one_line(err, str(out), "does not look like a checkpoint")
    (out / "config.json").write_text("{}")
    code, _, err = call(capsys, *arguments, "--overwrite")
    assert code == 0, err
    assert (out / "hf_quant_config.json").exists() and not (out / "mine.txt").exists()
    assert call(capsys, "quantize", tiny_checkpoint, "--out", out / "config.json", "--overwrite", *QUICK)[0] == 2


def test_a_refused_output_costs_no_work(capsys, monkeypatch, tmp_path):
    (tmp_path / "there").write_text("")
    monkeypatch.setattr(modelq, "load", lambda *args, **options: pytest.fail("loaded for nothing"), raising=False)
    assert call(capsys, "quantize", "x", "--out", tmp_path)[0] == 2


def test_eval_is_the_perplexity_of_the_windows(capsys, tiny_checkpoint, calibration):
    import numpy as np

    arguments = ["eval", tiny_checkpoint, "--text", calibration, "--window", 100, "--max-windows", 3, "--compute", "float32"]
    code, out, err = call(capsys, *arguments, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert (report["windows"], report["window"], report["predicted_tokens"]) == (3, 100, 297)
    model = modelq.load(tiny_checkpoint, compute="float32")
    ids = np.array(model.tokenizer.encode(calibration.read_text(), add_special_tokens=False))[:300].reshape(3, 100)
    logits = model(ids).logits.astype(np.float64)[:, :-1]
    chance = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
    expected = np.exp(-np.take_along_axis(chance, ids[:, 1:, None], -1).mean())
    assert report["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert f"perplexity {report['perplexity']:.4f}" in call(capsys, *arguments)[1]


def test_eval_of_an_export(capsys, quantized, calibration):
    code, out, err = call(capsys, "eval", quantized[0], "--text", calibration, "--json")
    assert code == 0, err
    assert 1 < json.loads(out)["perplexity"] < 1e6


def damaged(folder, target, **changes):
    """A copy of a checkpoint with some of config.json changed."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def test_bad_input_is_one_line(capsys, tiny_checkpoint, calibration, tmp_path):
    def refused(source, *words, calib=calibration, more=()):
        code, out, err = call(capsys, "quantize", source, "--calib", calib, "--out", tmp_path / "never", *QUICK, *more)
        assert (code, out) == (2, "")
        assert_one_line(err, *words)
        assert not (tmp_path / "never").exists()

    cut = damaged(tiny_checkpoint, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-1000])
    refused(cut, "cut short", str(cut / "model.safetensors"))
    refused(damaged(tiny_checkpoint, tmp_path / "strange", model_type="strange", architectures=["Strange"]), "strange")
    missing = damaged(tiny_checkpoint, tmp_path / "missing")
    (missing / "model.safetensors").unlink()
    refused(missing, "model.safetensors")
    (tmp_path / "empty.txt").write_text("")
    refused(tiny_checkpoint, "no calibration data", calib=tmp_path / "empty.txt")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    refused(tiny_checkpoint, "bad.jsonl, line 2", calib=tmp_path / "bad.jsonl")
    (tmp_path / "bad.yaml").write_text("quant_cfg: [")
    refused(tiny_checkpoint, "bad.yaml", more=["--config", tmp_path / "bad.yaml"])
    (tmp_path / "nothing.yaml").write_text("quant_cfg: {'*': {enable: false}}\nalgorithm: max")
    refused(tiny_checkpoint, "quantizes nothing", more=["--config", tmp_path / "nothing.yaml"])


def test_not_a_number_in_the_weights_is_named(capsys, tiny_checkpoint, calibration, tmp_path):
    folder = damaged(tiny_checkpoint, tmp_path / "nan")
    data = bytearray((folder / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    begin = json.loads(data[8:header])["model.layers.1.mlp.up_proj.weight"]["data_offsets"][0]
    data[header + begin:header + begin + 2] = b"\xc0\x7f"
    (folder / "model.safetensors").write_bytes(data)
    code, _, err = call(capsys, "quantize", folder, "--calib", calibration, "--out", tmp_path / "never", *QUICK)
    assert code == 2
    assert_one_line(err, "model.layers.1.mlp.up_proj.weight", "NaN")
    assert not (tmp_path / "never").exists()


@pytest.mark.slow
def test_control_c_in_the_middle(smollm2, tmp_path):
    where = str(Path(modelq.__file__).parents[1])
    process = subprocess.Popen([sys.executable, "-m", "modelq", "quantize", str(smollm2), "--out", str(tmp_path / "out")], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": where})
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(4)   # the whole takes longer on any machine
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "modelq: interrupted\n")
    assert list(tmp_path.iterdir()) == []
