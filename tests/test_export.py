"""The export: its words against golden configs, its tensors against golden checkpoints, and what it refuses."""
import errno
import json
import shutil
import subprocess
import sys
import textwrap
from fnmatch import fnmatch

import ml_dtypes
import modelq
import modelq.quantization as mtq
import numpy as np
import pytest
from export_stub import StubModel
from golden_data import cases, read_safetensors
from modelq.checkpoint import open_checkpoint
from modelq.export import export_hf_checkpoint, modelopt
from modelq.export.excluded import summarize_excluded

# (unquantized, quantized, expected): what modelopt 0.47's summariser answers for random names of few and short parts
SUMMARIES = [
    (["lm_head", "model.embed_tokens"], ["model.layers.0.mlp.up_proj"], ["lm_head", "model.embed_tokens"]),
    (["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"], ["model.layers.0.mlp.up_proj"],
     ["model.layers.0.self_attn*"]),
    (["model.layers.1.mlp.up_proj"], ["model.layers.10.mlp.up_proj"], ["model.layers.1.*"]),
    (["1.a", "1.b.b1", "ab.a.b1.1", "b.x.a.1", "a.1"], ["x.1.x.b", "a.abc", "b1"], ["1*", "a.1", "ab*", "b.*"]),
    (["b1.b1", "1.b", "b1.0.b"], [], ["1*", "b1*"]),
    (["1.a", "0", "ab"], ["x.10.b1.a", "0.10.10.a", "10", "x.ab.b1.b1"], ["0", "1.*", "ab"]),
    (["b", "0.1.b.a", "x.ab"], ["1.a.0", "x", "a", "abc.abc.b1"], ["0*", "b", "x.ab"]),
    (["10.ab", "abc.b.b1.0", "b.a.abc"], ["0.ab.0", "a"], ["10*", "abc*", "b*"]),
    (["b", "abc.10.x.b", "abc", "0.10.x", "ab.x.10", "10.1.b.x"], ["a", "ab.ab.ab.x"], ["0*", "10*", "ab.x*", "abc", "abc*", "b"]),
    (["b.abc", "0", "10.10.1", "b1.10.ab.b", "x.x", "1"], ["b1.b1.b1.10"], ["0", "1", "10*", "b.*", "b1.10*", "x*"]),
    (["a.b"], ["a.b"], []),
    ([], ["a"], []),
]


@pytest.mark.parametrize("unquantized, quantized, expected", SUMMARIES)
def test_excluded_modules_are_summarized_as_by_the_reference(unquantized, quantized, expected):
    assert summarize_excluded(unquantized, quantized) == expected


def linears_of(case) -> list[str]:
    """Modules with a two-dimensional weight, and lm_head, which a tied model does not store."""
    names = [name.removesuffix(".weight") for name, tensor in read_safetensors(case.model.source).items() if tensor.ndim == 2]
    return names + ["lm_head"] * ("lm_head" not in names)


@pytest.mark.parametrize("case", cases(dtype="bfloat16", needs=["hf_quant_config.json", "config.json"], any_family=True))
def test_config_files_equal_golden_ones(case):
    text = (case.folder / "hf_quant_config.json").read_text()
    golden = json.loads(text)
    said = golden["quantization"]
    if said["quant_algo"] == "MIXED_PRECISION":
        layers, rest = said["quantized_layers"], ["model.embed_tokens"]
    else:
        rest = [name for name in linears_of(case) if any(fnmatch(name, pattern) for pattern in said["exclude_modules"])]
        layers = {name: modelopt.layer_entry(said["quant_algo"], said.get("group_size"))
                  for name in linears_of(case) if name not in rest}
    ours = modelopt.hf_quant_config(layers, rest, said["kv_cache_quant_algo"])
    assert ours["producer"]["name"] == "modelopt"      # what vLLM looks for in the nested file
    ours["producer"] = golden["producer"]
    assert json.dumps(ours, indent=4) == text
    inline = json.loads((case.folder / "config.json").read_text())["quantization_config"]
    assert json.dumps(modelopt.quantization_config(ours)) == json.dumps(inline)   # the same keys in the same order


# Tensors ---------------------------------------------------------------------------------------------------------------------

CONFIGS = ["FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"]
INPUT_SCALE_TOLERANCE = 0.015      # what two bfloat16 forwards of the golden models differ by (1%), and half as much again
GOLDEN = cases(dtype="bfloat16", configs=CONFIGS, names=["llama", "qwen3"], needs=["model.safetensors", "amax.safetensors"])


def stub(case):
    return StubModel(case.model.source, case.config, case.amax)


def assert_same_tensors(ours, golden):
    assert sorted(ours) == sorted(golden)
    for name, tensor in golden.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert ours[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("case", GOLDEN)
def test_tensors_equal_golden_ones_byte_for_byte(case, tmp_path):
    """With golden's own calibration even the input scales must be the same bytes."""
    export_hf_checkpoint(stub(case), tmp_path / "out")
    assert_same_tensors(read_safetensors(tmp_path / "out"), case.exported)


@pytest.mark.parametrize("case", GOLDEN)
def test_files_equal_golden_ones(case, tmp_path):
    export_hf_checkpoint(stub(case), export_dir=tmp_path / "out")
    for name in ("hf_quant_config.json", "config.json", "generation_config.json"):
        ours, golden = (tmp_path / "out" / name).read_text(), (case.folder / name).read_text()
        assert ours.replace(modelopt.PRODUCER["version"], "0.47.0") == golden, name
    extra = {path.name for path in (tmp_path / "out").iterdir()} - {path.name for path in case.folder.iterdir()}
    assert not extra


@pytest.mark.parametrize("compute, case", [("bfloat16", param.values[0]) for param in GOLDEN], ids=str)
def test_whole_way_from_checkpoint_to_export_equals_golden(case, compute, tmp_path):
    """Our own forward in place of golden's calibration: two bfloat16 forwards differ by up to 1% among themselves."""
    model = modelq.load(case.model.source, compute=compute)
    mtq.quantize(model, getattr(mtq, case.config), lambda model: [model(row[None]) for row in case.model.calib])
    export_hf_checkpoint(model, tmp_path / "out")
    ours, golden = read_safetensors(tmp_path / "out"), case.exported
    inputs = [name for name in golden if name.endswith(".input_scale")]
    assert len(inputs) == 14
    for name in inputs:
        assert ours[name].shape == () and ours[name] == pytest.approx(golden[name], rel=INPUT_SCALE_TOLERANCE), name
    assert_same_tensors({name: tensor for name, tensor in ours.items() if name not in inputs},
                        {name: tensor for name, tensor in golden.items() if name not in inputs})
    assert (tmp_path / "out" / "hf_quant_config.json").read_text().replace(modelopt.PRODUCER["version"], "0.47.0") == \
        (case.folder / "hf_quant_config.json").read_text()


def test_mixed_formats_list_every_layer_and_reopen(tmp_path):
    """Layer 0 in NVFP4, layer 1 in FP8: each layer's tensors are golden's of that format."""
    fp8, nvfp4 = case_of("FP8_DEFAULT_CFG"), case_of("NVFP4_DEFAULT_CFG")
    model, other = stub(nvfp4), stub(fp8)
    model.quantizers = {name: (other if ".layers.1." in name else model).quantizers[name] for name in model.quantizers}
    export_hf_checkpoint(model, tmp_path / "out")
    ours = read_safetensors(tmp_path / "out")
    golden = {name: tensor for part, case in ((".layers.0.", nvfp4), (".layers.1.", fp8)) for name, tensor in case.exported.items()
              if part in name}
    assert_same_tensors({name: tensor for name, tensor in ours.items() if ".layers." in name}, golden)
    said = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert said["quant_algo"] == "MIXED_PRECISION" and len(said["quantized_layers"]) == 14 and "exclude_modules" not in said
    assert said["quantized_layers"]["model.layers.0.mlp.up_proj"] == {"quant_algo": "NVFP4", "group_size": 16}
    assert said["quantized_layers"]["model.layers.1.mlp.up_proj"] == {"quant_algo": "FP8"}
    with open_checkpoint(tmp_path / "out") as reopened:
        schemes = {module: layer.scheme for module, layer in reopened.layers.items()}
    assert schemes == {module: "nvfp4" if ".layers.0." in module else "fp8" for module in said["quantized_layers"]}


def case_of(config, model="llama"):
    return next(param.values[0] for param in GOLDEN if param.values[0].config == config and param.values[0].model.name == model)


def test_shards_together_hold_what_one_file_holds(tmp_path):
    case = case_of("NVFP4_DEFAULT_CFG")
    export_hf_checkpoint(stub(case), tmp_path / "out", max_shard_size=100_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert_same_tensors(read_safetensors(tmp_path / "out"), case.exported)


@pytest.mark.parametrize("dtype, name", [("float32", "float32"), (np.float16, "float16")])
def test_export_dtype_is_that_of_unquantized_tensors_and_of_the_config(tmp_path, dtype, name):
    case = case_of("FP8_DEFAULT_CFG")
    export_hf_checkpoint(stub(case), tmp_path / "out", dtype=dtype)
    ours = read_safetensors(tmp_path / "out")
    norm = ours["model.norm.weight"]
    assert norm.dtype == name and np.array_equal(norm, case.exported["model.norm.weight"].astype(name))
    assert ours["model.layers.0.mlp.up_proj.weight"].tobytes() == case.exported["model.layers.0.mlp.up_proj.weight"].tobytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name


def test_arguments_in_the_reference_order_work_too(tmp_path):
    assert export_hf_checkpoint(stub(case_of("FP8_DEFAULT_CFG")), None, tmp_path / "out") == tmp_path / "out"
    assert (tmp_path / "out" / "model.safetensors").exists()


# Refusals: nothing may be left behind, and what was there must stay --------------------------------------------------------------

def none_quantized(model):
    model.quantizers = {}


def input_never_calibrated(model):
    model.quantizers["model.layers.1.mlp.down_proj.input_quantizer"].amax = None


def no_word_for_the_scheme(model):
    model.quantizers["model.layers.0.self_attn.o_proj.weight_quantizer"].scheme = "mxfp6"


def no_scheme(model):
    model.quantizers["model.layers.0.self_attn.o_proj.weight_quantizer"].scheme = None


def weight_only(model):
    for name, quantizer in model.quantizers.items():
        quantizer.enabled = not name.endswith("input_quantizer")


def not_finite(model):
    model.quantizers["model.layers.0.mlp.up_proj.input_quantizer"].amax = np.float32(np.nan)


def siblings_differ(model):
    for side in ("weight", "input"):
        quantizer = model.quantizers[f"model.layers.0.mlp.up_proj.{side}_quantizer"]
        quantizer.scheme, quantizer.num_bits, quantizer.block_sizes = "nvfp4", (2, 1), {-1: 16}


@pytest.mark.parametrize("spoil, words", [
    (none_quantized, "no layer of this model is quantized"),
    (input_never_calibrated, "model.layers.1.mlp.down_proj.input_quantizer was never calibrated"),
    (no_word_for_the_scheme, "model.layers.0.self_attn.o_proj.*cannot say mxfp6.*it can say.*nvfp4 weights with nvfp4 inputs"),
    (no_scheme, "model.layers.0.self_attn.o_proj.weight_quantizer: num_bits"),
    (weight_only, "cannot say fp8 weights with unquantized inputs"),
    (not_finite, "model.layers.0.mlp.up_proj.input_quantizer: the calibrated amax is not finite"),
    (siblings_differ, "gate_proj: fp8, model.layers.0.mlp.up_proj: nvfp4: they read one input"),
])
def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path, spoil, words):
    model = stub(case_of("FP8_DEFAULT_CFG"))
    spoil(model)
    with pytest.raises(ValueError, match=words):
        export_hf_checkpoint(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_sibling_left_alone_is_said(tmp_path):
    model = stub(case_of("FP8_DEFAULT_CFG"))
    model.quantizers["model.layers.0.self_attn.v_proj.weight_quantizer"].enabled = False
    with pytest.warns(UserWarning, match="model.layers.0.self_attn.v_proj stays in high precision beside quantized siblings"):
        export_hf_checkpoint(model, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert said["exclude_modules"] == ["lm_head", "model.embed_tokens", "model.layers.0.self_attn.v_proj"]


def test_a_tied_head_that_is_quantized_alone_gets_a_weight_of_its_own(tmp_path):
    """Two different matrices are tied no longer, or engines would take the embedding for both."""
    model = stub(case_of("NVFP4_DEFAULT_CFG", "qwen3"))
    for side in ("weight", "input"):
        model.quantizers[f"lm_head.{side}_quantizer"] = model.quantizers[f"model.layers.0.mlp.up_proj.{side}_quantizer"]
    export_hf_checkpoint(model, tmp_path / "out")
    tensors = read_safetensors(tmp_path / "out")
    assert tensors["lm_head.weight"].dtype == np.uint8 and tensors["model.embed_tokens.weight"].dtype == ml_dtypes.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head" not in json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]


@pytest.mark.parametrize("arguments, error, words", [
    ({"dialect": "ggml"}, ValueError, "unknown dialect 'ggml'; known are modelopt"),
    ({"dtype": "int8"}, ValueError, "dtype: expected one of float32"),
    ({"export_dir": None}, TypeError, "export_dir: expected the path"),
])
def test_bad_arguments(tmp_path, arguments, error, words):
    with pytest.raises(error, match=words):
        export_hf_checkpoint(stub(case_of("FP8_DEFAULT_CFG")), **{"export_dir": tmp_path / "out", **arguments})
    assert list(tmp_path.iterdir()) == []


def test_something_else_than_a_model():
    with pytest.raises(TypeError, match="modelq.load, got dict"):
        export_hf_checkpoint({}, "out")


def test_existing_folder_needs_overwrite(tmp_path):
    target, case = tmp_path / "out", case_of("FP8_DEFAULT_CFG")
    target.mkdir()
    (target / "mine.txt").write_text("precious")
    (target / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="overwrite"):
        export_hf_checkpoint(stub(case), target)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "mine.txt"]
    export_hf_checkpoint(stub(case), target, overwrite=True)
    assert not (target / "mine.txt").exists()
    assert_same_tensors(read_safetensors(target), case.exported)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("overwrite", [False, True])
def test_interrupted_export_leaves_what_was_there(tmp_path, monkeypatch, error, overwrite):
    """Full disk or Ctrl-C in the middle of the tensors: no new file anywhere, and the old target whole."""
    target, case = tmp_path / "out", case_of("FP8_DEFAULT_CFG")
    if overwrite:
        target.mkdir()
        (target / "config.json").write_text("old")
    model, read = stub(case), None
    read = model.checkpoint.read

    def read_until(name):
        if name == "model.layers.1.mlp.up_proj.weight":
            raise error
        return read(name)
    model.checkpoint.read = read_until
    with pytest.raises(type(error)):
        export_hf_checkpoint(model, target, overwrite=overwrite)
    assert sorted(path.name for path in tmp_path.rglob("*")) == (["config.json", "out"] if overwrite else [])


def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path):
    """A file size limit in a process of its own stands in for the full disk: write() itself fails."""
    script = textwrap.dedent("""
        import resource, signal, sys
        sys.path[:0] = sys.argv[3:]
        from golden_data import cases
        from export_stub import StubModel
        from modelq.export import export_hf_checkpoint
        case = next(p.values[0] for p in cases(dtype="bfloat16", configs=["FP8_DEFAULT_CFG"], names=["llama"]))
        model = StubModel(case.model.source, case.config, case.amax)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            export_hf_checkpoint(model, sys.argv[1])
        except OSError as error:
            print("OSError", error)
    """)
    command = [sys.executable, "-c", script, str(tmp_path / "out"), "-", *sys.path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.startswith("OSError"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_sampling_settings_are_made_to_validate(tmp_path):
    source = tmp_path / "source"
    case = case_of("FP8_DEFAULT_CFG")
    shutil.copytree(case.model.source, source)
    (source / "generation_config.json").write_text(json.dumps({"top_p": 0.9, "eos_token_id": 2}))
    (source / "tokenizer.json").write_text("{}")
    (source / "modeling_custom.py").write_text("# custom code\n")
    export_hf_checkpoint(StubModel(source, case.config, case.amax), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"top_p": 0.9, "eos_token_id": 2, "do_sample": True}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "modeling_custom.py").read_text() == "# custom code\n"


def test_a_zero_amax_counts_as_the_largest_element(tmp_path):
    """An input that was zero on all data must not make a scale of 0 (the reference exports maxbound / divisor)."""
    model = stub(case_of("FP8_DEFAULT_CFG"))
    model.quantizers["model.layers.0.self_attn.o_proj.input_quantizer"].amax = np.float32(0)
    export_hf_checkpoint(model, tmp_path / "out")
    assert read_safetensors(tmp_path / "out")["model.layers.0.self_attn.o_proj.input_scale"] == np.float32(1)


@pytest.mark.measures
def test_memory_stays_at_one_tensor(tmp_path, run_python):
    """24 weights of 8 MiB: the export's own peak stays far below what it reads or writes."""
    grown = run_python(textwrap.dedent("""
        import json, sys
        from pathlib import Path
        from types import SimpleNamespace
        sys.path[:0] = sys.argv[2:]
        import ml_dtypes, numpy as np
        from export_stub import SETTINGS, modules_of
        from modelq.checkpoint import TensorInfo, open_checkpoint
        from modelq.checkpoint.writer import ShardedWriter
        from modelq.export import export_hf_checkpoint

        def peak():
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
        folder = Path(sys.argv[1])
        folder.mkdir()
        plan = [TensorInfo(f"model.layers.{i}.mlp.down_proj.weight", "bfloat16", (2048, 2048), 0) for i in range(24)]
        weight = np.random.default_rng(0).standard_normal((2048, 2048), np.float32).astype(ml_dtypes.bfloat16)
        with ShardedWriter(folder, plan) as writer:
            for info in plan:
                writer.write(info.name, weight)
        (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
        checkpoint = open_checkpoint(folder)
        setting = dict(enabled=True, amax=np.float32(5), second_divisor=0.0, **SETTINGS["NVFP4_DEFAULT_CFG"]["weight"])
        model = SimpleNamespace(checkpoint=checkpoint, config=checkpoint.config, float32_weights=False, modules=list(modules_of(checkpoint)))
        model.quantizers = {f"{row['name']}.{side}_quantizer": SimpleNamespace(**setting)
                            for row in model.modules for side in ("weight", "input")}
        del weight
        Path("/proc/self/clear_refs").write_text("5")     # the peak starts anew from what is held now
        before = peak()
        export_hf_checkpoint(model, folder.with_name("out"))
        print(peak() - before)
    """), args=[str(tmp_path / "source"), *sys.path])
    assert float(grown) < 40, f"{grown} MiB for an export that reads 192 MiB and writes 54 MiB"
