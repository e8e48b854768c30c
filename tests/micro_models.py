"""Micro models of every family with random weights, made by transformers: what the tests of families compare with."""
from __future__ import annotations

from pathlib import Path

import numpy as np

LENGTH = 24     # longer than any window and chunk below
BASE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128)
HEAD = {"head_dim": 16}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16.0}


def longrope(half: int) -> dict:
    rising = np.linspace(1, 4, half)
    return {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": rising.tolist(), "long_factor": (rising * 3).tolist(),
            "original_max_position_embeddings": 16, "partial_rotary_factor": 1.0}


LATENT = BASE | {
    "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 20,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "moe_intermediate_size": 20, "n_shared_experts": 2,
    "first_k_dense_replace": 1, "routed_scaling_factor": 1.7, "norm_topk_prob": True}

# name -> (config class, its arguments). Names begin with the family's.
MODELS = {
    "llama yarn": ("LlamaConfig", BASE | HEAD | {"rope_parameters": YARN}),
    "llama yarn, whole numbers": ("LlamaConfig", BASE | HEAD | {"rope_parameters": YARN | {"truncate": False, "attention_factor": 1.3}}),
    "llama dynamic": ("LlamaConfig", BASE | HEAD | {"max_position_embeddings": 16, "rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    "granite": ("GraniteConfig", BASE | {"embedding_multiplier": 6.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2,
                                         "logits_scaling": 3.0}),
    "granitemoe": ("GraniteMoeConfig", BASE | {
        "embedding_multiplier": 6.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 3.0,
        "num_local_experts": 5, "num_experts_per_tok": 2}),
    "olmo2": ("Olmo2Config", BASE),
    "phi3": ("Phi3Config", BASE | {"sliding_window": 6, "pad_token_id": 0, "eos_token_id": 1}),
    "phi3 longrope": ("Phi3Config", BASE | {"rope_parameters": longrope(4), "original_max_position_embeddings": 16, "pad_token_id": 0,
                                            "eos_token_id": 1}),
    "phi3 partial": ("Phi3Config", BASE | {"partial_rotary_factor": 0.5, "pad_token_id": 0, "eos_token_id": 1}),
    "gemma2": ("Gemma2Config", BASE | HEAD | {"sliding_window": 6, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0,
                                              "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", BASE | HEAD | {
        "sliding_window": 6, "sliding_window_pattern": 2, "query_pre_attn_scalar": 24, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
    "qwen2_moe": ("Qwen2MoeConfig", BASE | {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28,
        "decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": False}),
    "qwen2_moe windows": ("Qwen2MoeConfig", BASE | {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28,
        "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3, "qkv_bias": False, "norm_topk_prob": True}),
    "gpt_oss": ("GptOssConfig", BASE | HEAD | {
        "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": YARN | {"truncate": False}}),
    "llama4": ("Llama4TextConfig", BASE | HEAD | {
        "intermediate_size": 32, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 2,
        "interleave_moe_layer_step": 2, "no_rope_layer_interval": 4, "attention_chunk_size": 7, "floor_scale": 4, "attn_scale": 0.4,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                            "original_max_position_embeddings": 16}}),
    "llama4 without norms": ("Llama4TextConfig", BASE | HEAD | {
        "intermediate_size": 32, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1, "use_qk_norm": False,
        "attn_temperature_tuning": False, "no_rope_layer_interval": 2, "attention_chunk_size": 8}),
    "deepseek_v2": ("DeepseekV2Config", LATENT | {      # its sizes are multiples of 16
        "q_lora_rank": 16, "kv_lora_rank": 32, "moe_intermediate_size": 16, "topk_method": "group_limited_greedy", "norm_topk_prob": False, "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}}),
    "deepseek_v2 lite": ("DeepseekV2Config", LATENT | {
        "q_lora_rank": None, "topk_method": "greedy", "n_group": None, "topk_group": None, "norm_topk_prob": False,
        "routed_scaling_factor": 1.0, "attention_bias": True}),
    "deepseek_v3": ("DeepseekV3Config", LATENT | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}}),
    "deepseek_v3 without q_lora": ("DeepseekV3Config", LATENT | {
        "q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "rope_interleave": False, "attention_bias": True}),
}


def build(name: str, seed: int = 0):
    """A transformers model whose every parameter is random, and far enough from what it would be by itself."""
    import torch
    import transformers as tf

    kind, arguments = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(tf, kind)(**arguments)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager",
                                                experts_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((noise * 0.15 if parameter.ndim >= 2 else parameter + noise * 0.2).to(torch.bfloat16).float())
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_((torch.rand(buffer.shape, generator=generator) * 0.4).to(torch.bfloat16).float())
    return model


def save(model, folder: Path) -> Path:
    """As the Hub has it."""
    model.save_pretrained(folder)
    return folder


def inputs(seed: int = 0, rows: int = 3, length: int = LENGTH) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, and masks padded on the left and on the right; the first row is whole."""
    random = np.random.default_rng(seed)
    lengths = np.r_[length, random.integers(length // 3, length, rows - 1)]
    right = (np.arange(length) < lengths[:, None]).astype(np.int64)
    return random.integers(2, 60, (rows, length)), right[:, ::-1].copy(), right
