"""The order of work: batches go through a model one layer at a time, and each layer's weights are in memory only meanwhile.

What is held: the hidden states of every batch at one layer boundary, and one layer. Weights come from the checkpoint's mapping, are
fake-quantized on the way where their quantizer is on, and their pages are given back when the layer is done.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from modelq import _core
from modelq.ahead import ahead_of, forget_ahead, take_made, take_read
from modelq.experts import quantizer_of
from modelq.groups import pair_of
from modelq.inputs import Batch
from modelq.progress import progress
from modelq.simulation import fake_quantize, weight_stages
from modelq.smoothing import as_loaded, norm_scales, own_scale, own_weight, stated_weight, times_norm
from modelq.stated import as_divided

if TYPE_CHECKING:
    from modelq.model import Model


def forward(model: Model, batches: Sequence[Batch], description: str = "forward") -> Any:
    """Run the batches through the embedding and every layer. Returns the runtime's run, which holds the hidden states; losses
    and logits come from it together with `head_tensors(model)`."""
    run = start(model, batches)
    for layer in progress(range(model.num_layers), description):
        run_layer(model, run, layer, following=layer + 1 if layer + 1 < model.num_layers else None)
    return run


def start(model: Model, batches: Sequence[Batch], count_padding: bool = False, experts: int = 0) -> Any:
    """A run over the batches, past the embedding. count_padding: padding counts in statistics. experts: so many at least see each token."""
    masks = None
    if any(batch.mask is not None for batch in batches):
        masks = [np.ones(batch.ids.shape, np.uint8) if batch.mask is None else batch.mask for batch in batches]
    run = model.runtime.start([batch.ids for batch in batches], masks, count_padding, experts)
    run.embed(embed_tensors(model))
    model.made_ahead = None
    return run


class Part(NamedTuple):
    """What of a model is in memory at once: what the tokens of a layer share (expert None), one expert, or what is outside the layers
    (layer -1). tensors: by name, as the model computes with them. tokens: how many that are no padding come by; None: all."""
    layer: int
    expert: int | None
    modules: Sequence[dict[str, Any]]
    tensors: Mapping[str, np.ndarray]
    tokens: int | None = None


class Visitor(Protocol):
    """Is shown each part before its tokens go through it, and afterwards, while its tensors are still there."""

    def enter(self, part: Part) -> None: ...

    def leave(self, part: Part) -> None: ...


def run_layer(model: Model, run: Any, layer: int, visitor: Visitor | None = None,
              following: int | None = None) -> np.ndarray | None:
    """All batches through one layer, expert by expert where it has any. Without a visitor, experts that no token reaches are not read.
    following: the layer that will be run next, if any, whose weights may come to a device meanwhile. Returns how many tokens went to each
    expert: int64 [experts, 2], all of them and those that are no padding."""
    names = model.runtime.layer_tensors(layer)
    try:
        part = Part(layer, None, model.modules_of(layer), read_part(model, names, layer, None, visitor is None))
        if visitor is not None:
            visitor.enter(part)
        model.runtime.load_layer(layer, part.tensors)
        load_low_rank(model, model.runtime, part.modules)
        if visitor is None:
            del part        # what was read is packed by now
        first, has_experts = (layer, 0), model.runtime.experts(layer) > 0
        tokens: np.ndarray | None = run.layer(layer, ahead_of(model, *(first if has_experts else (following, None)), visitor is None))
        if visitor is not None:
            visitor.leave(part)
        counts = [] if tokens is None else tokens.tolist()
        reached = [expert for expert, (count, _) in enumerate(counts) if count]
        then = dict(zip(reached, [*((layer, expert) for expert in reached[1:]), (following, None)]))
        for expert, (count, counted) in enumerate(counts):
            if count or visitor is not None:
                _run_expert(model, run if count else None, layer, expert, counted, visitor, then.get(expert, (None, None)))
    except BaseException:
        forget_ahead(model)
        raise
    finally:
        model.runtime.drop_layer(layer)
        model.checkpoint.release(names)
    return tokens


def _run_expert(model: Model, run: Any, layer: int, expert: int, counted: int, visitor: Visitor | None,
                then: tuple[int | None, int | None]) -> None:
    """One expert's tokens; run None: there are none. then: layer and expert of the part that is run next."""
    names, modules = model.runtime.expert_tensors(layer, expert), model.modules_of(layer, expert)
    try:
        part = Part(layer, expert, modules, read_part(model, names, layer, expert, visitor is None), counted)
        if visitor is not None:
            visitor.enter(part)
        if run is not None:
            run.expert(layer, expert, part.tensors, ahead_of(model, *then, visitor is None))
        if visitor is not None:
            visitor.leave(part)
    finally:
        model.checkpoint.release(names)


def parts(model: Model, layer: int) -> Iterator[tuple[list[str], Part]]:
    """A layer's parts, without running anything: names of tensors, and the part with these tensors, read when asked for."""
    for expert in (None, *range(model.runtime.experts(layer))):
        names = model.runtime.layer_tensors(layer) if expert is None else model.runtime.expert_tensors(layer, expert)
        yield names, Part(layer, expert, model.modules_of(layer, expert), unread(model), 0)


def unread(model: Model) -> Mapping[str, np.ndarray]:
    """The tensors of the checkpoint, read when asked for and not kept: the pages of one are given back when the next is read."""
    return _Lazy(model)


class _Lazy(dict[str, np.ndarray]):
    def __init__(self, model: Model):
        super().__init__()
        self._model = model
        self._before: list[str] = []

    def __missing__(self, name: str) -> np.ndarray:
        if self._before != [name]:
            self._model.checkpoint.release(self._before)
            self._before = [name]
        return self._model.checkpoint.read(name)


def load_low_rank(model: Model, runtime: Any, modules: Sequence[dict[str, Any]]) -> None:
    """The branches of low rank of the linears of a layer that the runtime has loaded."""
    for module in modules:
        if (branch := model.low_rank.get(module["name"])) is not None:
            runtime.load_low_rank(module["name"], branch.down, branch.up)


def embed_tensors(model: Model) -> dict[str, np.ndarray]:
    return read(model, model.runtime.embed_tensors(), model.embedding_modules)


def head_tensors(model: Model) -> dict[str, np.ndarray]:
    return read(model, model.runtime.head_tensors(), model.head_modules)


def head_for_products(model: Model) -> dict[str, Any]:
    """The same for logits and losses, as `read_for_products` has it."""
    return read_for_products(model, model.runtime.head_tensors(), model.head_modules)


def read_part(model: Model, names: list[str], layer: int, expert: int | None, for_products: bool) -> dict[str, Any]:
    """The tensors of a layer, or of one of its experts, whose turn has come: by `read_for_products` or `read`, but for those that were made
    ahead."""
    made = take_made(model, layer, expert, for_products)
    reader = read_for_products if for_products else read
    return {**reader(model, [name for name in names if name not in made], model.modules_of(layer, expert)), **made}


def read(model: Model, names: Iterable[str], modules: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Arrays by tensor name; weights smoothed, and as their quantizers make them if the model simulates that. modules: all of the part that
    the names are of, since norms take up what smooths the linears behind them."""
    names = list(names)
    wanted = [module for module in modules if module["weight"] in names]
    if model.simulate:
        made = {module["weight"]: simulated(model, module) for module in wanted if _is_simulated(model, module)}
    else:
        made = {module["weight"]: smoothed(model, module) for module in wanted if is_smoothed(model, module)}
    tensors = {name: made[name] if name in made else _plain(model, name) for name in names}
    if not model.float32_weights:
        for name, scale in norm_scales(model, modules).items():
            if name in tensors:
                tensors[name] = times_norm(model, name, tensors[name], scale)
    return tensors


def _plain(model: Model, name: str) -> np.ndarray:
    """A tensor as the checkpoint has it."""
    kept = take_read(model, name)
    return model.checkpoint.read(name) if kept is None else kept


def is_read_as_stored(model: Model, module: dict[str, Any]) -> bool:
    """Whether `read` gives a linear's weight as the checkpoint has it."""
    return not (_is_simulated(model, module) if model.simulate else is_smoothed(model, module))


def read_stored(model: Model, names: Iterable[str], modules: Sequence[dict[str, Any]], pack: bool = False) -> dict[str, Any]:
    """As `read`, but weights that are packed in memory or in the checkpoint come as (parts, scheme, dtype, block_size): the runtime
    multiplies with the codes, and has the results of what they stand for. pack: so do fake-quantized ones."""
    names = list(names)
    made = {module["weight"]: found for module in modules
            if module["weight"] in names and (found := stored(model, module, pack)) is not None}
    return read(model, [name for name in names if name not in made], modules) | made


def read_for_products(model: Model, names: Iterable[str], modules: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """As `read_stored`, for nothing but to be multiplied with. Where a GPU does that, it quantizes weights too: (numbers, scheme, dtype,
    block_size, (amax, block_amax, second_divisor)) stands for what they become, bit for bit what `simulated` gives."""
    names = list(names)
    wanted = [module for module in modules if module["weight"] in names and is_quantized_there(model, module)]
    there = {module["weight"]: found for module in wanted if (found := unquantized(model, module)) is not None}
    return read_stored(model, [name for name in names if name not in there], modules) | there


def is_quantized_there(model: Model, module: dict[str, Any]) -> bool:
    """Whether a weight is only simulated, and what computes with it quantizes it: a GPU, which the reference's simulation of a float32
    model is not for."""
    if module["kind"] != "linear" or not model.simulate or model.float32_weights or model.runtime.device is None:
        return False
    pair = pair_of(model, module["name"])
    return module["name"] not in model.packed and pair is not None and pair.weight is not None


def unquantized(model: Model, module: dict[str, Any], tensor: np.ndarray | None = None) -> Any:
    """Such a weight (as the checkpoint has it, if that is read already) as it is quantized, and by what; None: `simulated` alone knows."""
    tensor = stated_weight(model, module, _plain(model, module["weight"]) if tensor is None else tensor)
    *before, (scheme, size, by) = weight_stages(model, module)
    if scheme is None:
        return None
    numbers = as_divided(model, module, tensor)
    for first, first_size, arguments in before:         # all but the last of several quantizers in a row
        numbers = _core.fake_quantize(numbers, first, block_size=first_size, name=module["weight"], **arguments)
    return numbers, scheme, str(tensor.dtype), size, (by["amax"], by["block_amax"], by["second_divisor"])


def stored(model: Model, module: dict[str, Any], pack: bool = False) -> Any:
    """A weight as the model computes with it, by its parts: (parts, scheme, dtype, block_size). None: it is not packed."""
    from modelq.checkpoint.quantized import QuantizedCheckpoint
    from modelq.compression import PackedWeight, has_packed_form, packed_weight

    if module["kind"] != "linear":
        return None
    name, dtype = module["name"], model.checkpoint.tensors[module["weight"]].dtype
    if model.simulate and name in model.packed:
        return model.packed[name].stored("float32" if model.float32_weights else dtype)
    if model.simulate and _is_simulated(model, module):     # a model of float32 weights is not what its export is, to within ties
        wanted = pack and not model.float32_weights and has_packed_form(model, module)
        return packed_weight(model, module).stored(dtype) if wanted else None
    if not model.simulate and is_smoothed(model, module):
        return None
    if name in getattr(model.checkpoint, "in_mxfp4", ()):
        return model.checkpoint.parts(name), "mxfp4", dtype, None
    if not isinstance(model.checkpoint, QuantizedCheckpoint):
        return None
    layer = model.checkpoint.layers.get(name)
    return None if layer is None else PackedWeight(layer.form, model.checkpoint.parts(name)).stored(dtype)


def _is_simulated(model: Model, module: dict[str, Any]) -> bool:
    quantizer = quantizer_of(model, f"{module['name']}.weight_quantizer")
    return module["name"] in model.packed or (quantizer is not None and quantizer.enabled)


def is_smoothed(model: Model, module: dict[str, Any]) -> bool:
    """Whether a linear's weight is not the checkpoint's even where nothing is rounded."""
    return module["kind"] == "linear" and (own_scale(model, module["name"]) is not None or module["name"] in model.low_rank)


def smoothed(model: Model, module: dict[str, Any]) -> np.ndarray:
    """A weight as its quantizer sees it, not quantized."""
    tensor = as_loaded(model, model.checkpoint.read(module["weight"]))
    return own_weight(model, module, tensor) if model.float32_weights else stated_weight(model, module, tensor)


def simulated(model: Model, module: dict[str, Any]) -> np.ndarray:
    """A quantized weight as the model computes with it: from its packed parts, or fake-quantized."""
    if module["name"] in model.packed:
        dtype = "float32" if model.float32_weights else model.checkpoint.tensors[module["weight"]].dtype
        return model.packed[module["name"]].read(dtype)
    return fake_quantize(model, module, model.checkpoint.read(module["weight"]))
