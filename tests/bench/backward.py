"""Time and peak memory of a backward pass, over the number of layers and of samples.

    python tests/bench/backward.py [--layers 2,4,8] [--samples 2,8] [--tokens 512] [--compute float32] [--hidden 1024] [--keep 67108864]

A Llama of random weights, written once and mapped. Every row is one process: `forward` is the loss of the samples, `backward` that and the
gradients by the hidden states and by every linear's output; with --observe, one candidate for each linear is scored by these.
ratio: backward over forward, of the same process (minimum of the repeats), of wall time and, which says more on a busy machine, of
processor time. Memory is what the process holds at its peak above what it held with the model open, pages of files included. `in file`:
hidden states between layers beyond --keep. "held" is what must be: hidden states and their gradients at one boundary, what is kept in
memory of the others, scratch, and one layer three times (as it is read, packed, and packed for the way back); candidates come on top.
Peaks differ by slices of the vocabulary, the boundary in use where it comes from the file, the allocator's slack, and the forward's
scratch, which was there before and is given back.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPEATS = 2


def config_of(args: argparse.Namespace, layers: int) -> dict:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": args.hidden, "intermediate_size": 3 * args.hidden,
            "num_hidden_layers": layers, "num_attention_heads": args.hidden // 64, "num_key_value_heads": max(1, args.hidden // 256),
            "vocab_size": 8192, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu",
            "max_position_embeddings": 4096}


def write_model(folder: Path, config: dict) -> None:
    import ml_dtypes
    import numpy as np

    from modelq import _core
    from modelq.checkpoint import TensorInfo
    from modelq.checkpoint.config import runtime_config
    from modelq.checkpoint.writer import ShardedWriter

    rng = np.random.default_rng(0)
    modules = [module for module in _core.Runtime(*runtime_config(config), "float32").modules if module["weight"]]
    shapes = {module["weight"]: tuple(module["shape"]) for module in modules}
    with ShardedWriter(folder, [TensorInfo(name, "bfloat16", shape, 0) for name, shape in shapes.items()]) as writer:
        for name, shape in shapes.items():
            value = np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape, np.float32) * 0.03
            writer.write(name, value.astype(ml_dtypes.bfloat16))
    (folder / "config.json").write_text(json.dumps(config))


def resident() -> dict[str, int]:
    with open("/proc/self/status") as status:
        return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in status if line.startswith(("RssAnon", "RssFile", "VmHWM"))}


def one_process(folder: str, samples: int, args: argparse.Namespace) -> None:
    import numpy as np

    import modelq
    import modelq._core as core
    from modelq.gradients import backward
    from modelq.measure import reset_peak_memory

    if args.threads:
        core.set_threads(args.threads)
    model = modelq.load(folder, compute=args.compute)
    ids = np.random.default_rng(1).integers(0, model.vocab_size, (samples, args.tokens))
    batches, forward_seconds, backward_seconds, kept = [row[None] for row in ids], [], [], [0]
    model.loss(batches[:1])     # threads, first pages

    def look(layer, back):
        kept[0] = max(kept[0], back.nbytes)
    for _ in range(REPEATS):
        start = time.perf_counter(), time.process_time()
        model.loss(batches)
        forward_seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    before = resident()
    reset_peak_memory()
    for _ in range(REPEATS):
        start = time.perf_counter(), time.process_time()
        backward(model, batches, visitor=Scores(model) if args.observe else None, look=look, keep_bytes=args.keep)
        backward_seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    states = ids.size * model.runtime.config["hidden_size"] * (2 if args.compute == "bfloat16" else 4)
    layer = sum(int(np.prod(module["shape"])) for module in model.modules_of(0) if module["weight"])
    in_memory = min(model.num_layers, args.keep // states) * states
    print(json.dumps({"forward": list(map(min, zip(*forward_seconds))), "backward": list(map(min, zip(*backward_seconds))),
                      "back": kept[0], "states": states, "in_memory": in_memory, "in_file": model.num_layers * states - in_memory,
                      "layer": layer * (2 + (4 if args.compute == "bfloat16" else 8)),
                      "peak": resident()["VmHWM"] - before["RssAnon"] - before["RssFile"]}))


class Scores:
    """A visitor that scores candidates which are the weights themselves: what AutoQuantize does for each of its formats."""

    def __init__(self, model):
        self.model = model

    def linears(self, part):
        return [module for module in part.modules if module["kind"] == "linear" and module["layer"] >= 0]

    def enter(self, part):
        import modelq._core as core
        for module in self.linears(part):
            self.model.runtime.set_observer(module["name"], core.OutputScore([part.tensors[module["weight"]]]))

    def leave(self, part):
        for module in self.linears(part):
            self.model.runtime.set_observer(module["name"], None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="2,4,8")
    parser.add_argument("--samples", default="2,8")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--compute", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--keep", type=int, default=64 << 20, help="bytes of hidden states between layers in memory")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--observe", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return one_process(args.child[0], int(args.child[1]), args)
    print(f"backward, hidden size {args.hidden}, {args.tokens} tokens a sample, {args.compute}, "
          f"{args.keep / 2**20:.0f} MiB of hidden states kept")
    print(f"{'layers':>7}{'samples':>8}{'forward s':>11}{'backward s':>11}{'ratio':>7}{'of cpu s':>9}{'peak MiB':>10}{'held MiB':>10}"
          f"{'in file MiB':>12}")
    for layers in map(int, args.layers.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), config_of(args, layers))
            for samples in args.samples.split(","):
                done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--child", folder, samples], capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                row = json.loads(done.stdout.splitlines()[-1])
                held = row["back"] + row["states"] + row["in_memory"] + row["layer"]
                print(f"{layers:7}{samples:>8}{row['forward'][0]:11.2f}{row['backward'][0]:11.2f}"
                      f"{row['backward'][0] / row['forward'][0]:7.2f}{row['backward'][1] / row['forward'][1]:9.2f}"
                      f"{row['peak'] / 2**20:10.0f}{held / 2**20:10.0f}{row['in_file'] / 2**20:12.0f}", flush=True)


if __name__ == "__main__":
    main()
