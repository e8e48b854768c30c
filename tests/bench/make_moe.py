"""A made-up checkpoint with as many layers and experts as DeepSeek-R1 has, narrow ones: random weights, in several shards.

    python tests/bench/make_moe.py FOLDER [--family deepseek_v3|qwen3_moe] [--gib 11] [--dtype bfloat16|fp8] [--layers 61] [--experts 256]

deepseek_v3: config.json and tensor names as of DeepSeek-R1 (latent attention, three dense layers first, one shared expert, a layer that
predicts a second token); qwen3_moe: as many layers and experts under that family's names. --gib sets the widths. fp8: linears in
blocks of 128 x 128 with weight_scale_inv, as DeepSeek publishes.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
VOCABULARY, HEADS, BLOCK = 8192, 8, 128
Shapes = Iterator[tuple[str, tuple[int, ...]]]
DEEPSEEK = dict(q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64)


def experts_of(prefix: str, experts: int, hidden: int, inner: int) -> Shapes:
    for expert in range(experts):
        yield from gated(f"{prefix}.experts.{expert}", hidden, inner)
    yield f"{prefix}.gate.weight", (experts, hidden)


def gated(prefix: str, hidden: int, inner: int) -> Shapes:
    yield f"{prefix}.gate_proj.weight", (inner, hidden)
    yield f"{prefix}.up_proj.weight", (inner, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, inner)


def latent_attention(prefix: str, hidden: int) -> Shapes:
    sizes = DEEPSEEK
    query = sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"]
    yield f"{prefix}.q_a_proj.weight", (sizes["q_lora_rank"], hidden)
    yield f"{prefix}.q_a_layernorm.weight", (sizes["q_lora_rank"],)
    yield f"{prefix}.q_b_proj.weight", (HEADS * query, sizes["q_lora_rank"])
    yield f"{prefix}.kv_a_proj_with_mqa.weight", (sizes["kv_lora_rank"] + sizes["qk_rope_head_dim"], hidden)
    yield f"{prefix}.kv_a_layernorm.weight", (sizes["kv_lora_rank"],)
    yield f"{prefix}.kv_b_proj.weight", (HEADS * (sizes["qk_nope_head_dim"] + sizes["v_head_dim"]), sizes["kv_lora_rank"])
    yield f"{prefix}.o_proj.weight", (hidden, HEADS * sizes["v_head_dim"])


def grouped_attention(prefix: str, hidden: int) -> Shapes:
    for name, rows in (("q_proj", HEADS * 64), ("k_proj", 2 * 64), ("v_proj", 2 * 64)):
        yield f"{prefix}.{name}.weight", (rows, hidden)
    yield f"{prefix}.o_proj.weight", (hidden, HEADS * 64)
    yield f"{prefix}.q_norm.weight", (64,)
    yield f"{prefix}.k_norm.weight", (64,)


def deepseek_layer(index: int, layers: int, experts: int, hidden: int, inner: int) -> Shapes:
    prefix = f"model.layers.{index}"
    if index == layers:         # predicts a second token
        yield f"{prefix}.enorm.weight", (hidden,)
        yield f"{prefix}.hnorm.weight", (hidden,)
        yield f"{prefix}.eh_proj.weight", (hidden, 2 * hidden)
        yield f"{prefix}.shared_head.norm.weight", (hidden,)
    yield from latent_attention(f"{prefix}.self_attn", hidden)
    if index < 3:
        yield from gated(f"{prefix}.mlp", hidden, 4 * inner)
    else:
        yield from experts_of(f"{prefix}.mlp", experts, hidden, inner)
        yield f"{prefix}.mlp.gate.e_score_correction_bias", (experts,)
        yield from gated(f"{prefix}.mlp.shared_experts", hidden, inner)
    yield f"{prefix}.input_layernorm.weight", (hidden,)
    yield f"{prefix}.post_attention_layernorm.weight", (hidden,)


def qwen_layer(index: int, layers: int, experts: int, hidden: int, inner: int) -> Shapes:
    prefix = f"model.layers.{index}"
    yield from grouped_attention(f"{prefix}.self_attn", hidden)
    yield from experts_of(f"{prefix}.mlp", experts, hidden, inner)
    yield f"{prefix}.input_layernorm.weight", (hidden,)
    yield f"{prefix}.post_attention_layernorm.weight", (hidden,)


def shapes(family: str, layers: int, experts: int, hidden: int, inner: int) -> Shapes:
    """Tensor names and shapes, in the order of the published files."""
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    for index in range(layers + (family == "deepseek_v3")):
        yield from (deepseek_layer if family == "deepseek_v3" else qwen_layer)(index, layers, experts, hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (VOCABULARY, hidden)


def config(family: str, layers: int, experts: int, hidden: int, inner: int, dtype: str) -> dict:
    common = {"hidden_size": hidden, "moe_intermediate_size": inner, "intermediate_size": 4 * inner, "num_hidden_layers": layers,
              "num_attention_heads": HEADS, "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": VOCABULARY, "hidden_act": "silu",
              "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "tie_word_embeddings": False, "rope_theta": 10000, "dtype": "bfloat16"}
    if dtype == "fp8":
        common["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                                         "weight_block_size": [BLOCK, BLOCK]}
    if family == "qwen3_moe":
        return {"model_type": family, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": experts, "num_key_value_heads": 2,
                "head_dim": 64, "decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False, **common}
    return {"model_type": family, "architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": experts, "n_shared_experts": 1,
            "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
            "first_k_dense_replace": 3, "moe_layer_freq": 1, "num_nextn_predict_layers": 1, "num_key_value_heads": HEADS,
            "attention_bias": False, "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
                                                      "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
            **DEEPSEEK, **common}


def widths(family: str, layers: int, experts: int, gib: float, dtype: str) -> tuple[int, int]:
    """(hidden size, width of an expert) for a checkpoint of so many GiB."""
    bytes_each, inner = (1 if dtype == "fp8" else 2), 256
    moe_layers = layers - 2 if family == "deepseek_v3" else layers
    hidden = gib * 2**30 / (bytes_each * moe_layers * experts * 3 * inner)
    return max(2 * BLOCK, -(-int(hidden) // BLOCK) * BLOCK), inner


def is_packed(name: str, shape: tuple[int, ...], dtype: str) -> bool:
    return dtype == "fp8" and len(shape) == 2 and "_proj" in name


def make(folder: Path, family: str, gib: float, dtype: str = "bfloat16", layers: int = 61, experts: int = 256) -> None:
    """Weights are runs of one block of noise, each beginning somewhere else, so that making them takes no longer than writing."""
    import ml_dtypes
    from modelq.checkpoint import TensorInfo
    from modelq.checkpoint.writer import ShardedWriter, atomic_directory

    random = np.random.default_rng(0)
    noise = (random.standard_normal(1 << 23) * 0.02).astype(ml_dtypes.bfloat16)
    packed = (noise.astype(np.float32) * 4096).astype(ml_dtypes.float8_e4m3fn)
    hidden, inner = widths(family, layers, experts, gib, dtype)
    plan: list[TensorInfo] = []
    for name, shape in shapes(family, layers, experts, hidden, inner):
        wide = "e_score" in name
        plan.append(TensorInfo(name, "float8_e4m3fn" if is_packed(name, shape, dtype) else "float32" if wide else "bfloat16", shape, 0))
        if is_packed(name, shape, dtype):
            plan.append(TensorInfo(f"{name}_scale_inv", "float32", tuple(-(-size // BLOCK) for size in shape), 0))
    with atomic_directory(folder) as target, ShardedWriter(target, plan, max_shard_size="2GB") as writer:
        for info in plan:
            size = int(np.prod(info.shape))
            if info.name.endswith("_scale_inv"):
                array = np.full(info.shape, 1 / 4096, np.float32)
            elif "norm" in info.name:
                array = np.ones(info.shape, ml_dtypes.bfloat16)
            elif info.dtype == "float32":
                array = np.zeros(info.shape, np.float32)
            else:
                start = int(random.integers(0, max(1, noise.size - size)))
                array = np.resize((packed if info.dtype == "float8_e4m3fn" else noise)[start:start + size], info.shape)
            writer.write(info.name, array)
        (target / "config.json").write_text(json.dumps(config(family, layers, experts, hidden, inner, dtype), indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=["deepseek_v3", "qwen3_moe"], default="deepseek_v3")
    parser.add_argument("--gib", type=float, default=11.0)
    parser.add_argument("--dtype", choices=["bfloat16", "fp8"], default="bfloat16")
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--experts", type=int, default=256)
    options = parser.parse_args()
    make(options.folder, options.family, options.gib, options.dtype, options.layers, options.experts)
    files = list(options.folder.glob("*.safetensors"))
    print(f"{options.folder}: {sum(file.stat().st_size for file in files) / 2**30:.2f} GiB in {len(files)} shards")


if __name__ == "__main__":
    main()
