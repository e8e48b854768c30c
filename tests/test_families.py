"""Configs of DeepSeek-V2 and of Granite's models with experts, as they are published: the numbers of the runtime, and what is refused.
Logits, gradients and exports are compared with transformers in tests/torch_models/test_families.py."""
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import modelq
import modelq._core as core
import modelq.quantization as mtq
from modelq import streaming
from modelq.checkpoint.config import runtime_config
from modelq.export import export_hf_checkpoint
from modelq.inputs import make_batch

V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, "bos_token_id": 100000, "eos_token_id": 100001,
    "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1408,
    "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": None,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096,
        "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False,
    "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True,
    "v_head_dim": 128, "vocab_size": 102400}
V2 = V2_LITE | {
    "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_group": 8, "n_routed_experts": 160,
    "num_attention_heads": 128, "num_hidden_layers": 60, "num_key_value_heads": 128, "q_lora_rank": 1536, "routed_scaling_factor": 16.0,
    "topk_group": 3, "topk_method": "group_limited_greedy"}
GRANITE = {
    "architectures": ["GraniteMoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.1, "attention_multiplier": 0.015625,
    "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 1024,
    "initializer_range": 0.02, "intermediate_size": 512, "logits_scaling": 6.0, "max_position_embeddings": 4096, "model_type": "granitemoe",
    "num_attention_heads": 16, "num_experts_per_tok": 8, "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
    "output_router_logits": False, "pad_token_id": 0, "residual_multiplier": 0.22, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 10000, "router_aux_loss_coef": 0.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 49155}
MSCALE = 0.1 * 0.707 * np.log(40) + 1


def test_deepseek_v2_as_it_is_published():
    family, flat = runtime_config(V2_LITE)
    assert family == "deepseek_v2" and flat["layer_experts"] == [False] + [True] * 26
    wanted = dict(head_dim=192, value_head_dim=128, q_lora_rank=0, kv_lora_rank=512, qk_rope_head_dim=64, num_experts=64,
                  num_experts_per_tok=6, moe_intermediate_size=1408, shared_intermediate_size=2816, rope_type="yarn",
                  rope_attention_factor=1.0, rope_interleaved=True, routed_scaling_factor=1.0)
    assert {key: flat[key] for key in wanted} == wanted
    assert not {"expert_groups", "norm_topk_prob", "routing"} & set(flat)
    np.testing.assert_allclose(flat["attention_multiplier"], 192 ** -0.5 * MSCALE ** 2)
    family, flat = runtime_config(V2)
    wanted = dict(q_lora_rank=1536, expert_groups=8, expert_groups_kept=3, expert_groups_best=1, routed_scaling_factor=16.0)
    assert {key: flat[key] for key in wanted} == wanted
    assert core.Runtime(family, flat, "bfloat16").config["expert_groups_best"] == 1


def test_granite_with_experts_as_it_is_published():
    family, flat = runtime_config(GRANITE)
    wanted = dict(num_experts=32, num_experts_per_tok=8, moe_intermediate_size=512, norm_topk_prob=True, embedding_multiplier=12.0,
                  residual_multiplier=0.22, attention_multiplier=0.015625, logits_scaling=6.0, tie_word_embeddings=True)
    assert family == "granitemoe" and {key: flat[key] for key in wanted} == wanted
    names = {module["name"]: module["kind"] for module in core.Runtime(family, flat, "bfloat16").modules if module["layer"] == 23}
    moe = "model.layers.23.block_sparse_moe"
    assert names[f"{moe}.router.layer"] == "router" and names[f"{moe}.experts.31.down_proj"] == "linear"
    assert names[f"{moe}.experts"] == "experts" and not any(name.startswith("model.layers.23.mlp") for name in names)


@pytest.mark.parametrize("config, changes, message", [
    (V2, {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' is not supported; supported is 'softmax'"),
    (V2, {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported; supported are greedy, group_limited_greedy"),
    (V2, {"norm_topk_prob": True}, "norm_topk_prob True is not supported"),
    (V2, {"n_group": None}, "topk_method 'group_limited_greedy' needs n_group and topk_group, which are None and 3"),
    (V2, {"mlp_bias": True}, "mlp_bias True is not supported"), (V2, {"moe_layer_freq": 2}, "moe_layer_freq 2 is not supported"),
    (V2, {"rope_interleave": False}, "rope_interleave False is not supported"),
    (V2, {"num_key_value_heads": 8}, "num_key_value_heads 8 is not supported beside num_attention_heads 128"),
    (V2, {"num_experts_per_tok": None}, "num_experts_per_tok is missing"), (V2, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    (V2, {"ep_scale": 3}, "ep_scale is 3, which is not known in a model of the family deepseek_v2"),
    (GRANITE, {"num_local_experts": 0}, "num_local_experts is 0"), (GRANITE, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    (GRANITE, {"shared_intermediate_size": 512}, "shared_intermediate_size is 512, which is not known in a model of the family granitemoe"),
    (GRANITE, {"attention_multiplier": 0}, "attention_multiplier is 0"), (GRANITE, {"logits_scaling": "6"}, "logits_scaling is '6'"),
    (GRANITE, {"moe_intermediate_size": 64}, "moe_intermediate_size is 64"),
    (GRANITE, {"model_type": "granitemoeshared"}, "model_type 'granitemoeshared'.*not supported"),
])
def test_refused_by_name(config, changes, message):
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        runtime_config(config | changes)


def test_groups_must_hold_a_token_s_experts():
    """160 experts in 8 groups are 20 a group: 21 of one group are not there."""
    family, flat = runtime_config(V2 | {"topk_group": 1, "num_experts_per_tok": 21})
    with pytest.raises(ValueError, match="num_experts_per_tok 21 is more than the 20 experts of expert_groups_kept 1"):
        core.Runtime(family, flat, "float32")
    with pytest.raises(ValueError, match="expert_groups_best is 3, expected 1 to 2"):
        core.Runtime(family, flat | {"expert_groups_best": 3}, "float32")


def test_dynamic_rope_has_the_base_of_a_sequences_length(tmp_path):
    """Up to max_position_embeddings it scales nothing; a longer one is that of a model of another rope_theta, by the formula of the
    "NTK-aware" scaling (transformers' logits and cache: tests/torch_models/test_rope_lengths.py)."""
    ids, lengths, sharp = np.arange(34).reshape(2, 17), (12, 13, 17), {"attention_multiplier": 9.0, "rope_theta": 100.0}

    def with_rope(name, **changes):
        folder = granite(tmp_path / name)
        (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))
        return modelq.load(folder, compute="float32")
    model = with_rope("dynamic", rope_scaling={"type": "dynamic", "factor": 40.0}, max_position_embeddings=12, **sharp)
    rotary, outputs = 8, [model(ids[:, :length]) for length in lengths]
    assert model.config["hidden_size"] == rotary * model.config["num_attention_heads"]
    for output, length in zip(outputs, lengths):
        base = 100.0 * (40.0 * length / 12 - 39.0) ** (rotary / (rotary - 2))
        plain = with_rope(f"of {length}", **{**sharp, "rope_theta": base})(ids[:, :length]).logits
        np.testing.assert_allclose(output.logits, plain, rtol=0, atol=0 if length == 12 else 1e-5)
        assert length == 12 or np.abs(output.logits[:, :12] - outputs[0].logits).max() > 1e-3
    decoding = model.decoding()
    found = decoding.begin([ids[0].tolist()], reuse=True)[0]
    np.testing.assert_allclose(found, outputs[-1].logits[0, -1], rtol=0, atol=1e-5)


def granite(folder: Path) -> Path:
    """Two layers with random weights, stored as the Hub's checkpoints are."""
    random, hidden, inner, experts = np.random.default_rng(0), 32, 48, 5
    shapes = {"model.embed_tokens.weight": (64, hidden), "model.norm.weight": (hidden,)}
    for layer in range(2):
        root = f"model.layers.{layer}."
        shapes |= {f"{root}{name}.weight": shape for name, shape in {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (16, hidden), "self_attn.v_proj": (16, hidden), "self_attn.o_proj": (hidden, hidden),
            "block_sparse_moe.router.layer": (experts, hidden), "block_sparse_moe.input_linear": (experts, 2 * inner, hidden),
            "block_sparse_moe.output_linear": (experts, hidden, inner)}.items()}
    folder.mkdir()
    save_file({name: (random.standard_normal(shape) * 0.15 + (len(shape) == 1)).astype(np.float32) for name, shape in shapes.items()},
              folder / "model.safetensors")
    sizes = dict(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 num_local_experts=experts, num_experts_per_tok=2, vocab_size=64, torch_dtype="float32")
    (folder / "config.json").write_text(json.dumps(GRANITE | sizes))
    return folder


def deepseek(folder: Path) -> Path:
    """Two layers, the second with eight experts in four groups."""
    random, heads, changes = np.random.default_rng(3), 4, dict(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=8, n_shared_experts=1,
        n_group=4, topk_group=2, num_experts_per_tok=3, vocab_size=64, torch_dtype="float32", max_position_embeddings=64,
        rope_scaling=None)
    shapes = {"model.embed_tokens": (64, 32), "model.norm": (32,), "lm_head": (64, 32)}
    for layer in range(2):
        root = f"model.layers.{layer}."
        shapes |= {f"{root}{name}": shape for name, shape in {
            "input_layernorm": (32,), "post_attention_layernorm": (32,), "self_attn.q_proj": (heads * 16, 32),
            "self_attn.kv_a_proj_with_mqa": (24, 32), "self_attn.kv_a_layernorm": (16,), "self_attn.kv_b_proj": (heads * 16, 16),
            "self_attn.o_proj": (32, heads * 8)}.items()}
        experts = {"mlp.": 48} if layer == 0 else {"mlp.shared_experts.": 16} | {f"mlp.experts.{expert}.": 16 for expert in range(8)}
        shapes |= {f"{root}{prefix}{name}": shape for prefix, inner in experts.items()
                   for name, shape in (("gate_proj", (inner, 32)), ("up_proj", (inner, 32)), ("down_proj", (32, inner)))}
    shapes["model.layers.1.mlp.gate"] = (8, 32)
    folder.mkdir()
    save_file({f"{name}.weight": (random.standard_normal(shape) * 0.3 + (len(shape) == 1)).astype(np.float32)
               for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(V2 | changes))
    return folder


def test_groups_count_by_their_best_expert(tmp_path):
    """Softmax, the two of four groups with the largest share, and the three best of their four experts: in NumPy."""
    folder = deepseek(tmp_path / "v2")
    model, ids = modelq.load(folder, compute="float32"), np.random.default_rng(4).integers(0, 64, (2, 40))
    run = streaming.start(model, [make_batch(model.vocab_size, {"input_ids": ids})])
    streaming.run_layer(model, run, 0)
    names, rows = model.runtime.layer_tensors(1), model.modules_of(1)
    model.runtime.load_layer(1, streaming.read(model, names, rows))
    counts = run.layer(1)
    stored, hidden = load_file(folder / "model.safetensors"), run.hidden(0).reshape(-1, 32)
    normed = hidden / np.sqrt((hidden ** 2).mean(-1, keepdims=True) + 1e-6) * stored["model.layers.1.post_attention_layernorm.weight"]
    logits = normed @ stored["model.layers.1.mlp.gate.weight"].T
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    groups = shares.reshape(-1, 4, 2)
    chosen, sums = (np.argsort(-score, axis=1)[:, :2] for score in (groups.max(-1), groups.sum(-1)))
    kept = np.zeros((len(shares), 4, 1), bool)
    np.put_along_axis(kept, chosen[:, :, None], True, 1)
    best = np.argsort(-np.where(kept, groups, 0).reshape(-1, 8), axis=1)[:, :3]
    np.testing.assert_array_equal(counts[:, 0], np.bincount(best.ravel(), minlength=8))
    assert (np.sort(chosen, 1) != np.sort(sums, 1)).any()       # else it would not be seen


def test_an_expert_of_a_stack_is_its_rows(tmp_path):
    folder = granite(tmp_path / "granite")
    stored, model = load_file(folder / "model.safetensors"), modelq.load(folder, compute="float32")
    whole = stored["model.layers.1.block_sparse_moe.input_linear.weight"]
    for index, (linear, expected) in enumerate((("gate_proj", whole[3, :48]), ("up_proj", whole[3, 48:]),
                                                ("down_proj", stored["model.layers.1.block_sparse_moe.output_linear.weight"][3]))):
        np.testing.assert_array_equal(model.checkpoint.read(f"model.layers.1.block_sparse_moe.experts.3.{linear}.weight"), expected)
    tokens = model(np.arange(40).reshape(2, 20) % 60)
    assert np.isfinite(tokens.logits).all() and np.abs(tokens.logits).max() > 0.01


@pytest.mark.parametrize("preset", ["FP8_PER_CHANNEL_PER_TOKEN_CFG", "NVFP4_DEFAULT_CFG"])
def test_quantized_experts_are_linears_of_their_own(preset, tmp_path):
    """In both dialects: the linears that vLLM's loader of fused experts looks for beside the stacks."""
    model = modelq.load(granite(tmp_path / "granite"), compute="float32")
    mtq.quantize(model, getattr(mtq, preset), lambda model: model(np.arange(60).reshape(3, 20)))
    logits = model(np.arange(20)[None]).logits
    for dialect in ("modelopt", "compressed-tensors"):
        export_hf_checkpoint(model, export_dir=tmp_path / dialect, dialect=dialect)
        again = modelq.load(tmp_path / dialect, compute="float32")
        assert np.linalg.norm(again(np.arange(20)[None]).logits - logits) < 0.03 * np.linalg.norm(logits)
        names = set(again.checkpoint.inner.tensors)
        assert "model.layers.0.block_sparse_moe.router.layer.weight" in names
        assert "model.layers.0.block_sparse_moe.experts.4.gate_proj.weight_scale" in names
        assert not any("input_linear" in name or "output_linear" in name for name in names)
