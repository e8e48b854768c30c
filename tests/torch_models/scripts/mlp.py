import torch

import modelopt.torch.quantization as mtq
from modelopt.torch.quantization.nn import TensorQuantizer


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 10))
        self.scale = torch.nn.Parameter(torch.ones(10))

    def forward(self, x):
        return self.layers(x) * self.scale


torch.manual_seed(0)
images = torch.randn(16, 3, 8, 8)
model = Net()
plain = model(images)
mtq.register(original_cls=torch.nn.Flatten, quantized_cls=type("QuantFlatten", (torch.nn.Flatten,), {
    "_setup": lambda self: setattr(self, "input_quantizer", TensorQuantizer()),
    "forward": lambda self, x: torch.nn.Flatten.forward(self, self.input_quantizer(x))}))
mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda model: model(images))
mtq.unregister(torch.nn.Flatten)
mtq.print_quant_summary(model)
assert model.layers[2].input_quantizer.amax is not None
error = (model(images) - plain).norm() / plain.norm()
assert 0 < error < 0.05, error
mtq.fold_weight(model)
assert not model.layers[0].weight_quantizer.is_enabled
