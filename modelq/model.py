"""`modelq.load`: a checkpoint opened in the native runtime, called like a transformers model, computed layer by layer when asked."""
from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from modelq.devices import Placement
from modelq.experts import expert_places
from modelq.generation import Generates
from modelq.inputs import IGNORED_ARGUMENTS, Batch, check_vocabulary, groups, integer_matrix, make_batch
from modelq.output import Output, Pass
from modelq.parking import Parking
from modelq.quantizers import without_rounding
from modelq.rules import Setting, default_setting
from modelq.slots import slots_of
from modelq.stated import stated_input_quantizers
from modelq.weights_only import PerhapsWeightsOnly, runtime_of

# How many bytes of hidden states a measurement (loss, perplexity) holds at once; more batches go in further rounds.
HIDDEN_BYTES = 512 << 20


class Model(Generates, PerhapsWeightsOnly):
    """A language model without PyTorch.

    config: config.json as a dictionary. checkpoint: the open files. runtime: the C forward. modules: one dictionary per module in
    the order of the model (name, kind, layer, shape, weight, bias, site, expert). quantizers: full name
    ("model.layers.0.mlp.up_proj.weight_quantizer") to `_core.Quantizer`; settings: the same names to what the rules said.
    places: where the quantizers of experts' linears are. expert_tokens: by layer, how many tokens of the
    calibration reached each expert.
    packed: modules whose weights `compress` holds in memory. low_rank: module name to the branch beside its weight (SVDQuant).
    kept_blocks: modules that go from MXFP4 to NVFP4 as they are, to what scales their blocks.
    search_losses: what the last search found each module or quantizer to lose.
    connected: the quantizers in the runtime, by name.
    own_scales: siblings keep scales of their own until an export.
    stored_layers: modules whose weights the checkpoint holds quantized already (an export opened again), and how.
    """

    def __init__(self, checkpoint: Any, compute: str = "auto", weights_only: bool = False, placement: Placement | None = None):
        self.float32_weights, self._weights_only, self.placement = compute == "float32", weights_only, placement
        self.training = self.own_scales = False
        self._tokenizer: Any = None
        self._recorded: list[Batch] | None = None
        self._open: list[weakref.ref[Output]] = []
        self.take(checkpoint, compute)

    def take(self, checkpoint: Any, compute: str) -> None:
        """Be the model of another checkpoint, not quantized, with compute as for `load`."""
        self.checkpoint = checkpoint
        self.forget_decoding()
        self.config: dict[str, Any] = checkpoint.config
        self.runtime = runtime_of(checkpoint, compute, self._weights_only)
        if self.placement is not None and not self.weights_only:
            self.placement.attach(self.runtime)
        self.modules: list[dict[str, Any]] = list(self.runtime.modules)
        self.num_layers: int = self.runtime.layers
        self.vocab_size: int = self.runtime.config["vocab_size"]
        self._parts: dict[tuple[int, int | None], list[dict[str, Any]]] = {}
        for module in self.modules:
            self._parts.setdefault((module["layer"], module["expert"]), []).append(module)
        self.places = expert_places(self.modules)
        self.expert_tokens: dict[int, np.ndarray] = {}
        self.slots = {slot.name: slot for slot in slots_of(self.modules)}
        self._slots_of: dict[int, list[str]] = {}
        for name, slot in self.slots.items():
            self._slots_of.setdefault(slot.layer, []).append(name)
        self.settings: dict[str, Setting] = {name: default_setting(slot) for name, slot in self.slots.items()}
        self.quantizers: dict[str, Any] = {}
        self.packed: dict[str, Any] = {}
        self.low_rank: dict[str, Any] = {}
        self.search_losses: dict[str, Any] = {}
        self.kept_blocks: dict[str, Any] = {}
        self.parking = Parking()
        self.read_ahead: dict[str, Any] = {}
        self.made_ahead: Any = None
        self.quantized = False
        self.simulate = self.simulate_inputs = True
        self.connected: dict[str, Any] = {}
        self.stored_layers: dict[str, Any] = {} if getattr(checkpoint, "is_source", False) else getattr(checkpoint, "layers", {})
        if self.stored_layers or getattr(checkpoint, "cache", None) is not None:
            from modelq.reopened import restore_quantizers
            restore_quantizers(self)

    # Structure ---------------------------------------------------------------------------------------------------------

    def modules_of(self, layer: int, expert: int | None = None) -> list[dict[str, Any]]:
        """The modules of a layer without those of its experts, or of one expert."""
        return self._parts.get((layer, expert), [])

    def slots_of(self, layer: int) -> list[str]:
        """Names of the places for quantizers of a layer, its experts' among them."""
        return self._slots_of.get(layer, [])

    @property
    def unseen_experts(self) -> dict[int, list[int]]:
        """By layer, the quantized experts that no token of the calibration reached."""
        return {layer: unseen for layer, tokens in self.expert_tokens.items() if (unseen := np.flatnonzero(tokens == 0).tolist())}

    def without_norms(self) -> Model:
        """A copy, to be looked at and not run, that takes smoothing up nowhere."""
        made = copy.copy(self)
        made.packed, made.low_rank = {}, {}
        made._parts = {part: [row for row in rows if row["kind"] != "norm"] for part, rows in self._parts.items()}
        made.modules = [row for row in self.modules if row["kind"] != "norm"]
        return made

    @property
    def embedding_modules(self) -> list[dict[str, Any]]:
        """Those before the layers."""
        return [module for module in self.modules if module["kind"] == "embedding"]

    @property
    def head_modules(self) -> list[dict[str, Any]]:
        """The linears behind the layers: lm_head."""
        return [module for module in self.modules if module["kind"] == "linear" and module["layer"] < 0]

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's (modelq.checkpoint.tokenizer.Tokenizer). FileNotFoundError, ValueError: none that can be read."""
        if self._tokenizer is None:
            self._tokenizer = self.checkpoint.tokenizer()
        return self._tokenizer

    @property
    def head_dim(self) -> int:
        """Channels of a head of attention."""
        return self.runtime.config["head_dim"]

    @property
    def weight_nbytes(self) -> int:
        """Bytes of the weights as the model computes with them: packed where `compress` packed them, else as they are read."""
        replaced = {row["weight"] for row in self.modules if row["name"] in self.packed}
        plain = sum(info.nbytes for name, info in self.checkpoint.tensors.items() if name not in replaced)
        return plain + sum(weight.nbytes for weight in self.packed.values())

    @property
    def device(self) -> str:
        """Where layers are computed: "cpu", or "cuda:0"."""
        return "cpu" if self.placement is None else str(self.placement)

    def eval(self) -> Model:
        """Accepted for scripts' sake, as `train`; returns the model."""
        return self

    def train(self, mode: bool = True) -> Model:
        """Accepted for scripts' sake, whatever the mode. There is no dropout here, and nothing learns."""
        return self

    # Calls -------------------------------------------------------------------------------------------------------------

    def __call__(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **ignored: Any) -> Output:
        """Next-token logits float32 [B, T, V], and the loss where labels are given, computed when touched (see `Output`).

        input_ids, attention_mask (0: padding), labels (-100: nothing to predict): integers [B, T], or one dictionary of them.
        ValueError: shapes or ids that do not fit. TypeError: an argument that a transformers model would take and this does not.
        """
        for name in ignored:
            if name not in IGNORED_ARGUMENTS:
                raise TypeError(f"model(): unknown argument {name!r}: expected input_ids, attention_mask, labels")
        self.must_compute()
        batch = make_batch(self.vocab_size, input_ids, attention_mask, labels)
        output = Output(self, batch)
        if self._recorded is not None:  # calibration runs these itself
            self._recorded.append(batch)
        else:
            self._open.append(weakref.ref(output))
        return output

    def compute_pending(self, wanted: Output) -> None:
        """Run every call still waiting, and still held by someone, in one pass over the layers, and the one wanted."""
        outputs = [output for output in self._open_outputs() if output.waiting and output is not wanted] + [wanted]
        done = Pass(self, [output.batch for output in outputs])
        for index, output in enumerate(outputs):
            output.keep(done, index)

    def settle(self) -> None:
        """Finish what was asked for before the quantizers change, so that it answers for the model as it was then."""
        for output in self._open_outputs():
            output.finish()
        self._open.clear()
        self.forget_decoding()

    def _open_outputs(self) -> list[Output]:
        """Outputs that somebody holds and whose logits nobody has seen yet."""
        outputs = [output for reference in self._open if (output := reference()) is not None and not output.finished]
        self._open = [weakref.ref(output) for output in outputs]
        return outputs

    @contextmanager
    def recording(self) -> Iterator[list[Batch]]:
        """Within it, calls are noted in the list it gives, and computed only where touched, without quantization. RuntimeError: twice."""
        if self._recorded is not None:
            raise RuntimeError("calibration is already recording this model's calls: quantize() cannot run inside a forward_loop")
        self._recorded = []
        try:
            yield self._recorded
        finally:
            self._recorded = None

    @contextmanager
    def simulating(self, weights: bool, activations: bool) -> Iterator[None]:
        """Within it, the model computes with quantized weights, quantized activations, both or none. What changes no values but for
        rounding stays: smoothing, rotations, branches of low rank beside what is left of weights."""
        before = self.simulate, self.simulate_inputs
        try:
            self.simulate, self.simulate_inputs = weights, activations
            self.connect()
            yield
        except BaseException:
            self.simulate, self.simulate_inputs = before
            with suppress(ValueError):      # siblings half smoothed: whoever quantizes puts all back
                self.connect()
            raise
        finally:
            self.simulate, self.simulate_inputs = before
        self.connect()

    def connect(self) -> None:
        """Give the runtime the quantizers of activations that take part in the simulation, and take away the others.

        Without simulation they only rotate and smooth, so that calibration sees what will be rounded."""
        active = {name: quantizer for name, quantizer in self.quantizers.items() if self.slots[name].role != "weight"}
        if not self.float32_weights:
            active |= stated_input_quantizers(self)
        wanted = {name: q for name, q in active.items()
                  if (q.enabled and self.simulate_inputs) or q.rotate or q.pre_quant_scale is not None}
        if not self.simulate_inputs:
            wanted = {name: without_rounding(q) for name, q in wanted.items()}
        for name in self.connected.keys() - wanted.keys():
            self.runtime.set_quantizer(name, None)
        self.connected = wanted
        self.forget_decoding()
        for name, quantizer in wanted.items():
            self.runtime.set_quantizer(name, quantizer)

    def disconnect(self) -> None:
        """Leave no quantizer in the runtime."""
        for name in self.connected:
            self.runtime.set_quantizer(name, None)
        self.connected = {}

    # Measurements ------------------------------------------------------------------------------------------------------

    def loss(self, batches: Iterable[Any]) -> float:
        """Mean negative log-likelihood in nats of each next token, over all tokens of all batches (padding does not count).

        batches: anything that the model can be called with, dictionaries included. ValueError: there is nothing to predict.
        """
        self.must_compute()
        total, count = 0.0, 0
        for group in groups([make_batch(self.vocab_size, batch) for batch in batches], self.tokens_at_once):
            sums, counts = Pass(self, group, "loss").losses
            total, count = total + float(sums.sum()), count + int(counts.sum())
        if not count:
            raise ValueError("loss: no tokens to predict: give batches of at least two tokens")
        return total / count

    def perplexity(self, token_ids: Any, window: int = 512) -> float:
        """exp of the mean negative log-likelihood over the tokens of consecutive windows, the first of each not predicted.

        token_ids: one long row of tokens. A rest shorter than a window is left out, unless it is all there is. ValueError: too few.
        """
        self.must_compute()
        ids = integer_matrix(token_ids, "token_ids")
        check_vocabulary(ids, self.vocab_size, "token_ids")
        if window < 2 or ids.size < 2:
            raise ValueError(f"perplexity: needs a window of at least 2 tokens and 2 tokens, got {window} and {ids.size}")
        window = min(window, ids.size)
        windows = ids.ravel()[:ids.size // window * window].reshape(-1, window)
        return float(np.exp(self.loss(list(np.array_split(windows, -(-len(windows) // 8))))))

    @property
    def tokens_at_once(self) -> int:
        """Of how many tokens hidden states are held together."""
        return max(1, HIDDEN_BYTES // (4 * self.runtime.config["hidden_size"]))

    def close(self) -> None:
        """Close the checkpoint's files: nothing can be computed any more."""
        self.forget_decoding()
        self.checkpoint.close()

    def __repr__(self) -> str:
        state = f"{sum(q.enabled for q in self.quantizers.values())} quantizers on" if self.quantized else "not quantized"
        return f"<modelq.Model {self.config.get('model_type')!r} from {str(self.checkpoint.path)!r}: {self.num_layers} layers, {state}>"
