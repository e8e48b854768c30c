"""What a search for formats costs beside its parts: a calibration per format, and a backward pass.

    python tests/bench/autoquantize.py [--samples 32] [--clock cpu]

SmolLM2-135M-Instruct, NVFP4 and FP8, scores by gradients on all samples.
"""
from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time, where the machine has other work too")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / f"modelq-bench-{os.getuid()}")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    import numpy as np
    from end_to_end import prepare, print_rows

    import modelq
    import modelq.quantization as mtq
    from modelq.gradients import backward
    from modelq.measure import peak_memory

    prepare(options.work, options.samples, options.seq_len)
    tokens = np.load(options.work / "tokens.npy")
    batches = [{"input_ids": row[None], "labels": row[None]} for row in tokens]
    formats = [mtq.NVFP4_DEFAULT_CFG, mtq.FP8_DEFAULT_CFG]
    now = {"wall": time.perf_counter, "cpu": time.process_time}[options.clock]

    def seconds(work) -> float:
        started = now()
        work()
        return now() - started

    def loop(model) -> None:
        for batch in batches:
            model(**batch)

    def load():
        return modelq.load(options.work / "model")

    seconds(lambda: mtq.quantize(load(), formats[0], lambda model: model(**batches[0])))     # what is done once only
    calibrations = [seconds(lambda: mtq.quantize(load(), config, loop)) for config in formats]
    passes = seconds(lambda: backward(load(), batches))
    search = seconds(lambda: mtq.auto_quantize(
        load(), {"effective_bits": 6.0, "cost": {"excluded_module_name_patterns": ["*lm_head*"]}}, formats, batches,
        lambda model, batch: model(**batch), lambda output, batch: output.loss, num_calib_steps=len(batches), num_score_steps=len(batches),
        disabled_layers=["*lm_head*"]))
    parts = sum(calibrations) + passes
    print(f"SmolLM2-135M, {options.samples} x {options.seq_len} tokens, {options.clock} time; peak memory {peak_memory() / 1e6:.0f} MB")
    print_rows([("calibration, NVFP4", "calibration, FP8", "forward and backward", "search", "search / its parts"),
                (*(f"{one:.1f} s" for one in (*calibrations, passes, search)), f"{search / parts:.2f}")], options.markdown)


if __name__ == "__main__":
    main()
