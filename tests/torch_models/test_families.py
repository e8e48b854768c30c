"""Every family of the native runtime against transformers: logits, gradients, generation; and what an export holds."""
import copy
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import modelq
import modelq._core as core
import modelq.quantization as mtq
from family_gradients import check_gradients
from micro_models import LENGTH, MODELS, build, inputs, save
from modelq.export import export_hf_checkpoint
from modelq.verify import verify_checkpoint

LOGITS = 2e-4       # absolute, in float32


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    """(name, transformers' model, its folder)."""
    model = build(request.param)
    return request.param, model, save(model, tmp_path_factory.mktemp("model") / "source")


def logits_of(model, ids, mask=None):
    with torch.no_grad():
        return model(torch.from_numpy(ids), attention_mask=None if mask is None else torch.from_numpy(mask)).logits.float().numpy()


def test_logits(case):
    _, theirs, folder = case
    model = modelq.load(folder, compute="float32")
    ids, left, right = inputs()
    outputs = [model(ids, attention_mask=mask) for mask in (None, left, right)] + [model(ids[:1, :5])]
    wanted = [logits_of(theirs, ids, mask) for mask in (None, left, right)] + [logits_of(theirs, ids[:1, :5])]
    assert np.abs(wanted[0]).max() > 0.1
    for output, logits, mask in zip(outputs, wanted, (None, left, right, None)):
        seen = np.ones(logits.shape[:2], bool) if mask is None else mask.astype(bool)
        np.testing.assert_allclose(output.logits[seen], logits[seen], rtol=0, atol=LOGITS)


def test_bfloat16_is_near(case):
    _, theirs, folder = case
    ids, _, _ = inputs()
    wanted = logits_of(theirs, ids)
    got = modelq.load(folder, compute="bfloat16")(ids).logits
    assert np.linalg.norm(got - wanted) < 0.1 * np.linalg.norm(wanted)


def test_token_by_token_equals_whole(case):
    """With the cache, over the edge of windows and chunks, two sequences of different length."""
    _, theirs, folder = case
    model = modelq.load(folder, compute="float32")
    ids, _, _ = inputs()
    decoding = model.decoding()
    logits = decoding.begin([ids[0, :10].tolist(), ids[1, :3].tolist()])
    length = LENGTH - 7 if case[0] not in ("llama dynamic", "phi3 longrope") else 15     # from 16 on: test_rope_lengths.py
    found = [[row] for row in logits]
    for step in range(length - 10):
        for sequence, first in ((0, 10), (1, 3)):
            found[sequence].append(decoding.forward([sequence], [[int(ids[sequence, first + step])]])[0])
    for sequence, first in ((0, 10), (1, 3)):
        wanted = logits_of(theirs, ids[sequence:sequence + 1, :first + length - 10])[0, first - 1:]
        np.testing.assert_allclose(found[sequence], wanted, rtol=0, atol=LOGITS)


def test_greedy_tokens(case):
    _, theirs, folder = case
    ids, _, _ = inputs(rows=1, length=9)
    wanted = theirs.generate(torch.from_numpy(ids), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0,
                             use_cache="longrope" not in case[0]).numpy()       # tests/torch_models/test_rope_lengths.py
    got = modelq.load(folder, compute="float32").generate(ids, max_new_tokens=12, eos_token_id=[], do_sample=False)
    np.testing.assert_array_equal(got, wanted)


def test_gradients(case, tmp_path):
    check_gradients(case[0], case[2], tmp_path)


def test_all_tensors_are_known(case):
    """Names and shapes are those of the checkpoint: none is left over, none is missing."""
    _, _, folder = case
    model = modelq.load(folder, compute="float32")
    used = {module[kind] for module in model.modules for kind in ("weight", "bias") if module[kind] is not None}
    assert used == set(model.checkpoint.tensors)


@pytest.mark.parametrize("preset", ["FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "INT8_SMOOTHQUANT_CFG", "INT4_AWQ_CFG"])
def test_export_computes_what_was_simulated(case, preset, tmp_path):
    _, theirs, folder = case
    model = modelq.load(folder, compute="bfloat16")
    ids, _, right = inputs()
    config = with_small_blocks(getattr(mtq, preset))
    if preset == "NVFP4_DEFAULT_CFG" and case[0].startswith(("qwen2_moe", "deepseek_v2 lite", "deepseek_v3")):
        pytest.skip("sizes of these are no multiples of 16")
    if case[0].startswith(("gpt_oss", "llama4")) and preset[:3] == "INT":       # a stack of experts has no place for these
        config["quant_cfg"].append({"quantizer_name": "*experts*", "enable": False})
    mtq.quantize(model, config, lambda model: model(ids, attention_mask=right))
    simulated = model(ids).logits
    assert 0 < np.linalg.norm(simulated - logits_of(theirs, ids)) < 0.7 * np.linalg.norm(simulated)
    export_hf_checkpoint(model, export_dir=tmp_path / "export")
    again = modelq.load(tmp_path / "export", compute="bfloat16")
    assert np.linalg.norm(again(ids).logits - simulated) < 0.03 * np.linalg.norm(simulated)
    source = json.loads((folder / "config.json").read_text())
    written = json.loads((tmp_path / "export" / "config.json").read_text())
    assert {key: written[key] for key in source} == source
    stems = {name.rpartition(".")[0] for name in model.checkpoint.tensors}
    assert {name.rpartition(".")[0] for name in again.checkpoint.tensors} == stems
    with safe_open(folder / "model.safetensors", "np") as source, safe_open(tmp_path / "export" / "model.safetensors", "np") as file:
        split = {name for name in source.keys() if name.endswith(("moe.input_linear.weight", "moe.output_linear.weight"))}
        assert bool(split) == case[0].startswith("granitemoe") and not split & set(file.keys())
        assert set(source.keys()) - split <= set(file.keys()) | {"lm_head.weight"}
        stacks = [name for name in source.keys() if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))]
        assert bool(stacks) == case[0].startswith(("gpt_oss", "llama4"))
        for name in stacks if preset == "FP8_DEFAULT_CFG" else ():
            assert file.get_slice(name).get_shape() == source.get_slice(name).get_shape() and file.get_slice(name).get_dtype() == "F8_E4M3"
            assert file.get_slice(f"{name}_weight_scale").get_shape() == file.get_slice(f"{name}_input_scale").get_shape() == []


@pytest.mark.parametrize("left_out", ["*experts*", "*down_proj*"])
def test_stacks_of_granite_stay_where_they_are_not_quantized(left_out, tmp_path):
    """Quantized experts are linears of their own in an export (as Model Optimizer writes and vLLM reads them); others stay in the Hub's
    stacks, to the bit."""
    theirs = build("granitemoe")
    folder = save(theirs, tmp_path / "source")
    model = modelq.load(folder, compute="bfloat16")
    ids, _, _ = inputs()
    config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    config["quant_cfg"].append({"quantizer_name": left_out, "enable": False})
    mtq.quantize(model, config, lambda model: model(ids))
    export_hf_checkpoint(model, dtype="float32", export_dir=tmp_path / "export")
    before, after = (load_raw(path / "model.safetensors") for path in (folder, tmp_path / "export"))
    for layer in range(4):
        moe = f"model.layers.{layer}.block_sparse_moe"
        for name, split in ((f"{moe}.input_linear.weight", left_out == "*down_proj*"), (f"{moe}.output_linear.weight", False)):
            assert (name in after) != split
            if not split:
                np.testing.assert_array_equal(after[name], before[name])
        np.testing.assert_array_equal(after[f"{moe}.router.layer.weight"], before[f"{moe}.router.layer.weight"])
        assert (f"{moe}.experts.4.up_proj.weight_scale" in after) == (left_out == "*down_proj*")
    said = json.loads((tmp_path / "export" / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert ("model.layers.0.block_sparse_moe*" in said) == (left_out == "*experts*")
    assert ("model.layers.0.block_sparse_moe.experts.0.down_proj" in said) == (left_out == "*down_proj*")
    again = modelq.load(tmp_path / "export", compute="bfloat16")
    assert np.linalg.norm(again(ids).logits - model(ids).logits) < 0.03 * np.linalg.norm(model(ids).logits)


@pytest.mark.parametrize("name", ["granitemoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama4"])
def test_a_model_in_torch_is_written_as_the_checkpoint_is(name, tmp_path):
    theirs = build(name)
    model = modelq.load(save(theirs, tmp_path / "source"), compute="float32")
    ids, _, _ = inputs()
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda model: model(ids))
    mtq.quantize(theirs, mtq.FP8_DEFAULT_CFG, lambda model: model(torch.from_numpy(ids)))
    written = []
    for one, folder in ((model, tmp_path / "native"), (theirs, tmp_path / "torch")):
        export_hf_checkpoint(one, dtype="float32", export_dir=folder)
        written.append(load_raw(folder / "model.safetensors"))
    assert written[0].keys() == written[1].keys()
    for key, tensor in written[0].items():
        if tensor.ndim:
            np.testing.assert_array_equal(tensor, written[1][key], key)
        else:
            np.testing.assert_allclose(tensor, written[1][key], rtol=1e-4 if "input" in key else 0, err_msg=key)


@pytest.mark.parametrize("preset", ["FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"])
@pytest.mark.parametrize(("name", "refused"), [("granitemoe", ""), ("gpt_oss", "no biases beside"), ("llama4", "in the multimodal model alone"),
                                               ("deepseek_v2", "")])
def test_exports_for_engines_are_verified(name, refused, preset, tmp_path):
    """Experts too, which some families hold in one tensor: nothing is found, until one of their scales is gone. refused: by vLLM's loader."""
    model, (ids, _, _) = modelq.load(save(build(name), tmp_path / "source"), compute="bfloat16"), inputs()
    mtq.quantize(model, getattr(mtq, preset), lambda model: model(ids))
    if refused:
        with pytest.raises(ValueError, match=refused):
            export_hf_checkpoint(model, export_dir=tmp_path / "vllm", engine="vllm")
    for engine in ("sglang", "tensorrt-llm") if refused else ("sglang", "tensorrt-llm", "vllm"):
        export_hf_checkpoint(model, export_dir=tmp_path / engine, engine=engine)
        assert verify_checkpoint(tmp_path / engine, engine) == []
    tensors = load_bytes(tmp_path / "sglang/model.safetensors")
    experts = [key for key in tensors if ".experts." in key and key.endswith("weight_scale")]
    for key in experts[:1]:
        save_bytes({name: tensor for name, tensor in tensors.items() if name != key}, tmp_path / "sglang/model.safetensors")
    found = [finding for finding in verify_checkpoint(tmp_path / "sglang", "sglang") if finding.level == "error"]
    assert found and all("experts" in str(finding) for finding in found)


def load_bytes(path):
    from safetensors.torch import load_file as load
    return load(path)


def save_bytes(tensors, path):
    from safetensors.torch import save_file as write
    write(tensors, path, {"format": "pt"})


def with_small_blocks(config):
    """4 columns wide, which divides all that the micro models have."""
    config = copy.deepcopy(config)
    for rule in config["quant_cfg"]:
        for part in rule.get("cfg") if isinstance(rule.get("cfg"), list) else [rule.get("cfg")]:
            if isinstance(part, dict) and (part.get("block_sizes") or {}).get(-1, 0) > 16:
                part["block_sizes"][-1] = 4
    return config


def test_every_family_is_here():
    """Others than these have tests of their own, with golden files or in NumPy."""
    elsewhere = {"qwen2", "qwen3", "qwen3_moe", "mixtral", "nemotron_nas"}
    assert {row["family"] for row in core.archs()} - {name.split()[0] for name in MODELS} == elsewhere


def test_folded_norms_multiply_by_what_they_did(tmp_path):
    """AWQ's scales go into norms, of which Gemma's multiply by 1 + weight: with the weights left alone, nothing changes."""
    theirs = build("gemma2")
    folder = save(theirs, tmp_path / "source")
    model = modelq.load(folder, compute="bfloat16")
    ids, _, _ = inputs()
    before = model(ids).logits
    config = with_small_blocks(mtq.INT4_AWQ_CFG)
    mtq.quantize(model, config, lambda model: model(ids))
    with model.simulating(weights=False, activations=False):
        assert np.linalg.norm(model(ids).logits - before) < 0.03 * np.linalg.norm(before)
    export_hf_checkpoint(model, export_dir=tmp_path / "export")
    norms = [load_file(path / "model.safetensors")["model.layers.0.input_layernorm.weight"] for path in (folder, tmp_path / "export")]
    assert not np.array_equal(*norms)


@pytest.mark.parametrize("name", ["gemma2", "phi3", "qwen2_moe"])
def test_formats_are_searched(name, tmp_path):
    """Scores by gradients, through soft caps, fused linears, and experts beside a shared one."""
    model = modelq.load(save(build(name), tmp_path / "source"), compute="float32")
    ids, _, _ = inputs()
    formats = [mtq.FP8_DEFAULT_CFG, with_small_blocks(mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)]
    batches = [{"input_ids": ids, "labels": ids}]
    _, state = mtq.auto_quantize(model, constraints={"effective_bits": 7.0}, quantization_formats=formats, data_loader=batches,
                                 forward_step=lambda model, batch: model(**batch), loss_func=lambda output, batch: output.loss)
    scores = [score for stats in state["candidate_stats"].values() for score in stats["scores"]]
    assert np.isfinite(scores).all() and max(scores) > 0


def test_language_model_inside_another(tmp_path):
    """Gemma 3's checkpoints hold a vision tower too: it is copied to the bit, and names stay those of the Hub."""
    import transformers as tf
    text = {**MODELS["gemma3"][1], "vocab_size": 64}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
              "patch_size": 14}
    torch.manual_seed(0)
    config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    theirs = tf.Gemma3ForConditionalGeneration(config).eval().float()
    folder = save(theirs, tmp_path / "source")
    model = modelq.load(folder, compute="float32")
    ids, left, _ = inputs()
    with torch.no_grad():
        wanted = theirs(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(left),
                        token_type_ids=torch.zeros(ids.shape, dtype=torch.long)).logits.numpy()
    seen = left.astype(bool)
    np.testing.assert_allclose(model(ids, attention_mask=left).logits[seen], wanted[seen], rtol=0, atol=LOGITS)
    model = modelq.load(folder, compute="bfloat16")
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda model: model(ids))
    export_hf_checkpoint(model, export_dir=tmp_path / "export")
    before, after = (load_raw(path / "model.safetensors") for path in (folder, tmp_path / "export"))
    assert set(before) <= set(after) | {"lm_head.weight"}
    towers = [name for name in before if "vision_tower" in name or "multi_modal" in name]
    assert len(towers) > 10 and all(np.array_equal(before[name], after[name]) for name in towers)
    quantized = [name for name in after if name.endswith("weight_scale")]
    assert len(quantized) == 7 * 4 and all(".layers." in name and "language_model" in name for name in quantized)
    again = modelq.load(tmp_path / "export", compute="bfloat16")
    assert np.linalg.norm(again(ids).logits - model(ids).logits) < 0.03 * np.linalg.norm(model(ids).logits)


def load_raw(path):
    from safetensors.torch import load_file as load
    return {name: tensor.view(torch.uint8).numpy() if tensor.ndim else tensor.float().numpy() for name, tensor in load(path).items()}


# Keys whose value is a shape, or a spelling, that other keys repeat.
REPEATED = {"layer_types", "_sliding_window_pattern", "sliding_window_pattern", "sliding_window", "use_sliding_window", "max_window_layers",
            "head_dim", "qk_head_dim", "num_local_experts", "partial_rotary_factor", "original_max_position_embeddings",
            "interleave_moe_layer_step", "no_rope_layer_interval"}


@pytest.mark.parametrize("name", MODELS)
def test_every_key_counts_or_is_refused(name):
    """Each key of config.json changed: the runtime's numbers change, or it is refused by name, unless it is one that changes no forward."""
    import transformers as tf
    from modelq.checkpoint.config import runtime_config
    from modelq.checkpoint.config_values import HARMLESS
    kind, arguments = MODELS[name]
    config = getattr(tf, kind)(**arguments).to_dict()
    config["architectures"] = [next(row["architectures"][0] for row in core.archs() if row["family"] == name.split()[0])]
    plain, silent = runtime_config(config), []
    for key, value in config.items():
        if key in HARMLESS | REPEATED or (key == "floor_scale" and not config["attn_temperature_tuning"]):
            continue
        for other in changed(value):
            try:
                if runtime_config({**config, key: other}) == plain:
                    silent.append((key, value, other))
            except ValueError as error:
                words = (key, "num_attention_heads", "groups", "layer_types", "no_rope_layers")
                assert any(word in str(error) for word in words), (key, error)
    assert not silent
    with pytest.raises(ValueError, match="query_scale is 2.0, which is not known"):
        runtime_config(config | {"query_scale": 2.0})


def changed(value):
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 2]
    if isinstance(value, float):
        return [value * 2]
    if isinstance(value, str):
        return ["another"]
    if isinstance(value, dict):
        return [{**value, key: other} for key, item in value.items() for other in changed(item)] + [{**value, "unknown": 3}]
    if isinstance(value, list):
        return [[*value[:-1], value[-1] + 1]] if value and isinstance(value[-1], int) else [["another"]]
    return [3.0]


def test_language_model_and_stacks_inside_another(tmp_path):
    """Llama 4's checkpoints: names with a prefix, experts in stacks, a vision tower."""
    import transformers as tf
    text = {key: value for key, value in MODELS["llama4"][1].items()}
    vision = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
              "patch_size": 14, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    torch.manual_seed(0)
    theirs = tf.Llama4ForConditionalGeneration(tf.Llama4Config(text_config=text, vision_config=vision)).eval().float()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.15 if parameter.ndim >= 2 else parameter + torch.randn(parameter.shape) * 0.2)
    folder = save(theirs, tmp_path / "source")
    model = modelq.load(folder, compute="float32")
    ids, left, _ = inputs()
    with torch.no_grad():
        wanted = theirs(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(left)).logits.numpy()
    seen = left.astype(bool)
    np.testing.assert_allclose(model(ids, attention_mask=left).logits[seen], wanted[seen], rtol=0, atol=LOGITS)
    model = modelq.load(folder, compute="bfloat16")
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda model: model(ids))
    export_hf_checkpoint(model, export_dir=tmp_path / "export")
    before, after = (load_raw(path / "model.safetensors") for path in (folder, tmp_path / "export"))
    assert set(before) <= set(after)
    towers = [name for name in before if "vision_model" in name or "multi_modal" in name]
    assert len(towers) > 10 and all(np.array_equal(before[name], after[name]) for name in towers)
    assert "language_model.model.layers.1.feed_forward.experts.gate_up_proj_weight_scale" in after
    again = modelq.load(tmp_path / "export", compute="bfloat16")
    assert np.linalg.norm(again(ids).logits - model(ids).logits) < 0.03 * np.linalg.norm(model(ids).logits)


@pytest.mark.parametrize("target", ["NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG"])
def test_experts_stored_in_mxfp4(target, tmp_path):
    """gpt-oss as it is published: what MXFP4 stands for is computed, and quantized anew."""
    arguments = MODELS["gpt_oss"][1] | {"hidden_size": 64, "intermediate_size": 32}
    MODELS["gpt_oss, stored"] = ("GptOssConfig", arguments)
    try:
        theirs = build("gpt_oss, stored")
    finally:
        del MODELS["gpt_oss, stored"]
    stored = {}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith(("gate_up_proj", "down_proj")):
                parts = [core.quantize(np.ascontiguousarray(one.numpy().T), "mxfp4") for one in parameter]
                parameter.copy_(torch.stack([torch.from_numpy(core.dequantize(part, "mxfp4", "float32").T.copy()) for part in parts]))
                rows, columns = parameter.shape[2], parameter.shape[1]
                stored[f"{name}_blocks"] = np.stack([part["weight"].reshape(rows, columns // 32, 16) for part in parts])
                stored[f"{name}_scales"] = np.stack([part["weight_scale"].reshape(rows, columns // 32) for part in parts])
    folder = save(theirs, tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(("gate_up_proj", "down_proj"))}
    save_file(kept | stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    model = modelq.load(folder, compute="float32")
    ids, _, _ = inputs()
    np.testing.assert_allclose(model(ids).logits, logits_of(theirs, ids), rtol=0, atol=LOGITS)
    model = modelq.load(folder, compute="bfloat16")
    mtq.quantize(model, getattr(mtq, target), lambda model: model(ids))
    export_hf_checkpoint(model, export_dir=tmp_path / "export")
    again = modelq.load(tmp_path / "export", compute="bfloat16")
    assert np.linalg.norm(again(ids).logits - model(ids).logits) < 0.05 * np.linalg.norm(model(ids).logits)
    if target == "NVFP4_DEFAULT_CFG":       # whose blocks hold what MXFP4's did
        names = [name for name in again.checkpoint.tensors if ".experts." in name and name.endswith("proj.weight")]
        assert len(names) == 4 * 4 * 3
        for name in names:
            np.testing.assert_array_equal(again.checkpoint.read(name).astype(np.float32), model.checkpoint.read(name).astype(np.float32))
