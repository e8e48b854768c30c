"""`modelq autoquantize` on a micro model: budgets, tables, pictures, exports, bad use."""
import json
import shutil

import pytest

import modelq
from byte_tokenizer import byte_tokenizer
from modelq.cli import main
from modelq.search_commands import budgets


def run(capsys, *arguments):
    code = main(["autoquantize", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def folder(golden, tmp_path):
    """The micro llama with a tokenizer, and a text."""
    made = tmp_path / "model"
    shutil.copytree(golden["llama"].source, made)
    byte_tokenizer().save(str(made / "tokenizer.json"))
    (made / "text.txt").write_text("\n\n".join(f"Sample {i}: the quick brown fox jumps over the lazy dog." for i in range(99)))
    return made


def options(folder):
    return [folder, "--calib", folder / "text.txt", "--text", folder / "text.txt", "--samples", 4, "--score-samples", 4, "--batch-size", 2, "--seq-len", 32,
            "--window", 32, "--max-windows", 2]


def test_several_budgets(folder, capsys, tmp_path):
    """Each within its budget, scores never worse with more of it; uniform formats beside them; scores are found once."""
    code, said, _ = run(capsys, *options(folder), "--effective-bits", "4.5..8:1.75", "--checkpoint-dir", tmp_path / "kept", "--json")
    found = json.loads(said)
    assert code == 0 and [one["budget"] for one in found["budgets"]] == [4.5, 6.25, 8]
    scores = [one["score"] for one in found["budgets"]]
    assert all(one["effective_bits"] <= one["budget"] for one in found["budgets"]) and scores == sorted(scores, reverse=True) and scores[0] > scores[-1]
    assert found["budgets"][0]["perplexity"] == pytest.approx(found["uniform"][0]["perplexity"], rel=1e-6)      # all NVFP4, but for lm_head
    assert [(one["format"], one["effective_bits"]) for one in found["uniform"]] == [("nvfp4", 4.5), ("fp8", 8.0)] and found["perplexity_before"] > 1
    code, said, _ = run(capsys, *options(folder), "--effective-bits", "6.25", "--checkpoint-dir", tmp_path / "kept", "--no-uniform",
                        "--formats", "NVFP4_DEFAULT_CFG, FP8")
    assert code == 0 and "uniform" not in said and "6.25" in said and "unquantized" in said


def test_export_and_pictures(folder, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    code, said, error = run(capsys, *options(folder), "--effective-bits", "6", "--out", tmp_path / "out", "--plot", tmp_path / "bits.svg",
                            "--plot-layers", tmp_path / "layers.svg", "--method", "kl_div")
    assert code == 0, error
    assert json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]["quant_algo"] == "MIXED_PRECISION"
    assert modelq.load(tmp_path / "out").quantized and f"{tmp_path / 'out'}: the model" in said
    for name in ("bits.svg", "layers.svg"):
        assert (tmp_path / name).read_text().startswith("<?xml")


@pytest.mark.parametrize("text, expected", [("6", [6]), ("4.5,8", [4.5, 8]), ("4.5..6", [4.5, 5, 5.5, 6]), ("5..6:0.25", [5, 5.25, 5.5, 5.75, 6])])
def test_budgets(text, expected):
    assert budgets(text) == expected


def test_bad_use(folder, capsys, tmp_path):
    for arguments, words in ((["--effective-bits", "x"], "--effective-bits x: expected a number"), (["--effective-bits", "8..4"], "an empty range"),
                             (["--effective-bits", "5,6", "--out", tmp_path / "out"], "--out exports one model"),
                             (["--effective-bits", "3"], "cannot be met"), (["--effective-bits", "6", "--formats", "fp9"], "fp9: unknown"),
                             (["--effective-bits", "6", "--disable", "*nothing*"], "fits no module")):
        code, said, error = run(capsys, *options(folder), "--no-eval", *arguments)
        assert code == 2 and not said and words in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_formats_are_named_as_one_likes(folder, capsys):
    """With spaces, in capitals, by the preset's name; each is measured by itself too."""
    code, said, error = run(capsys, *options(folder), "--effective-bits", "6", "--formats", "NVFP4, FP8_DEFAULT_CFG", "--json")
    assert code == 0, error
    assert [one["effective_bits"] for one in json.loads(said)["uniform"]] == [4.5, 8]
