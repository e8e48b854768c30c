"""Quantizers in transformers' attention: queries, keys and values as its kernel gets them, behind the rotary embedding and the cache."""
from __future__ import annotations

import copy
import sys
from typing import Any

import torch

PREFIX = "modelq_"
CONFIG = "_config_before"       # of an intercepted module: the config that it had


def is_attention(module: torch.nn.Module) -> bool:
    """Whether a module dispatches through transformers' attention interface itself."""
    inner = any(type(child).__name__.endswith("Attention") for child in module.modules() if child is not module)
    return type(module).__name__.endswith("Attention") and not inner and hasattr(getattr(module, "config", None), "_attn_implementation")


def intercept(module: torch.nn.Module) -> None:
    """Let an attention module, which has quantizers, call them. Its config is a copy from then on, so that the model's own, and with it how
    masks are made, stays as it is."""
    from transformers import AttentionInterface

    used = module.config._attn_implementation
    AttentionInterface.register(PREFIX + used, _quantized_attention)
    object.__setattr__(module, CONFIG, module.config)
    module.config = copy.copy(module.config)
    module.config._attn_implementation_internal = PREFIX + used
    if module.config._attn_implementation != PREFIX + used:
        raise NotImplementedError(f"this version of transformers chooses attention kernels in another way ({used!r} cannot be replaced)")


def let_go(module: torch.nn.Module) -> None:
    """Undo it."""
    module.config = vars(module).pop(CONFIG)


def _quantized_attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any, **options: Any) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    query, key, value = module.q_bmm_quantizer(query), module.k_bmm_quantizer(key), module.v_bmm_quantizer(value)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    used = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation.removeprefix(PREFIX), eager)
    return used(module, query, key, value, *arguments, **options)
