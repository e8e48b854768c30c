"""The calibration algorithms a config may name, with their settings and defaults (Model Optimizer 0.47's; rotate, histogram, entropy,
percentile and the last three settings of gptq are ours).

An `algorithm` is None (no calibration), a name, a dictionary {"method": name, **settings}, or a list of these, run in order.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_LAYERWISE = {"enable": False, "get_qdq_activations_from_prev_layer": False, "checkpoint_dir": None, "save_every": 1,
              "calib_mutates_weights": True}
_COMMON = {"moe_calib_experts_ratio": None, "layerwise": _LAYERWISE}
_SEARCH = {"step_size": 0.1, "start_multiplier": 0.25, "stop_multiplier": 4.0, "distributed_sync": True, "shared_states": None}
_AWQ_LITE = {"alpha_step": 0.1, "debug": False}
_AWQ_CLIP = {"max_co_batch_size": 1024, "max_tokens_per_batch": 64, "min_clip_ratio": 0.5, "shrink_step": 0.05, "debug": False}

HISTOGRAM = {"percentile": 99.99, "num_bins": 2048, "start_bin": 128, "stride": 1, "skip_zeros": False}

METHODS: dict[str, dict[str, Any]] = {
    "max": {"distributed_sync": True, "sync_expert_weight_amax": False, "skip_forward_without_activation_calib": False,
            "shared_states": None},
    "mse": {**_SEARCH, "fp8_scale_sweep": False},
    "local_hessian": {**_SEARCH, "fp8_scale_sweep": True, "block_size": 16, "debug": False},
    "smoothquant": {"alpha": 1.0},
    "awq_lite": _AWQ_LITE,
    "awq_clip": _AWQ_CLIP,
    "awq_full": {**_AWQ_LITE, **_AWQ_CLIP},
    "svdquant": {"lowrank": 32, "skip_layers": None},
    "gptq": {"perc_damp": 0.01, "block_size": 128, "fused": False, "act_order": False, "static_groups": True, "scale_algorithm": None},
    "rotate": {"seed": 0, "residual": True, "values": True},
    "histogram": {"range_method": "entropy", **HISTOGRAM},
    "entropy": HISTOGRAM,
    "percentile": HISTOGRAM,
    "nvfp4_act_headroom": {"anchor_percentile": 1.0, "upper_percentile": 99.99, "rho": 16384.0,
                           "weight_scale_algorithm": {"method": "max"}},
    "lsq": {"learnable_amax": ["post"], "tied_amax": False, "quantize_pre_scale": True, "scale_algorithm": None},
}

# Setting: (what is allowed, in words; the test). None passes wherever the default is None.
_RANGES: dict[str, tuple[str, Any]] = {
    "moe_calib_experts_ratio": ("in (0, 1]", lambda v: 0 < v <= 1),
    "alpha": ("in [0, 1]", lambda v: 0 <= v <= 1),
    "alpha_step": ("in (0, 1]", lambda v: 0 < v <= 1),
    "step_size": ("above 0", lambda v: v > 0),
    "start_multiplier": ("above 0", lambda v: v > 0),
    "stop_multiplier": ("above 0", lambda v: v > 0),
    "block_size": ("above 0", lambda v: v > 0),
    "min_clip_ratio": ("in (0, 1)", lambda v: 0 < v < 1),
    "shrink_step": ("in (0, 1]", lambda v: 0 < v <= 1),
    "lowrank": ("above 0", lambda v: v > 0),
    "perc_damp": ("above 0", lambda v: v > 0),
    "anchor_percentile": ("in (0, 100]", lambda v: 0 < v <= 100),
    "upper_percentile": ("in (0, 100]", lambda v: 0 < v <= 100),
    "rho": ("in (0, 28672)", lambda v: 0 < v < 28672),
    "save_every": ("at least 1", lambda v: v >= 1),
    "percentile": ("in (0, 100]", lambda v: 0 < v <= 100),
    "num_bins": ("from 2 to 65536", lambda v: 2 <= v <= 65536),
    "start_bin": ("at least 1", lambda v: v >= 1),
    "stride": ("at least 1", lambda v: v >= 1),
    "seed": ("at least 0", lambda v: v >= 0 and v == int(v)),
}
_AMAX_ONLY = {"max", "mse", "local_hessian"}


def normalize_algorithm(algorithm: Any) -> list[dict[str, Any]]:
    """The steps to run, in order, each {"method": name or None, **every setting with its value}.

    Raises ValueError for an unknown method or setting, a value out of range, or a list inside a list.
    """
    if isinstance(algorithm, (list, tuple)):
        for step in algorithm:
            if isinstance(step, (list, tuple)):
                raise ValueError(f"algorithm: a list of steps cannot hold another list: {algorithm!r}")
        return [step for item in algorithm for step in normalize_algorithm(item)]
    if algorithm is None:
        return []
    if isinstance(algorithm, str):
        algorithm = {"method": algorithm}
    if not isinstance(algorithm, Mapping):
        raise ValueError(f"algorithm must be None, a name, a dictionary or a list of these, got {algorithm!r}")
    return [_one_step(dict(algorithm))] if algorithm.get("method") is not None else []


def split_rotation(algorithm: Any) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """(the step "rotate", if the algorithm starts with it; the steps behind it: maxima if there are none). ValueError if it comes later."""
    steps = normalize_algorithm(algorithm)
    rotation = steps.pop(0) if steps and steps[0]["method"] == "rotate" else None
    if any(step["method"] == "rotate" for step in steps):
        raise ValueError("algorithm 'rotate' changes every weight, so it comes once, before the others: [\"rotate\", \"max\"], say")
    if rotation is not None and not rotation["residual"] and not rotation["values"]:
        raise ValueError("algorithm 'rotate': neither residual nor values: nothing is left to rotate")
    return rotation, steps if rotation is None or steps else normalize_algorithm("max")


def _one_step(given: dict[str, Any]) -> dict[str, Any]:
    method = given.pop("method")
    if method not in METHODS:
        raise ValueError(f"unknown calibration method {method!r}: known are {', '.join(METHODS)}")
    known = {**METHODS[method], **_COMMON}
    _refuse_unknown(f"algorithm {method!r}", given, known)
    layerwise = given.pop("layerwise", None) or {}
    _refuse_unknown(f"algorithm {method!r}, layerwise", layerwise, _LAYERWISE)
    defaults = {**_LAYERWISE, "get_qdq_activations_from_prev_layer": method == "gptq"}
    step = {"method": method, **known, **given, "layerwise": {**defaults, **layerwise}}
    for name, value in [*step.items(), *step["layerwise"].items()]:
        _check_range(method, name, value, known.get(name))
    _check_layerwise(method, step["layerwise"])
    _check_ranges_and_scales(step)
    _check_shared_states(step.get("shared_states"))
    return step


def _refuse_unknown(where: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: expected a dictionary, got {given!r}")
    for name in given:
        if name not in known:
            raise ValueError(f"{where}: unknown setting {name!r}: known are {', '.join(known)}")


def _check_range(method: str, name: str, value: Any, default: Any) -> None:
    if name not in _RANGES or (value is None and default is None):
        return
    words, allowed = _RANGES[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not allowed(value):
        raise ValueError(f"algorithm {method!r}: {name} must be a number {words}, got {value!r}")


def _check_ranges_and_scales(step: Mapping[str, Any]) -> None:
    if step.get("range_method", "entropy") not in ("entropy", "percentile", "mse"):
        raise ValueError(f"algorithm 'histogram': range_method must be entropy, percentile or mse, got {step['range_method']!r}")
    if step["method"] != "gptq":
        return
    scales = normalize_algorithm(step["scale_algorithm"])
    if len(scales) > 1 or any(scale["method"] not in _AMAX_ONLY for scale in scales):
        raise ValueError(f"algorithm 'gptq': scale_algorithm is None, max, mse or local_hessian, got {step['scale_algorithm']!r}")
    if step["act_order"] and not step["static_groups"]:
        raise ValueError("algorithm 'gptq': act_order needs static_groups: a block's columns come far apart")


def _check_layerwise(method: str, layerwise: Mapping[str, Any]) -> None:
    if layerwise["checkpoint_dir"] is not None and not layerwise["enable"]:
        raise ValueError(f"algorithm {method!r}: layerwise.checkpoint_dir needs layerwise.enable to be true")
    if not layerwise["calib_mutates_weights"] and method not in _AMAX_ONLY:
        raise ValueError(f"algorithm {method!r} changes weights, so layerwise.calib_mutates_weights cannot be false")


def _check_shared_states(states: Any) -> None:
    for name, state in (states or {}).items():
        if name != "weight_global_amax" or set(state) - {"patterns"}:
            raise ValueError(f"shared_states: expected {{'weight_global_amax': {{'patterns': [...]}}}}, got {{{name!r}: {state!r}}}")
        for pattern in state.get("patterns", []):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"shared_states: invalid pattern {pattern!r}: {error}") from error
