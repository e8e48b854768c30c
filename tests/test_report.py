"""`modelq report`: the facts against NumPy and `modelq verify`, the page through an HTML parser."""
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

import modelq
import modelq.quantization as mtq
from byte_tokenizer import byte_tokenizer
from modelq import cli
from modelq.export import export_hf_checkpoint
from modelq.report import gather, html_page
from modelq.report.weights import BINS, summed
from modelq.verify import dequantized_errors
from modelq.verify.errors import relative_error, scaled_error

EMPTY = {"meta", "link", "br", "hr", "img", "input", "path", "rect", "circle", "polyline", "polygon"}
OPTIONAL = {"dt", "dd", "p", "li"}


class Page(HTMLParser):
    """tags: how often each is there; text: all of it; problems: tags that do not close each other, and what reaches outside."""

    def __init__(self, html):
        super().__init__()
        self.open, self.problems, self.tags, self.texts, self.ids = [], [], {}, [], []
        self.feed(html)
        self.close()
        self.text = " ".join("".join(self.texts).split())
        if self.open:
            self.problems.append(f"open at the end: {self.open}")

    def handle_starttag(self, tag, attributes):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.problems += [f"{tag} {name}={value}" for name, value in attributes if name in ("src", "href", "xlink:href", "action", "onload")]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes another")

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "title", "desc"):
            self.texts.append(data)


def quantized(golden, name, config, tmp_path, algorithm=None, **options):
    """(the model, an export of it opened, tokens)"""
    model, ids = modelq.load(golden[name].source), golden[name].calib
    config = {**config, "algorithm": algorithm} if algorithm else config
    mtq.quantize(model, config, lambda model: model(ids))
    export_hf_checkpoint(model, tmp_path / "export", **options)
    return modelq.load(golden[name].source), modelq.load(tmp_path / "export"), ids.ravel()[:96]


def blocks_of(size):
    from modelq.choices import with_block_size

    return with_block_size(mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG, size)


# Every dialect, and formats with scales of every kind.
CASES = [
    ("llama", mtq.FP8_DEFAULT_CFG, {}), ("llama", mtq.NVFP4_DEFAULT_CFG, {"dialect": "compressed-tensors"}), ("qwen3", mtq.MXFP8_DEFAULT_CFG, {}),
    ("llama", mtq.INT8_DEFAULT_CFG, {"dialect": "compressed-tensors"}), ("llama", blocks_of(32), {"dialect": "gptq"}),
    ("llama", blocks_of(64), {"dialect": "autoawq"}), ("llama", mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG, {"dialect": "fp8"}),
    ("qwen3moe", mtq.NVFP4_DEFAULT_CFG, {}), ("qwen3moe", mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG, {"dialect": "compressed-tensors"}),
]


@pytest.mark.parametrize("name, config, options", CASES)
def test_every_dialect(golden, tmp_path, name, config, options):
    before, after, ids = quantized(golden, name, config, tmp_path, **options)
    facts = gather(before, after, ids, 32, "a <text>")
    wanted = dequantized_errors(tmp_path / "export", golden[name].source)
    assert {f"{one.module}.weight": one.error for one in facts.weights} == pytest.approx(wanted, rel=1e-4)
    assert len(wanted) == len(facts.weights) >= 14 and all(one.note == "" for one in facts.weights)
    for one in facts.weights:
        weight = np.abs(before.checkpoint.read(f"{one.module}.weight").astype(np.float64))
        low, middle, high = one.values.clips
        assert one.values.largest == weight.max() and sum(one.values.counts) == weight.size and 0 < low <= middle <= high
        # every format's largest block reaches the largest weight, or 7/8 of it; a power of two, or a scale shared with siblings, may be more
        assert 0.87 * weight.max() <= high <= 2 * weight.max()
        assert one.values.quantiles[0] == pytest.approx(np.median(weight), rel=0.02)
    assert facts.bytes_after < facts.bytes_before and facts.bits_per_weight == pytest.approx(
        8 * facts.bytes_after / (facts.bytes_before / 2))
    seen = {(one.layer, one.part) for one in facts.inputs}
    assert {(layer, "self_attn.q_proj") for layer in range(before.num_layers)} <= seen and all(sum(one.values.counts) for one in facts.inputs)
    page = Page(html_page(facts))
    assert page.problems == [] and "a <text>" in page.text and "http" not in page.text
    for one in facts.weights:
        assert one.algorithm in page.text and one.part.rpartition(".")[2] in page.text


def test_inputs_and_their_clip_points(golden, tmp_path):
    """Histograms of what reaches the quantizers, and the amax that they were calibrated to; all of it within that, on the same text."""
    model, ids = modelq.load(golden["llama"].source, compute="float32"), golden["llama"].calib
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda model: model(ids))
    export_hf_checkpoint(model, tmp_path / "export")
    before, after = modelq.load(golden["llama"].source, compute="float32"), modelq.load(tmp_path / "export", compute="float32")
    facts = gather(before, after, ids.ravel(), ids.shape[1], "the same")
    first = next(one for one in facts.inputs if (one.layer, one.part) == (0, "self_attn.q_proj"))
    amax = float(np.max(model.quantizers["model.layers.0.self_attn.q_proj.input_quantizer"].amax))
    assert first.values.clips == pytest.approx((amax,) * 3, rel=1e-6) and first.values.largest == pytest.approx(amax, rel=1e-5)
    assert sum(first.values.counts) == ids.size * 128 and first.scheme == "fp8"
    assert all(calibrator is None for calibrator in [facts.cache])
    again = gather(before, after, ids.ravel(), ids.shape[1], "the same")        # no calibrator was left behind
    assert vars(again.fidelity) == vars(facts.fidelity) and again.inputs == facts.inputs


@pytest.mark.parametrize("config, options, smoothed", [
    ("NVFP4_AWQ_LITE_CFG", {"engine": "vllm"}, "up to scales"), ("INT8_SMOOTHQUANT_CFG", {}, "pre_quant_scale"),
    ("NVFP4_SVDQUANT_DEFAULT_CFG", {}, "pre_quant_scale")])
def test_smoothed_weights_are_compared_as_what_they_stand_for(golden, tmp_path, config, options, smoothed):
    before, after, ids = quantized(golden, "llama", getattr(mtq, config), tmp_path, **options)
    facts = gather(before, after, ids, 32, "")
    notes = " ".join(one.note for one in facts.weights)
    assert smoothed in notes
    assert dequantized_errors(tmp_path / "export", golden["llama"].source) == pytest.approx(
        {f"{one.module}.weight": one.error for one in facts.weights}, rel=1e-6)
    assert all(one.error < (0.05 if "INT8" in config else 0.15) for one in facts.weights), {one.module: one.error for one in facts.weights}
    assert Page(html_page(facts)).problems == []


def test_rotated_weights_are_not_compared(golden, tmp_path):
    before, after, ids = quantized(golden, "llama", mtq.FP8_DEFAULT_CFG, tmp_path, algorithm=["rotate", "max"])
    facts = gather(before, after, ids, 32, "")
    assert None in dequantized_errors(tmp_path / "export", golden["llama"].source).values()
    assert any(one.error is None and "rotated" in one.note for one in facts.weights) and facts.fidelity.hidden[0] > 0.5
    page = Page(html_page(facts))
    assert page.problems == [] and "another basis" in page.text and "hidden states" not in re.sub("Hidden.*", "", page.text)


def test_scaled_errors():
    """The error that is left is that of the rounding, whatever the rows and columns were multiplied by."""
    rng = np.random.default_rng(1)
    was = rng.normal(size=(2000, 64)).astype(np.float32)
    rounded = was + 0.05 * rng.normal(size=was.shape).astype(np.float32)
    factors = rng.uniform(0.1, 9, (2000, 1)), rng.uniform(0.1, 9, (1, 64))
    assert relative_error(was, rounded) == pytest.approx(0.05, rel=0.02) and relative_error(was, was) == 0
    assert relative_error(was, rounded * factors[0] * factors[1]) > 1
    assert scaled_error(was, (rounded * factors[0] * factors[1]).astype(np.float32)) == pytest.approx(0.05, rel=0.1)
    assert scaled_error(was, rng.normal(size=was.shape).astype(np.float32)) > 1
    assert relative_error(was, (rounded / factors[1]).astype(np.float32), factors[1].astype(np.float32)[0]) == pytest.approx(0.05, rel=0.02)


def test_histograms_reach_as_far_as_clip_points():
    fine = np.zeros(480, np.int64)
    fine[:10], fine[479] = 5, 1
    found = summed(fine, top=2.0, largest=1.99, clips=(1.0, 3.0, 8.0))
    assert found.top == 8 and len(found.counts) == BINS and sum(found.counts) == 51 and found.counts[0] == 50 and found.counts[11] == 1


def test_models_that_cannot_be_run(tmp_path):
    """An architecture that is not known: weights are compared, and nothing is claimed of the rest."""
    from test_weights_only import QUANTIZED, strange, write

    source = write(tmp_path / "strange", strange())
    code = cli.main(["quantize", str(source), "--format", "nvfp4_wo", "--out", str(tmp_path / "export")])
    assert code == 0
    assert cli.main(["report", str(source), str(tmp_path / "export"), "--out", str(tmp_path / "page.html")]) == 0
    page = Page((tmp_path / "page.html").read_text())
    assert page.problems == [] and "it was not run" in page.text and "Perplexity" not in page.text and "attn" in page.text
    before, after = modelq.load(source), modelq.load(tmp_path / "export")
    facts = gather(before, after, None, 32, "")
    wanted = dequantized_errors(tmp_path / "export", source)
    assert {one.module for one in facts.weights} == QUANTIZED and facts.inputs == [] and facts.layers == [0, 1]
    assert {f"{one.module}.weight": one.error for one in facts.weights} == pytest.approx(wanted, rel=1e-4)
    assert {one.part for one in facts.weights} == {"attn.wq", "attn.wk", "attn.wv", "attn.wo", "moe.experts.*.w1", "moe.experts.*.w3"}
    with pytest.raises(ValueError, match="cannot be run"):
        gather(before, after, [1, 2, 3], 32, "")


def test_colors_can_be_read():
    """Contrast of text on every colour (4.5 is WCAG's AA), steps of ramps by lightness alone, and both themes."""
    from modelq.report.style import BLUES, BROWNS, CATEGORIES, CSS, contrast, luminance, text_on

    assert contrast("#ffffff", "#000000") == pytest.approx(21) and contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    for color in (*BLUES, *BROWNS, *CATEGORIES):
        assert contrast(color, text_on(color)) >= 4.5, color
    for ramp in (BLUES, BROWNS):
        assert all(luminance(one) > 1.12 * luminance(other) for one, other in zip(ramp, ramp[1:]))
    themes = re.findall(r"--paper:(#\w+);--ink:(#\w+);--soft:(#\w+)", CSS)
    assert len(themes) == 2
    for paper, *texts in themes:
        paper = paper if len(paper) == 7 else "#" + "".join(2 * letter for letter in paper[1:])
        assert all(contrast(paper, text) >= 4.5 for text in texts)


# ---- the command ----

@pytest.fixture(scope="module")
def folders(golden, tmp_path_factory):
    """A model with a tokenizer and a text, and an export of mixed formats with the search that chose them."""
    folder = tmp_path_factory.mktemp("report")
    shutil.copytree(golden["llama"].source, folder / "model", copy_function=shutil.copyfile)
    byte_tokenizer().save(str(folder / "model" / "tokenizer.json"))
    (folder / "text.txt").write_text("\n\n".join(f"Sample {i}: the quick brown fox jumps over the lazy dog." for i in range(99)))
    assert cli.main(list(map(str, ["autoquantize", folder / "model", "--effective-bits", 6, "--out", folder / "export", "--checkpoint-dir",
                                   folder / "scores", "--calib", folder / "text.txt", "--samples", 4, "--score-samples", 4, "--batch-size", 2,
                                   "--seq-len", 32, "--no-eval"]))) == 0
    return folder


def report(capsys, folder, *more):
    code = cli.main(list(map(str, ["report", folder / "model", folder / "export", "--text", folder / "text.txt", "--window", 32,
                                   "--max-windows", 3, *more])))
    return (code, *capsys.readouterr())


def test_the_page_of_a_search(folders, capsys, tmp_path):
    code, out, err = report(capsys, folders, "--out", tmp_path / "page.html", "--search", folders / "scores", "--json")
    assert (code, err) == (0, "")
    data = json.loads(out)
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.problems == [] and {path.name for path in tmp_path.iterdir()} == {"page.html"}
    for words in ("Perplexity", f"{data['perplexity_after']:.3f}", f"{data['top1_agreement']:.1%}", "Bits per weight", "Errors by layer", "AutoQuantize chose",
                  "Ranges of activations", "Histograms", "What stayed in high precision", "lm_head", "MIXED_PRECISION", modelq.__version__):
        assert words in page.text, words
    scores = json.loads((folders / "scores" / "search.json").read_text())["state"]["candidate_stats"]
    for stats in scores.values():
        if stats["scores"][0] > 0:
            assert f"{np.log10(stats['scores'][0]):.1f}" in page.text
    assert page.text.count("Layer 0") + page.text.count("Layer 1") >= 1 and "The other layer" in page.text
    assert sorted(data["formats"]) == ["FP8", "NVFP4"] and data["perplexity_kept"] == data["perplexity_before"] / data["perplexity_after"]
    assert data["perplexity_after"] == pytest.approx(json.loads(evaluated(capsys, folders))["perplexity"], rel=1e-4)
    code, out, _ = report(capsys, folders, "--out", tmp_path / "other.html")
    assert code == 0 and f"{tmp_path / 'other.html'}: the report" in out and "AutoQuantize" not in (tmp_path / "other.html").read_text()


def evaluated(capsys, folder):
    cli.main(list(map(str, ["eval", folder / "export", "--text", folder / "text.txt", "--window", 32, "--max-windows", 3, "--json"])))
    return capsys.readouterr().out


def test_bad_use(folders, capsys, tmp_path):
    (tmp_path / "there.html").write_text("mine")
    for more, words in ((["--out", tmp_path / "there.html"], "--overwrite"), (["--out", tmp_path], "is a folder"),
                        (["--out", tmp_path / "no" / "page.html"], "there is no folder"), (["--out", tmp_path / "x.html", "--search", tmp_path], "no such search")):
        code, out, err = report(capsys, folders, *more)
        assert (code, out) == (2, "") and words in err and err.count("\n") == 1, err
    assert (tmp_path / "there.html").read_text() == "mine" and not (tmp_path / "x.html").exists()
    assert cli.main(["report", str(folders / "model"), str(folders / "model"), "--out", str(tmp_path / "x.html")]) == 2
    assert "on an export" in capsys.readouterr().err
