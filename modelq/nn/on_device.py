"""What a TensorQuantizer does with an array on a GPU: there, by modelq's CUDA library, without a copy and without waiting."""
from __future__ import annotations

from typing import Any

import numpy as np

from modelq import _core, device_arrays
from modelq.quantizers import block_extents, without_rounding

_MOST_PENDING = 64      # maxima that wait on the device; then they are brought over


class OnDevice:
    """The half of TensorQuantizer that is about GPUs. Maxima stay on the device until somebody asks for them."""
    attributes: Any
    core: Any
    name: str

    def __init__(self) -> None:
        self._pending: list[Any] = []

    def _library_for(self, x: Any) -> _core.CudaLibrary | None:
        """The CUDA library where it can do all that this quantizer does with x; None: on the CPU."""
        library = device_arrays.library_for(x)
        return None if library is None or self.attributes.bias is not None and len(x.shape) == 4 else library

    def _round_there(self, library: _core.CudaLibrary, x: Any, prepare: bool) -> Any:
        rows = device_arrays.contiguous(x)
        core = without_rounding(self.core) if prepare else self.core
        return device_arrays.quantized(library, core, self.as_rows(rows), prepare).reshape(x.shape)    # type: ignore[attr-defined]

    def _gradient_there(self, library: _core.CudaLibrary, core: Any, gradient: Any, x: Any) -> Any:
        rows = self.as_rows(device_arrays.contiguous(gradient))     # type: ignore[attr-defined]
        given = rows if x is None else self.as_rows(device_arrays.contiguous(x))        # type: ignore[attr-defined]
        return device_arrays.gradient(library, core, given, rows).reshape(gradient.shape)

    def _grain(self) -> tuple[int, int] | None:
        """Extents of the blocks that have a maximum each (0: all of an axis); None: axes that the kernels do not know."""
        blocks = block_extents(self.attributes)
        if blocks and (self.attributes.block_sizes or {}).get("type") != "dynamic":
            return blocks.get(-2, 1), blocks[-1]
        axis = self.attributes.axis
        return {None: (0, 0), 0: (1, 0), -1: (0, 1)}.get(axis)

    def _collect_there(self, library: _core.CudaLibrary, x: Any) -> bool:
        """Whether the maxima could be found there."""
        grain = self._grain()
        if grain is None:
            return False
        rows = self.as_rows(device_arrays.contiguous(x))        # type: ignore[attr-defined]
        if grain != (0, 0) and len(rows.shape) != 2:
            return False
        self._pending.append((device_arrays.largest(library, rows, grain), list(x.shape)))
        if len(self._pending) >= _MOST_PENDING:
            self._bring_over()
        return True

    def _bring_over(self) -> None:
        """Take note of what waits on the device. ValueError names an array that held NaN or an infinity."""
        pending, self._pending = self._pending, []
        for there, shape in pending:
            seen = device_arrays.to_host(there)
            if not np.isfinite(seen).all():
                raise ValueError(f"{self.name}: NaN or infinity in an array of shape {shape}")
            self.collect_maxima(seen.reshape(()) if self._grain() == (0, 0) else seen)

    def collect_maxima(self, seen: np.ndarray) -> None:
        raise NotImplementedError
