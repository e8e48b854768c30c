"""Data for histograms, the same wherever NumPy runs: integers of a fixed generator through exact arithmetic."""
import ml_dtypes
import numpy as np

# name: (HistogramCalibrator's options, sizes of the batches as multiples of one)
CASES = {
    "float32": ({"num_bits": 8}, [1.0]),
    "bfloat16": ({"num_bits": 8}, [1.0]),
    "bfloat16_growing": ({"num_bits": 8}, [1.0, 1.75, 0.5]),
    "float32_growing": ({"num_bits": 8}, [1.0, 1.6]),
    "bfloat16_unsigned": ({"num_bits": 8, "unsigned": True}, [1.0]),
    "bfloat16_4_bits": ({"num_bits": 4}, [1.0, 1.25]),
}


def batches_of(name: str) -> list[np.ndarray]:
    """Bell-shaped values (sums of twelve uniform ones, of which some are drawn out), [128, 256] each."""
    rng = np.random.Generator(np.random.PCG64(len(name)))
    dtype = ml_dtypes.bfloat16 if name.startswith("bfloat16") else np.float32
    batches = []
    for factor in CASES[name][1]:
        bell = rng.integers(0, 1 << 16, (12, 128, 256)).sum(0).astype(np.float64) / (1 << 16) - 6.0
        tail = np.where(rng.integers(0, 200, bell.shape) == 0, 3.0, 1.0)
        batches.append((bell * tail * factor).astype(np.float32).astype(dtype))
    return batches
