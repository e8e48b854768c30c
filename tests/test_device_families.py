"""Every family of the runtime on a GPU (emulated, as in test_device.py): against the CPU's code, whose logits tests/torch_models compares with
transformers; Llama-Nemotron's against NumPy."""
import copy

import numpy as np
import pytest

import family_models
import modelq
import modelq._core as core
import modelq.quantization as mtq
import test_nemotron
from cuda_library import library_to_test
from modelq import cuda
from modelq.checkpoint.config import runtime_config

LARGE = "64MiB"
RNG = np.random.default_rng(0)
IDS = RNG.integers(2, 60, (3, 24))
LEFT = np.arange(24) >= np.array([0, 9, 15])[:, None]
RIGHT = LEFT[:, ::-1].copy()
SHORT = RNG.integers(2, 60, (2, 9))     # shorter than longrope's first table is for
ROWS = IDS.size + SHORT.size


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setenv("MODELQ_CUDA_LIBRARY", str(library_to_test()))


@pytest.fixture(scope="module", params=family_models.CONFIGS)
def source(request, tmp_path_factory):
    return family_models.save(request.param, tmp_path_factory.mktemp("model") / "source")


def named(name, tmp_path):
    return family_models.save(name, tmp_path / "source")


def there(source, compute="float32", memory=LARGE):
    return modelq.load(source, compute=compute, device="cuda", device_memory=memory)


def here(source, compute="float32"):
    return modelq.load(source, compute=compute)


def logits(model, ids=IDS, mask=None):
    found = np.asarray(model(ids, attention_mask=mask).logits)
    return found if mask is None else found[mask]


def passes(model):
    """Sequences of different length together, some of them padded."""
    model(IDS, attention_mask=LEFT)
    model(SHORT)


def amax_of(model):
    return {name: np.asarray(quantizer.amax) for name, quantizer in model.quantizers.items() if getattr(quantizer, "amax", None) is not None}


def check_amax(found, expected, bound=1e-6):
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=bound, atol=0, err_msg=name)


def test_every_family_is_here():
    """Others have files of transformers in data/families, or are golden; and the stored configs are those of tests/torch_models."""
    elsewhere = {"qwen2", "qwen3", "qwen3_moe", "mixtral", "nemotron_nas"}
    assert {row["family"] for row in core.archs()} - {runtime_config(config)[0] for config in family_models.CONFIGS.values()} == elsewhere


def test_logits(source):
    """Windows, chunks and longer ropes among them."""
    model, other = here(source), there(source)
    for mask in (None, LEFT, RIGHT):
        np.testing.assert_allclose(logits(other, mask=mask), logits(model, mask=mask), rtol=0, atol=2e-5)
    assert other.loss([IDS, SHORT]) == pytest.approx(model.loss([IDS, SHORT]), rel=1e-6)


def small(source):
    """On a device that has room for the longest sequence and little more, so that rows come in chunks."""
    for memory in range(1_520_000, 4_000_000, 40_000):
        try:
            there(source, memory=memory).loss([IDS[:1]])
        except MemoryError:
            continue
        break
    model = there(source, memory=memory + 20_000)
    with pytest.raises(MemoryError, match="a sequence of .* needs"):       # all rows do not fit together
        model.loss([np.ones((1, ROWS), np.int64)])
    return model


def test_maxima(source):
    """The CPU's, and the same bits whatever room there is."""
    found = []
    for model in (here(source), there(source), small(source)):
        mtq.quantize(model, mtq.FP8_DEFAULT_CFG, passes)
        found.append((amax_of(model), model.loss([IDS, SHORT])))
    check_amax(found[1][0], found[0][0], 2e-6)      # sums in another order: 1.0e-6 was seen beside AVX-512's, 1.2e-6 beside AVX2's
    check_amax(found[2][0], found[1][0], 0)
    assert found[1][1] == found[2][1] == pytest.approx(found[0][1], rel=2e-3)     # a sum in another order may round to the code beside


def test_bfloat16(source):
    one, other = logits(here(source, "bfloat16")), logits(there(source, "bfloat16"))
    exact = logits(here(source))
    assert np.linalg.norm(other - exact) < 1.3 * np.linalg.norm(one - exact) + 1e-3 * np.linalg.norm(exact)


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "llama4", "qwen2_moe", "phi3 longrope"])
def test_streams_that_do_nothing_before_they_must(name, tmp_path, monkeypatch):
    source, found = named(name, tmp_path), []
    for streams in ("at once", "late", "random"):
        monkeypatch.setenv("MODELQ_SHIM_STREAMS", streams)
        model = small(source)
        mtq.quantize(model, mtq.FP8_DEFAULT_CFG, passes)
        found.append((amax_of(model), model.loss([IDS, SHORT])))
    for amax, loss in found[1:]:
        check_amax(amax, found[0][0], 0)
        assert loss == found[0][1]


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "llama4", "qwen2_moe windows"])
def test_experts_who_look_on(name, tmp_path):
    source, models = named(name, tmp_path), []
    for model in (here(source), there(source)):
        algorithm = {"method": "max", "moe_calib_experts_ratio": 0.75}
        mtq.quantize(model, {**mtq.FP8_DEFAULT_CFG, "algorithm": algorithm}, passes)
        models.append(model)
    assert str(models[0].expert_tokens) == str(models[1].expert_tokens)
    check_amax(*map(amax_of, reversed(models)))


@pytest.mark.parametrize("name", ["phi3", "gemma2", "deepseek_v3", "qwen2_moe"])
def test_outputs_that_are_quantized(name, tmp_path):
    """Of linears that are several in one, and of those behind which something is narrow: their rows that count are gathered too."""
    source, models = named(name, tmp_path), []
    config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    config["quant_cfg"] += [{"quantizer_name": "*self_attn*output_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}},
                            {"quantizer_name": "*mlp*output_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}}]
    for model in (here(source), there(source)):
        mtq.quantize(model, config, passes)
        models.append(model)
    found, expected = amax_of(models[1]), amax_of(models[0])
    assert any("output_quantizer" in name for name in expected)
    check_amax(found, expected)
    assert models[1].loss([IDS]) == pytest.approx(models[0].loss([IDS]), rel=1e-3)


def test_blocks_of_their_own_sizes(tmp_path):
    """Llama-Nemotron against NumPy: halves that are not there, or one linear."""
    source = test_nemotron.save(tmp_path / "source", test_nemotron.BLOCKS, test_nemotron.weights(test_nemotron.BLOCKS))
    model, other = there(source), here(source)
    for row, ids in zip(np.asarray(model(test_nemotron.IDS).logits), test_nemotron.IDS):
        wanted = test_nemotron.logits(test_nemotron.BLOCKS, test_nemotron.weights(test_nemotron.BLOCKS), ids)
        np.testing.assert_allclose(row, wanted, rtol=0, atol=2e-4)
    for each in (model, other):
        mtq.quantize(each, mtq.FP8_DEFAULT_CFG, lambda model: model(test_nemotron.IDS))
    check_amax(amax_of(model), amax_of(other))


@pytest.mark.parametrize("name, change, words", [
    ("granite", {"residual_multiplier": 0.0}, "a multiplier of zero for what layers add"),
    ("deepseek_v3", {"num_experts": 128, "expert_groups": 64}, "more than 32 groups of experts"),
    ("gemma2", {"head_dim": 320}, "heads of more than 256 numbers"),
    ("phi3 longrope", {"layer_ropes": [1, 2, 1, 1]}, "longrope, and layers with a rope of their own beside it"),
    ("llama dynamic", {"layer_ropes": [1, 2, 1, 1]}, "dynamic rope, and layers with one of their own beside it")])
def test_what_a_device_does_not_compute(name, change, words):
    family, config = runtime_config(family_models.CONFIGS[name])
    runtime = core.Runtime(family, config | change, "float32")
    with pytest.raises(ValueError, match=f"this {family} model is computed on the CPU only so far: it has {words}"):
        runtime.use_device(cuda.library())
