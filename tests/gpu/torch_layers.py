"""Llama's layers in plain torch, bfloat16, the fastest way that torch itself has (F.scaled_dot_product_attention, F.rms_norm): what
bench_forward.py compares modelq's calibration forward with. Weights lie on the device; torch is not imported before it is called."""
from __future__ import annotations

from typing import Any

import numpy as np


class TorchLayers:
    """config: of config.json; tensors: bfloat16 arrays by their names in a checkpoint."""
    def __init__(self, config: dict, tensors: dict[str, np.ndarray], device: str) -> None:
        import torch

        self.torch, self.config, self.device = torch, config, device
        self.weights = {name: torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16).to(device)
                        for name, array in tensors.items() if name != "lm_head.weight"}
        self.head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]

    def rope(self, tokens: int) -> tuple[Any, Any]:
        """cos and sin (T, head_dim), as in transformers: made in float32, used in bfloat16."""
        torch = self.torch
        frequencies = self.config["rope_theta"] ** (-torch.arange(0, self.head_dim, 2, device=self.device).float() / self.head_dim)
        angles = torch.outer(torch.arange(tokens, device=self.device).float(), frequencies).repeat(1, 2)
        return angles.cos().bfloat16(), angles.sin().bfloat16()

    def turned(self, x: Any, rope: tuple[Any, Any]) -> Any:
        half = self.head_dim // 2
        return x * rope[0] + self.torch.cat((-x[..., half:], x[..., :half]), -1) * rope[1]

    def linear(self, name: str, x: Any) -> Any:
        if self.maxima is not None:
            self.maxima.setdefault(name, []).append(x.abs().amax())
        return self.torch.nn.functional.linear(x, self.weights[f"{name}.weight"])

    def layer(self, prefix: str, x: Any, rope: tuple[Any, Any]) -> Any:
        F, heads, shape = self.torch.nn.functional, self.config["num_attention_heads"], x.shape[:2]
        eps, width = self.config["rms_norm_eps"], x.shape[-1:]
        normed = F.rms_norm(x, width, self.weights[f"{prefix}.input_layernorm.weight"], eps)
        q, k, v = (self.linear(f"{prefix}.self_attn.{part}_proj", normed).view(*shape, -1, self.head_dim).transpose(1, 2) for part in "qkv")
        mixed = F.scaled_dot_product_attention(self.turned(q, rope), self.turned(k, rope), v, is_causal=True,
                                               enable_gqa=k.shape[1] != heads)
        x = x + self.linear(f"{prefix}.self_attn.o_proj", mixed.transpose(1, 2).reshape(*shape, -1))
        normed = F.rms_norm(x, width, self.weights[f"{prefix}.post_attention_layernorm.weight"], eps)
        gate, up = (self.linear(f"{prefix}.mlp.{part}_proj", normed) for part in ("gate", "up"))
        return x + self.linear(f"{prefix}.mlp.down_proj", F.silu(gate) * up)

    def __call__(self, ids: np.ndarray, calibrates: bool = False) -> Any:
        """Hidden states (B, T, C) behind the last layer of ids (B, T); calibrates: with the largest magnitude of each linear's input."""
        self.maxima: dict[str, list] | None = {} if calibrates else None
        with self.torch.inference_mode():
            x = self.weights["model.embed_tokens.weight"][self.torch.from_numpy(ids).to(self.device)]
            rope = self.rope(ids.shape[1])
            for i in range(self.config["num_hidden_layers"]):
                x = self.layer(f"model.layers.{i}", x, rope)
        return x

    def wait(self) -> None:
        if self.device != "cpu":
            self.torch.cuda.synchronize()
