"""Opening a model."""
from __future__ import annotations

from pathlib import Path

from modelq import _core
from modelq.cuda import library
from modelq.devices import placement_of
from modelq.model import Model


def load(path_or_id: str | Path, compute: str = "auto", num_threads: int | None = None, weights_only: bool = False, device: str = "cpu",
         device_memory: int | str | None = None) -> Model:
    """Open path_or_id: a Hugging Face folder, a GGUF file or a Hub id. Weights are mapped, checked, and not read yet.

    An architecture that modelq does not compute is opened for its weights alone: formats that need no calibration data work on it.

    compute: "bfloat16" (activations stored as bfloat16, products accumulated in float32), "float32" (as a model loaded with
    dtype=float32: weights too are quantized as float32), or "auto": bfloat16 where this processor computes it fast.
    num_threads: for the whole process; None leaves MODELQ_NUM_THREADS or the processor's cores.
    weights_only: open a known architecture so, too, whatever its config.json asks for.
    device: "cuda" or "cuda:0": layers, logits and losses are computed on that GPU, layer by layer (see modelq.cuda); gradients and
    generation stay on the CPU. device_memory: how much of it may be used, bytes or "8GB"; None: MODELQ_CUDA_MEMORY, else what is free.
    FileNotFoundError: nothing is there. ValueError: a damaged file, or a config.json that does not fit its weights (named), no such
    device or memory. cuda.CudaUnavailable: there is no GPU for modelq; it says what is missing.
    """
    from modelq.checkpoint import open_checkpoint
    from modelq.checkpoint.quantized import open_quantized
    if compute not in ("auto", "bfloat16", "float32"):
        raise ValueError(f"compute must be auto, bfloat16 or float32, got {compute!r}")
    if num_threads is not None:
        _core.set_threads(num_threads)
    placement = placement_of(device, device_memory)
    if placement is not None:
        library()           # says what is missing before files are looked for
        compute = "bfloat16" if compute == "auto" else compute
    checkpoint = open_checkpoint(path_or_id)
    checkpoint = checkpoint if hasattr(checkpoint, "layers") else open_quantized(checkpoint)
    return Model(checkpoint, compute, weights_only, placement)
