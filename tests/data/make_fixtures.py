"""Make tests/data/families: micro models with random weights and what transformers computes with them.

    pip install torch==2.13.0 transformers==5.17.0
    python tests/data/make_fixtures.py [FAMILY ...]

Per family: config.json and model.safetensors (bfloat16), and reference.npz with
  ids, left, right   int64 [2, 20] token ids; masks padded on the left and on the right; the first row is whole
  logits_left, logits_right            float32 [2, 20, V], with each mask, in float32
  amax_float32, amax_bfloat16          float32 [linears]: largest |input| of each linear over the tokens that `right` keeps,
                                       in a float32 and in a bfloat16 model; names: their modules, and ...mlp.experts.gate_up_proj for
                                       what reaches a layer's experts
"""
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

OUT = Path(__file__).parent / "families"
BASE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
CONFIGS = {
    "llama3": lambda: tf.LlamaConfig(**BASE, head_dim=16, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama_bias": lambda: tf.LlamaConfig(
        **BASE | {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 3}, head_dim=20, attention_bias=True, mlp_bias=True,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
    "mistral": lambda: tf.MistralConfig(**BASE, sliding_window=6),
    "qwen2": lambda: tf.Qwen2Config(**BASE),
    "mixtral": lambda: tf.MixtralConfig(**BASE, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **BASE, head_dim=12, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=20,
        norm_topk_prob=True, mlp_only_layers=[0]),
}


def build(config, seed=0):
    """Weights that are bfloat16 numbers, so that both computations start from the same."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((noise * 0.15 if parameter.ndim >= 2 else parameter + noise * 0.1).to(torch.bfloat16).float())
    return model


def masks(generator, shape):
    """(left, right), rows of different length; the first is whole."""
    lengths = torch.randint(shape[1] // 3, shape[1], (shape[0],), generator=generator)
    lengths[0] = shape[1]
    right = (torch.arange(shape[1])[None] < lengths[:, None]).long()
    return right.flip(1), right


def input_amax(model, ids, mask):
    """{linear's name: max |input| over the tokens that mask keeps}."""
    seen = {}

    def hook(name):
        return lambda module, args: seen.__setitem__(name, args[0].float().abs()[mask.bool()].max().item())
    named = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    named |= {f"{name}.experts.gate_up_proj": module for name, module in model.named_modules() if hasattr(module, "experts")}
    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in named.items()]
    model(ids, attention_mask=mask)
    for handle in hooks:
        handle.remove()
    return seen


def save_weights(model, folder):
    """In bfloat16, named as on disk (experts are stacked in memory)."""
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        tensors = load_file(Path(saved) / "model.safetensors")
    save_file({key: value.to(torch.bfloat16).contiguous() for key, value in tensors.items()}, folder / "model.safetensors")


def main():
    for name, make in CONFIGS.items():
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        folder = OUT / name
        folder.mkdir(parents=True, exist_ok=True)
        model = build(make())
        model.config.architectures = [type(model).__name__]
        model.config.to_json_file(folder / "config.json")
        save_weights(model, folder)
        generator = torch.Generator().manual_seed(7)
        ids = torch.randint(0, BASE["vocab_size"], (2, 20), generator=generator)
        left, right = masks(generator, ids.shape)
        with torch.no_grad():
            logits = [model(ids, attention_mask=mask).logits for mask in (left, right)]
            exact = input_amax(model, ids, right)
            rounded = input_amax(model.to(torch.bfloat16), ids, right)
        np.savez_compressed(folder / "reference.npz", ids=ids, left=left, right=right, logits_left=logits[0], logits_right=logits[1],
                            names=list(exact), amax_float32=np.array(list(exact.values()), np.float32),
                            amax_bfloat16=np.array(list(rounded.values()), np.float32))


if __name__ == "__main__":
    main()
