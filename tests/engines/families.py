"""Micro models of the families, of sizes that every engine's CPU kernels take: multiples of 128, heads of 64.

An engine's own transformers writes the folder (`make` orders of run_*.py), so that config and names are those that a checkpoint on the Hub
has; Llama-Nemotron's, which no transformers has, follow modeling_decilm.py. The numbers are filled in here, rows and columns of
differing size as in small_model.py.
"""
from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from golden_data import read_safetensors
from small_model import SPREAD
from safetensors import TensorSpec, serialize_file

VOCABULARY = 256
BASE: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=0, tie_word_embeddings=False)
HEAD = {"head_dim": 64}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
MULTIPLIERS = {"embedding_multiplier": 6.0, "residual_multiplier": 0.6, "attention_multiplier": 0.02, "logits_scaling": 3.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0,
        "beta_slow": 1.0}
LATENT = EXPERTS | {
    "num_key_value_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
    "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}}

# name -> (transformers' config class, its arguments)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", BASE | HEAD),
    "qwen2": ("Qwen2Config", BASE),
    "qwen3": ("Qwen3Config", BASE | HEAD | {"tie_word_embeddings": True}),
    "granite": ("GraniteConfig", BASE | MULTIPLIERS),
    "olmo2": ("Olmo2Config", BASE),
    "phi3": ("Phi3Config", BASE),
    "gemma2": ("Gemma2Config", BASE | HEAD | {"sliding_window": 16, "query_pre_attn_scalar": 64, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", BASE | HEAD | {
        "sliding_window": 16, "query_pre_attn_scalar": 64, "tie_word_embeddings": True,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
    "nemotron_nas": ("", {}),
    "mixtral": ("MixtralConfig", BASE | HEAD | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128}),
    "qwen2_moe": ("Qwen2MoeConfig", BASE | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 128, "mlp_only_layers": [0],
                                                      "decoder_sparse_step": 1, "norm_topk_prob": False}),
    "qwen3_moe": ("Qwen3MoeConfig", BASE | HEAD | EXPERTS | {"num_experts": 4, "norm_topk_prob": True}),
    "granitemoe": ("GraniteMoeConfig", BASE | MULTIPLIERS | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128}),
    "deepseek_v2": ("DeepseekV2Config", BASE | LATENT | {"topk_method": "group_limited_greedy", "norm_topk_prob": False}),
    "deepseek_v3": ("DeepseekV3Config", BASE | LATENT | {"norm_topk_prob": True, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}),
    "gpt_oss": ("GptOssConfig", BASE | HEAD | {
        "intermediate_size": 128, "sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_parameters": YARN | {"truncate": False}}),
    "llama4": ("Llama4TextConfig", BASE | HEAD | {
        "num_hidden_layers": 4, "intermediate_size": 128, "intermediate_size_mlp": 256, "num_local_experts": 4, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2, "no_rope_layer_interval": 4, "attention_chunk_size": 128, "floor_scale": 4, "attn_scale": 0.1,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                            "original_max_position_embeddings": 64}}),
}

WITH_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama4")
LEAVE_EXPERTS = {"quantizer_name": "*experts.*", "enable": False}
PER_TOKEN = {"quantizer_name": "*experts.*input_quantizer", "cfg": {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}}}
LEAVE_KV_B = {"quantizer_name": "*kv_b_proj*", "enable": False}     # vLLM's INT8 kernel of a CPU keeps no weight for MLA to take apart
# Exports whose experts an engine cannot read (modelq.verify.expert_rules): they stay as they are.
STAY = {"transformers": ("granitemoe-compressed-tensors", "gpt_oss-compressed-tensors"), "vllm": ("gpt_oss", "llama4-modelopt")}
# transformers holds these families' experts in one tensor, which it reads in FP8 and INT4 only, whether they are quantized or not.
IN_ONE_TENSOR = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3")


def loads(engine: str, family: str, config: str) -> bool:
    """Whether the engine loads the family in this format at all."""
    return engine == "vllm" or family != "nemotron_nas" and (family not in IN_ONE_TENSOR or config.startswith(("FP8", "INT4")))


def rules_for(engine: str, family: str, config: str, dialect: str) -> list[dict[str, Any]]:
    """What a preset's rules want behind them for the engine to load the family's export."""
    if f"{family}-{dialect}".startswith(STAY[engine]):
        return [LEAVE_EXPERTS]
    if (engine, config) != ("vllm", "INT8_DEFAULT_CFG") or family not in WITH_EXPERTS:
        return []
    return [PER_TOKEN, *([LEAVE_KV_B] if family.startswith("deepseek") else [])]


# Of what the checkpoints bring along, the part that vLLM imports: blocks with attributes.
CONFIGURATION_DECILM = """
from transformers import PretrainedConfig


class Part(dict):
    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return Part(self[name]) if isinstance(self[name], dict) else self[name]


class DeciLMConfig(PretrainedConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, **settings):
        self.block_configs = [Part(block) for block in block_configs or []]
        super().__init__(**settings)
"""

# Of linears, small enough that a rounding error stays one, large enough that every linear decides tokens and every token has its experts.
GAINS = [(("o_proj", "down_proj", "w2", "output_linear", "linear_attn", "linear_mlp"), 0.4),
         (("q_proj", "k_proj", "kv_b_proj", "q_b_proj"), 0.7),
         ((".gate", ".router", ".router.layer"), 3.0), (("lm_head",), 4.0)]
# Of families that multiply them, or have no other head.
SMALL_EMBEDDINGS = {"qwen3": 5, "gemma2": 64, "gemma3": 64, "granite": 6, "granitemoe": 6}


def write_source(family: str, folder: Path, make: Callable[..., Any]) -> Path:
    """The family's micro model in bfloat16; make(kind, arguments, folder) has an engine's environment write its config and tensors."""
    if family == "nemotron_nas":
        shapes = _nemotron(folder)
    else:
        kind, arguments = FAMILIES[family]
        make(kind=kind, arguments=arguments, folder=str(folder))
        shapes = {name: array.shape for name, array in read_safetensors(folder).items()}
    plus_one = 1.0 if family.startswith("gemma") else 0.0       # their norms' weights are what is added to one
    tensors = {}
    for name, shape in sorted(shapes.items()):
        values = _values(name, tuple(shape), plus_one)
        if "embed_tokens" in name:
            values /= SMALL_EMBEDDINGS.get(family, 1)
        tensors[name] = values.astype(np.float32 if name.endswith("e_score_correction_bias") else ml_dtypes.bfloat16)
    _write(folder / "model.safetensors", tensors)
    return folder


def _values(name: str, shape: tuple[int, ...], plus_one: float) -> np.ndarray:
    random = np.random.default_rng(zlib.crc32(name.encode()))
    noise = random.standard_normal(shape)
    if len(shape) == 1:
        return np.exp(SPREAD * noise) - plus_one if "norm" in name else np.abs(noise) * 0.1 if "correction" in name else noise * 0.1
    if "embed_tokens" in name:
        return noise
    if name.endswith("_bias"):
        return noise * 0.1
    turned = len(shape) == 3 and not name.endswith(".weight")       # [experts, in, out]
    rows = np.exp(SPREAD * random.standard_normal((*shape[:-1], 1)))
    columns = np.exp(SPREAD * random.standard_normal((*shape[:-2], 1, shape[-1])))
    stem = name.removesuffix(".weight")
    gain = next((gain for ends, gain in GAINS if stem.endswith(ends)), 1.0)
    return gain * noise * rows * columns / np.sqrt(shape[-2 if turned else -1])


def _nemotron(folder: Path) -> dict[str, tuple[int, ...]]:
    """Blocks of two sizes of both halves, and one without each."""
    def attention(group: int | None) -> dict[str, Any]:
        return {"n_heads_in_group": group, "no_op": group is None, "replace_with_linear": False, "num_sink_tokens": None, "sparsify": None,
                "unshifted_sink": None, "use_prefill_window_in_sink_attention": None, "window_length": None}

    def ffn(mult: float | None) -> dict[str, Any]:
        return {"ffn_mult": mult, "no_op": mult is None, "replace_with_linear": False, "sparsify": None}

    groups, mults = (2, None, 1, 4), (2.625, 1.3, 1.3, None)
    inner = {2.625: 512, 1.3: 256}       # int(2 * mult * 256 / 3), up to a multiple of 256
    config = {"model_type": "nemotron-nas", "architectures": ["DeciLMForCausalLM"], "num_key_value_heads": None, "intermediate_size": None,
              "hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 4, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5,
              "rope_theta": 1e4, "rope_scaling": None, "max_position_embeddings": 256, "dtype": "bfloat16", "torch_dtype": "bfloat16",
              "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "bos_token_id": 0,
              "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"}, "eos_token_id": 1,
              "block_configs": [{"attention": attention(a), "ffn": ffn(f)} for a, f in zip(groups, mults)]}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "configuration_decilm.py").write_text(CONFIGURATION_DECILM)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCABULARY, 256), "model.norm": (256,), "lm_head": (VOCABULARY, 256)}
    for layer, (group, mult) in enumerate(zip(groups, mults)):
        prefix = f"model.layers.{layer}."
        if group is not None:
            narrow = 4 // group * 64
            shapes |= {f"{prefix}input_layernorm": (256,), f"{prefix}self_attn.q_proj": (256, 256),
                       f"{prefix}self_attn.k_proj": (narrow, 256), f"{prefix}self_attn.v_proj": (narrow, 256),
                       f"{prefix}self_attn.o_proj": (256, 256)}
        if mult is not None:
            shapes |= {f"{prefix}post_attention_layernorm": (256,), f"{prefix}mlp.gate_proj": (inner[mult], 256),
                       f"{prefix}mlp.up_proj": (inner[mult], 256), f"{prefix}mlp.down_proj": (256, inner[mult])}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def _write(file: Path, tensors: dict[str, np.ndarray]) -> None:
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    specs = {name: TensorSpec(dtype=array.dtype.name, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes)
             for name, array in arrays.items()}
    serialize_file(specs, str(file), metadata={"format": "pt"})
