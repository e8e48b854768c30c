"""What low-precision checkpoints stand for, by transformers' own dequantizers, and by compressed-tensors' library, which writes them here."""
import json

import numpy as np
import pytest
import torch
import transformers
from modelq.checkpoint import open_checkpoint
from safetensors.torch import save_file

SOURCE = {"model_type": "strange", "architectures": ["Strange"], "dtype": "bfloat16", "vocab_size": 96}


def write(folder, tensors, quantization):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**SOURCE, "quantization_config": quantization}))
    return folder


def floats(array):
    return np.asarray(array).astype(np.float32)


def test_deepseeks_fp8_blocks(tmp_path):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    torch.manual_seed(0)
    weight = (torch.randn(256, 384) * 50).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3) * 1e-3
    folder = write(tmp_path / "m", {"a.weight": weight, "a.weight_scale_inv": scale}, {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]})
    wanted = Fp8Dequantize(None)._dequantize_one(weight, scale, output_dtype=torch.bfloat16)
    with open_checkpoint(folder) as checkpoint:
        assert np.array_equal(floats(checkpoint.read("a.weight")), wanted.float().numpy())
        assert np.array_equal(floats(checkpoint.read_rows("a.weight", 100, 200)), wanted[100:200].float().numpy())


def test_gpt_oss_experts(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 64, 4, 16), dtype=torch.uint8)
    scales = torch.randint(100, 130, (3, 64, 4), dtype=torch.uint8)
    folder = write(tmp_path / "m", {"mlp.experts.down_proj_blocks": blocks, "mlp.experts.down_proj_scales": scales}, {"quant_method": "mxfp4"})
    wanted = convert_moe_packed_tensors(blocks, scales)
    with open_checkpoint(folder) as checkpoint:
        read = checkpoint.read("mlp.experts.down_proj")
        assert read.shape == tuple(wanted.shape) and np.array_equal(floats(read), wanted.float().numpy())


def test_a_published_gpt_oss_folder_as_transformers_loads_it(tmp_path):
    """A micro model with random experts: what transformers dequantizes for a CPU is what is read."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(num_hidden_layers=1, hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
                                       head_dim=16, num_local_experts=4, num_experts_per_tok=2, vocab_size=96)
    transformers.GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    from safetensors import safe_open

    with safe_open(tmp_path / "plain" / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(110, 124, (experts, rows, columns // 32), dtype=torch.uint8)
    folder = write(tmp_path / "m", tensors, {"quant_method": "mxfp4"})
    plain = json.loads((tmp_path / "plain" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**plain, "quantization_config": {
        "quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]}}))
    loaded = transformers.GptOssForCausalLM.from_pretrained(folder, quantization_config=transformers.Mxfp4Config(dequantize=True))
    state = loaded.state_dict()
    with open_checkpoint(folder) as checkpoint:
        stacks = checkpoint.inner      # around it, experts are linears
        assert "model.layers.0.mlp.experts.gate_up_proj" in stacks.tensors
        for name in stacks.tensors:
            assert np.array_equal(floats(stacks.read(name)), state[name].float().numpy()), name
        up = floats(checkpoint.read("model.layers.0.mlp.experts.2.up_proj.weight"))
        assert np.array_equal(up, state["model.layers.0.mlp.experts.gate_up_proj"][2, :, 1::2].T.float().numpy())


CT = {
    "float-quantized": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
    "int-quantized": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False},
    "pack-quantized": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": False},
    "nvfp4-pack-quantized": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True, "dynamic": False,
                             "scale_dtype": "torch.float8_e4m3fn"},
}
TOKENS = {"int-quantized": {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}}


@pytest.mark.parametrize("form", CT)
def test_what_compressed_tensors_writes(tmp_path, form):
    """Compressed and decompressed by the library; we read the compressed."""
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    torch.manual_seed(0)
    weight, args = torch.randn(64, 128), QuantizationArgs(**CT[form])
    state = {"weight": weight, **scales_of(weight, form)}
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    compressor = BaseCompressor.get_value_from_registry(form)
    packed = compressor.compress(dict(state), scheme)
    unpacked = compressor.decompress(dict(packed), scheme)["weight"]
    folder = write(tmp_path / "m", {f"layers.0.a.{name}": value.contiguous() for name, value in packed.items()}, {
        "quant_method": "compressed-tensors", "format": form, "version": library.__version__, "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": CT[form], "format": form, "input_activations": TOKENS.get(form)}}})
    with open_checkpoint(folder) as checkpoint:
        read = floats(checkpoint.read("layers.0.a.weight"))
    np.testing.assert_allclose(read, unpacked.float().numpy(), rtol=2 ** -7)
    assert np.abs(read - weight.numpy()).max() < 0.7


def scales_of(weight, form):
    """Scales of maxima, for the library to quantize by."""
    if form == "nvfp4-pack-quantized":
        whole = 2688 / weight.abs().max()
        blocks = (weight.reshape(64, -1, 16).abs().amax(2) / 6 * whole).to(torch.float8_e4m3fn)
        return {"weight_scale": blocks.float(), "weight_global_scale": whole.reshape(1)}
    if form == "pack-quantized":
        return {"weight_scale": weight.reshape(64, -1, 32).abs().amax(2) / 7}
    return {"weight_scale": weight.abs().amax(1, keepdim=True) / (448 if form == "float-quantized" else 127)}
