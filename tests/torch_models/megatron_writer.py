"""Writes a transformers model as Megatron-LM and NeMo do: fused, padded, split over ranks, with torch's own torch.save and
torch.distributed.checkpoint."""
import argparse
import enum
import io
import signal
import sys
import types
from pathlib import Path

import torch

PADDED = 64     # the vocabulary's rows are a multiple of this


def stand_in_megatron():
    """Classes that settings refer to by the names of Megatron-LM's own, which is not installed."""
    module = types.ModuleType("megatron.core.transformer.enums")
    module.AttnBackend = enum.Enum("AttnBackend", ["flash", "auto"], module=module.__name__)
    for name in ("megatron", "megatron.core", "megatron.core.transformer"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules[module.__name__] = module
    return module


def settings(model, **more):
    config = model.config
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    found = dict(num_layers=config.num_hidden_layers, hidden_size=config.hidden_size, ffn_hidden_size=config.intermediate_size,
                 num_attention_heads=config.num_attention_heads, num_query_groups=config.num_key_value_heads, kv_channels=config.head_dim,
                 group_query_attention=config.num_key_value_heads != config.num_attention_heads, norm_epsilon=config.rms_norm_eps,
                 rotary_base=int(config.rope_parameters["rope_theta"]), rotary_percent=1.0, position_embedding_type="rope", swiglu=True,
                 normalization="RMSNorm", add_bias_linear=False, untie_embeddings_and_output_weights=not config.tie_word_embeddings,
                 max_position_embeddings=config.max_position_embeddings, vocab_size=config.vocab_size, num_experts=experts,
                 params_dtype=model.dtype, bf16=model.dtype == torch.bfloat16, exit_signal=signal.SIGTERM)
    if experts:
        found |= dict(moe_router_topk=config.num_experts_per_tok, moe_router_pre_softmax=False,
                      moe_ffn_hidden_size=getattr(config, "moe_intermediate_size", config.intermediate_size))
    return found | more


def whole(model, numbered=lambda layer: f"decoder.layers.{layer}."):
    """megatron.core's tensors (Transformer Engine's names), not split: name to (tensor, axis that ranks split, parts)."""
    state, config = model.state_dict(), model.config
    groups, head = config.num_key_value_heads, config.head_dim

    def padded(weight):
        rows = -(-len(weight) // PADDED) * PADDED - len(weight)
        return torch.cat([weight, weight.new_full((rows, weight.shape[1]), 7.0)])

    made = {"embedding.word_embeddings.weight": (padded(state["model.embed_tokens.weight"]), 0, 1),
            "decoder.final_layernorm.weight": (state["model.norm.weight"], None, 1)}
    if not config.tie_word_embeddings:
        made["output_layer.weight"] = (padded(state["lm_head.weight"]), 0, 1)
    for layer in range(config.num_hidden_layers):
        ours, to = f"model.layers.{layer}.", numbered(layer)
        for kind in ("weight", "bias"):
            if f"{ours}self_attn.q_proj.{kind}" in state:
                q, k, v = (state[f"{ours}self_attn.{name}_proj.{kind}"] for name in "qkv")
                fused = torch.cat([part.unflatten(0, (groups, -1)) for part in (q, k, v)], dim=1).flatten(0, 1)
                made[f"{to}self_attention.linear_qkv.{kind}"] = (fused, 0, 1)
        made[f"{to}self_attention.linear_qkv.layer_norm_weight"] = (state[f"{ours}input_layernorm.weight"], None, 1)
        made[f"{to}self_attention.linear_proj.weight"] = (state[f"{ours}self_attn.o_proj.weight"], 1, 1)
        for name in "qk":
            if f"{ours}self_attn.{name}_norm.weight" in state:
                made[f"{to}self_attention.{name}_layernorm.weight"] = (state[f"{ours}self_attn.{name}_norm.weight"], None, 1)
        assert head * groups == len(state[f"{ours}self_attn.k_proj.weight"])
        post = state[f"{ours}post_attention_layernorm.weight"]
        if f"{ours}mlp.gate_proj.weight" in state:
            gate, up, down = (state[f"{ours}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
            made[f"{to}mlp.linear_fc1.layer_norm_weight"] = (post, None, 1)
            made[f"{to}mlp.linear_fc1.weight"] = (torch.cat([gate, up]), 0, 2)
            made[f"{to}mlp.linear_fc2.weight"] = (down, 1, 1)
            continue
        made[f"{to}pre_mlp_layernorm.weight"] = (post, None, 1)
        made[f"{to}mlp.router.weight"] = (state[f"{ours}mlp.gate.weight"], None, 1)
        for expert, (gate_up, down) in enumerate(zip(state[f"{ours}mlp.experts.gate_up_proj"], state[f"{ours}mlp.experts.down_proj"])):
            made[f"{to}mlp.experts.local_experts.{expert}.linear_fc1.weight"] = (gate_up, 0, 2)
            made[f"{to}mlp.experts.local_experts.{expert}.linear_fc2.weight"] = (down, 1, 1)
    return made


def part_of(tensor, axis, parts, rank, ranks):
    if axis is None or ranks == 1:
        return tensor.clone()
    return torch.cat([part.chunk(ranks, axis)[rank] for part in tensor.chunk(parts, 0)]) if parts > 1 else \
        tensor.chunk(ranks, axis)[rank].clone()


def write_ranks(model, folder, tensor=1, pipeline=1, expert=1, rename=lambda name: name, wrap=None, **more):
    """iter_0000007/mp_rank_XX[_YYY][_ZZZ]/model_optim_rng.pt and the file that says which iteration is the latest."""
    enums = stand_in_megatron()
    args = argparse.Namespace(**settings(model, attention_backend=enums.AttnBackend.auto, tensor_model_parallel_size=tensor,
                                         pipeline_model_parallel_size=pipeline, expert_model_parallel_size=expert, **more))
    layers, experts = model.config.num_hidden_layers, settings(model)["num_experts"] or 1
    for t in range(tensor):
        for p in range(pipeline):
            for e in range(expert):
                first, count = p * layers // pipeline, layers // pipeline
                state = {}
                for name, (value, axis, parts) in whole(model).items():
                    words = name.split(".")
                    if name.startswith("decoder.layers."):
                        if not first <= int(words[2]) < first + count:
                            continue
                        words[2] = str(int(words[2]) - first)
                        if "local_experts" in words:
                            at, mine = words.index("local_experts") + 1, experts // expert
                            if int(words[at]) // mine != e:
                                continue
                            words[at] = str(int(words[at]) % mine)
                    elif p != (0 if name.startswith("embedding") else pipeline - 1):
                        continue
                    state[rename(".".join(words))] = part_of(value, axis, parts, t, tensor)
                state["decoder.layers.0.self_attention.linear_qkv._extra_state"] = io.BytesIO(b"state of FP8")
                ranks = f"{t:02d}" + (f"_{p:03d}" if pipeline > 1 else "") + (f"_{e:03d}" if expert > 1 else "")
                target = Path(folder) / "iter_0000007" / f"mp_rank_{ranks}"
                target.mkdir(parents=True)
                saved = {"args": args, "checkpoint_version": 3.0, "iteration": 7, "model": wrap(state) if wrap else state,
                         "rng_state": [{"np_rng_state": __import__("numpy").random.get_state(), "cuda": torch.get_rng_state()}]}
                torch.save(saved, target / "model_optim_rng.pt")
    (Path(folder) / "latest_checkpointed_iteration.txt").write_text("7")


def grouped(state):
    """A rank's experts as megatron.core's GroupedMLP holds them: weight1 and weight2 of all of them."""
    found, experts = {}, {}
    for name, value in state.items():
        head, _, tail = name.partition(".mlp.experts.local_experts.")
        if tail:
            number, which, _ = tail.split(".")
            experts.setdefault((head, which[-1]), {})[int(number)] = value
        else:
            found[name] = value
    for (head, which), values in experts.items():
        turned = torch.stack([values[number].T for number in sorted(values)])
        hidden = turned.shape[1 if which == "1" else 2]
        found[f"{head}.mlp.experts.weight{which}"] = turned.view(hidden, -1) if which == "1" else turned.view(-1, hidden)
    return found


def stacked(model):
    """torch_dist's global tensors: layers, and experts, stacked along leading axes."""
    made, layers = {}, {}
    for name, (value, _, _) in whole(model).items():
        words = name.split(".")
        if not name.startswith("decoder.layers."):
            made[name] = value
            continue
        layer = int(words.pop(2))
        expert = None
        if "local_experts" in words:
            at = words.index("local_experts")
            expert = int(words.pop(at + 1))
            words[at] = "experts"
        layers.setdefault(".".join(words), {})[layer, expert] = value
    for name, values in layers.items():
        ordered = [values[key] for key in sorted(values, key=lambda key: (key[0], key[1] or 0))]
        experts = 1 + max(key[1] or 0 for key in values)
        joined = torch.stack(ordered)
        made[name] = joined if next(iter(values))[1] is None else joined.unflatten(0, (-1, experts))
    return made
