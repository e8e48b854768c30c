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


# What only a source is: zero points, other bits, scales for the tensor, groups of 8-bit codes, blocks.
SCALED = [("pack-quantized", {"num_bits": bits, "strategy": strategy, "symmetric": symmetric})
          for bits, strategy, symmetric in ((4, "group", False), (4, "channel", False), (8, "group", False), (3, "group", True), (5, "group", True),
                                            (2, "group", False), (6, "channel", True), (7, "group", False), (4, "tensor", True))] + [
    ("int-quantized", {"num_bits": 8, "strategy": strategy, "symmetric": symmetric})
    for strategy, symmetric in (("channel", False), ("tensor", True), ("tensor", False), ("group", True), ("group", False))] + [
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "group", "symmetric": True}),
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 64], "symmetric": True}),
    ("naive-quantized", {"num_bits": 8, "strategy": "block", "block_structure": [16, 16], "symmetric": True})]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form, words", SCALED, ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())))
def test_what_compressed_tensors_writes_beyond_exports_of_ours(tmp_path, form, words, dtype):
    """Bit for bit what the library decompresses, whatever dtype it does it in."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    torch.manual_seed(0)
    words = {"type": "int", "dynamic": False, **({"group_size": 32} if words["strategy"] == "group" else {}), **words}
    weight, args = torch.randn(64, 128).to(dtype), QuantizationArgs(**words)
    scale, zero = range_of(weight, words)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    compressor = BaseCompressor.get_value_from_registry(form)
    packed = compressor.compress({"weight": weight, "weight_scale": scale, **({} if zero is None else {"weight_zero_point": zero})}, scheme)
    unpacked = compressor.decompress(dict(packed), scheme)["weight"]
    assert unpacked.dtype == dtype and (unpacked - weight).abs().max() < (2.1 if words["type"] == "int" else 20) * scale.max()
    folder = write(tmp_path / "m", {f"layers.0.a.{name}": value.contiguous() for name, value in packed.items()}, {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": words, "format": form, "input_activations": None}}})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}))
    with open_checkpoint(folder) as checkpoint:
        read = checkpoint.read("layers.0.a.weight")
        assert read.tobytes() == unpacked.contiguous().view(torch.uint8).numpy().tobytes()
        assert np.array_equal(floats(checkpoint.read_rows("layers.0.a.weight", 5, 20)), floats(read[5:20]))
        assert sorted(checkpoint.tensors) == ["layers.0.a.weight"]


def range_of(weight, words):
    """(scales, zero points or None) of minima and maxima, as the library takes them."""
    top = 448 if words["type"] == "float" else 2 ** (words["num_bits"] - 1) - 1
    if words["strategy"] == "block":
        rows, columns = words["block_structure"]
        parts = weight.reshape(64 // rows, rows, 128 // columns, columns).transpose(1, 2).flatten(2)
    else:
        parts = {"tensor": weight.reshape(1, 1, -1), "channel": weight.reshape(64, 1, -1), "group": weight.reshape(64, -1, 32)}[words["strategy"]]
    if words["symmetric"]:
        scale = (parts.abs().amax(2) / top)
        return (scale.reshape(1) if words["strategy"] == "tensor" else scale), None
    low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
    scale = (high - low) / (2 * top + 1)
    zero = (-low / scale - top - 1).round().clamp(-top - 1, top).to(torch.int8)
    return (scale.reshape(1), zero.reshape(1)) if words["strategy"] == "tensor" else (scale, zero)


def test_columns_in_another_order(tmp_path):
    """weight_g_idx (actorder): columns sorted by their group, decompressed by the library, and put back."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    torch.manual_seed(0)
    words = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False, "dynamic": False}
    weight, scheme = torch.randn(64, 128), QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**words), format="pack-quantized")
    groups = (torch.arange(128) // 32)[torch.randperm(128)].int()
    order = torch.argsort(groups, stable=True)
    scale, zero = range_of(weight[:, order], words)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    packed = compressor.compress({"weight": weight[:, order], "weight_scale": scale, "weight_zero_point": zero}, scheme)
    wanted = torch.empty_like(weight)
    wanted[:, order] = compressor.decompress(dict(packed), scheme)["weight"]
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    codes = torch.empty(64, 128, dtype=torch.int8)
    codes[:, order] = unpack_from_int32(packed["weight_packed"], 4, torch.Size((64, 128)))
    state = {**packed, "weight_packed": pack_to_int32(codes, 4), "weight_g_idx": groups}
    folder = write(tmp_path / "m", {f"layers.0.a.{name}": value.contiguous() for name, value in state.items()}, {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {**words, "actorder": "group"}, "input_activations": None}}})
    with open_checkpoint(folder) as checkpoint:
        assert np.array_equal(floats(checkpoint.read("layers.0.a.weight")), wanted.bfloat16().float().numpy())


def test_groups_of_both_kinds(tmp_path):
    """One that an export of ours could have beside one that it could not: both are sources, and quantized inputs are said to be ignored."""
    weight = torch.randint(-128, 128, (64, 64), dtype=torch.int8)
    scale, zero = torch.rand(64, 1) * 0.1, torch.randint(-50, 50, (64, 1), dtype=torch.int8)
    tensors = {"layers.0.a.weight": weight, "layers.0.a.weight_scale": scale, "layers.0.a.weight_zero_point": zero,
               "layers.0.b.weight": weight, "layers.0.b.weight_scale": scale.clone()}
    channel = {"num_bits": 8, "type": "int", "strategy": "channel", "dynamic": False}
    quantization = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {
        "group_0": {"targets": ["re:.*a$"], "weights": {**channel, "symmetric": False}, "input_activations": TOKENS["int-quantized"]},
        "group_1": {"targets": ["re:.*b$"], "weights": {**channel, "symmetric": True}, "input_activations": TOKENS["int-quantized"]}}}
    folder = write(tmp_path / "m", {name: tensor.clone() for name, tensor in tensors.items()}, quantization)
    with pytest.warns(UserWarning, match="the inputs of 1 linears are quantized is not simulated"), open_checkpoint(folder) as checkpoint:
        assert checkpoint.is_source and sorted(checkpoint.tensors) == ["layers.0.a.weight", "layers.0.b.weight"]
        for name, points in (("a", zero), ("b", 0)):
            wanted = (weight.float() - points) * scale
            assert np.array_equal(floats(checkpoint.read(f"layers.0.{name}.weight")), wanted.bfloat16().float().numpy())
    quantization["config_groups"]["group_0"]["targets"] = ["layers.0.c"]
    with pytest.raises(ValueError, match="layers.0.a is stored quantized, but the config leaves it out"):
        open_checkpoint(write(tmp_path / "left", {name: tensor.clone() for name, tensor in tensors.items()}, quantization))


def test_fp8_with_one_scale_as_transformers_takes_it(tmp_path):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    torch.manual_seed(0)
    weight, scale = (torch.randn(96, 160) * 50).to(torch.float8_e4m3fn), torch.rand(()) * 1e-3
    folder = write(tmp_path / "m", {"a.weight": weight, "a.weight_scale_inv": scale, "a.activation_scale": torch.ones(())}, {
        "quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None})
    wanted = Fp8Dequantize(None)._dequantize_one(weight, scale, output_dtype=torch.bfloat16)
    with open_checkpoint(folder) as checkpoint:
        assert np.array_equal(floats(checkpoint.read("a.weight")), wanted.float().numpy())


def test_autoawq_as_compressed_tensors_converts_it(tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    torch.manual_seed(0)
    state = {"layers.0.a.qweight": torch.randint(-2 ** 31, 2 ** 31, (128, 8), dtype=torch.int32),
             "layers.0.a.qzeros": torch.randint(-2 ** 31, 2 ** 31, (4, 8), dtype=torch.int32), "layers.0.a.scales": torch.rand(4, 64).half()}
    folder = write(tmp_path / "m", state, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    converted = AutoAWQConverter(4, 32).process(dict(state))
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=False))
    wanted = BaseCompressor.get_value_from_registry("pack-quantized").decompress(
        {name.removeprefix("layers.0.a."): tensor for name, tensor in converted.items()}, scheme)["weight"]
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.read("layers.0.a.weight").tobytes() == wanted.contiguous().numpy().tobytes()


def scales_of(weight, form):
    """Scales of maxima, for the library to quantize by."""
    if form == "nvfp4-pack-quantized":
        whole = 2688 / weight.abs().max()
        blocks = (weight.reshape(64, -1, 16).abs().amax(2) / 6 * whole).to(torch.float8_e4m3fn)
        return {"weight_scale": blocks.float(), "weight_global_scale": whole.reshape(1)}
    if form == "pack-quantized":
        return {"weight_scale": weight.reshape(64, -1, 32).abs().amax(2) / 7}
    return {"weight_scale": weight.abs().amax(1, keepdim=True) / (448 if form == "float-quantized" else 127)}
