"""Calibrators to be used by hand, on arrays of any framework, as Model Optimizer's calib module offers them.

    calibrator = HistogramCalibrator(num_bits=8)
    for batch in batches:
        calibrator.collect(batch)                  # NumPy, ml_dtypes, or any DLPack producer (a torch tensor), on the CPU
    amax = calibrator.compute_amax("entropy")

`observe` shows calibrators what reaches the quantizers of a native model.
The same statistics are what quantize() collects on its way through a model (csrc/calib); these classes hold a
`_core.Calibrator`, `calibrator.statistics`, which may also be given to a Runtime's set_calibrator.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq import _core

if TYPE_CHECKING:
    from modelq.model import Model

__all__ = ["GramCalibrator", "HistogramCalibrator", "MaxCalibrator", "MeanCalibrator", "observe"]


class _Calibrator:
    """What all have in common. A mask has x's shape without the last axis; where it is 0, x is padding and counts in nothing."""

    def __init__(self, kind: str, axis: int | None = None, option: int = 0) -> None:
        self.statistics = _core.Calibrator(kind, axis, option)

    @property
    def count(self) -> int:
        """Rows (tokens) seen, padding left out."""
        return self.statistics.count

    def collect(self, x: Any, mask: Any = None) -> None:
        """Adds x [..., C], float32, bfloat16 or float16; mask [...]: 0 where x is padding. NaN and infinities are remembered, and refused
        by what computes."""
        self.statistics.collect(x, mask)

    def reset(self) -> None:
        """Forgets everything collected."""
        self.statistics.reset()

    def merge(self, other: _Calibrator) -> None:
        """Adds what another of the same kind has seen. Maxima and histograms of two halves merge to exactly those of the whole, sums
        to rounding. TypeError for another kind, ValueError for other parameters."""
        if type(other) is not type(self):
            raise TypeError(f"merge: expected a {type(self).__name__}, got {type(other).__name__}")
        self.statistics.merge(other.statistics)

    def save(self) -> bytes:
        """The statistics as bytes, for load()."""
        return self.statistics.save()

    def load(self, state: bytes) -> None:
        """Replaces the statistics by state, saved ones; ValueError if they are of another kind or damaged."""
        self.statistics.load(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(count={self.count})"


class MaxCalibrator(_Calibrator):
    """The largest |x|: of everything (axis None), or one per index of an axis (Model Optimizer's calib/max.py).

    num_bits and unsigned are taken for its sake; a maximum does not depend on them. With track_amax, `amaxs` lists the maxima of
    the single calls.

    >>> import numpy as np
    >>> calibrator = MaxCalibrator(axis=-1)
    >>> calibrator.collect(np.array([[1.0, -5.0], [-2.0, 3.0]], np.float32))
    >>> calibrator.compute_amax().tolist()
    [2.0, 5.0]
    """

    def __init__(self, num_bits: int | tuple[int, int] = 8, axis: int | Sequence[int] | None = None, unsigned: bool = False,
                 track_amax: bool = False) -> None:
        if isinstance(axis, Sequence):
            if len(axis) != 1:
                raise ValueError(f"MaxCalibrator: one axis or None, got {tuple(axis)}")
            axis = axis[0]
        super().__init__("max", None if axis is None else -1)
        self.num_bits, self.axis, self.unsigned = num_bits, axis, unsigned
        self.amaxs: list[float | np.ndarray] | None = [] if track_amax else None

    def collect(self, x: Any, mask: Any = None) -> None:
        """Adds x, of any shape with that axis. A mask is for the last axis (or None) only. ValueError: x has no such axis."""
        if self.axis is not None:
            x = _core.as_array(x, "x")
            if not -x.ndim <= self.axis < x.ndim:
                raise ValueError(f"MaxCalibrator: axis {self.axis} of an array of shape {x.shape}")
            if self.axis % x.ndim != x.ndim - 1:
                if mask is not None:
                    raise ValueError(f"MaxCalibrator: a mask goes with axis None or -1, not {self.axis}")
                x = np.moveaxis(x, self.axis, -1)
        super().collect(x, mask)
        if self.amaxs is not None:
            single = _core.Calibrator("max", self.statistics.axis)
            single.collect(x, mask)
            self.amaxs.append(single.compute_amax())

    def reset(self) -> None:
        """Forgets everything collected, `amaxs` too."""
        super().reset()
        if self.amaxs is not None:
            self.amaxs = []

    def compute_amax(self) -> float | np.ndarray | None:
        """A float, or float32 [length of the axis]; None if nothing was collected. ValueError if NaN or an infinity was seen."""
        return self.statistics.compute_amax()


class HistogramCalibrator(_Calibrator):
    """A histogram of |x|, and the ranges found from it (Model Optimizer's calib/histogram.py).

    num_bins bins span the first call's largest |x|; later calls that reach farther add bins of the same width (beyond 16 times as
    many, bins become wider). skip_zeros leaves exact zeros out. Per tensor only, as there.

    >>> import numpy as np
    >>> calibrator = HistogramCalibrator()
    >>> calibrator.collect(np.r_[np.linspace(0, 1, 9999), 100].astype(np.float32))      # one outlier among ten thousand
    >>> round(calibrator.compute_amax("percentile", percentile=99.9), 1)
    1.0
    """

    def __init__(self, num_bits: int | tuple[int, int] = 8, axis: None = None, unsigned: bool = False, num_bins: int = 2048,
                 skip_zeros: bool = False) -> None:
        if axis is not None:
            raise NotImplementedError("HistogramCalibrator: histograms are per tensor, axis must be None")
        if not 2 <= num_bins <= 65536:
            raise ValueError(f"HistogramCalibrator: num_bins must be 2 to 65536, got {num_bins}")
        if not isinstance(num_bits, int) and tuple(num_bits) != (4, 3):
            raise ValueError(f"HistogramCalibrator: num_bits must be an integer or (4, 3), got {num_bits}")
        super().__init__("histogram", None, num_bins)
        self.num_bits, self.axis, self.unsigned, self.skip_zeros = num_bits, axis, unsigned, skip_zeros

    @property
    def histogram(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(counts int64 [n], edges float64 [n + 1]), as np.histogram gives them; None if nothing was collected."""
        found = self.statistics.histogram(self.skip_zeros)
        return None if found is None else (found[0], np.arange(len(found[0]) + 1) * found[1])

    def compute_amax(self, method: str, *, stride: int = 1, start_bin: int = 128, percentile: float = 99.99) -> float | None:
        """The amax by a method: "entropy" (least Kullback-Leibler divergence, last minimum), "mse" (least squared error of the quantized
        bin centres, first minimum) or "percentile"; None if nothing was collected.

        stride and start_bin: which numbers of bins entropy and mse try. mse is the formula that Model Optimizer means; its own call
        passes the arguments in the wrong places. ValueError if NaN or an infinity was seen, or for arguments out of range.
        """
        bits = self.num_bits if isinstance(self.num_bits, int) else 0
        return self.statistics.compute_range(method, bits, self.unsigned, stride, start_bin, percentile, self.skip_zeros)


class GramCalibrator(_Calibrator):
    """H = X^T X over all tokens X [..., C]: what AWQ's, GPTQ's and the local Hessian's losses are computed from.

    bfloat16 is multiplied as it is, float32 and float16 as float32; sums are float32 within a block of 2048 to 8192 tokens, float64
    across blocks. block_size keeps the blocks on the diagonal only: far less work and memory. The result does not depend on the
    number of threads.

    >>> import numpy as np
    >>> calibrator = GramCalibrator()
    >>> calibrator.collect(np.array([[1, 2], [3, 4]], np.float32))
    >>> calibrator.compute_gram().tolist()
    [[10.0, 14.0], [14.0, 20.0]]
    """

    def __init__(self, block_size: int | None = None) -> None:
        super().__init__("gram", -1, block_size or 0)
        self.block_size = block_size

    def compute_gram(self) -> np.ndarray | None:
        """The sum over tokens (not divided by `count`): float32 [C, C], or [ceil(C / block_size), block_size, block_size], zero beyond
        C; None if nothing was collected. ValueError if NaN or an infinity was seen."""
        return self.statistics.compute_gram()


class MeanCalibrator(_Calibrator):
    """The mean of |x| per channel: over all tokens, or with compat="modelopt" as its AWQ has it (awq_lite's act_scale): the mean of each
    call, rounded to x's dtype, counts once, however many tokens the call had."""

    def __init__(self, compat: str | None = None) -> None:
        if compat not in (None, "modelopt"):
            raise ValueError(f"MeanCalibrator: compat must be None or 'modelopt', got {compat!r}")
        super().__init__("mean_abs", -1, int(compat is not None))
        self.compat = compat

    def compute_mean(self) -> np.ndarray | None:
        """float32 [C]; None if nothing was collected. ValueError if NaN or an infinity was seen."""
        return self.statistics.compute_amax()


# On a model ----------------------------------------------------------------------------------------------------------------------

def observe(model: Model, batches: Iterable[Any], calibrators: Mapping[str, _Calibrator]) -> None:
    """Show calibrators the activations that come to quantizers of a native model, as it computes now: to draw them, or to find ranges by
    a rule of one's own.

    Args:
        model: from modelq.load, quantized or not; it stays as it is.
        batches: anything that the model can be called with, dictionaries included.
        calibrators: by the full name of an activation's quantizer, such as "model.layers.0.mlp.down_proj.input_quantizer". They see
            [..., C] values before rounding, padding left out. Linears that read one tensor may share one.

    Raises:
        KeyError: the model has no such place. TypeError: it is no native model. ValueError: there is no batch.
    """
    from modelq import streaming
    from modelq.inputs import groups, make_batch
    from modelq.model import Model

    if not isinstance(model, Model):
        raise TypeError(f"observe: expected a model from modelq.load, got {type(model).__name__}")
    made = [make_batch(model.vocab_size, batch) for batch in batches]
    if not made:
        raise ValueError("observe: there is no batch to show")
    with ExitStack() as stack:
        for name, calibrator in calibrators.items():
            model.runtime.set_calibrator(name, calibrator.statistics)
            stack.callback(model.runtime.set_calibrator, name, None)
        for group in groups(made, model.tokens_at_once):
            streaming.forward(model, group, "observe")
