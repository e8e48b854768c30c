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

    def __str__(self) -> str:
        return f"{self.dialect}-{self.config}"


EXPORTS = [
    Export("FP8_DEFAULT_CFG", vllm="emulate", quantization="modelopt"),
    Export("NVFP4_DEFAULT_CFG", vllm="emulate", quantization="modelopt_fp4"),
]
