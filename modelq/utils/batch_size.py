"""How many samples go through a model at once."""
from __future__ import annotations

from typing import Any

LARGEST = 512
FLOATS_PER_HIDDEN, FLOATS_PER_INTERMEDIATE = 10, 4      # held at once in a decoder layer: residual, norm, q, k, v, heads; gate, up, product


def get_max_batch_size(model: Any, max_sample_length: int = 512, sample_memory_usage_ratio: float = 1.0,
                       sample_input_single_batch: Any = None, enable_grad: bool = False) -> int:
    """The largest batch, a power of two of at most 512, that there is memory for; estimated from the model's sizes, nothing is run.

    Args:
        model: a native or a transformers model.
        max_sample_length: tokens of a sample.
        sample_memory_usage_ratio: how much more than that a sample takes.
        sample_input_single_batch: taken for the sake of scripts for Model Optimizer, which runs it; not looked at.
        enable_grad: activations of all layers stay, for gradients. (A native model never holds them.)

    Raises:
        ValueError: the model has no config with a hidden_size.
    """
    config, names = getattr(model, "config", None), ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers")
    sizes = [config.get(name) if isinstance(config, dict) else getattr(config, name, None) for name in names]
    if not isinstance(sizes[0], int):
        raise ValueError(f"get_max_batch_size: a {type(model).__name__} without config.hidden_size: choose a batch_size yourself")
    hidden, intermediate, vocabulary, layers = (size or 0 for size in sizes)
    is_native = hasattr(model, "runtime")
    held = layers if enable_grad and not is_native else 1
    floats = held * (FLOATS_PER_HIDDEN * hidden + FLOATS_PER_INTERMEDIATE * (intermediate or 4 * hidden)) + 2 * vocabulary
    most = int(_free_bytes(model) / 2 / (4 * floats * max_sample_length * sample_memory_usage_ratio))
    return min(LARGEST, 1 << max(0, most.bit_length() - 1))


def _free_bytes(model: Any) -> int:
    """Of the device that the model is on: CUDA, or memory that this machine could give without swapping."""
    device = getattr(model, "device", "cpu")
    if getattr(device, "type", "cpu") == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as said:
            return next(int(line.split()[1]) * 1024 for line in said if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4 << 30
