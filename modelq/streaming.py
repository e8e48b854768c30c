"""The order of work: batches go through a model one layer at a time, and each layer's weights are in memory only meanwhile.

What is held: the hidden states of every batch at one layer boundary, and one layer. Weights come from the checkpoint's mapping, are
fake-quantized on the way where their quantizer is on, and their pages are given back when the layer is done.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq import _core
from modelq.experts import own_part, place_of, quantizer_of
from modelq.groups import pair_of
from modelq.inputs import Batch
from modelq.progress import progress
from modelq.quantizers import Found, block_extents, make_quantizer, set_found_values, stage_quantizers
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


Look = Callable[[Sequence[dict[str, Any]], dict[str, np.ndarray]], None]


def run_layer(model: Model, run: Any, layer: int, look: Look | None = None) -> np.ndarray | None:
    """All batches through one layer, expert by expert where it has any. look(modules, tensors) is shown the tensors of each part before
    they are used. Returns how many tokens went to each expert: int64 [experts, 2], all of them and those that are no padding."""
    names = model.runtime.layer_tensors(layer)
    try:
        tensors = read(model, names, model.modules_of(layer))
        if look is not None:
            look(model.modules_of(layer), tensors)
        model.runtime.load_layer(layer, tensors)
        del tensors
        tokens: np.ndarray | None = run.layer(layer)
        for expert, count in enumerate(() if tokens is None else tokens[:, 0].tolist()):
            if count or look is not None:
                _run_expert(model, run if count else None, layer, expert, look)
    finally:
        model.runtime.drop_layer(layer)
        model.checkpoint.release(names)
    return tokens


def _run_expert(model: Model, run: Any, layer: int, expert: int, look: Look | None) -> None:
    """One expert's tokens; run None: there are none."""
    names = model.runtime.expert_tensors(layer, expert)
    try:
        tensors = read(model, names, model.modules_of(layer, expert))
        if look is not None:
            look(model.modules_of(layer, expert), tensors)
        if run is not None:
            run.expert(layer, expert, tensors)
    finally:
        model.checkpoint.release(names)


def parts(model: Model, layer: int) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    """(tensors, modules) of a layer's parts: what its tokens share, then each expert."""
    yield model.runtime.layer_tensors(layer), model.modules_of(layer)
    for expert in range(model.runtime.experts(layer)):
        yield model.runtime.expert_tensors(layer, expert), model.modules_of(layer, expert)


def embed_tensors(model: Model) -> dict[str, np.ndarray]:
    return read(model, model.runtime.embed_tensors(), model.embedding_modules)


def head_tensors(model: Model) -> dict[str, np.ndarray]:
    return read(model, model.runtime.head_tensors(), model.head_modules)


def read(model: Model, names: Iterable[str], modules: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Arrays by tensor name; the weights of `modules` as their quantizers make them, if the model simulates quantization."""
    made = {module["weight"]: simulated(model, module) for module in modules if _is_simulated(model, module)} if model.simulate else {}
    tensors = {name: made[name] if name in made else model.checkpoint.read(name) for name in names}
    if model.simulate and not model.float32_weights:
        for name, scale in norm_scales(model, modules).items():
            tensors[name] = times_columns(tensors[name], scale)
    return tensors


def _is_simulated(model: Model, module: dict[str, Any]) -> bool:
    quantizer = quantizer_of(model, f"{module['name']}.weight_quantizer")
    return module["name"] in model.packed or (quantizer is not None and quantizer.enabled)


def simulated(model: Model, module: dict[str, Any]) -> np.ndarray:
    """A quantized weight as the model computes with it: from its packed parts, or fake-quantized."""
    if module["name"] in model.packed:
        dtype = "float32" if model.float32_weights else model.checkpoint.tensors[module["weight"]].dtype
        return model.packed[module["name"]].read(dtype)
    return fake_quantize(model, module, model.checkpoint.read(module["weight"]))


def fake_quantize(model: Model, module: dict[str, Any], tensor: np.ndarray) -> np.ndarray:
    """The values that the exported weight will dequantize to. A model loaded as float32 follows the reference's simulation instead,
    which multiplies by reciprocal scales where an export divides: one code apart on ties."""
    name = f"{module['name']}.weight_quantizer"
    quantizer, setting = quantizer_of(model, name), model.settings[place_of(model, name).name]
    if model.float32_weights:
        if place_of(model, name).parts > 1:
            found = [Found(own_part(model, name, stage.amax), global_amax=stage.global_amax) for stage in stage_quantizers(quantizer)]
            quantizer = make_quantizer(setting)
            set_found_values(quantizer, found)
        return quantizer(as_loaded(model, tensor))
    tensor, pair = stated_weight(model, module, tensor), pair_of(model, module["name"])
    if pair is None or pair.weight is None:
        plain = make_quantizer(setting)
        set_found_values(plain, [Found(stated.amax) for stated in stated_weight_amax(model, module)])
        return plain(tensor)
    schemes = [pair.weight] + [stage.scheme for stage in stage_quantizers(quantizer)[1:]]
    for scheme, attributes, stated in zip(schemes, stages(setting), stated_weight_amax(model, module)):
        size = block_extents(attributes).get(-1)
        tensor = _core.fake_quantize(tensor, scheme, block_size=size, name=module["weight"], **stated._asdict())
    return tensor
