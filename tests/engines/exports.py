"""The exports that engines are asked to load: one row per configuration and dialect, and who loads it how.

transformers: "dequantize" (weights are decompressed on loading), "modules" (compressed-tensors' own modules, which fake-quantize
activations) or None. vllm: "plain" (as it is on a CPU), "emulate" (with its reference kernels, see run_vllm.py) or None. What is not
here runs on no CPU build of an engine; `modelq verify` checks it.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Export:
    config: str
    dialect: str = "modelopt"
    transformers: str | None = None
    vllm: str | None = None
    quantization: str = ""          # what vLLM calls it
    kv_cache: str = "auto"          # and the type of its cache
    activations: bool = True        # whether activations are quantized too
    near: float = 2e-4              # how far transformers' logits may be from ours, as a share of the largest
    dtype: str = "float32"          # in which transformers computes
    flag: str = ""                  # of the processor, without which vLLM cannot

    def __str__(self) -> str:
        return f"{self.dialect}-{self.config}"


CT = "compressed-tensors"
BFLOAT16 = 5e-3     # compressed-tensors dequantizes NVFP4 to bfloat16, whatever the model's type
STEPS = 0.15       # its modules for 4-bit and MX formats compute in bfloat16 only, which moves some activations by a quantization step
EXPORTS = [
    Export("FP8_DEFAULT_CFG", vllm="emulate", quantization="modelopt"),
    Export("FP8_DEFAULT_CFG+FP8_KV_CFG", vllm="emulate", quantization="modelopt", kv_cache="fp8_e4m3"),
    Export("FP8_PER_CHANNEL_PER_TOKEN_CFG", vllm="plain", quantization="modelopt"),
    Export("NVFP4_DEFAULT_CFG", vllm="emulate", quantization="modelopt_fp4"),
    Export("W4A16_NVFP4_CFG", vllm="emulate", quantization="modelopt_fp4", activations=False),
    Export("MXFP8_DEFAULT_CFG", vllm="emulate", quantization="modelopt_mxfp8"),
    Export("NVFP4_DEFAULT_CFG+FP8_KV_CFG", vllm="emulate", quantization="modelopt_fp4", kv_cache="fp8_e4m3"),
    Export("NVFP4_MLP_ONLY_CFG", vllm="emulate", quantization="modelopt_fp4"),
    Export("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", vllm="plain", quantization="modelopt", flag="amx_bf16"),
    Export("MIXED", vllm="emulate", quantization="modelopt_mixed"),

    Export("FP8_DEFAULT_CFG", CT, "dequantize", "emulate", CT),
    Export("FP8_DEFAULT_CFG", CT, "modules"),
    Export("FP8_DEFAULT_CFG+FP8_KV_CFG", CT, "modules"),
    Export("FP8_PER_CHANNEL_PER_TOKEN_CFG", CT, "modules"),
    Export("INT8_DEFAULT_CFG", CT, "modules"),
    Export("NVFP4_DEFAULT_CFG", CT, "modules", near=STEPS, dtype="bfloat16"),
    Export("MXFP8_DEFAULT_CFG", CT, "modules", near=STEPS, dtype="bfloat16"),
    Export("MXFP4_DEFAULT_CFG", CT, "modules", near=STEPS, dtype="bfloat16"),
    Export("MIXED", CT, "modules", "emulate", CT, near=STEPS, dtype="bfloat16"),
    Export("FP8_PER_CHANNEL_PER_TOKEN_CFG", CT, "dequantize", "plain", CT),
    Export("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", CT, "dequantize", "plain", CT, flag="amx_bf16"),
    Export("NVFP4_DEFAULT_CFG", CT, "dequantize", "emulate", CT, near=BFLOAT16),
    Export("W4A16_NVFP4_CFG", CT, "dequantize", "emulate", CT, activations=False, near=BFLOAT16),
    Export("MXFP8_DEFAULT_CFG", CT, "dequantize", "emulate", CT),
    Export("MXFP4_DEFAULT_CFG", CT, "dequantize"),
    Export("INT8_DEFAULT_CFG", CT, "dequantize", "plain", CT),
    Export("INT8_WEIGHT_ONLY_CFG", CT, "dequantize"),
    Export("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", CT, "dequantize", "plain", CT, activations=False),
    Export("FP8_DEFAULT_CFG+FP8_KV_CFG", CT, "dequantize", "emulate", CT, kv_cache="fp8"),

    Export("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "autoawq", vllm="plain", quantization="awq", activations=False),
    Export("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "gptq", vllm="plain", quantization="auto_gptq", activations=False),
    Export("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "fp8", "dequantize", "plain", "fp8", flag="amx_bf16"),
    Export("MXFP8_DEFAULT_CFG", "fp8", "dequantize"),
]

# What every family is exported in.
FAMILY_EXPORTS = [
    Export("FP8_DEFAULT_CFG", vllm="emulate", quantization="modelopt"),
    Export("NVFP4_DEFAULT_CFG", vllm="emulate", quantization="modelopt_fp4"),
    Export("FP8_DEFAULT_CFG", CT, "dequantize", "emulate", CT),
    Export("INT8_DEFAULT_CFG", CT, "dequantize", "emulate", CT),
    Export("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", CT, "dequantize", "emulate", CT, activations=False),
    Export("NVFP4_DEFAULT_CFG", CT, "dequantize", near=BFLOAT16),
]
