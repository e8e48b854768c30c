"""A checkpoint larger than the memory it may take: made up (random weights, Llama 3 8B's widths), quantized, exported in shards.

    python tests/bench/large_checkpoint.py [--gib 8] [--configs W4A16_NVFP4_CFG NVFP4_DEFAULT_CFG] [--work DIR]

Each job runs in a process of its own; "peak MB" is its VmHWM, file pages included. The aim: 8 GiB within 1.5 GiB. Needs
twice the checkpoint's size in free disk space, and removes what it wrote unless --keep is given.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
CONFIGS = ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "W4A16_NVFP4_CFG", "NVFP4_DEFAULT_CFG")
WIDTHS = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=128256)


def shapes(layers: int):
    """Tensor names and shapes, in the order of a transformers model."""
    hidden, inner, vocab = WIDTHS["hidden_size"], WIDTHS["intermediate_size"], WIDTHS["vocab_size"]
    kv = WIDTHS["num_key_value_heads"] * WIDTHS["head_dim"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(layers):
        for name, shape in (("self_attn.q_proj", (hidden, hidden)), ("self_attn.k_proj", (kv, hidden)), ("self_attn.v_proj", (kv, hidden)),
                            ("self_attn.o_proj", (hidden, hidden)), ("mlp.gate_proj", (inner, hidden)), ("mlp.up_proj", (inner, hidden)),
                            ("mlp.down_proj", (hidden, inner)), ("input_layernorm", (hidden,)), ("post_attention_layernorm", (hidden,))):
            yield f"model.layers.{i}.{name}.weight", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def make(folder: Path, gib: float) -> None:
    """Random bfloat16 weights: one block of noise, repeated over the rows, so that making them takes no longer than writing."""
    import ml_dtypes
    from modelq.checkpoint import TensorInfo
    from modelq.checkpoint.writer import ShardedWriter, atomic_directory

    bytes_of = lambda layers: sum(2 * int(np.prod(shape)) for _, shape in shapes(layers))  # noqa: E731
    layers = max(1, round((gib * 2**30 - bytes_of(0)) / (bytes_of(1) - bytes_of(0))))
    noise = (np.random.default_rng(0).standard_normal(1 << 22) * 0.02).astype(ml_dtypes.bfloat16)
    with atomic_directory(folder) as target, ShardedWriter(
            target, [TensorInfo(name, "bfloat16", shape, 0) for name, shape in shapes(layers)], max_shard_size="2GB") as writer:
        for name, shape in shapes(layers):
            if len(shape) == 1:
                writer.write(name, np.ones(shape, ml_dtypes.bfloat16))
                continue
            step = noise.size // shape[1]
            writer.write_pieces(name, (noise[:shape[1] * min(step, shape[0] - start)].reshape(-1, shape[1])
                                       for start in range(0, shape[0], step)))
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers, "dtype": "bfloat16",
                  "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, **WIDTHS}
        (target / "config.json").write_text(json.dumps(config, indent=2))


def job(source: str, config: str, out: str) -> None:
    import modelq
    import modelq.quantization as mtq
    from modelq.export import export_hf_checkpoint
    from weight_only import status

    ids = np.random.default_rng(1).integers(0, WIDTHS["vocab_size"], (4, 64))
    start = time.perf_counter()
    model = mtq.quantize(modelq.load(source), getattr(mtq, config), lambda model: [model(row[None]) for row in ids])
    export_hf_checkpoint(model, out, max_shard_size="2GB")
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_mb": status("VmHWM")}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=8.0)
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / f"modelq-large-{os.getuid()}")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return job(*options.child)
    source, out = options.work / f"source-{options.gib:g}", options.work / "out"
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        if not source.exists():
            make(source, options.gib)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        print(f"{size / 2**30:.2f} GiB in {len(list(source.glob('*.safetensors')))} shards")
        print(f"{'config':36} {'seconds':>8} {'GB/s':>6} {'peak MB':>8} {'shards out':>10}")
        for config in options.configs:
            shutil.rmtree(out, ignore_errors=True)
            done = subprocess.run([sys.executable, __file__, "--child", str(source), config, str(out)], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            result = json.loads(done.stdout.splitlines()[-1])
            print(f"{config:36} {result['seconds']:8.1f} {size / 1e9 / result['seconds']:6.2f} {result['peak_mb']:8.0f} "
                  f"{len(list(out.glob('*.safetensors'))):10}", flush=True)
    finally:
        shutil.rmtree(out, ignore_errors=True)
        if not options.keep:
            shutil.rmtree(source, ignore_errors=True)


if __name__ == "__main__":
    main()
