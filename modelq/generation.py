"""`model.generate` and `model.stream`: new tokens for a prompt, one at a time."""
from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq.checkpoint.config_rope import context_length
from modelq.decoding import Decoding
from modelq.inputs import Batch, make_batch
from modelq.sampling import Sampling

if TYPE_CHECKING:
    from modelq.model import Model


class Generates:
    """The part of a `Model` that generates. Its weights stay in memory from the first token on, as long as quantization stays what it is
    (`forget_decoding` lets go of them)."""

    _decoding: Decoding | None = None

    def decoding(self: Model) -> Decoding:  # type: ignore[misc]
        """The model with its weights in memory: made when there is none yet."""
        if self._decoding is None:
            self._decoding = Decoding(self)
        return self._decoding

    def forget_decoding(self) -> None:
        """Let go of the weights in memory. A `generate` after a quantizer was changed by hand sees the change only then."""
        self._decoding = None

    def generate(self: Model, input_ids: Any = None, attention_mask: Any = None, **options: Any) -> np.ndarray:  # type: ignore[misc]
        """Prompt and new tokens: int64 [B, T + new]. Options are those of `stream`.

        input_ids: [B, T], or a dictionary of arguments. attention_mask: 0 where a token is padding, on whichever side: sequences are
        computed without it. Rows that ended before the longest are filled up with pad_token_id, as in transformers. Within the
        forward_loop of a calibration, what the model has seen is recorded as one call.
        """
        stream = self.stream(input_ids, attention_mask, **options)
        prompt = make_batch(self.vocab_size, input_ids, attention_mask)
        tokens = np.stack(list(stream), axis=1)
        whole = np.concatenate([prompt.ids, tokens], axis=1)
        if self._recorded is not None:
            ended = np.cumsum(np.isin(tokens, self._ends(options.get("eos_token_id"))), axis=1)
            before = np.ones_like(prompt.ids, np.uint8) if prompt.mask is None else prompt.mask
            seen = np.concatenate([before, ended == 0], axis=1, dtype=np.uint8)
            self._recorded.append(Batch(whole[:, :-1], seen[:, :-1]))
        return whole

    def _ends(self: Model, given: int | Sequence[int] | None) -> list[int]:  # type: ignore[misc]
        return stop_tokens(self) if given is None else np.atleast_1d(np.asarray(given, np.int64)).tolist()

    def stream(self: Model, input_ids: Any = None, attention_mask: Any = None, max_new_tokens: int = 128,  # type: ignore[misc]
               temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int | None = None,
               eos_token_id: int | Sequence[int] | None = None, pad_token_id: int | None = None, do_sample: bool | None = None,
               reuse: bool = False) -> Iterator[np.ndarray]:
        """The new tokens of `generate` as they come: int64 [B] each, pad_token_id for a sequence that is at its end.

        input_ids, attention_mask: as for `generate`. max_new_tokens: at most so many; fewer where all sequences have ended, or where the
        model's context does. temperature, top_p, top_k, seed: see `modelq.sampling.Sampling`; by default the likeliest token. eos_token_id:
        what ends a sequence (one or several; default: what generation_config.json, config.json or the tokenizer says; [] = nothing).
        pad_token_id: default the first of these. do_sample: as in transformers: False means temperature 0, True a temperature of 1 where
        none is given. reuse: go on from the sequences of the last call as far as the prompts begin like them, without computing that again;
        the last bits of logits may differ. Beginning another stream ends this one. ValueError: a prompt as long as the context, or empty.
        """
        self.must_compute()
        if do_sample is not None:
            temperature = (temperature or 1.0) if do_sample else 0.0
        sampling = Sampling(temperature, top_p, top_k, seed)
        rows = unpadded(make_batch(self.vocab_size, input_ids, attention_mask))
        count = room(rows, max_new_tokens, context_length(self.config))
        ends = self._ends(eos_token_id)
        pad = pad_token_id if pad_token_id is not None else ends[0] if ends else 0
        return _tokens(self.decoding(), rows, count, sampling, frozenset(ends), pad, reuse)


def _tokens(decoding: Decoding, rows: list[list[int]], count: int, sampling: Sampling, ends: frozenset[int], pad: int,
            reuse: bool) -> Iterator[np.ndarray]:
    generators = sampling.generators(len(rows))
    logits, going = decoding.begin(rows, reuse), list(range(len(rows)))
    turn = decoding.turn
    for step in range(count):
        if decoding.turn != turn:
            raise RuntimeError("this stream is over: another generate or stream of the same model has begun")
        chosen = {row: sampling.choose(scores, generators[row]) for row, scores in zip(going, logits)}
        yield np.array([chosen.get(row, pad) for row in range(len(rows))], np.int64)
        going = [row for row in going if chosen[row] not in ends]
        if not going:
            return
        if step + 1 < count and decoding.turn == turn:
            logits = decoding.forward(going, [[chosen[row]] for row in going])


def unpadded(batch: Batch) -> list[list[int]]:
    """The tokens of each row that are no padding."""
    masks = np.ones_like(batch.ids) if batch.mask is None else batch.mask
    rows = [ids[mask != 0].tolist() for ids, mask in zip(batch.ids, masks)]
    if empty := [index for index, row in enumerate(rows) if not row]:
        raise ValueError(f"input_ids: row {empty[0]} has no tokens: give at least one (most tokenizers have one that begins a text)")
    return rows


def room(rows: list[list[int]], wanted: int, context: int | None) -> int:
    """How many new tokens the model's context has room for."""
    if wanted < 1:
        raise ValueError(f"max_new_tokens: expected 1 or more, got {wanted}")
    longest = max(map(len, rows))
    if not context or longest + wanted <= context:
        return wanted
    if longest >= context:
        raise ValueError(f"input_ids: a prompt of {longest} tokens leaves no room for new ones in the model's context of {context} "
                         "(max_position_embeddings): shorten it")
    warnings.warn(f"max_new_tokens={wanted}: after a prompt of {longest} tokens the model's context of {context} ends after "
                  f"{context - longest} more", stacklevel=3)
    return context - longest


def stop_tokens(model: Model) -> list[int]:
    """The ids that end a sequence: as generation_config.json says, else config.json, else the tokenizer."""
    from modelq.checkpoint.base import read_json_object

    file = Path(model.checkpoint.path) / "generation_config.json"
    said = read_json_object(file, "the generation config").get("eos_token_id") if file.is_file() else None
    if said is None:
        said = model.config.get("eos_token_id")
    if said is None:
        with suppress(OSError, ValueError):     # no tokenizer, or none that we read
            said = model.tokenizer.eos_token_id
    found = [] if said is None else said if isinstance(said, list) else [said]
    if not all(isinstance(token, int) for token in found):
        raise ValueError(f"{file.parent}: eos_token_id {said!r}: expected an integer or a list of them; give eos_token_id")
    return found


def text_pieces(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come: a piece whenever there is one that later tokens do not change (a character may take several)."""
    ids: list[int] = []
    begin = shown = 0       # ids[begin:shown] are shown already, and decoded again as context for what follows
    for token in tokens:
        ids.append(token)
        before = tokenizer.decode(ids[begin:shown], skip_special_tokens=True)
        now = tokenizer.decode(ids[begin:], skip_special_tokens=True)
        if len(now) > len(before) and not now.endswith("\ufffd"):
            yield now[len(before):]
            begin, shown = shown, len(ids)
    rest = tokenizer.decode(ids[begin:], skip_special_tokens=True)[len(tokenizer.decode(ids[begin:shown], skip_special_tokens=True)):]
    if rest:
        yield rest
