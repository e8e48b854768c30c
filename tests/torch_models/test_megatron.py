"""Megatron-LM's and NeMo's checkpoints, written by torch itself: every tensor comes back bit for bit, and the model computes what
transformers does."""
import argparse
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import modelq
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
import transformers
import yaml
from megatron_writer import grouped, part_of, settings, stacked, whole, write_ranks
from modelq.checkpoint import open_checkpoint

SIZES = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
             head_dim=8, max_position_embeddings=128, tie_word_embeddings=False, dtype=torch.bfloat16)
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "tie_word_embeddings": True})),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True)),
}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    return make(request.param)


def make(name):
    torch.manual_seed(1)
    made = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in made.parameters():     # also norms and biases, which start as ones and zeros
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1))
    return made.to(torch.bfloat16)


def as_saved(model, folder):
    """Name -> tensor as transformers itself writes it, experts one by one."""
    model.save_pretrained(folder)
    with open_checkpoint(folder) as checkpoint:
        return {name: np.array(checkpoint.read(name)) for name in checkpoint.tensors}


def check(path, model, tmp_path):
    expected = as_saved(model, tmp_path / "expected")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors.keys() == expected.keys()
        for name, array in expected.items():
            read = checkpoint.read(name)
            assert read.dtype == array.dtype and read.shape == checkpoint.tensors[name].shape == array.shape, name
            np.testing.assert_array_equal(read.view(np.uint16), array.view(np.uint16), err_msg=name)
            checkpoint.release([name])
    ids = np.random.default_rng(0).integers(0, 100, (2, 9))
    with torch.no_grad():
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "expected", dtype=torch.float32)
        wanted = again(torch.from_numpy(ids)).logits.numpy()
    loaded = modelq.load(path, compute="float32")
    np.testing.assert_allclose(np.asarray(loaded(ids).logits), wanted, atol=2e-5 * np.abs(wanted).max())


def test_a_file_per_rank(model, tmp_path):
    write_ranks(model, tmp_path / "megatron", tensor=4, pipeline=2)
    check(tmp_path / "megatron", model, tmp_path)


@pytest.mark.parametrize("split", [{}, {"tensor": 2}, {"pipeline": 4}], ids=str)
def test_ranks(split, tmp_path):
    write_ranks(make("llama"), tmp_path / "megatron", **split)
    check(tmp_path / "megatron", make("llama"), tmp_path)


@pytest.mark.parametrize("split", [{"expert": 2}, {"expert": 4, "tensor": 2}, {"expert": 2, "pipeline": 2}], ids=str)
def test_experts_per_rank(split, tmp_path):
    write_ranks(make("mixtral"), tmp_path / "megatron", **split)
    check(tmp_path / "megatron", make("mixtral"), tmp_path)


def test_virtual_stages(tmp_path):
    """An interleaved pipeline: the first of two ranks has layers 0 and 2, the second 1 and 3."""
    model = make("llama")
    write_ranks(model, tmp_path / "four", pipeline=4)
    stages = [torch.load(tmp_path / "four" / "iter_0000007" / f"mp_rank_00_00{rank}" / "model_optim_rng.pt", weights_only=False)
              for rank in range(4)]
    for rank in range(2):
        folder = tmp_path / "two" / f"mp_rank_00_00{rank}"
        folder.mkdir(parents=True)
        torch.save({"args": stages[0]["args"], "model0": stages[rank]["model"], "model1": stages[rank + 2]["model"]},
                   folder / "model_optim_rng.pt")
    check(tmp_path / "two", model, tmp_path)


LEGACY = (("self_attention.linear_qkv.layer_norm_weight", "input_norm.weight"), ("mlp.linear_fc1.layer_norm_weight", "post_attention_norm.weight"),
          ("self_attention.linear_qkv.", "self_attention.query_key_value."), ("self_attention.linear_proj.", "self_attention.dense."),
          ("linear_fc1.", "dense_h_to_4h."), ("linear_fc2.", "dense_4h_to_h."), ("decoder.final_layernorm", "decoder.final_norm"))


def legacy(name):
    for new, old in LEGACY:
        name = name.replace(new, old)
    return name.replace("decoder.", "language_model.encoder.") if name.startswith("decoder.") else f"language_model.{name}"


def nested(state):
    """As megatron.legacy saves it: dictionaries of dictionaries."""
    made = {"language_model": {"embedding": {"word_embeddings": {}}, "encoder": {}, "output_layer": {}}}
    for name, value in state.items():
        name = name.removeprefix("language_model.")
        if name.startswith("encoder."):
            made["language_model"]["encoder"][name.removeprefix("encoder.")] = value
        elif name.startswith("embedding."):
            made["language_model"]["embedding"]["word_embeddings"]["weight"] = value
        elif name.startswith("output_layer."):
            made["language_model"]["output_layer"]["weight"] = value
    return made


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_older_names(name, tmp_path):
    write_ranks(make(name), tmp_path / "megatron", tensor=2, rename=legacy, wrap=nested)
    check(tmp_path / "megatron", make(name), tmp_path)


def test_grouped_experts(tmp_path):
    """Transformer Engine's grouped products: weight0, weight1, ..."""
    model = make("mixtral")
    write_ranks(model, tmp_path / "megatron", expert=2, rename=lambda name: re.sub(
        r"local_experts\.(\d+)\.linear_fc(\d)\.weight", r"linear_fc\2.weight\1", name))
    check(tmp_path / "megatron", model, tmp_path)


@pytest.mark.parametrize("name, split", [("mixtral", {}), ("mixtral", {"expert": 2, "tensor": 2}), ("mixtral", {"tensor": 4, "pipeline": 2}),
                                         ("qwen3_moe", {"expert": 2})], ids=str)
def test_experts_in_two_matrices(name, split, tmp_path):
    """The first grouped products: weight1, weight2."""
    write_ranks(make(name), tmp_path / "megatron", wrap=grouped, **split)
    check(tmp_path / "megatron", make(name), tmp_path)


@pytest.mark.parametrize("tracker", [True, False])
def test_zarr_is_refused_by_name(tracker, tmp_path):
    folder = tmp_path / "m" / "iter_0000007" if tracker else tmp_path / "m"
    (folder / "decoder.layers.mlp.linear_fc1.weight").mkdir(parents=True)
    (folder / "decoder.layers.mlp.linear_fc1.weight" / ".zarray").write_text("{}")
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1, "common_backend": "torch"}')
    write_common(make("llama"), folder)
    if tracker:
        (tmp_path / "m" / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(ValueError, match=r"linear_fc1.weight/.zarray: a checkpoint in zarr, which is not read.*torch_dist"):
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize("spoil, words", [
    (lambda state: state.update({"decoder.layers.1.mlp.experts.weight1": torch.zeros(32, 94)}), r"weight1' has the shape \[32, 94\].*of 4 experts"),
    (lambda state: state.update({"decoder.layers.1.mlp.experts.weight2": torch.zeros(32, 192).T}), "weight2' has the shape"),
    (lambda state: state.pop("decoder.layers.1.mlp.router.weight"), "of unknown experts"),
])
def test_matrices_of_experts_that_cannot_be(spoil, words, tmp_path):
    def wrap(state):
        made = grouped(state)
        spoil(made)
        return made
    write_ranks(make("mixtral"), tmp_path / "megatron", wrap=wrap)
    with pytest.raises(ValueError, match=words):
        open_checkpoint(tmp_path / "megatron")


def write_common(model, folder, **more):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"args": argparse.Namespace(**settings(model, **more)), "iteration": 7, "checkpoint_version": 3.0}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_dist(model, tmp_path):
    folder = tmp_path / "megatron" / "iter_0000007"
    write_common(model, folder)
    torch.distributed.checkpoint.save({**stacked(model), "rng_state": [1, 2]}, checkpoint_id=folder, no_dist=True)
    (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").write_text("7")
    check(tmp_path / "megatron", model, tmp_path)
    check(folder, model, tmp_path)


WORKER = """
import sys, torch, torch.distributed.checkpoint
from torch.distributed.tensor import DTensor, Shard, init_device_mesh, distribute_tensor
rank, path, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", init_method=f"file://{path}.meet", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
state = torch.load(path)
split = {name: distribute_tensor(value, mesh, [Shard(index % value.dim())]) for index, (name, value) in enumerate(state.items())}
torch.distributed.checkpoint.save(split, checkpoint_id=out)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_torch_dist_of_two_processes(name, tmp_path):
    """Tensors in pieces along any axis."""
    model = make(name)
    folder = tmp_path / "megatron"
    write_common(model, folder)
    torch.save(stacked(model), tmp_path / "state.pt")
    jobs = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path / "state.pt"), str(folder)], cwd=tmp_path,
                             stderr=subprocess.PIPE, text=True) for rank in range(2)]
    said = [job.communicate(timeout=120)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert len(list(folder.glob("*.distcp"))) == 2
    check(folder, model, tmp_path)


def nemo_settings(model):
    given = settings(model)
    names = {"num_experts": "num_moe_experts", "norm_epsilon": "layernorm_epsilon", "rotary_percent": "rotary_percentage",
             "max_position_embeddings": "encoder_seq_length"}
    kept = {names.get(key, key): value for key, value in given.items() if isinstance(value, (int, float, str)) and key not in (
        "swiglu", "untie_embeddings_and_output_weights", "exit_signal", "params_dtype")}
    return {**kept, "activation": "fast-swiglu", "normalization": "rmsnorm", "precision": "bf16", "mcore_gpt": True,
            "share_embeddings_and_output_weights": model.config.tie_word_embeddings}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_nemo_archive(mode, tensor, tmp_path):
    model = make("llama")
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    (unpacked / "model_config.yaml").write_text(yaml.safe_dump(nemo_settings(model)))
    for rank in range(tensor):
        file = unpacked / (f"mp_rank_{rank:02d}" if tensor > 1 else "") / "model_weights.ckpt"
        file.parent.mkdir(exist_ok=True)
        torch.save({f"model.{name}": part_of(value, axis, parts, rank, tensor) for name, (value, axis, parts) in whole(model).items()}, file)
    with tarfile.open(tmp_path / "model.nemo", mode) as archive:
        archive.add(unpacked, arcname="./")
    check(tmp_path / "model.nemo", model, tmp_path)
    check(unpacked, model, tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_nemo_2(tmp_path):
    model = make("mixtral")
    folder = tmp_path / "nemo"
    (folder / "context").mkdir(parents=True)
    text = yaml.safe_dump({"_target_": "nemo.collections.llm.gpt.model.base.GPTModel", "config": nemo_settings(model)})
    (folder / "context" / "model.yaml").write_text(text + "tokenizer: !!python/object:os.system {}\n")
    torch.distributed.checkpoint.save({f"module.{name}": value for name, value in stacked(model).items()}, checkpoint_id=folder / "weights",
                                      no_dist=True)
    check(folder, model, tmp_path)


def test_settings_that_are_not_computed_are_refused_by_name(tmp_path):
    model = make("llama")
    for number, (name, value) in enumerate([("swiglu", False), ("normalization", "LayerNorm"), ("position_embedding_type", "learned_absolute"),
                                            ("rotary_percent", 0.5), ("multi_latent_attention", True), ("num_layers", None)]):
        write_ranks(model, tmp_path / str(number), **{name: value})
        with pytest.raises(ValueError, match=name):
            open_checkpoint(tmp_path / str(number))


def test_shapes_must_be_the_settings(tmp_path):
    write_ranks(make("llama"), tmp_path / "megatron", ffn_hidden_size=64)
    with pytest.raises(ValueError, match=r"decoder.layers.0.mlp.linear_fc1.weight' has the shape \[96, 32\], the settings ask for \[128, 32\]"):
        open_checkpoint(tmp_path / "megatron")


def test_a_missing_rank_is_named(tmp_path):
    write_ranks(make("llama"), tmp_path / "megatron", tensor=2, pipeline=2)
    file = tmp_path / "megatron" / "iter_0000007" / "mp_rank_01_000" / "model_optim_rng.pt"
    file.unlink()
    with pytest.raises(ValueError, match="tensor rank 1, pipeline rank 0"):
        open_checkpoint(tmp_path / "megatron")


def test_rope_scaling_and_zero_centered_norms(tmp_path):
    model = make("llama")
    config = transformers.LlamaConfig(**SIZES, rope_theta=5e5, rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192})
    scaled = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    scaled.load_state_dict(model.state_dict())
    for name, parameter in scaled.named_parameters():
        if "norm" in name:                      # 1 + w, with w exact in bfloat16
            parameter.data.copy_(1 + (parameter.data * 8).round() / 8)
    shifted = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    shifted.load_state_dict({name: value - 1 if "norm" in name else value for name, value in scaled.state_dict().items()})
    write_ranks(shifted, tmp_path / "megatron", use_rope_scaling=True, apply_layernorm_1p=True)
    check(tmp_path / "megatron", scaled, tmp_path)


def test_quantized_to_a_hugging_face_folder(tmp_path):
    """From a training run's folder to an export: the same as that of the Hugging Face model."""
    import modelq.quantization as mtq
    from modelq.export import export_hf_checkpoint

    model = make("llama")
    write_ranks(model, tmp_path / "megatron", tensor=2)
    model.save_pretrained(tmp_path / "hf")
    exports = []
    for source in ("megatron", "hf"):
        loaded = modelq.load(tmp_path / source)
        mtq.quantize(loaded, mtq.FP8_DEFAULT_CFG, lambda model: model(np.arange(64)[None]))
        export_hf_checkpoint(loaded, export_dir=tmp_path / f"{source}-out")
        with open_checkpoint(Path(tmp_path / f"{source}-out")) as made:
            inner = getattr(made, "inner", made)
            exports.append({name: np.array(inner.read(name)).tobytes() for name in inner.tensors})
    assert exports[0] == exports[1]


def test_converted_to_a_hugging_face_folder(tmp_path, capsys):
    """By the command line; transformers loads it, and has the same weights."""
    from modelq.cli import main

    for name in ("llama", "mixtral"):
        model = make(name)
        write_ranks(model, tmp_path / name, tensor=2)
        assert main(["convert", str(tmp_path / name), "--out", str(tmp_path / f"{name}-hf")]) == 0
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-hf", dtype=torch.bfloat16)
        assert type(again) is type(model)
        for key, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key
    assert main(["convert", str(tmp_path / "llama-hf"), "--out", str(tmp_path / "again")]) != 0
    assert "a Hugging Face folder already" in capsys.readouterr().err
