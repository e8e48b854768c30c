"""A model for the exporter with golden's calibration in place of a forward: what modelq.load gives, without the runtime."""
from types import SimpleNamespace

import numpy as np
from modelq.checkpoint import open_checkpoint

SITES = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
SETTINGS = {
    "FP8_DEFAULT_CFG": {"weight": dict(scheme="fp8", num_bits=(4, 3), block_sizes=None)},
    "NVFP4_DEFAULT_CFG": {"weight": dict(scheme="nvfp4", num_bits=(2, 1), block_sizes={-1: 16})},
}


class StubModel:
    """As much of modelq.Model as the exporter uses. amax: quantizer name to value, as golden/*/amax.safetensors has it."""
    float32_weights = False

    def __init__(self, source, config, amax):
        self.checkpoint = open_checkpoint(source)
        self.config = self.checkpoint.config
        self.modules = list(modules_of(self.checkpoint))
        self.quantizers = {}
        for name, value in amax.items():
            module, _, what = name.removesuffix(".amax").rpartition(".")
            if name.endswith("_quantizer.amax") and what in ("weight_quantizer", "input_quantizer"):
                self.quantizers[f"{module}.{what}"] = SimpleNamespace(enabled=True, amax=np.asarray(value), second_divisor=0.0,
                                                                             **SETTINGS[config]["weight"])


def modules_of(checkpoint):
    for name, info in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if len(info.shape) == 2:
            last = module.rpartition(".")[2]
            layer = int(module.split(".")[2]) if ".layers." in module else -1
            kind = "embedding" if last == "embed_tokens" else "linear"
            yield dict(name=module, kind=kind, layer=layer, shape=info.shape, weight=name, bias=None, site=SITES.get(last, -1))
    if "lm_head.weight" not in checkpoint.tensors and "model.embed_tokens.weight" in checkpoint.tensors:
        shape = checkpoint.tensors["model.embed_tokens.weight"].shape
        yield dict(name="lm_head", kind="linear", layer=-1, shape=shape, weight="model.embed_tokens.weight", bias=None, site=-1)
