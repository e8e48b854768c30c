"""auto_quantize: the best format for every layer within a budget of bits."""
from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from modelq.autoquantize.candidates import METHODS, Steps
from modelq.autoquantize.costs import BITS, Constraints
from modelq.autoquantize.recipes import parse_recipes
from modelq.autoquantize.replay import get_auto_quantize_config
from modelq.autoquantize.search import Request, search, take_batches
from modelq.calibration import COMPAT
from modelq.config import QuantizeConfig
from modelq.torch_models import is_torch_model

__all__ = ["auto_quantize", "get_auto_quantize_config"]


def auto_quantize(model: Any, constraints: Any = None, quantization_formats: Any = None, data_loader: Any = None,
                  forward_step: Callable[[Any, Any], Any] | None = None, loss_func: Callable[[Any, Any], Any] | None = None,
                  forward_backward_step: Callable[[Any, Any], Any] | None = None, disabled_layers: Any = None, num_calib_steps: int = 512,
                  num_score_steps: int = 128, verbose: bool = False, method: str = "gradient", checkpoint: Any = None, *,
                  kv_cache_cfg: Any = None, bits: str = "effective", compat: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Choose a format for every layer such that the loss grows least, quantize the model so, and return (model, state).

    constraints: {"effective_bits": mean bits of a weight at most (4.8), "cost_model": "weight" or "active_moe", "cost": {...}}.
    quantization_formats: configs or names of presets; None among them, and no quantization, is always a choice. data_loader: batches for
    calibration and scores. forward_step(model, batch) -> output; loss_func(output, batch) -> loss (of a native model the mean cross-entropy
    of the labels: output.loss), or, for torch modules, forward_backward_step(model, batch) that does both. disabled_layers: patterns of
    modules that stay as they are; lm_head is one to name. num_calib_steps, num_score_steps: how many batches. method: "gradient", or
    "kl_div", which needs forward_step only (logits, or an output that has them).
    checkpoint: a folder that keeps calibration and scores: an interrupted search goes on, another budget takes the same scores.
    kv_cache_cfg: a config whose rules for keys and values are calibrated and added (mtq.FP8_KV_CFG). bits: "effective" counts as Model
    Optimizer does, "stored" what a checkpoint stores, scales of blocks included. verbose: print what was chosen. compat: as in `quantize`.

    state: method, candidate_stats (by group: formats, scores, costs), best (recipe, constraints, score), and what
    `get_auto_quantize_config` needs to choose again for another budget; plain JSON. If anything raises, the model is as it was.
    ValueError: a budget that cannot be met, no format or one twice, a pattern that fits no layer, a loss that is NaN.
    """
    _check(method, num_calib_steps, num_score_steps, bits, compat)
    recipes = parse_recipes(quantization_formats)
    steps = _steps(method, forward_step, loss_func, forward_backward_step)
    subject = _subject(model, compat)
    request = Request(Constraints.parse(constraints, subject.config), recipes, steps,
                      take_batches(data_loader, max(num_calib_steps, num_score_steps)), num_calib_steps, num_score_steps, disabled_layers,
                      checkpoint, bits, None if kv_cache_cfg is None else QuantizeConfig.parse(kv_cache_cfg), verbose)
    return model, search(subject, request)


def _check(method: Any, num_calib_steps: Any, num_score_steps: Any, bits: Any, compat: Any) -> None:
    for name, value, allowed in (("method", method, METHODS), ("bits", bits, BITS), ("compat", compat, COMPAT)):
        if value not in allowed:
            raise ValueError(f"auto_quantize: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    for name, value in (("num_calib_steps", num_calib_steps), ("num_score_steps", num_score_steps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"auto_quantize: {name} must be a number of batches of at least 1, got {value!r}")


def _steps(method: str, forward_step: Any, loss_func: Any, forward_backward_step: Any) -> Steps:
    if not callable(forward_step):
        raise ValueError("auto_quantize needs forward_step(model, batch), which calls the model on a batch and returns its output")
    if method == "gradient" and loss_func is None and forward_backward_step is None:
        raise ValueError("auto_quantize: method 'gradient' needs loss_func(output, batch) or forward_backward_step(model, batch); "
                         "method='kl_div' needs neither")
    if method == "kl_div" and (loss_func is not None or forward_backward_step is not None):
        warnings.warn("auto_quantize: method 'kl_div' takes no loss: loss_func and forward_backward_step are not called", UserWarning,
                      stacklevel=3)
    return Steps(method, forward_step, loss_func, forward_backward_step)


def _subject(model: Any, compat: str | None) -> Any:
    if is_torch_model(model):
        from modelq.torch_models.auto_quantize import TorchSubject

        return TorchSubject(model, compat)
    from modelq.quantization.auto_native import NativeSubject

    return NativeSubject(model, compat)
