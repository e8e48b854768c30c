"""Models of architectures that modelq does not compute: what of a folder is a linear, what is copied, what is refused. (Real architectures, as
transformers saves them, are in torch_models/test_any_architecture.py.)"""
import json
import subprocess
import sys
import warnings
from pathlib import Path

import ml_dtypes
import modelq
import modelq.quantization as mtq
import numpy as np
import pytest
from golden_data import read_safetensors, write_safetensors
from modelq.checkpoint.base import TensorInfo
from modelq.checkpoint.matrices import kind_of, rows_of, site_of
from modelq.export import convert_checkpoint, export_hf_checkpoint, verify_checkpoint
from modelq.summary import summary_lines

LLAMA = Path(__file__).parent / "data" / "families" / "llama3"
CONFIG = {"architectures": ["StrangeForCausalLM"], "model_type": "strange", "vocab_size": 96, "dtype": "bfloat16"}
random = np.random.default_rng(5)


def weight(*shape, dtype=ml_dtypes.bfloat16):
    return random.normal(0, 0.1, shape).astype(dtype)


def strange():
    """A model with something of everything."""
    tensors = {"model.embed_tokens.weight": weight(96, 128), "lm_head.weight": weight(96, 128), "model.norm.weight": weight(128)}
    for i in range(2):
        layer = f"model.blocks.{i}"
        tensors |= {f"{layer}.attn.{name}.weight": weight(128, 128) for name in ("wq", "wk", "wv", "wo")}
        tensors |= {f"{layer}.moe.router.weight": weight(4, 128, dtype=np.float32), f"{layer}.moe.bias": weight(4, dtype=np.float32),
                    f"{layer}.moe.experts.gate_up_proj": weight(4, 64, 128), f"{layer}.conv.weight": weight(64, 1, 4),
                    f"{layer}.A_log": weight(64, 16, dtype=np.float32), f"{layer}.narrow.weight": weight(64, 24),
                    f"{layer}.norm.weight": weight(64, dtype=np.float16), f"{layer}.steps": np.arange(6, dtype=np.int64),
                    f"{layer}.moe.experts.7.w1.weight": weight(32, 128), f"{layer}.moe.experts.7.w3.weight": weight(32, 128)}
    return tensors


QUANTIZED = {f"model.blocks.{i}.{name}" for i in range(2) for name in (
    "attn.wq", "attn.wk", "attn.wv", "attn.wo", "moe.experts.7.w1", "moe.experts.7.w3")}


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "strange", strange())


def write(folder, tensors, config=CONFIG):
    """In two shards."""
    folder.mkdir()
    names, where = list(tensors), {}
    for shard, part in enumerate((names[: len(names) // 2], names[len(names) // 2:])):
        file = f"model-{shard + 1:05d}-of-00002.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in part})
        where |= {name: file for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_what_is_a_linear_is_quantized_and_the_rest_is_copied_bit_for_bit(folder, tmp_path):
    model, tensors = modelq.load(folder), {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= read_safetensors(path)
    with pytest.warns(UserWarning, match="2 linears stay in high precision: model.blocks.0.narrow .24 columns do not divide"):
        mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
    export_hf_checkpoint(model, tmp_path / "out")
    written = read_safetensors(tmp_path / "out" / "model.safetensors")
    assert {name.removesuffix(".weight_scale_2") for name in written if name.endswith(".weight_scale_2")} == QUANTIZED
    for name in tensors.keys() - {f"{module}.weight" for module in QUANTIZED}:
        assert written[name].dtype == tensors[name].dtype and written[name].tobytes() == tensors[name].tobytes(), name
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    shared = [{float(written[f"model.blocks.0.{name}.weight_scale_2"]) for name in names} for names in (
        ("attn.wq", "attn.wk", "attn.wv"), ("moe.experts.7.w1", "moe.experts.7.w3"), ("attn.wo",))]
    assert [len(scales) for scales in shared] == [1, 1, 1] and len(set.union(*shared)) == 3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in CONFIG} == CONFIG
    for engine in ("vllm", "sglang"):
        assert [finding for finding in verify_checkpoint(tmp_path / "out", engine) if finding.level == "error"] == []


def test_the_summary_says_why_each_matrix_stays_as_it_is(folder):
    model = modelq.load(folder)
    with pytest.warns(UserWarning, match="narrow"):
        mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
    lines = summary_lines(model)
    for name, why in (("model.embed_tokens", "nn.Embedding"), ("lm_head", "lm_head"), ("model.blocks.*.moe.router", "chooses experts"),
                      ("model.blocks.*.moe.experts.gate_up_proj", "stacked experts"), ("model.blocks.*.conv", "convolution"),
                      ("model.blocks.*.narrow", "24 columns"), ("model.blocks.*.A_log", "a parameter")):
        assert any(line.strip().startswith(name + " ") and why in line for line in lines), name


@pytest.mark.parametrize("config, nearest", [("NVFP4_DEFAULT_CFG", "W4A16_NVFP4_CFG"), ("INT4_AWQ_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"),
                                             ("FP8_DEFAULT_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG"),
                                             ("INT4_GPTQ_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"), ("INT8_DEFAULT_CFG", "INT8_WEIGHT_ONLY_CFG")])
def test_what_needs_data_is_refused_with_what_does_not(folder, config, nearest):
    from modelq.export import check_exportable

    model = modelq.load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call in (lambda: mtq.quantize(model, getattr(mtq, config), lambda model: None),
                     lambda: check_exportable(model, getattr(mtq, config))):
            with pytest.raises(ValueError, match=f"type 'strange', architecture 'StrangeForCausalLM', and .* no data is {nearest} "):
                call()
    assert not model.quantized and not model.quantizers


def test_searches_of_weights_alone_work(folder, tmp_path):
    model = modelq.load(folder)
    with pytest.warns(UserWarning, match="narrow"):
        mtq.quantize(model, {**mtq.INT8_WEIGHT_ONLY_CFG, "quant_cfg": [*mtq.W4A16_NVFP4_CFG["quant_cfg"]], "algorithm": "mse"})
    assert set(model.search_losses) >= {"model.blocks.0.attn.wq"} or model.quantized


def test_conv1d_of_transformers_is_not_taken_for_a_linear(tmp_path):
    source = write(tmp_path / "gpt2", {"h.0.attn.c_attn.weight": weight(64, 192), "wte.weight": weight(96, 64)}, {**CONFIG, "model_type": "gpt2"})
    model = modelq.load(source)
    assert [row["kind"] for row in model.modules] == ["conv1d", "embedding"]
    with pytest.raises(ValueError, match="no weight|nothing"):
        mtq.quantize(model, mtq.W4A16_NVFP4_CFG)


def test_a_known_family_can_be_opened_for_its_weights_alone(tmp_path):
    """The same bytes as of the model that is computed; and a config.json that is refused does not matter."""
    for name, model in (("known", modelq.load(LLAMA)), ("weights", modelq.load(LLAMA, weights_only=True))):
        mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
        export_hf_checkpoint(model, tmp_path / name)
    known, weights = (read_safetensors(tmp_path / name / "model.safetensors") for name in ("known", "weights"))
    packed = {name for name in known if f"{name.rpartition('.')[0]}.weight_scale" in known}
    assert known.keys() == weights.keys() and len(packed) == 14 * 3
    assert all(known[name].tobytes() == weights[name].tobytes() for name in packed)
    strange = json.loads((LLAMA / "config.json").read_text()) | {"hidden_act": "gelu"}
    write(tmp_path / "gelu", read_safetensors(LLAMA), strange)
    with pytest.raises(ValueError, match="hidden_act 'gelu' is not supported.*weights_only=True"):
        modelq.load(tmp_path / "gelu")
    assert modelq.load(tmp_path / "gelu", weights_only=True).weights_only


def test_an_export_is_converted_and_opened_again(folder, tmp_path):
    model = modelq.load(folder)
    with pytest.warns(UserWarning, match="narrow"):
        mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
    export_hf_checkpoint(model, tmp_path / "out")
    convert_checkpoint(tmp_path / "out", tmp_path / "ct", dialect="compressed-tensors")
    first, second = modelq.load(tmp_path / "out"), modelq.load(tmp_path / "ct")
    assert set(first.stored_layers) == set(second.stored_layers) == QUANTIZED
    for module in QUANTIZED:
        assert np.array_equal(first.checkpoint.read(f"{module}.weight"), second.checkpoint.read(f"{module}.weight"))
    assert [finding for finding in verify_checkpoint(tmp_path / "ct", "vllm") if finding.level == "error"] == []


def test_a_dtype_is_not_changed(folder, tmp_path):
    model = modelq.load(folder)
    with pytest.warns(UserWarning, match="narrow"):
        mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
    with pytest.raises(ValueError, match="copied as they are: leave it out"):
        export_hf_checkpoint(model, tmp_path / "out", dtype="float16")


MEASURED = """
import sys, numpy as np, ml_dtypes, tqdm
import modelq, modelq.quantization as mtq
from modelq.export import export_hf_checkpoint
from modelq.measure import peak_memory, reset_peak_memory
model = modelq.load(sys.argv[1])
reset_peak_memory(); before = peak_memory()
mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
export_hf_checkpoint(model, sys.argv[2], max_shard_size="16MB")
print(peak_memory() - before)
"""


@pytest.mark.measures
def test_memory_stays_at_a_few_matrices(tmp_path):
    """Twenty-four experts of one layer, 8 MB each, beside an embedding of 32 MB."""
    tensors = {f"model.layers.0.experts.{i}.w1.weight": weight(1024, 4096) for i in range(24)}
    source = write(tmp_path / "large", tensors | {"model.embed_tokens.weight": weight(4096, 4096)})
    del tensors
    done = subprocess.run([sys.executable, "-c", MEASURED, str(source), str(tmp_path / "out")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 << 20


# Names -----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, shape, kind", [
    ("transformer.wte.weight", (96, 8), "embedding"), ("shared.weight", (96, 8), "embedding"), ("rwkv.emb.weight", (96, 8), "embedding"),
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 8), "embedding"),
    ("encoder.embedding_hidden_mapping_in.weight", (8, 16), "linear"), ("electra.embeddings_project.weight", (8, 16), "linear"),
    ("embed_out.weight", (96, 8), "head"), ("generator.weight", (96, 8), "head"), ("lm_head.weight", (96, 8), "linear"),
    ("model.layers.0.mlp.gate.weight", (8, 8), "router"), ("model.layers.0.mlp.gate_proj.weight", (8, 8), "linear"),
    ("model.layers.0.ffn.router.layer.weight", (8, 8), "router"), ("x.in_proj_weight", (24, 8), "parameter"),
    ("model.layers.0.mlp.experts.down_proj", (4, 8, 8), "stacked experts"), ("vit.patch.projection.weight", (8, 3, 4, 4), "convolution"),
])
def test_kinds_by_names_and_shapes(name, shape, kind):
    assert kind_of(TensorInfo(name, "bfloat16", shape, 0), CONFIG, outside=".0." not in name) == kind


def test_layers_that_predict_further_tokens_stay_as_they_are():
    names = ("model.layers.1.a.weight", "model.layers.2.a.weight", "model.layers.2.enorm.weight")
    tensors = {name: TensorInfo(name, "bfloat16", (8, 8) if "norm" not in name else (8,), 0) for name in names}
    config = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    assert [row["kind"] for row in rows_of(tensors, config)] == ["linear", "further layer"]
    assert [row["kind"] for row in rows_of(tensors, {"num_hidden_layers": 2})] == ["linear", "linear"]


def test_sites_are_shared_by_what_engines_fuse():
    assert site_of("a.q_proj") == site_of("a.k_proj") == site_of("a.v_proj") != site_of("b.q_proj")
    assert site_of("encoder_attn.q_proj") != site_of("encoder_attn.k_proj") == site_of("encoder_attn.v_proj")
    assert site_of("a.gate_proj") == site_of("a.up_proj") != site_of("a.down_proj")
    rows = rows_of({name: TensorInfo(name, "bfloat16", (8, 8), 0) for name in ("e.layers.0.q.weight", "d.layers.0.q.weight", "q.weight")}, {})
    assert [row["layer"] for row in rows] == [0, 1, -1]
