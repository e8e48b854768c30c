"""What else is done with a model: copied, moved, wrapped, compiled, offloaded, called in other modes, given bad values."""
import copy
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import golden_data  # noqa: E402
import modelq.quantization as mtq  # noqa: E402
from modelq.export import export_hf_checkpoint  # noqa: E402
from modelq.nn import TensorQuantizer  # noqa: E402
from test_torch_models import UP, load, logits, quantize, quantizers  # noqa: E402

SEARCHED = ["FP8_DEFAULT_CFG", "INT4_AWQ_CFG", "INT8_SMOOTHQUANT_CFG"]


def same_files(one, other):
    first, second = (golden_data.read_safetensors(folder) for folder in (one, other))
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].tobytes() == second[name].tobytes(), name


def test_copied_and_moved(golden):
    """deepcopy shares nothing; .to() changes dtypes, and keeps what was found."""
    model = quantize(load(golden["llama"], "float32"), golden["llama"], mtq.NVFP4_SVDQUANT_DEFAULT_CFG)
    expected, copied = logits(model, golden["llama"]), copy.deepcopy(model)
    np.testing.assert_array_equal(logits(copied, golden["llama"]), expected)
    mtq.disable_quantizer(copied, "*")
    mtq.calibrate(copied, None)
    np.testing.assert_array_equal(logits(model, golden["llama"]), expected)
    amax = model.get_submodule(UP).input_quantizer.amax
    moved = copy.deepcopy(model).to(torch.bfloat16)
    np.testing.assert_array_equal(moved.get_submodule(UP).input_quantizer.amax, amax)
    off = np.linalg.norm(logits(moved, golden["llama"]) - expected) / np.linalg.norm(expected)
    assert 0 < off < 0.2
    assert logits(model.to("cpu"), golden["llama"]).dtype == np.float32


class Loud(torch.nn.DataParallel):
    """As DataParallel is without a GPU: it calls the module."""


@pytest.mark.parametrize("preset", SEARCHED)
def test_wrapped_in_data_parallel(golden, preset, tmp_path):
    plain = quantize(load(golden["llama"]), golden["llama"], getattr(mtq, preset))
    wrapped, seen = Loud(load(golden["llama"])), []

    def loop(model):
        seen.append(type(model))
        for row in golden["llama"].calib:
            model(torch.from_numpy(row[None]))
    assert mtq.quantize(wrapped, getattr(mtq, preset), loop) is wrapped and set(seen) == {Loud}
    np.testing.assert_array_equal(logits(wrapped, golden["llama"]), logits(plain, golden["llama"]))
    export_hf_checkpoint(wrapped, export_dir=tmp_path / "wrapped")
    export_hf_checkpoint(plain, export_dir=tmp_path / "plain")
    same_files(tmp_path / "wrapped", tmp_path / "plain")
    mtq.disable_quantizer(wrapped, "*")
    assert not any(quantizer.is_enabled for quantizer in quantizers(wrapped.module).values())


@pytest.mark.parametrize("name, preset", [("llama", "NVFP4_DEFAULT_CFG"), ("qwen3moe", "FP8_DEFAULT_CFG")])
def test_compiled(golden, name, preset):
    """Quantizing modules fall back to eager, without a word; a compiled model can be quantized too."""
    model = quantize(load(golden[name], "float32"), golden[name], getattr(mtq, preset))
    expected = logits(model, golden[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled = torch.compile(model, backend="eager")
        np.testing.assert_array_equal(logits(compiled, golden[name]), expected)
    other = torch.compile(load(golden[name], "float32"), backend="eager")
    np.testing.assert_array_equal(logits(quantize(other, golden[name], getattr(mtq, preset)), golden[name]), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("preset", [*SEARCHED, "NVFP4_DEFAULT_CFG"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded(golden, preset, where, tmp_path):
    """Weights that accelerate keeps elsewhere, and brings while a module computes, are found there; the export is the same."""
    accelerate = pytest.importorskip("accelerate")
    plain = quantize(load(golden["llama"]), golden["llama"], getattr(mtq, preset))
    model = load(golden["llama"])
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, str(tmp_path / "offload"), execution_device="cpu")
    assert model.get_submodule(UP).weight.device.type == "meta"
    quantize(model, golden["llama"], getattr(mtq, preset))
    assert model.get_submodule(UP).weight.device.type == "meta"
    np.testing.assert_array_equal(logits(model, golden["llama"]), logits(plain, golden["llama"]))
    export_hf_checkpoint(model, export_dir=tmp_path / "offloaded")
    export_hf_checkpoint(plain, export_dir=tmp_path / "plain")
    same_files(tmp_path / "offloaded", tmp_path / "plain")


def test_no_values(golden):
    """A model on the meta device is refused before anything is changed."""
    config = load(golden["llama"]).config
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="model.embed_tokens.weight is on the meta device, it has no values"):
        quantize(model, golden["llama"], mtq.FP8_DEFAULT_CFG)
    assert not quantizers(model) and type(model.get_submodule(UP)) is torch.nn.Linear


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("preset", [*SEARCHED, "NVFP4_DEFAULT_CFG"])
def test_modes(golden, mode, preset):
    """Calibrated and called within no_grad and inference_mode: the same numbers."""
    expected = logits(quantize(load(golden["llama"]), golden["llama"], getattr(mtq, preset)), golden["llama"])
    with mode():
        model = quantize(load(golden["llama"]), golden["llama"], getattr(mtq, preset))
        made = model(torch.from_numpy(golden["llama"].calib[:1])).logits
    np.testing.assert_array_equal(made.detach().float().numpy(), expected)
    np.testing.assert_array_equal(logits(model, golden["llama"]), expected)


@pytest.mark.parametrize("what, words", [("activations", r"model\.layers\.0\.mlp\.(down|up)_proj\S*: NaN or infinity"), ("weights", r"model\.layers\.0\.mlp\.up_proj")])
def test_overflow_in_half_precision(golden, what, words):
    """The place where infinity shows up is named, and the model is as it was."""
    model = load(golden["llama"]).to(torch.float16)
    weight = model.get_submodule("model.layers.0.mlp.up_proj").weight
    with torch.no_grad():
        weight.mul_(60000 / weight.abs().max().item())
        if what == "weights":
            weight[3, 5] = torch.inf
    for preset in ("FP8_DEFAULT_CFG", "INT4_AWQ_CFG", "INT8_SMOOTHQUANT_CFG"):
        with pytest.raises(ValueError, match=words):
            quantize(model, golden["llama"], getattr(mtq, preset))
        assert not quantizers(model)


@pytest.mark.parametrize("preset", ["FP8_DEFAULT_CFG", "INT8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"])
def test_odd_weights(preset):
    """Transposed views, slices, no rows, no columns."""
    torch.manual_seed(0)
    straight, x = torch.nn.Linear(128, 32), torch.randn(4, 128)
    views = [straight.weight.detach().t().contiguous().t(), torch.cat([straight.weight.detach()] * 2, 1)[:, :128],
             torch.stack([straight.weight.detach()] * 2, 2)[..., 0]]
    mtq.quantize(straight, getattr(mtq, preset), lambda model: model(x))
    for view in views:
        module = torch.nn.Linear(128, 32)
        module.weight, module.bias = torch.nn.Parameter(view), straight.bias
        assert module.weight.stride() != (128, 1)
        mtq.quantize(module, getattr(mtq, preset), lambda model: model(x))
        assert torch.equal(module(x), straight(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        none = torch.nn.Sequential(torch.nn.Linear(128, 0), torch.nn.Linear(0, 128), torch.nn.Linear(128, 8))
        mtq.quantize(none, getattr(mtq, preset), lambda model: model(x))
        assert none(x).shape == (4, 8) and none(x[:0]).shape == (0, 8)


def test_quantized_already(golden):
    """Anew, from the weights as they are; what the first time set is gone."""
    model = quantize(load(golden["llama"]), golden["llama"], mtq.INT4_AWQ_CFG)
    quantize(model, golden["llama"], mtq.FP8_DEFAULT_CFG)
    once = quantize(load(golden["llama"]), golden["llama"], mtq.FP8_DEFAULT_CFG)
    np.testing.assert_array_equal(logits(model, golden["llama"]), logits(once, golden["llama"]))
    quantize(model, golden["llama"], mtq.NVFP4_SVDQUANT_DEFAULT_CFG)
    quantize(model, golden["llama"], mtq.FP8_DEFAULT_CFG)
    np.testing.assert_array_equal(logits(model, golden["llama"]), logits(once, golden["llama"]))


def test_what_stays_on_a_device(golden, monkeypatch):
    """Maxima of tensors that are not on the CPU are kept where they are until all data have passed, and are the same."""
    from modelq.torch_models import looking

    expected = {name: q.amax for name, q in quantizers(quantize(load(golden["llama"]), golden["llama"], mtq.FP8_DEFAULT_CFG)).items()}
    handed = []
    monkeypatch.setattr(looking, "is_on_cpu", lambda x: False)
    monkeypatch.setattr(looking.Largest, "hand_over", lambda self, original=looking.Largest.hand_over: (
        handed.append(len(self._found)), original(self)))
    model = quantize(load(golden["llama"]), golden["llama"], mtq.FP8_DEFAULT_CFG)
    assert handed == [14]
    for name, quantizer in quantizers(model).items():
        np.testing.assert_array_equal(quantizer.amax, expected[name]) if expected[name] is not None else None


def test_a_quantizer_of_any_array():
    quantizer = TensorQuantizer({"num_bits": (4, 3)}, amax=2.0)
    x = np.linspace(-3, 3, 48, dtype=np.float32).reshape(6, 8)
    assert isinstance(quantizer, torch.nn.Module) and isinstance(quantizer(x), np.ndarray)
    np.testing.assert_array_equal(quantizer(torch.from_numpy(x)).numpy(), quantizer(x))
