"""`modelq quantize --dry-run`, and the options that change a config."""
import json

import pytest

import modelq
from modelq import choices, cli

QUICK = ["--samples", 4, "--seq-len", 64, "--batch-size", 2, "--compute", "float32"]


def call(capsys, *arguments):
    code = cli.main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def calibration(tmp_path):
    path = tmp_path / "calib.txt"
    path.write_text("".join(chr(32 + (7 * i * i + 3 * i) % 90) for i in range(4000)))
    return path


@pytest.mark.parametrize("options, bits, cache", [
    (["--format", "nvfp4"], 4.5, None), (["--format", "fp8", "--kv-cache", "fp8"], 8, "FP8"),
    (["--format", "int4_awq", "--block-size", 64], 4 + 32 / 64 + 16 / 128, None), (["--format", "int4_gptq", "--dialect", "gptq", "--block-size", 32], None, None),
    (["--format", "int8_sq", "--engine", "vllm"], None, None)])
def test_a_dry_run_says_what_the_run_does(capsys, tiny_checkpoint, calibration, tmp_path, options, bits, cache):
    """The size it promises is that of the export's tensors, to the byte; and it writes nothing."""
    arguments = ["quantize", tiny_checkpoint, "--calib", calibration, *options, *QUICK, "--json"]
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call(capsys, *arguments, "--dry-run")
    assert (code, err) == (0, "") and sorted(tmp_path.rglob("*")) == before
    said = json.loads(out)
    code, out, err = call(capsys, *arguments, "--out", tmp_path / "out")
    assert code == 0, err
    done = json.loads(out)
    file = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert said["bytes_after"] == len(file) - 8 - int.from_bytes(file[:8], "little")
    assert said["dialect"] == done["dialect"] and said["samples"] == done["samples"] == 4 and said["kv_cache_format"] == cache
    assert said["bytes_before"] == done["bytes_before"] and all(0 < seconds < 60 for seconds in said["estimated_seconds"].values())
    layers = {row["pattern"]: row for row in said["layers"]}
    down = layers["model.layers.*.mlp.down_proj"]
    assert (down["count"], down["shape"], down["reason"]) == (2, [128, 256], None) and down["format"]
    if bits:
        assert down["bits_per_weight"] == pytest.approx(bits, abs=0.02)
    assert layers["lm_head"]["format"] is None and "'*lm_head*'" in layers["lm_head"]["reason"]
    assert sum(row["bytes"] for row in said["layers"]) <= said["bytes_after"]      # the cache's scales are no layer's


def test_a_dry_run_for_people(capsys, tiny_checkpoint, calibration):
    code, out, err = call(capsys, "quantize", tiny_checkpoint, "--calib", calibration, "--kv-cache", "fp8", "--dry-run", *QUICK)
    assert code == 0, err
    assert "self_attn.q_proj" in out and "in the modelopt dialect" in out and "keys and values in FP8" in out and "nothing was written" in out


def test_a_dry_run_refuses_what_the_run_refuses(capsys, tiny_checkpoint, calibration):
    code, out, err = call(capsys, "quantize", tiny_checkpoint, "--calib", calibration, "--format", "w4a8_awq", "--engine", "vllm", "--dry-run",
                          "--block-size", 64, *QUICK)
    assert (code, out, err.count("\n")) == (2, "", 1) and "vllm" in err


def test_an_export_with_a_cache(capsys, tiny_checkpoint, calibration, tmp_path):
    code, out, err = call(capsys, "quantize", tiny_checkpoint, "--calib", calibration, "--kv-cache", "fp8", "--out", tmp_path / "out", *QUICK)
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert any(name.endswith("k_bmm_quantizer") and one.enabled for name, one in modelq.load(tmp_path / "out").quantizers.items())


def test_another_algorithm():
    args = cli.make_parser().parse_args(["quantize", "x", "--format", "int4_wo", "--algorithm", "rotate+gptq", "--kv-cache", "nvfp4"])
    config = choices.chosen_config(args)
    assert config["algorithm"] == ["rotate", "gptq"] and config["quant_cfg"][-1]["quantizer_name"] == "*[kv]_bmm_quantizer"
    assert choices.preset("int4_wo")["algorithm"] == "max" and choices.preset("int4_wo")["quant_cfg"][-1] != config["quant_cfg"][-1]
    with pytest.raises(ValueError, match="'magic' is unknown; known are max, "):
        choices.algorithm("rotate+magic")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_cache_beside_the_older_spelling():
    config = choices.with_kv_cache({"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 0}, "default": {"enable": False}}}, "fp8")
    assert [rule["quantizer_name"] for rule in config["quant_cfg"]] == ["*weight_quantizer", "*", "*[kv]_bmm_quantizer"]
    assert config["algorithm"] == "max"


def test_eval_of_a_data_set(capsys, tiny_checkpoint, tmp_path):
    """As many documents as fill the windows, and the same as their text."""
    lines = [f"Document {i}: " + "the quick brown fox jumps over the lazy dog. " * 3 for i in range(100)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (tmp_path / "data.txt").write_text("\n\n".join(lines))
    same = ["--window", 64, "--compute", "float32", "--json", "--max-windows"]
    for most in (3, 1000):      # of fewer than there are tokens, and of more
        found = [json.loads(call(capsys, "eval", tiny_checkpoint, option, tmp_path / name, *same, most)[1])
                 for option, name in (("--dataset", "data.jsonl"), ("--text", "data.txt"))]
        assert found[0]["perplexity"] == found[1]["perplexity"] and found[0]["windows"] == found[1]["windows"] == min(most, found[1]["windows"])
    code, _, err = call(capsys, "eval", tiny_checkpoint, "--dataset", "no_such_set", *same, 2)
    assert code == 2 and "no_such_set" in err
