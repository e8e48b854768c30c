"""Perplexity of SmolLM2-135M-Instruct after each calibration algorithm, on a text of your choice.

    python tests/bench/perplexity.py --calibrate wiki-valid.txt --test wiki-test.txt [--only AWQ] [--markdown]

The model in bfloat16 (made by end_to_end.py), calibrated on the first N x L tokens of one text, measured over the first windows of another
(their first tokens are not predicted), as an export would compute: fake-quantized weights are the numbers that are written.
"""
from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import numpy as np  # noqa: E402
from end_to_end import prepare, print_rows  # noqa: E402

import modelq  # noqa: E402
import modelq.quantization as mtq  # noqa: E402

INT4, INT8, NVFP4 = "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "INT8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"
# (format, algorithm as said in the table, preset, algorithm in the place of the preset's)
CASES: list[tuple[str, str, str, Any]] = [
    ("INT8", "max", INT8, None), ("INT8", "rotate, max", INT8, ["rotate", "max"]), ("INT8", "entropy", INT8, "entropy"),
    ("INT8", "percentile 99.99", INT8, "percentile"), ("INT8", "histogram mse", INT8, {"method": "histogram", "range_method": "mse"}),
    ("INT8", "smoothquant", "INT8_SMOOTHQUANT_CFG", None),
    ("FP8", "max", "FP8_DEFAULT_CFG", None),
    ("INT4", "max", INT4, None), ("INT4", "mse", INT4, "mse"), ("INT4", "awq_lite", "INT4_AWQ_CFG", None),
    ("INT4", "awq_clip", "INT4_AWQ_CFG", "awq_clip"), ("INT4", "awq_full", "INT4_AWQ_CFG", "awq_full"),
    ("INT4", "gptq, reference's defaults", INT4, "gptq"), ("INT4", "gptq (INT4_GPTQ_CFG)", "INT4_GPTQ_CFG", None),
    ("INT4", "rotate, gptq", "INT4_GPTQ_CFG", "rotate+"),
    ("W4A8 (INT4 + FP8)", "awq_lite", "W4A8_AWQ_BETA_CFG", None),
    ("NVFP4 weights", "max", "W4A16_NVFP4_CFG", None), ("NVFP4 weights", "mse", "W4A16_NVFP4_CFG", "mse"),
    ("NVFP4 weights", "gptq", "W4A16_NVFP4_CFG", "gptq+"),
    ("NVFP4", "max", NVFP4, None), ("NVFP4", "mse", NVFP4, "mse"), ("NVFP4", "mse, all FP8 scales", "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG", None),
    ("NVFP4", "local_hessian", "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG", None), ("NVFP4", "awq_lite", "NVFP4_AWQ_LITE_CFG", None),
    ("NVFP4", "awq_clip", "NVFP4_AWQ_CLIP_CFG", None), ("NVFP4", "awq_full", "NVFP4_AWQ_FULL_CFG", None),
    ("NVFP4", "svdquant", "NVFP4_SVDQUANT_DEFAULT_CFG", None), ("NVFP4", "gptq (NVFP4_GPTQ_CFG)", "NVFP4_GPTQ_CFG", None),
    ("NVFP4", "rotate, max", NVFP4, ["rotate", "max"]),
]


def config_of(preset: str, algorithm: Any) -> dict[str, Any]:
    config = copy.deepcopy(getattr(mtq, preset))
    if algorithm == "rotate+":
        config["algorithm"] = ["rotate", config["algorithm"]]
    elif algorithm == "gptq+":
        config["algorithm"] = mtq.NVFP4_GPTQ_CFG["algorithm"]
    elif algorithm is not None:
        config["algorithm"] = algorithm
    return config


def tokens_of(text: Path, folder: Path, count: int, length: int) -> np.ndarray:
    """int64 [count, length]."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids
    if len(ids) < count * length:
        raise SystemExit(f"{text} has {len(ids)} tokens, {count} x {length} are asked for")
    return np.asarray(ids[:count * length], np.int64).reshape(count, length)


def measure(folder: Path, config: dict[str, Any] | None, calibration: np.ndarray, test: np.ndarray) -> tuple[float, float]:
    """(perplexity, seconds of quantize)."""
    model, started = modelq.load(folder), time.perf_counter()
    if config is not None:
        mtq.quantize(model, config, lambda model: [model(calibration[at:at + 8]) for at in range(0, len(calibration), 8)])
    seconds = time.perf_counter() - started
    return model.perplexity(test, test.shape[1]), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", type=Path, help="a text file")
    parser.add_argument("--test", type=Path, help="a text file")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--only", default="", help="cases whose format, algorithm or preset has this in it")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / f"modelq-bench-{os.getuid()}")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    if options.calibrate is None or options.test is None:
        print("perplexity.py: nothing to do without --calibrate TEXT and --test TEXT")
        return
    warnings.simplefilter("ignore")
    prepare(options.work, 1, 1)
    folder = options.work / "model"
    calibration = tokens_of(options.calibrate, folder, options.samples, options.seq_len)
    test = tokens_of(options.test, folder, options.windows, options.seq_len)
    plain = measure(folder, None, calibration, test)[0]
    rows = [("format", "algorithm", "preset", "perplexity", "seconds"), ("bfloat16", "", "", f"{plain:.2f}", "")]
    for case in CASES:
        if options.only in " ".join(case[:3]):
            perplexity, seconds = measure(folder, config_of(*case[2:]), calibration, test)
            rows.append((*case[:3], f"{perplexity:.2f}", f"{seconds:.1f}"))
    print_rows(rows, options.markdown)


if __name__ == "__main__":
    main()
