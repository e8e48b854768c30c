"""Llama-Nemotron (DeciLM): layers with sizes of their own, without a half, or with a linear in its place. transformers has no such model;
what the checkpoints' modeling_decilm.py computes is computed here in NumPy. With all blocks alike it is Llama."""
import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import modelq
import modelq.quantization as mtq
from modelq.export import export_hf_checkpoint
from modelq.gradients import backward
from modelq.rotation import RotatedCheckpoint

HIDDEN, HEADS, HEAD, VOCABULARY, EPSILON, THETA = 32, 4, 8, 48, 1e-5, 1e4
ATTENTION = {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False, "num_sink_tokens": None, "sparsify": None,
             "unshifted_sink": None, "use_prefill_window_in_sink_attention": None, "window_length": None}
FFN = {"ffn_mult": 2.0, "no_op": False, "replace_with_linear": False, "sparsify": None}
NONE = {"no_op": True, "n_heads_in_group": None, "ffn_mult": None}
LINEAR = {"replace_with_linear": True, "n_heads_in_group": None, "ffn_mult": None}
BLOCKS = [
    {"attention": ATTENTION, "ffn": FFN},
    {"attention": ATTENTION | NONE, "ffn": FFN | {"ffn_mult": 20.0}},
    {"attention": ATTENTION | {"n_heads_in_group": 4}, "ffn": FFN | NONE},
    {"attention": ATTENTION | LINEAR, "ffn": FFN | LINEAR},
    {"attention": ATTENTION | {"n_heads_in_group": 1}, "ffn": FFN},
    {"attention": ATTENTION | NONE, "ffn": FFN | NONE},
]
INNER = {2.0: 256, 20.0: 512}       # int(2 * mult * 32 / 3), up to 256


def config(blocks):
    return {"model_type": "nemotron-nas", "architectures": ["DeciLMForCausalLM"], "hidden_size": HIDDEN, "num_attention_heads": HEADS,
            "num_key_value_heads": None, "intermediate_size": None, "num_hidden_layers": len(blocks), "vocab_size": VOCABULARY,
            "rms_norm_eps": EPSILON, "rope_theta": THETA, "block_configs": blocks, "max_position_embeddings": 64, "dtype": "float32",
            "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}


def weights(blocks, seed=0):
    random = np.random.default_rng(seed)
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (VOCABULARY, HIDDEN)}
    for i, block in enumerate(blocks):
        attention, ffn, root = block["attention"], block["ffn"], f"model.layers.{i}."
        if not attention["no_op"]:
            shapes[f"{root}input_layernorm"] = (HIDDEN,)
            if attention["replace_with_linear"]:
                shapes[f"{root}self_attn.linear_attn"] = (HIDDEN, HIDDEN)
            else:
                narrow = HEADS // attention["n_heads_in_group"] * HEAD
                shapes |= {f"{root}self_attn.{name}": shape for name, shape in (
                    ("q_proj", (HEADS * HEAD, HIDDEN)), ("k_proj", (narrow, HIDDEN)), ("v_proj", (narrow, HIDDEN)),
                    ("o_proj", (HIDDEN, HEADS * HEAD)))}
        if not ffn["no_op"]:
            shapes[f"{root}post_attention_layernorm"] = (HIDDEN,)
            if ffn["replace_with_linear"]:
                shapes[f"{root}mlp.linear_mlp"] = (HIDDEN, HIDDEN)
            else:
                inner = INNER[ffn["ffn_mult"]]
                shapes |= {f"{root}mlp.gate_proj": (inner, HIDDEN), f"{root}mlp.up_proj": (inner, HIDDEN),
                           f"{root}mlp.down_proj": (HIDDEN, inner)}
    return {f"{name}.weight": (random.standard_normal(shape) * 0.15 + (len(shape) == 1)).astype(np.float32)
            for name, shape in shapes.items()}


def save(folder, blocks, tensors, **changes):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config(blocks) | changes))
    save_file(tensors, folder / "model.safetensors")
    return folder


def norm(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * weight


def turn(x):
    angles = np.arange(x.shape[0])[:, None, None] * THETA ** (-np.arange(0, HEAD, 2) / HEAD)
    first, second = np.split(x, 2, -1)
    return np.concatenate([first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], -1)


def attend(x, at, group):
    q, k, v = (np.reshape(x @ at(f"self_attn.{name}_proj").T, (len(x), -1, HEAD)) for name in "qkv")
    q, k, v = turn(q), np.repeat(turn(k), group, 1), np.repeat(v, group, 1)
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(HEAD)
    scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v).reshape(len(x), -1) @ at("self_attn.o_proj").T


def logits(blocks, tensors, ids, half=lambda name, added: added):
    """float64, of one row of tokens."""
    exact = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    x = exact["model.embed_tokens.weight"][ids]
    for i, block in enumerate(blocks):
        def at(name, i=i):
            return exact[f"model.layers.{i}.{name}.weight"]
        attention, ffn = block["attention"], block["ffn"]
        if not attention["no_op"]:
            seen = norm(x, at("input_layernorm"))
            x = x + half(f"{i}.attention", seen @ at("self_attn.linear_attn").T if attention["replace_with_linear"] else
                         attend(seen, at, attention["n_heads_in_group"]))
        if not ffn["no_op"]:
            seen = norm(x, at("post_attention_layernorm"))
            if ffn["replace_with_linear"]:
                x = x + half(f"{i}.mlp", seen @ at("mlp.linear_mlp").T)
            else:
                gate = seen @ at("mlp.gate_proj").T
                x = x + half(f"{i}.mlp", (gate / (1 + np.exp(-gate)) * (seen @ at("mlp.up_proj").T)) @ at("mlp.down_proj").T)
    return norm(x, exact["model.norm.weight"]) @ exact["lm_head.weight"].T


def loss(blocks, tensors, ids, half=lambda name, added: added):
    found = logits(blocks, tensors, ids, half)[:-1]
    return np.mean(np.log(np.exp(found).sum(-1)) - np.take_along_axis(found, ids[1:, None], 1)[:, 0])


@pytest.fixture
def model(tmp_path):
    return modelq.load(save(tmp_path / "source", BLOCKS, weights(BLOCKS)), compute="float32")


IDS = np.random.default_rng(5).integers(0, VOCABULARY, (2, 14))


def test_logits(model):
    found = model(IDS).logits
    for row, ids in zip(found, IDS):
        np.testing.assert_allclose(row, logits(BLOCKS, weights(BLOCKS), ids), rtol=0, atol=2e-4)


def test_token_by_token(model):
    decoding = model.decoding()
    found = [decoding.begin([IDS[0, :4].tolist()])[0]] + [decoding.forward([0], [[int(token)]])[0] for token in IDS[0, 4:-1]]
    np.testing.assert_allclose(found, logits(BLOCKS, weights(BLOCKS), IDS[0, :-1])[3:], rtol=0, atol=2e-4)


def test_gradients_are_the_slopes(model):
    """Of the loss along a random direction of each tensor, by differences in float64."""
    tensors, random, step = weights(BLOCKS), np.random.default_rng(1), 1e-5
    found = backward(model, [{"input_ids": IDS[:1]}], tensors).weights
    for name, tensor in tensors.items():
        direction = random.standard_normal(tensor.shape)
        sides = [loss(BLOCKS, tensors | {name: tensor + sign * step * direction}, IDS[0]) for sign in (1.0, -1.0)]
        slope = (sides[0] - sides[1]) / (2 * step)
        scale = np.linalg.norm(found[name]) * np.linalg.norm(direction)
        assert abs(np.vdot(found[name], direction) - slope) < 1e-4 * scale + 1e-9, name


def test_alike_blocks_are_llama(tmp_path):
    blocks = [{"attention": ATTENTION, "ffn": FFN}] * 3
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2, "intermediate_size": 256}
    ours, theirs = (modelq.load(save(tmp_path / name, blocks, weights(blocks), **changes), compute="float32")
                    for name, changes in (("nemotron", {}), ("llama", llama | {"block_configs": None})))
    np.testing.assert_array_equal(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("preset", ["FP8_DEFAULT_CFG", "INT8_SMOOTHQUANT_CFG"])
def test_export(model, preset, tmp_path):
    mtq.quantize(model, getattr(mtq, preset), lambda model: model(IDS))
    simulated = model(IDS).logits
    export_hf_checkpoint(model, export_dir=tmp_path / "export")
    again = modelq.load(tmp_path / "export", compute="float32")
    assert np.linalg.norm(again(IDS).logits - simulated) < 0.03 * np.linalg.norm(simulated)
    assert json.loads((tmp_path / "export" / "config.json").read_text())["block_configs"] == BLOCKS
    with safe_open(tmp_path / "export" / "model.safetensors", "np") as file:
        assert {"model.layers.3.mlp.linear_mlp.weight_scale", "model.layers.3.self_attn.linear_attn.weight_scale"} <= set(file.keys())


def search(model, bits, formats):
    return mtq.auto_quantize(model, {"effective_bits": bits}, formats, [{"input_ids": IDS[:1], "labels": IDS[:1]}],
                             lambda model, batch: model(**batch), loss_func=lambda output, batch: output.loss)


SCORED = {"model.layers.0.self_attn.o_proj": "0.attention", "model.layers.1.mlp.down_proj": "1.mlp",
          "model.layers.3.self_attn.linear_attn": "3.attention", "model.layers.3.mlp.linear_mlp": "3.mlp"}


def test_scores_of_a_search_are_by_differences(model):
    """sum((slope of the loss by an output * what INT8 changes in it)^2), of what ends each kind of half, in float64."""
    _, state = search(model, 9.0, [mtq.INT8_WEIGHT_ONLY_CFG])
    stats, tensors, step = state["candidate_stats"], weights(BLOCKS), 1e-4
    for module, place in SCORED.items():
        found, weight = {}, tensors[f"{module}.weight"]
        scale = np.abs(weight).max(1, keepdims=True) / 127
        for key, value in (("was", weight), ("is", np.round(weight / scale) * scale)):
            logits(BLOCKS, tensors | {f"{module}.weight": value}, IDS[0],
                   lambda name, added, key=key: found.setdefault(key, added) if name == place else added)
        change, wanted = found["is"] - found["was"], 0.0
        for at in np.ndindex(change.shape):
            nudge = np.zeros(change.shape)
            nudge[at] = step
            sides = [loss(BLOCKS, tensors, IDS[0], lambda name, added, sign=sign: added + sign * nudge if name == place else added)
                     for sign in (1.0, -1.0)]
            wanted += ((sides[0] - sides[1]) / (2 * step) * change[at]) ** 2
        np.testing.assert_allclose(stats[f"{module}.quant_recipe"]["scores"][0], wanted, rtol=1e-3, err_msg=module)


@pytest.mark.parametrize("bits", [6.0, 7.0])
def test_a_search_keeps_to_its_budget_and_is_written(bits, tmp_path):
    model = modelq.load(save(tmp_path / "source", BLOCKS, weights(BLOCKS)), compute="bfloat16")
    model, state = search(model, bits, [mtq.NVFP4_DEFAULT_CFG, mtq.FP8_DEFAULT_CFG])
    assert state["best"]["is_satisfied"] and state["best"]["constraints"]["effective_bits"] <= bits
    assert len({recipe.split("(")[0] for recipe in state["best"]["recipe"].values()}) >= 2
    simulated = model(IDS).logits
    export_hf_checkpoint(model, export_dir=tmp_path / "export")
    again = modelq.load(tmp_path / "export", compute="bfloat16")
    assert np.linalg.norm(again(IDS).logits - simulated) < 0.03 * np.linalg.norm(simulated)


@pytest.mark.parametrize("options", [{}, {"residual": False}])
def test_a_rotated_model_computes_what_it_did(model, options):
    """Linears in the place of a half read the residual stream and write it."""
    expected = model(IDS).logits
    model.take(RotatedCheckpoint(model, **options), "float32")
    np.testing.assert_allclose(model(IDS).logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    name = "model.layers.3.mlp.linear_mlp.weight"
    assert np.array_equal(model.checkpoint.read(name), weights(BLOCKS)[name]) == bool(options)


REFUSED = {
    "too few": (BLOCKS[:2], "block_configs must be a list of one dictionary for each of 3 layers"),
    "window": ([BLOCKS[0] | {"attention": ATTENTION | {"window_length": 8}}] * 3, r"block_configs\[0\].attention.window_length 8 is not"),
    "sinks": ([BLOCKS[0] | {"attention": ATTENTION | {"num_sink_tokens": 8}}] * 3, "num_sink_tokens 8 is not supported"),
    "unknown half": ([BLOCKS[0] | {"parallel_blocks": [1]}] * 3, "parallel_blocks is .* not known"),
    "unknown key": ([BLOCKS[0] | {"ffn": FFN | {"moe": {"experts": 4}}}] * 3, "ffn.moe is .* not known"),
    "group": ([BLOCKS[0] | {"attention": ATTENTION | {"n_heads_in_group": 3}}] * 3, "n_heads_in_group 3 does not divide 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    from modelq.checkpoint.config import runtime_config
    blocks, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        runtime_config(config(blocks) | {"num_hidden_layers": 3})
