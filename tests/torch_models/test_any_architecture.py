"""Architectures that modelq does not compute, as transformers saves them: which of their tensors are linears (torch's own classes say), and
what formats that need no data make of them (the reference's formulas, in NumPy and ml_dtypes)."""
import copy
import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import modelq
import modelq.quantization as mtq
import numpy as np
import pytest
import torch
import transformers
from modelq.checkpoint import open_checkpoint
from modelq.export import export_hf_checkpoint, verify_checkpoint
from safetensors import safe_open

SMALL = dict(vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
# architecture -> (its class, its config, its linears that stay as they are: heads, routers)
MODELS = {
    "bert": (transformers.BertForSequenceClassification, transformers.BertConfig(**SMALL), ()),
    "roberta": (transformers.RobertaForMaskedLM, transformers.RobertaConfig(**SMALL), ("lm_head.dense", "lm_head.decoder")),
    "whisper": (transformers.WhisperForConditionalGeneration, transformers.WhisperConfig(
        vocab_size=300, d_model=64, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=128, decoder_ffn_dim=128, max_source_positions=40, max_target_positions=40, num_mel_bins=8, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=[], begin_suppress_tokens=[]), ("proj_out",)),
    "vit": (transformers.ViTForImageClassification, transformers.ViTConfig(image_size=32, patch_size=8, **{
        key: value for key, value in SMALL.items() if key != "vocab_size"}), ()),
    "mamba": (transformers.MambaForCausalLM, transformers.MambaConfig(vocab_size=300, hidden_size=64, num_hidden_layers=2, state_size=16,
                                                                      time_step_rank=16), ("lm_head",)),
    "falcon": (transformers.FalconForCausalLM, transformers.FalconConfig(**SMALL, alibi=False, new_decoder_architecture=True, num_kv_heads=2),
               ("lm_head",)),
    "gpt_neox": (transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig(**SMALL), ("embed_out", "lm_head")),
    "t5": (transformers.T5ForConditionalGeneration, transformers.T5Config(vocab_size=300, d_model=64, d_kv=16, d_ff=128, num_layers=2,
                                                                          num_heads=4, feed_forward_proj="gated-gelu"), ("lm_head",)),
    "olmoe": (transformers.OlmoeForCausalLM, transformers.OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2), ("lm_head",)),
    "clip": (transformers.CLIPModel, transformers.CLIPConfig(
        text_config={**SMALL, "max_position_embeddings": 20}, vision_config={"hidden_size": 64, "intermediate_size": 128, "image_size": 32,
                                                                             "num_hidden_layers": 2, "num_attention_heads": 4,
                                                                             "patch_size": 8}, projection_dim=64), ()),
}
CONFIGS = ("W4A16_NVFP4_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "INT8_WEIGHT_ONLY_CFG", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
           "FP8_PER_CHANNEL_PER_TOKEN_CFG", "MXFP8_DEFAULT_CFG")
SIBLINGS = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q", "k", "v"), ("gate_proj", "up_proj"), ("wi_0", "wi_1"))


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """(name, folder, the model, tensors as transformers wrote them)."""
    torch.manual_seed(0)
    kind, config, _ = MODELS[request.param]
    model = kind(copy.deepcopy(config)).to(torch.bfloat16).eval()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="100KB")
    return request.param, folder, model, read(folder)


def read(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    return tensors


def config_of(name):
    """INT4 in blocks of 32: 64 columns do not divide by 128."""
    config = copy.deepcopy(getattr(mtq, name))
    if name.startswith("INT4"):
        mtq.config.find_quant_cfg_entry_by_path(config["quant_cfg"], "*weight_quantizer")["cfg"]["block_sizes"][-1] = 32
    return config


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def linears(name, model, tensors, config):
    """Names on disk of the weights of torch's nn.Linear (experts are stacked in memory; on disk they are linears), but for heads, for routers,
    for what the presets leave out (vision towers of models of text), and for what blocks do not fit."""
    weights = {bits(kind.weight) for module, kind in model.named_modules() if isinstance(kind, torch.nn.Linear)
               and module not in MODELS[name][2]} - {bits(kind.weight) for kind in model.modules() if isinstance(kind, torch.nn.Embedding)}
    found = {tensor.removesuffix(".weight") for tensor, value in tensors.items() if tensor.endswith(".weight") and (
        ".experts." in tensor or bits(value) in weights) and not any(word in tensor for word in ("vision_model", "visual"))}
    block = {"INT4": 32, "MXFP": 32, "W4A1": 16}.get(config[:4], 1)
    return {module for module in found if tensors[f"{module}.weight"].shape[1] % block == 0}


# The reference's formulas ----------------------------------------------------------------------------------------------------------

def expected(config, weight, tensors, module):
    """float32 that the reference's export of a bfloat16 weight stands for (spec/modelopt_spec.md, 2.6 to 2.10)."""
    w = weight.float().numpy()
    rows, columns = w.shape
    if config.startswith("INT8"):
        scale = np.abs(w).max(1, keepdims=True) / np.float32(127)
        return np.clip(np.rint(w / scale), -128, 127) * scale
    if config.startswith("INT4"):
        blocks = w.reshape(rows, -1, 32)
        scale = np.abs(blocks).max(2, keepdims=True) / np.float32(7)
        return (np.clip(np.rint(blocks / scale), -8, 7) * scale).reshape(w.shape)
    if config.startswith("FP8_PER"):
        scale = np.abs(w).max(1, keepdims=True) / np.float32(448)
        return (w / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    if config.startswith("FP8_2D"):
        padded = np.zeros((-(-rows // 128) * 128, -(-columns // 128) * 128), np.float32)
        padded[:rows, :columns] = w
        grid = padded.reshape(padded.shape[0] // 128, 128, -1, 128)
        amax = np.abs(grid).max((1, 3), keepdims=True)
        if amax.size == 1:
            amax = np.full_like(amax, max(float(tensors[f"{other}.weight"].abs().max()) for other in siblings(module, tensors)))
        scale = amax / np.float32(448)
        codes = (grid / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        return (codes * scale).reshape(padded.shape)[:rows, :columns]
    if config.startswith("MXFP8"):
        blocks = w.reshape(rows, -1, 32)
        exponent = np.clip(np.ceil(np.log2(np.abs(blocks).max(2, keepdims=True).astype(np.float64) / 448)), -127, 127)
        scale = np.exp2(exponent).astype(np.float32)
        return (np.clip(blocks / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale).reshape(w.shape)
    second = np.float32(max(float(tensors[f"{other}.weight"].abs().max()) for other in siblings(module, tensors))) / np.float32(2688)
    blocks = w.reshape(rows, -1, 16)
    scale = np.clip(np.abs(blocks).max(2, keepdims=True) / (np.float32(6) * second), 2.0 ** -9, 448).astype(ml_dtypes.float8_e4m3fn)
    scale = scale.astype(np.float32) * second
    return ((blocks / scale).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale).reshape(w.shape)


def siblings(module, tensors):
    """Linears that one product computes: of cross attention, q reads another tensor than k and v."""
    parent, _, last = module.rpartition(".")
    names = next((names for names in SIBLINGS if last in names), (last,))
    if any(word in parent for word in ("encoder_attn", "EncDec")):
        names = (last,) if last in ("q_proj", "q") or len(names) == 1 else names[1:]
    return [f"{parent}.{name}" if parent else name for name in names if f"{parent}.{name}.weight" in tensors or name == last]


@pytest.mark.parametrize("config", CONFIGS)
def test_weights_are_what_the_reference_makes_of_them(saved, config, tmp_path):
    name, folder, model, tensors = saved
    ours = modelq.load(folder)
    assert ours.weights_only
    mtq.quantize(ours, config_of(config))
    export_hf_checkpoint(ours, tmp_path / "out", max_shard_size="100KB")
    wanted = linears(name, model, tensors, config)
    with open_checkpoint(tmp_path / "out") as written:
        assert set(written.layers) == wanted
        for module in sorted(wanted):
            formula = expected(config, tensors[f"{module}.weight"], tensors, module).astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(written.read(f"{module}.weight").astype(np.float32), formula.astype(np.float32), err_msg=module)
    stored = read(tmp_path / "out")
    untouched = tensors.keys() - {f"{module}.weight" for module in wanted}
    assert untouched <= stored.keys()
    for tensor in untouched:
        assert stored[tensor].dtype == tensors[tensor].dtype and stored[tensor].shape == tensors[tensor].shape, tensor
        assert stored[tensor].view(torch.uint8).equal(tensors[tensor].view(torch.uint8)) if stored[tensor].ndim else True, tensor
    reopened = modelq.load(tmp_path / "out")
    assert reopened.weights_only and set(reopened.stored_layers) == wanted


def test_formats_that_look_at_activations_name_one_that_does_not(saved):
    name, folder, _, _ = saved
    model = modelq.load(folder)
    for config, nearest in (("NVFP4_DEFAULT_CFG", "W4A16_NVFP4_CFG"), ("FP8_DEFAULT_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG"),
                            ("INT8_SMOOTHQUANT_CFG", "INT8_WEIGHT_ONLY_CFG")):
        with pytest.raises(ValueError, match=f"computes no models of type '{model.config['model_type']}'.*no data is {nearest}"):
            mtq.quantize(model, getattr(mtq, config), lambda model: pytest.fail("not to be called"))
        assert not model.quantized
    for run in (lambda: model([[1, 2]]), lambda: model.perplexity([1, 2, 3]), lambda: model.generate([[1]])):
        with pytest.raises(ValueError, match="cannot be run"):
            run()


@pytest.mark.parametrize("saved", ["bert"], indirect=True)
def test_transformers_loads_the_export(saved, tmp_path):
    """compressed-tensors' own library dequantizes, in transformers, with scales in bfloat16: the modules' weights are ours."""
    pytest.importorskip("compressed_tensors")
    name, folder, model, tensors = saved
    ours = modelq.load(folder)
    mtq.quantize(ours, mtq.INT8_WEIGHT_ONLY_CFG)
    export_hf_checkpoint(ours, tmp_path / "out", engine="transformers")
    assert not verify_checkpoint(tmp_path / "out", "transformers")
    loaded = type(model).from_pretrained(tmp_path / "out", quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
    weights = dict(loaded.named_parameters())
    with open_checkpoint(tmp_path / "out") as written:
        for module in written.layers:
            np.testing.assert_allclose(weights[f"{module}.weight"].detach().float().numpy(),
                                       written.read(f"{module}.weight").astype(np.float32), rtol=2 ** -6, err_msg=module)


def test_the_command_line(tmp_path):
    torch.manual_seed(0)
    kind, config, _ = MODELS["vit"]
    kind(copy.deepcopy(config)).save_pretrained(tmp_path / "vit")

    def run(*words):
        return subprocess.run([sys.executable, "-m", "modelq", *map(str, words)], capture_output=True, text=True, cwd=tmp_path)
    done = run("quantize", tmp_path / "vit", "--format", "nvfp4", "--out", tmp_path / "out")
    assert done.returncode == 2 and "--format nvfp4_wo" in done.stderr and not (tmp_path / "out").exists()
    done = run("quantize", tmp_path / "vit", "--format", "nvfp4_wo", "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == 0
    inspected = json.loads(run("inspect", tmp_path / "out", "--json").stdout)
    assert {row["format"] for row in inspected["tensors"] if row["name"].endswith("dense.weight")} == {"W4A16_NVFP4"}
    done = run("eval", tmp_path / "out")
    assert done.returncode == 2 and "cannot be run" in done.stderr
    assert run("verify", tmp_path / "out", "--engine", "vllm").returncode == 0
    assert Path(tmp_path / "out" / "preprocessor_config.json").exists() == Path(tmp_path / "vit" / "preprocessor_config.json").exists()


@pytest.mark.parametrize("config", ["FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"])
def test_a_torch_model_in_memory_is_exported_with_its_calibrated_inputs(tmp_path, config):
    """Where torch runs the model, formats that look at activations work on every architecture, too."""
    torch.manual_seed(0)
    kind, settings, _ = MODELS["bert"]
    model = kind(copy.deepcopy(settings)).to(torch.bfloat16).eval()
    ids = torch.randint(0, 300, (2, 16))
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, given, name=name: seen.update({name: float(given[0].abs().max())}))
    model(ids)
    mtq.quantize(model, getattr(mtq, config), lambda model: model(ids))
    export_hf_checkpoint(model, tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as written:
        assert set(written.layers) == set(seen)
        for module, layer in written.layers.items():
            same = [name for name in siblings(module, {f"{name}.weight": 0 for name in seen})] if config.startswith("NV") else [module]
            assert written.input_amax(module) == max(seen[name] for name in same), module
