"""TensorQuantizer: one quantizer to be called on arrays of any framework, with Model Optimizer's attributes and switches."""
from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from modelq import _core
from modelq.algorithms import HISTOGRAM
from modelq.arrays import give_back, take
from modelq.attributes import QuantizerAttributeConfig
from modelq.nn.on_device import OnDevice
from modelq.quantizers import (Found, attributes_need_amax, core_quantizer, found_values, set_constant_amax, set_found_values, stage_amax,
                               without_rounding)

STATE = ("amax", "pre_quant_scale", "bias", "global_amax")


def _attribute(name: str, says: str) -> Any:
    """What the attributes say, to be read."""
    return property(lambda self: getattr(self.attributes, name), doc=says)


class TensorQuantizer(OnDevice):
    """Rounds arrays to the numbers of a format, or looks at them first to find the range (calibration).

    quant_attribute_cfg: attributes as in a config's "cfg" (a dictionary or QuantizerAttributeConfig); None: 8-bit integers, one scale for
    the tensor. Called on an array (NumPy, torch, JAX, anything with DLPack) it returns one of the same framework, dtype and shape; arrays
    on a CUDA device stay there, where modelq has its CUDA library (modelq.cuda). if_quant: rounds; if_calib: takes note of what passes, for
    `load_calib_amax`; both may be on. Errors: ValueError for attributes that make no quantizer, for NaN or infinity seen by a calibration,
    and when it has to round without knowing a range.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> TensorQuantizer:
        """Beside torch it is a torch.nn.Module too, which modules can hold."""
        if cls is TensorQuantizer and "torch" in sys.modules:
            from modelq.torch_models.quantizer_module import QuantizerModule

            return object.__new__(QuantizerModule)
        return object.__new__(cls)

    def __init__(self, quant_attribute_cfg: Any = None, amax: Any = None, if_quant: bool = True, if_calib: bool = False,
                 name: str = "quantizer"):
        self.name = name
        self._if_quant, self._if_calib = if_quant, if_calib
        self.set_from_attribute_config(QuantizerAttributeConfig() if quant_attribute_cfg is None else quant_attribute_cfg)
        if amax is not None:
            self.amax = amax

    def set_from_attribute_config(self, quant_attribute_cfg: Any) -> None:
        """Take the attributes of quant_attribute_cfg; what is not named gets its default. What was found for others is forgotten.
        ValueError: unknown or impossible attributes."""
        attributes = QuantizerAttributeConfig.parse(quant_attribute_cfg, self.name)
        self.core = core_quantizer(attributes)
        self.attributes, self.core.enabled = attributes, attributes.enable
        set_constant_amax(self.core, attributes)
        self.reset_calibrator()

    @property
    def native(self) -> Any:
        """The core's quantizer."""
        return self.core

    # Switches ----------------------------------------------------------------------------------------------------------------------

    @property
    def is_enabled(self) -> bool:
        """Whether it does anything but multiply by a pre_quant_scale."""
        return self.core.enabled

    def enable(self) -> None:
        """Round and look again, as the two switches below say."""
        self.core.enabled = True

    def disable(self) -> None:
        """Neither rounds nor looks; a pre_quant_scale still multiplies."""
        self.core.enabled = False

    def enable_quant(self) -> None:
        """Round what passes."""
        self._if_quant = True

    def disable_quant(self) -> None:
        """Round nothing."""
        self._if_quant = False

    def enable_calib(self) -> None:
        """Look at what passes. ValueError if there is nothing to be found: scales are taken on the fly, or constant."""
        if not self.needs_calibration:
            raise ValueError(f"{self.name}: nothing to calibrate: its scales are taken on the fly or constant")
        self._if_calib = True

    def disable_calib(self) -> None:
        """Look no longer; what was seen stays."""
        self._if_calib = False

    # Attributes --------------------------------------------------------------------------------------------------------------------

    num_bits = _attribute("num_bits", "An integer, or (exponent, mantissa) of a float format.")
    axis = _attribute("axis", "Of the dimension that has an amax for each of its indices; None: one for all.")
    block_sizes = _attribute("block_sizes", "{-1: 16, ...}: elements of a block by dimension, how its scale is stored; None: no blocks.")
    unsigned = _attribute("unsigned", "Whether integers begin at 0.")
    narrow_range = _attribute("narrow_range", "Whether integers are -127 to 127 rather than -128 to 127.")
    fake_quant = _attribute("fake_quant", "Whether values are rounded and stay in their dtype.")

    @property
    def needs_calibration(self) -> bool:
        """Whether there is an amax to be found: not for scales taken on the fly, and constant ones."""
        return attributes_need_amax(self.attributes)

    @property
    def maxbound(self) -> float:
        """The largest code, as a number."""
        if isinstance(self.num_bits, tuple):
            return next(row["max"] for row in _core.formats().values() if row["num_bits"] == self.num_bits)
        return float(2 ** (self.num_bits - 1 + self.unsigned) - 1)

    @property
    def step_size(self) -> Any:
        """amax over the largest code; None without an amax."""
        return None if self.amax is None else self.amax / np.float32(self.maxbound)

    @property
    def amax(self) -> np.ndarray | None:
        """float32, in the grain that the attributes ask for: one, by axis, by block; None before calibration."""
        return self.core.amax

    @amax.setter
    def amax(self, value: Any) -> None:
        self.core.amax = None if value is None else np.asarray(take(value, f"{self.name}: amax"), np.float32)

    @property
    def pre_quant_scale(self) -> np.ndarray | None:
        """float32 [columns] that arrays are multiplied by first."""
        return self.core.pre_quant_scale

    @pre_quant_scale.setter
    def pre_quant_scale(self, value: Any) -> None:
        self.core.pre_quant_scale = None if value is None else np.asarray(take(value, f"{self.name}: pre_quant_scale"), np.float32)

    # Calibration -------------------------------------------------------------------------------------------------------------------

    def reset_calibrator(self) -> None:
        """Forget what was seen."""
        self._maxima: np.ndarray | None = None
        self._pending = []
        kind = self.attributes.calibrator if isinstance(self.attributes.calibrator, str) else "max"
        self._statistics = _core.Calibrator("histogram", None, HISTOGRAM["num_bins"]) if kind == "histogram" else None

    def collect(self, x: Any) -> None:
        """Look at an array x, as it is. ValueError if NaN or infinity is in it."""
        library = self._library_for(x) if self._statistics is None else None
        if library is not None and (0 in x.shape or self._collect_there(library, x)):
            return
        array = take(x, self.name)
        if self._statistics is not None:
            self._statistics.collect(array)
        elif array.size:
            seen = np.asarray(stage_amax(self.attributes, self.as_rows(array)), np.float32)
            if not np.isfinite(seen).all():
                raise ValueError(f"{self.name}: NaN or infinity in an array of shape {list(array.shape)}")
            self.collect_maxima(seen)

    def collect_maxima(self, seen: np.ndarray) -> None:
        """Take note of magnitudes that were seen elsewhere, in the grain of amax."""
        self._maxima = seen if self._maxima is None else np.maximum(self._maxima, seen)

    def compute_amax(self, method: str = "entropy", **options: Any) -> np.ndarray | None:
        """What the calibration found; None if nothing passed. method: of histograms (entropy, percentile or mse)."""
        self._bring_over()
        if self._statistics is None:
            return self._maxima
        bits = self.num_bits if isinstance(self.num_bits, int) else 0
        settings = {**HISTOGRAM, **options}
        return self._statistics.compute_range(method, bits, self.unsigned, *(settings[name] for name in (
            "stride", "start_bin", "percentile", "skip_zeros")))

    def load_calib_amax(self, method: str = "entropy", **options: Any) -> None:
        """Take the range that was found, as amax; method and options as in `compute_amax`. ValueError if nothing passed."""
        found = self.compute_amax(method, **options)
        if found is None:
            raise ValueError(f"{self.name}: no array has passed while calibration was on")
        self.core.amax = np.asarray(found, np.float32)

    def reset_amax(self) -> None:
        """Forget the amax."""
        self.core.amax = None

    # Calls -------------------------------------------------------------------------------------------------------------------------

    def __call__(self, x: Any) -> Any:
        """x of any shape and framework, looked at or rounded as the switches say; framework, device, dtype and shape stay. ValueError: it
        was never calibrated, or NaN is in what it looks at."""
        prepares = self.core.pre_quant_scale is not None or bool(self.core.rotate)
        looks, rounds = self._if_calib and self.is_enabled, self._if_quant and self.is_enabled
        if not self.acts:
            return x
        library = self._library_for(x)
        if library is not None:
            return x if 0 in x.shape else self._call_there(library, x, prepares, looks, rounds)
        array = take(x, self.name)
        if array.size == 0:
            return x
        if looks:
            self.collect(without_rounding(self.core)(array) if prepares else array)
        if rounds:
            self._check_range()
            return give_back(self._as_it_came(self.core(self.as_rows(array)), array), x)
        return give_back(without_rounding(self.core)(array), x) if prepares else x

    def _call_there(self, library: Any, x: Any, prepares: bool, looks: bool, rounds: bool) -> Any:
        if looks:
            self.collect(self._round_there(library, x, True) if prepares else x)
        if rounds:
            self._check_range()
        return self._round_there(library, x, not rounds) if rounds or prepares else x

    @property
    def acts(self) -> bool:
        """Whether it looks at what it is given, or changes it."""
        return self.core.pre_quant_scale is not None or bool(self.core.rotate) or (self.is_enabled and (self._if_calib or self._if_quant))

    def _check_range(self) -> None:
        if self.needs_calibration and self.core.amax is None and not self._is_plain_cast:
            raise ValueError(f"{self.name}: no amax yet: calibrate first, or set amax")

    def as_rows(self, array: np.ndarray) -> np.ndarray:
        """As the core takes it: channels of an array that is no matrix (convolutions, vectors) are rows; where a cache [batch, heads,
        tokens, channels] has biases, the heads' channels are columns."""
        if self.attributes.bias is not None and array.ndim == 4:
            return array.swapaxes(1, 2).reshape(array.shape[0], array.shape[2], -1)
        return array.reshape(len(array), -1) if self.axis in (0, (0,)) and array.ndim not in (0, 2) else array

    def _as_it_came(self, rows: np.ndarray, array: np.ndarray) -> np.ndarray:
        if self.attributes.bias is not None and array.ndim == 4:
            batch, heads, tokens, channels = array.shape
            return np.ascontiguousarray(rows.reshape(batch, tokens, heads, channels).swapaxes(1, 2))
        return rows.reshape(array.shape)

    @property
    def _is_plain_cast(self) -> bool:
        return isinstance(self.num_bits, tuple) and self.block_sizes is None

    def prepared(self, x: Any) -> Any:
        """What would be rounded of an array x: times pre_quant_scale, rotated."""
        library = self._library_for(x)
        return give_back(without_rounding(self.core)(take(x, self.name)), x) if library is None else self._round_there(library, x, True)

    def gradient(self, gradient: Any, x: Any = None) -> Any:
        """The gradient of a loss by what was given, from that by what came out: straight through; with x, what was given, nothing passes
        where its magnitude is above amax. Arrays alike, of any framework."""
        core = self.core if x is not None else without_rounding(self.core)
        if x is None and core.pre_quant_scale is None and not core.rotate:
            return gradient
        library = self._library_for(gradient)
        if library is not None:
            return self._gradient_there(library, core, gradient, x)
        array = take(gradient, self.name)
        rows = self.as_rows(array)
        made = _core.straight_through(core, rows if x is None else self.as_rows(take(x, self.name)), rows)
        return give_back(self._as_it_came(made, array), gradient)

    # State -------------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, np.ndarray]:
        """What was found, float32 by name."""
        return {name: np.asarray(value) for name, value in found_values(self.core)[0]._asdict().items() if value is not None}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take what `state` gave. ValueError: a name that it never gives."""
        unknown = set(state) - set(STATE)
        if unknown:
            raise ValueError(f"{self.name}: unknown state {sorted(unknown)}: known are {', '.join(STATE)}")
        set_found_values(self.core, [Found(**{name: np.asarray(value, np.float32) for name, value in state.items()})])

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorQuantizer:
        made = type(self)(self.attributes, if_quant=self._if_quant, if_calib=self._if_calib, name=self.name)
        memo[id(self)] = made
        made.core.enabled, made.core.rotate = self.core.enabled, self.core.rotate
        set_found_values(made.core, found_values(self.core))
        self._bring_over()
        made._maxima = copy.copy(self._maxima)
        if self._statistics is not None and made._statistics is not None:
            made._statistics.load(self._statistics.save())
        return made

    def describe(self) -> str:
        """As Model Optimizer prints it."""
        from modelq.summary import describe_quantizer

        return describe_quantizer(self.attributes, self.core)

    def __repr__(self) -> str:
        return self.describe()
