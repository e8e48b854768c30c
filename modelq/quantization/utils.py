"""`modelq.quantization.utils`: helpers on configs that scripts import from there."""
from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any


def update_quant_cfg_with_kv_cache_quant(quant_cfg: dict[str, Any], kv_cache_quant_cfg: Sequence[Any]) -> dict[str, Any]:
    """A copy of a whole config with the rules kv_cache_quant_cfg of a KV-cache config (its "quant_cfg" list) appended, and printed.

    A config without rules of its own gets "all off" first; one without an algorithm gets "max".
    """
    config = copy.deepcopy(quant_cfg)
    config["quant_cfg"] = list(config.get("quant_cfg") or [{"quantizer_name": "*", "enable": False}]) + copy.deepcopy(
        list(kv_cache_quant_cfg))
    config["algorithm"] = config.get("algorithm") or "max"
    print(f"Updated quant_cfg with KV cache quantization: {config}")
    return config
