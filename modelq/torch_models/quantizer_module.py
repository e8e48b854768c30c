"""Quantizers as torch modules: seen by named_modules(), kept by state_dict(), crossed by gradients."""
from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from modelq.arrays import give_back, take
from modelq.low_rank import LowRank
from modelq.nn.tensor_quantizer import STATE, TensorQuantizer
from modelq.quantizers import Sequential, core_quantizer, found_values, set_found_values

LOW_RANK = ("svdquant_lora_a", "svdquant_lora_b")       # down [rank, in] and up [out, rank], under Model Optimizer's names
SCALES = ("_scale", "_double_scale")                    # of a weight that `compress` packed


class QuantizerModule(TensorQuantizer, torch.nn.Module):
    """A TensorQuantizer in a model: seen by named_modules(), kept by state_dict() (`_amax`, `_pre_quant_scale`, ...)."""

    def __init__(self, quant_attribute_cfg: Any = None, amax: Any = None, if_quant: bool = True, if_calib: bool = False,
                 name: str = "quantizer"):
        torch.nn.Module.__init__(self)
        TensorQuantizer.__init__(self, quant_attribute_cfg, amax, if_quant, if_calib, name)
        for name in (*LOW_RANK, *SCALES):
            self.register_buffer(name, None)

    __call__ = torch.nn.Module.__call__         # its hooks are run

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(x, torch.Tensor) and x.requires_grad and torch.is_grad_enabled() and (self.acts or self.low_rank is not None):
            return _StraightThrough.apply(x, self)
        return self.compute(x)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """The same, without gradients."""
        if self.low_rank is None:
            return TensorQuantizer.__call__(self, x)
        rest = self.low_rank.taken_from(take(self.prepared(x), self.name))
        if self.rounds and self.is_enabled:
            plain = core_quantizer(self.attributes)
            set_found_values(plain, [found._replace(pre_quant_scale=None) for found in found_values(self.core)])
            rest = plain(rest)
        return give_back(rest, x)

    @property
    def masks_gradients(self) -> bool:
        """Whether no gradient passes where a magnitude is above the range."""
        rounds = self.rounds and self.is_enabled and self.amax is not None and self.low_rank is None
        return rounds and not self.attributes.pass_through_bwd

    @property
    def low_rank(self) -> LowRank | None:
        """A weight's branch of low rank (SVDQuant), which is taken from it before it is rounded."""
        down, up = (getattr(self, half) for half in LOW_RANK)
        return None if down is None else LowRank(take(down, LOW_RANK[0]), take(up, LOW_RANK[1]))

    @low_rank.setter
    def low_rank(self, branch: LowRank | None) -> None:
        for half, value in zip(LOW_RANK, branch or (None, None)):
            setattr(self, half, None if value is None else give_back(np.array(value), torch.empty(0)))

    def smoothed(self, x: torch.Tensor) -> torch.Tensor:
        """x times pre_quant_scale."""
        scale = self.pre_quant_scale
        return x if scale is None else x * torch.from_numpy(scale).to(x)

    def add_low_rank(self, made: torch.Tensor, x: torch.Tensor, input_quantizer: QuantizerModule) -> torch.Tensor:
        """made plus what the branch, if there is one, makes of x as it is smoothed."""
        down, up = (getattr(self, half) for half in LOW_RANK)
        if down is None:
            return made
        x = input_quantizer.smoothed(x)
        return made + torch.nn.functional.linear(torch.nn.functional.linear(x, down.to(x)), up.to(x))

    @property
    def rounds(self) -> bool:
        """Whether it rounds while it is on."""
        return self._if_quant

    @rounds.setter
    def rounds(self, value: bool) -> None:
        self._if_quant = value

    def describe_stages(self, name: str) -> list[tuple[str, str]]:
        """(name, line of a summary), one for each of several in a row."""
        return [(name, self.describe())]

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizerModule:
        made = super().__deepcopy__(memo)
        made.low_rank = self.low_rank
        for name in SCALES:
            setattr(made, name, copy.deepcopy(getattr(self, name)))
        made.train(self.training)
        return made

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, value in self.state().items():
            destination[f"{prefix}_{name}"] = torch.from_numpy(value.copy())
        destination.update({f"{prefix}{name}": getattr(self, name) for name in (*LOW_RANK, *SCALES) if getattr(self, name) is not None})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
                              unexpected_keys: list[str], error_msgs: list[str]) -> None:
        given = {name: state_dict[f"{prefix}_{name}"].cpu().numpy() for name in STATE if f"{prefix}_{name}" in state_dict}
        for name in (*LOW_RANK, *SCALES):
            setattr(self, name, state_dict.get(f"{prefix}{name}"))
        try:
            self.load_state(given)
        except (ValueError, TypeError) as error:
            error_msgs.append(f"{prefix}: {error}")


class SequentialQuantizer(torch.nn.Sequential):
    """Quantizers one after the other (INT4 blocks, then FP8), as one. What is asked of it, the first answers; all look at the array
    itself."""

    def __init__(self, *stages: QuantizerModule):
        super().__init__(*stages)

    @property
    def native(self) -> Any:
        return Sequential(tuple(stage.core for stage in self))

    @property
    def is_enabled(self) -> bool:
        return all(stage.is_enabled for stage in self)

    @property
    def needs_calibration(self) -> bool:
        return any(stage.needs_calibration for stage in self)

    @property
    def amax(self) -> Any:
        return self[0].amax

    @property
    def low_rank(self) -> LowRank | None:
        return self[0].low_rank     # type: ignore[no-any-return]

    @low_rank.setter
    def low_rank(self, branch: LowRank | None) -> None:
        self[0].low_rank = branch

    def add_low_rank(self, made: torch.Tensor, x: torch.Tensor, input_quantizer: QuantizerModule) -> torch.Tensor:
        return self[0].add_low_rank(made, x, input_quantizer)

    @property
    def pre_quant_scale(self) -> Any:
        return self[0].pre_quant_scale

    @pre_quant_scale.setter
    def pre_quant_scale(self, value: Any) -> None:
        self[0].pre_quant_scale = value

    @property
    def _scale(self) -> torch.Tensor | None:
        return self[0]._scale

    @_scale.setter
    def _scale(self, value: torch.Tensor | None) -> None:
        self[0]._scale = value

    @property
    def _double_scale(self) -> torch.Tensor | None:
        return self[0]._double_scale

    @_double_scale.setter
    def _double_scale(self, value: torch.Tensor | None) -> None:
        self[0]._double_scale = value

    @property
    def rounds(self) -> bool:
        return self[0].rounds

    @rounds.setter
    def rounds(self, value: bool) -> None:
        for stage in self:
            stage.rounds = value

    def collect(self, x: torch.Tensor) -> None:
        for stage in self:
            if stage.needs_calibration:
                stage.collect(x)

    def load_calib_amax(self) -> None:
        for stage in self:
            if stage.needs_calibration:
                stage.load_calib_amax()

    def enable(self) -> None:
        for stage in self:
            stage.enable()

    def disable(self) -> None:
        for stage in self:
            stage.disable()

    def reset_calibrator(self) -> None:
        for stage in self:
            stage.reset_calibrator()

    def reset_amax(self) -> None:
        for stage in self:
            stage.reset_amax()

    def describe_stages(self, name: str) -> list[tuple[str, str]]:
        return [(f"{name}.{index}", stage.describe()) for index, stage in enumerate(self)]


def make_quantizer(name: str, stages: Sequence[Any]) -> QuantizerModule | SequentialQuantizer:
    """A module for one place, by the attributes of each of its quantizers."""
    made = [QuantizerModule(attributes, name=name) for attributes in stages]
    return made[0] if len(made) == 1 else SequentialQuantizer(*made)


class _StraightThrough(torch.autograd.Function):
    """Rounded on the way in, as if it were not on the way back (Bengio et al. 2013), but for what is clipped if so wished."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, quantizer: QuantizerModule) -> torch.Tensor:
        ctx.quantizer, ctx.masks = quantizer, quantizer.masks_gradients
        ctx.save_for_backward(*[x] * ctx.masks)
        made: torch.Tensor = quantizer.compute(x.detach())
        return made.view_as(made) if made.data_ptr() == x.data_ptr() else made      # a view may not be changed in place

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.quantizer.gradient(gradient, *ctx.saved_tensors), None
