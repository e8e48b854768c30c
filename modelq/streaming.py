"""The order of work: batches go through a model one layer at a time, and each layer's weights are in memory only meanwhile.

What is held: the hidden states of every batch at one layer boundary, and one layer. Weights come from the checkpoint's mapping, are
fake-quantized on the way where their quantizer is on, and their pages are given back when the layer is done.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq import _core
from modelq.groups import pair_of
from modelq.inputs import Batch
from modelq.progress import progress
from modelq.quantizers import block_extents, make_quantizer, set_found_values, stage_quantizers
from modelq.rules import stages
from modelq.smoothing import as_loaded, norm_scales, stated_weight, times_columns
from modelq.stated import stated_weight_amax

if TYPE_CHECKING:
    from modelq.model import Model


def forward(model: Model, batches: Sequence[Batch], description: str = "forward") -> Any:
    """Run the batches through the embedding and every layer. Returns the runtime's run, which holds the hidden states; losses
    and logits come from it together with `head_tensors(model)`."""
    run = start(model, batches)
    for layer in progress(range(model.num_layers), description):
        run_layer(model, run, layer)
    return run


def start(model: Model, batches: Sequence[Batch]) -> Any:
    """A run over the batches, past the embedding."""
    masks = None
    if any(batch.mask is not None for batch in batches):
        masks = [np.ones(batch.ids.shape, np.uint8) if batch.mask is None else batch.mask for batch in batches]
    run = model.runtime.start([batch.ids for batch in batches], masks)
    run.embed(embed_tensors(model))
    return run


def run_layer(model: Model, run: Any, layer: int, look: Callable[[dict[str, np.ndarray]], None] | None = None) -> None:
    """All batches through one layer. look() is shown the layer's tensors first."""
    names = model.runtime.layer_tensors(layer)
    try:
        tensors = read(model, names, model.modules_of(layer))
        if look is not None:
            look(tensors)
        model.runtime.load_layer(layer, tensors)
        del tensors
        run.layer(layer)
    finally:
        model.runtime.drop_layer(layer)
        model.checkpoint.release(names)


def embed_tensors(model: Model) -> dict[str, np.ndarray]:
    return read(model, model.runtime.embed_tensors(), model.embedding_modules)


def head_tensors(model: Model) -> dict[str, np.ndarray]:
    return read(model, model.runtime.head_tensors(), model.head_modules)


def read(model: Model, names: Iterable[str], modules: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Arrays by tensor name; the weights of `modules` as their quantizers make them, if the model simulates quantization."""
    tensors = {name: model.checkpoint.read(name) for name in names}
    if model.simulate:
        for module in modules:
            quantizer = model.quantizers.get(f"{module['name']}.weight_quantizer")
            if quantizer is not None and quantizer.enabled:
                tensors[module["weight"]] = fake_quantize(model, module, tensors[module["weight"]])
        if not model.float32_weights:
            for name, scale in norm_scales(model, modules).items():
                tensors[name] = times_columns(tensors[name], scale)
    return tensors


def fake_quantize(model: Model, module: dict[str, Any], tensor: np.ndarray) -> np.ndarray:
    """The values that the exported weight will dequantize to. A model loaded as float32 follows the reference's simulation instead,
    which multiplies by reciprocal scales where an export divides: one code apart on ties."""
    name = f"{module['name']}.weight_quantizer"
    quantizer = model.quantizers[name]
    if model.float32_weights:
        return quantizer(as_loaded(model, tensor))
    tensor, pair = stated_weight(model, module, tensor), pair_of(model, module["name"])
    if pair is None or pair.weight is None:
        plain = make_quantizer(model.settings[name])
        set_found_values(plain, [(amax, None, None) for amax in stated_weight_amax(model, module)])
        return plain(tensor)
    schemes = [pair.weight] + [stage.scheme for stage in stage_quantizers(quantizer)[1:]]
    for scheme, attributes, amax in zip(schemes, stages(model.settings[name]), stated_weight_amax(model, module)):
        tensor = _core.fake_quantize(tensor, scheme, amax=amax, block_size=block_extents(attributes).get(-1), name=module["weight"])
    return tensor
