"""Quantized experts of vLLM in PyTorch, for a CPU: its own kernels for them want AMX, or a GPU.

The parameters are made, and filled from the checkpoint, by vLLM; here is only what computes with them. Each expert's weights and inputs
are taken by the scales that were loaded for it. Written for vLLM 0.32.
"""
from __future__ import annotations

from importlib import import_module

import torch
from torch.nn.functional import linear, silu


class Modular:
    """Stands for a kernel's class: experts are chosen by vLLM's router, before."""
    @staticmethod
    def is_monolithic():
        return False


def emulate_experts():
    import vllm.model_executor.layers.quantization.modelopt as modelopt
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
    from vllm.model_executor.layers.fused_moe.oracle.int8 import Int8MoeBackend
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend

    package = "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_"
    ct_nvfp4, ct_fp8, ct_int8, ct_int4 = (import_module(package + name) for name in ("w4a4_nvfp4", "w8a8_fp8", "w8a8_int8", "wna16"))
    for module, backend, method, experts in (
            (modelopt, Fp8MoeBackend.TRITON, modelopt.ModelOptFp8MoEMethod, Fp8Experts),
            (modelopt, NvFp4MoeBackend.EMULATION, modelopt.ModelOptNvFp4FusedMoE, Nvfp4Experts),
            (ct_fp8, Fp8MoeBackend.TRITON, ct_fp8.CompressedTensorsW8A8Fp8MoEMethod, Fp8Experts),
            (ct_nvfp4, NvFp4MoeBackend.EMULATION, ct_nvfp4.CompressedTensorsW4A4Nvfp4MoEMethod, ReciprocalNvfp4Experts),
            (ct_int8, Int8MoeBackend.CPU, ct_int8.CompressedTensorsW8A8Int8MoEMethod, Int8Experts),
            (ct_int4, WNA16MoEBackend.CPU, ct_int4.CompressedTensorsWNA16MoEMethod, Int4Experts)):
        select = f"select_{type(backend).__name__.lower().removesuffix('moebackend')}_moe_backend"
        assert hasattr(module, select)
        setattr(module, select, lambda *args, found=backend, **kwargs: (found, Modular))
        method.process_weights_after_loading = lambda self, layer: None     # what the checkpoint filled stays as it is
        method.apply = applied(experts())
        method.get_fused_moe_quant_config = lambda self, layer: None


def applied(experts):
    def apply(self, layer, x, topk_weights, topk_ids, *args, **kwargs):
        return forward(experts, layer, x, topk_weights, topk_ids)
    return apply


def forward(experts, layer, x, topk_weights, topk_ids):
    """[tokens, hidden]."""
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in topk_ids.unique().tolist():
        token, place = (topk_ids == expert).nonzero(as_tuple=True)
        seen, share = x[token], topk_weights[token, place][:, None]
        if layer.apply_router_weight_on_input:
            seen = (seen * share).to(x.dtype)
        inner = activate(layer, experts.product(layer, "w13", expert, seen))
        made = experts.product(layer, "w2", expert, inner).float()
        out.index_add_(0, token, made if layer.apply_router_weight_on_input else made * share.float())
    return out.to(x.dtype)


def activate(layer, both):
    assert layer.activation.value == "silu", layer.activation
    gate, up = both.chunk(2, dim=-1)
    return silu(gate) * up


class Experts:
    def product(self, layer, matrix, expert, x):
        weight = torch.cat([self.weight(layer, matrix, expert, rows, part) for rows, part in halves(layer, matrix)])
        return linear(self.seen(layer, matrix, expert, x).to(x.dtype), weight.to(x.dtype))


def halves(layer, matrix):
    """(rows, number of their scale): gate and up have their own."""
    if matrix == "w2":
        return [(slice(None), 0)]
    rows = (layer.w13_weight if hasattr(layer, "w13_weight") else layer.w13_weight_packed).shape[1] // 2
    return [(slice(0, rows), 0), (slice(rows, None), 1)]


def part_of(scales, expert, part):
    found = scales[expert].reshape(-1)
    return found[min(part, len(found) - 1)].float()


class Fp8Experts(Experts):
    def weight(self, layer, matrix, expert, rows, part):
        scale = getattr(layer, f"{matrix}_weight_scale")
        scale = scale[expert][rows] if scale.ndim == 3 else part_of(scale, expert, part)
        return getattr(layer, f"{matrix}_weight")[expert][rows].float() * scale

    def seen(self, layer, matrix, expert, x):
        scale = getattr(layer, f"{matrix}_input_scale", None)
        scale = x.float().abs().amax(dim=-1, keepdim=True) / 448 if scale is None else part_of(scale, expert, 0)
        return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


class Nvfp4Experts(Experts):
    WEIGHT, SECOND, INPUT, RECIPROCAL = "weight", "weight_scale_2", "input_scale", False

    def weight(self, layer, matrix, expert, rows, part):
        from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype

        second = self.number(layer, f"{matrix}_{self.SECOND}", expert, part)
        return dequantize_to_dtype(getattr(layer, f"{matrix}_{self.WEIGHT}")[expert][rows].view(torch.uint8),
                                   getattr(layer, f"{matrix}_weight_scale")[expert][rows], second, torch.bfloat16, 16, swizzle=False)

    def seen(self, layer, matrix, expert, x):
        from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import ref_nvfp4_quant_dequant

        if not hasattr(layer, f"{matrix}_{self.INPUT}"):
            return x
        return ref_nvfp4_quant_dequant(x, 1 / self.number(layer, f"{matrix}_{self.INPUT}", expert, 0), 16)

    def number(self, layer, name, expert, part):
        found = part_of(getattr(layer, name), expert, part)
        return 1 / found if self.RECIPROCAL else found


class ReciprocalNvfp4Experts(Nvfp4Experts):
    WEIGHT, SECOND, INPUT, RECIPROCAL = "weight_packed", "weight_global_scale", "input_global_scale", True


class Int8Experts(Experts):
    def weight(self, layer, matrix, expert, rows, part):
        scale = getattr(layer, f"{matrix}_weight_scale")[expert][rows].float()
        return getattr(layer, f"{matrix}_weight")[expert][rows].float() * scale

    def seen(self, layer, matrix, expert, x):
        scale = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-10) / 127
        return (x.float() / scale).round().clamp(-128, 127) * scale


class Int4Experts(Experts):
    def weight(self, layer, matrix, expert, rows, part):
        packed = getattr(layer, f"{matrix}_weight_packed")[expert][rows]
        codes = (packed[..., None] >> torch.arange(0, 32, 4)) & 15
        scale = getattr(layer, f"{matrix}_weight_scale")[expert][rows].float()
        codes = (codes.reshape(len(packed), scale.shape[-1], -1) - 8).float() * scale[..., None]
        return codes.reshape(len(packed), -1)

    def seen(self, layer, matrix, expert, x):
        return x
