"""`modelq bench`: its table against what else measures the same, and its picture: no name covers another, or a point."""
import json
import re
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from byte_tokenizer import byte_tokenizer
from modelq import cli


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    """The micro llama with a tokenizer, a text, and an FP8 export."""
    made = tmp_path_factory.mktemp("bench")
    shutil.copytree(golden["llama"].source, made / "model", copy_function=shutil.copyfile)
    byte_tokenizer().save(str(made / "model" / "tokenizer.json"))
    (made / "text.txt").write_text("\n\n".join(f"Sample {i}: the quick brown fox jumps over the lazy dog." for i in range(99)))
    assert cli.main(list(map(str, ["quantize", made / "model", "--format", "fp8", "--out", made / "fp8-export", "--calib", made / "text.txt", *QUICK]))) == 0
    return made


QUICK = ["--samples", 4, "--seq-len", 32, "--batch-size", 2]


def bench(capsys, folder, *more):
    code = cli.main(list(map(str, ["bench", folder / "model", *more, "--calib", folder / "text.txt", "--text", folder / "text.txt", *QUICK,
                                   "--window", 32, "--max-windows", 3, "--decode-tokens", 4, "--repeat", 2])))
    return (code, *capsys.readouterr())


def test_folders_and_formats(folder, capsys, tmp_path):
    code, out, err = bench(capsys, folder, folder / "fp8-export", "--formats", "nvfp4, int4_wo", "--block-size", 32, "--json")
    assert code == 0 and "Traceback" not in err, err
    data = json.loads(out)
    rows = {row["name"]: row for row in data["models"]}
    assert list(rows) == ["unquantized", "fp8-export", "nvfp4", "int4_wo"] and data["decode_tokens"] == 4
    plain = rows.pop("unquantized")
    assert plain["perplexity_kept"] == plain["top1_agreement"] == plain["speed_up"] == 1 and plain["bits_per_weight"] == 16
    for row in rows.values():
        assert row["perplexity_kept"] == row["perplexity_before"] / row["perplexity"] and row["perplexity_before"] == plain["perplexity"]
        assert row["speed_up"] == row["tokens_per_second"] / row["unquantized_tokens_per_second"] > 0 and row["bytes"] < plain["bytes"]
        assert row["unquantized_tokens_per_second"] <= plain["tokens_per_second"]
    assert rows["fp8-export"]["kl_divergence"] < rows["nvfp4"]["kl_divergence"]
    assert rows["fp8-export"]["bits_per_weight"] > rows["nvfp4"]["bits_per_weight"]
    cli.main(list(map(str, ["eval", folder / "fp8-export", "--text", folder / "text.txt", "--window", 32, "--max-windows", 3, "--json"])))
    assert json.loads(capsys.readouterr().out)["perplexity"] == pytest.approx(rows["fp8-export"]["perplexity"], rel=1e-4)


def test_models_take_turns():
    """Each token by itself, behind the prompt; the median of all turns' tokens counts."""
    from types import SimpleNamespace

    from modelq.decode_bench import decode_speeds

    asked = []

    def model(name):
        decoding = SimpleNamespace(begin=lambda rows: asked.append((name, rows)), forward=lambda which, ids: asked.append((name, which, ids)))
        decoding.nbytes = 10
        return SimpleNamespace(decoding=lambda: decoding)
    ticks = iter([0, 1, 1, 4, 4, 6] + [0, 5, 5, 6, 6, 8] + [0, 2, 2, 4, 4, 5] + [0, 5, 5, 10, 10, 15])
    speeds = decode_speeds([model("a"), model("b")], [5, 6], tokens=3, repeat=2, clock=lambda: next(ticks))
    turn = [[(name, [[5, 6]]), (name, [0], [[5]]), (name, [0], [[6]]), (name, [0], [[5]])] for name in "ab"]
    assert asked == [*turn[0], *turn[1]] * 2 and [tuple(speed) for speed in speeds] == [(2, 10), (5, 10)]
    assert speeds[0].tokens_per_second == 0.5 and speeds[1].bytes_per_second == 2


def test_table_and_pictures(folder, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    names = [tmp_path / "bench.png", tmp_path / "bench.svg"]
    code, out, err = bench(capsys, folder, folder / "fp8-export", "--plot", names[0], "--plot", names[1])
    assert code == 0, err
    assert re.search(r"^unquantized +\d+\.\d{3} +100\.0% +100\.0% +0\.0000 +16\.00 +\S+ MB +\d+\.\d +1\.00x +\d+\.\d +\d+\.\d$", out, flags=re.M)
    assert re.search(r"^fp8-export +\d", out, flags=re.M) and all(f"{name}: accuracy against speed" in out for name in names)
    assert names[0].read_bytes().startswith(b"\x89PNG") and names[1].read_text().startswith("<?xml")
    before = names[0].read_bytes()
    code, out, err = bench(capsys, folder, folder / "fp8-export", "--plot", names[0])
    assert (code, out) == (2, "") and "--overwrite" in err and names[0].read_bytes() == before


def test_what_cannot_be_measured_is_refused_before_the_work(folder, capsys, monkeypatch):
    """A last format whose blocks do not fit, or a folder of another model, costs no measurement of the first."""
    from pathlib import Path

    monkeypatch.setattr("modelq.quantization.quantize", lambda *args, **options: pytest.fail("quantized for nothing"))
    monkeypatch.setattr("modelq.fidelity.fidelity", lambda *args: pytest.fail("measured for nothing"))
    other = Path(__file__).parent / "data" / "families" / "qwen2"
    for more, words in ((["--formats", "fp8,int4_wo", "--block-size", 100], "block"), ([folder / "fp8-export", other], "not one model")):
        code, out, err = bench(capsys, folder, *more)
        assert (code, out) == (2, "") and words in err and err.count("\n") == 1, err


def test_bad_use(folder, capsys):
    for more, words in (([], "nothing to measure"), (["--formats", "fp9"], "fp9: unknown"), ([folder / "nowhere"], "nowhere"),
                        (["--formats", "int4_wo", "--block-size", 100], "block")):
        code, out, err = bench(capsys, folder, *more)
        assert (code, out) == (2, "") and words in err and err.count("\n") == 1, err


# ---- names beside points ----

def boxes(points, names):
    plt = pytest.importorskip("matplotlib", reason="pictures need matplotlib") and __import__("modelq.plots").plots.require_matplotlib()
    from modelq.plot_labels import MARKER, place_labels

    figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 10)
    place_labels(axes, points, names)
    figure.canvas.draw()
    half = MARKER * figure.dpi / 72
    found = [text.get_window_extent().extents for text in axes.texts if text.get_text()]
    marks = [(x - half, y - half, x + half, y + half) for x, y in axes.transData.transform(points)]
    frame = axes.get_window_extent().extents
    order = [text.get_text() for text in axes.texts if text.get_text()]
    plt.close(figure)
    return found, marks, frame, order


def common(one, other):
    return max(0, min(one[2], other[2]) - max(one[0], other[0])) * max(0, min(one[3], other[3]) - max(one[1], other[1]))


def check(points, names):
    found, marks, frame, order = boxes(points, names)
    assert sorted(order) == sorted(names)
    for index, box in enumerate(found):
        assert frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]
        assert all(common(box, other) == 0 for other in found[index + 1:]), order[index]
        assert all(common(box, mark) == 0 for mark in marks), order[index]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.floats(1, 9), st.floats(1, 9)), min_size=1, max_size=12), st.randoms())
def test_names_cover_nothing(points, random):
    names = [f"{'int4_awq nvfp4_gptq fp8 w4a8_nvfp4_fp8'.split()[random.randrange(4)]}{index}" for index in range(len(points))]
    check(points, names)


def test_names_of_points_that_are_one():
    check([(5, 5)] * 6, [f"nvfp4_awq{index}" for index in range(6)])
    check([(9.9, 9.9), (0.1, 0.1), (9.9, 0.1), (0.1, 9.9)], ["north-east", "south-west", "south-east", "north-west"])


def test_markers_and_colors_are_told_apart():
    from modelq.plots import COLORS, MARKERS

    pairs = {(MARKERS[index % len(MARKERS)], COLORS[index % len(COLORS)]) for index in range(21)}
    assert len(pairs) == 21 and len(set(MARKERS)) == len(MARKERS)
    luminance = [np.dot([int(color[i:i + 2], 16) for i in (1, 3, 5)], [0.2126, 0.7152, 0.0722]) for color in COLORS]
    assert len({round(value) for value in luminance}) == len(COLORS)
