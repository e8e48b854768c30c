"""A small Llama of random weights whose sizes every engine's CPU kernels take: multiples of 128, heads of 64.

Weights are written by the safetensors library. Rows and columns differ in size (log-normal factors), so that scales in the wrong
order, direction or place change the tokens.
"""
import json
from pathlib import Path

import numpy as np

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCABULARY = 256, 512, 4, 2, 64, 2, 256
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "dtype": "bfloat16", "torch_dtype": "bfloat16",
    "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 1,
}

SPREAD = 0.2    # of the logarithms of the factors of rows and columns
LINEARS = [     # name, rows, columns, gain: small enough that a rounding error stays one, large enough that every linear decides tokens
    ("self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN, 0.7), ("self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN, 0.7),
    ("self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN, 1), ("self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM, 0.4),
    ("mlp.gate_proj", INTERMEDIATE, HIDDEN, 1), ("mlp.up_proj", INTERMEDIATE, HIDDEN, 1), ("mlp.down_proj", HIDDEN, INTERMEDIATE, 0.4),
]


def write_model(folder: Path, seed: int = 7, dtype: str = "bfloat16") -> Path:
    """Make the folder with config.json and model.safetensors; returns it."""
    import ml_dtypes
    from safetensors import TensorSpec, serialize_file

    folder.mkdir(parents=True)
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in _weights(np.random.default_rng(seed)).items()}
    specs = {name: TensorSpec(dtype="bfloat16", shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes)
             for name, array in tensors.items()}
    serialize_file(specs, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | {"dtype": dtype, "torch_dtype": dtype}, indent=2))
    return folder


def _weights(random: np.random.Generator) -> dict[str, np.ndarray]:
    def linear(rows: int, columns: int, gain: float) -> np.ndarray:
        weight = random.standard_normal((rows, columns)) * np.exp(SPREAD * random.standard_normal((rows, 1)))
        return gain * weight * np.exp(SPREAD * random.standard_normal((1, columns))) / np.sqrt(columns)

    def norm() -> np.ndarray:
        return np.exp(SPREAD * random.standard_normal(HIDDEN))

    tensors = {"model.embed_tokens.weight": random.standard_normal((VOCABULARY, HIDDEN)), "model.norm.weight": norm(),
               "lm_head.weight": linear(VOCABULARY, HIDDEN, 4)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        tensors |= {prefix + "input_layernorm.weight": norm(), prefix + "post_attention_layernorm.weight": norm()}
        for name, rows, columns, gain in LINEARS:
            tensors[f"{prefix}{name}.weight"] = linear(rows, columns, gain)
    return tensors
