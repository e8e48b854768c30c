"""Prompts, answers and how fast they came: what `modelq chat` and `modelq compare` are made of."""
from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from modelq.generation import stop_tokens, text_pieces

if TYPE_CHECKING:
    from modelq.model import Model

CHUNK = 64      # tokens whose distributions over the vocabulary are held at a time


@dataclass
class Answer:
    """prompt_seconds: up to the first token, which is the last step of the prompt."""
    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    prompt_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first; None if there are none."""
        rest = self.seconds - self.prompt_seconds
        return (len(self.tokens) - 1) / rest if len(self.tokens) > 1 and rest > 0 else None

    def speed(self) -> str:
        rate = self.tokens_per_second
        return f"{len(self.tokens)} tokens" + (f", {rate:.1f} tokens/s" if rate else "") + f", first after {self.prompt_seconds:.2f} s"


def prompt_ids(model: Model, messages: list[dict[str, Any]], plain: bool = False) -> list[int]:
    """The tokens of a conversation up to where the assistant's answer begins; plain: of the last message's text as it is."""
    if plain:
        return model.tokenizer.encode(messages[-1]["content"])
    return model.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"][0].tolist()


def answer(model: Model, ids: list[int], **options: Any) -> Iterator[str | Answer]:
    """Pieces of the text of the answer as they come, and at the end the Answer."""
    model.decoding()        # reading weights is no part of the answer's time
    found, ends, start = Answer(len(ids)), set(stop_tokens(model)), time.perf_counter()

    def tokens() -> Iterator[int]:
        for step in model.stream([ids], **options):
            found.seconds = time.perf_counter() - start
            found.prompt_seconds = found.prompt_seconds or found.seconds
            found.tokens.append(int(step[0]))
            if found.tokens[-1] not in ends:
                yield found.tokens[-1]
    for piece in text_pieces(model.tokenizer, tokens()):
        found.text += piece
        yield piece
    yield found


def whole_answer(model: Model, ids: list[int], **options: Any) -> Answer:
    *_, found = answer(model, ids, **options)
    assert isinstance(found, Answer)
    return found


class Conversation:
    """A chat: each question sees those before it and their answers."""

    def __init__(self, model: Model, system: str | None = None, plain: bool = False, **options: Any):
        self.model, self.plain, self.options = model, plain, options
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str) -> Iterator[str | Answer]:
        """As `answer`. A question that cannot be answered leaves the conversation as it was."""
        asked = [*self.messages, {"role": "user", "content": text}]
        for part in answer(self.model, prompt_ids(self.model, asked, self.plain), reuse=True, **self.options):
            if isinstance(part, Answer):
                self.messages = [*asked, {"role": "assistant", "content": part.text}]
            yield part


# Two models --------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Distance:
    """Of the distributions of the next token that two models have along the first one's answer. divergence: Kullback and Leibler's, of
    the second from the first, in nats, mean and largest; agreement: how often both have the same likeliest token."""
    divergence: float
    largest_divergence: float
    agreement: float
    positions: int


def first_difference(first: list[int], second: list[int]) -> int | None:
    """The position of the first token that differs, or where one ends before the other; None: they are the same."""
    length = min(len(first), len(second))
    differing = next((i for i in range(length) if first[i] != second[i]), length)
    return None if differing == len(first) == len(second) else differing


def distance(first: Model, second: Model, prompt: list[int], tokens: list[int]) -> Distance:
    """Along prompt + tokens, both models computing what comes after each."""
    if first.vocab_size != second.vocab_size:
        raise ValueError(f"vocabularies of {first.vocab_size} and {second.vocab_size} tokens: their distributions have no distance")
    if first is second:     # there is one set of keys and values
        raise ValueError("a model cannot be compared with itself: open it a second time")
    divergences, agreements = [], []
    for left, right in zip(distributions(first, prompt, tokens), distributions(second, prompt, tokens)):
        divergences.append((np.exp(left) * (left - right)).sum(axis=-1))
        agreements.append(left.argmax(axis=-1) == right.argmax(axis=-1))
    values = np.concatenate(divergences)
    return Distance(float(values.mean()), float(values.max()), float(np.concatenate(agreements).mean()), len(values))


def distributions(model: Model, prompt: list[int], tokens: list[int]) -> Iterator[np.ndarray]:
    """Logarithms of the probabilities of each of the tokens' places, some at a time: float64 [n, V]."""
    decoding = model.decoding()
    yield log_softmax(decoding.begin([prompt]))
    for start in range(0, len(tokens) - 1, CHUNK):
        yield log_softmax(decoding.forward([0], [tokens[start:min(start + CHUNK, len(tokens) - 1)]], every=True))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
