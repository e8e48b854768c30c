"""Users' module classes: registered with what quantizes them."""
import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import modelq  # noqa: E402
import modelq.quantization as mtq  # noqa: E402
from modelq.nn import TensorQuantizer  # noqa: E402


class Scale(torch.nn.Module):
    """Not a linear, and unknown to modelq."""

    def __init__(self, width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.1, 2.0, width))

    def forward(self, x):
        return x * self.weight


class QuantScale(Scale):
    def _setup(self):
        self.input_quantizer = TensorQuantizer()
        self.weight_quantizer = TensorQuantizer()
        self.hidden_quantizer = TensorQuantizer()

    def forward(self, x):
        return self.hidden_quantizer(self.input_quantizer(x) * self.weight_quantizer(self.weight)) + 1


class MixIn:
    def _setup(self):
        self.input_quantizer = TensorQuantizer()

    def forward(self, x):
        return super().forward(self.input_quantizer(x))


@pytest.fixture(autouse=True)
def clean():
    yield
    for kind in (Scale, torch.nn.LayerNorm, torch.nn.Linear):
        try:
            mtq.unregister(kind)
        except KeyError:
            pass


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.LayerNorm(32), Scale(32), torch.nn.Linear(32, 4))


X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


def test_a_registered_class_is_quantized(tmp_path):
    """Its quantizers are found by rules, calibrated, exported by states, and gone when something fails."""
    mtq.register(original_cls=Scale, quantized_cls=QuantScale)
    mtq.register(torch.nn.LayerNorm, MixIn)
    model = mtq.quantize(net(), mtq.INT8_DEFAULT_CFG, lambda model: model(X))
    scale, norm = model[2], model[1]
    assert isinstance(scale, Scale) and isinstance(norm, torch.nn.LayerNorm) and type(norm).__name__ == "MixIn"
    np.testing.assert_array_equal(np.ravel(scale.weight_quantizer.amax), scale.weight.detach())
    assert scale.input_quantizer.amax > 0 and not scale.hidden_quantizer.is_enabled         # no rule of the preset names it
    assert "2.hidden_quantizer" in dict(model.named_modules()) and norm.input_quantizer.is_enabled
    mtq.set_quantizer_by_cfg(model, [{"quantizer_name": "2.*", "enable": False}])
    assert torch.equal(scale(X.repeat(1, 2)), X.repeat(1, 2) * scale.weight + 1)
    modelq.save(model, tmp_path)
    other = modelq.restore(net(), tmp_path)
    assert torch.equal(other(X), model(X)) and torch.equal(copy.deepcopy(model)(X), model(X))


def test_only_named_parts(tmp_path):
    mtq.register(Scale, QuantScale)
    model = mtq.quantize(net(), {"quant_cfg": [{"quantizer_name": "*", "enable": False},
                                               {"quantizer_name": "2.hidden_quantizer", "cfg": {"num_bits": (4, 3)}}], "algorithm": "max"},
                         lambda model: model(X))
    assert model[2].hidden_quantizer.num_bits == (4, 3) and not model[0].weight_quantizer.is_enabled
    np.testing.assert_allclose(model[2].hidden_quantizer.amax, (model[1](model[0](X)) * model[2].weight).abs().max().item(), rtol=1e-6)


def test_a_failure_takes_everything_back():
    mtq.register(Scale, QuantScale)
    model = net()
    names, plain = [name for name, _ in model.named_modules()], model(X)

    def fails(model):
        raise RuntimeError("no data today")
    with pytest.raises(RuntimeError):
        mtq.quantize(model, mtq.INT8_DEFAULT_CFG, fails)
    assert type(model[2]) is Scale and [name for name, _ in model.named_modules()] == names and torch.equal(model(X), plain)


def test_the_nearest_class_counts():
    """A user's class for nn.Linear takes the place of ours; unregistered, ours is back."""
    mtq.register(torch.nn.Linear, MixIn)
    assert type(mtq.quantize(net(), mtq.INT8_DEFAULT_CFG, lambda model: model(X))[0]).__name__ == "MixIn"
    mtq.unregister(torch.nn.Linear)
    assert type(mtq.quantize(net(), mtq.INT8_DEFAULT_CFG, lambda model: model(X))[0]).__name__ == "QuantLinear"
    with pytest.raises(KeyError, match="Linear is not registered"):
        mtq.unregister(torch.nn.Linear)
    with pytest.raises(TypeError, match="_setup"):
        mtq.register(Scale, Scale)
    with pytest.raises(TypeError, match="original_cls"):
        mtq.register("Scale", QuantScale)
