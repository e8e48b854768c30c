"""From the logits of the next token to a token."""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

NUCLEUS = 512       # candidates that top_p looks at first: the likeliest, as a rule more than enough


@dataclass(frozen=True)
class Sampling:
    """How to choose. temperature 0: the likeliest token. top_k: among so many of the likeliest, 0 = all; top_p: among the likeliest that
    have this much of the probability between them (Holtzman et al. 2020). seed: of the draws, None = a new one each time."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature: expected 0 (the likeliest token) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a probability above 0 and up to 1, got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected 0 (all tokens) or more, got {self.top_k}")

    def generators(self, rows: int) -> list[np.random.Generator]:
        """One for each sequence, so that what one draws does not depend on how long the others are."""
        return [np.random.default_rng(sequence) for sequence in np.random.SeedSequence(self.seed).spawn(rows)]

    def choose(self, logits: np.ndarray, generator: np.random.Generator) -> int:
        """A token by its logits [V]."""
        if not self.temperature:
            return int(logits.argmax())
        candidates, weights = self.candidates(logits)
        sums = np.cumsum(weights)
        return int(candidates[min(np.searchsorted(sums, generator.random() * sums[-1], side="right"), len(sums) - 1)])

    def candidates(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens to draw from, and what their probabilities are proportional to."""
        scaled = logits.astype(np.float64) / self.temperature
        weights = np.exp(scaled - scaled.max())
        tokens = np.arange(len(weights))
        if 0 < self.top_k < len(weights):
            tokens = likeliest(weights, self.top_k)
        if self.top_p < 1:
            tokens = nucleus(weights, tokens, self.top_p * weights[tokens].sum())
        return tokens, weights[tokens]


def likeliest(weights: np.ndarray, count: int) -> np.ndarray:
    """The indices of the `count` largest, from large to small."""
    found = np.argpartition(weights, -count)[-count:] if count < len(weights) else np.arange(len(weights))
    return found[np.lexsort((found, -weights[found]))]


def nucleus(weights: np.ndarray, tokens: np.ndarray, wanted: float) -> np.ndarray:
    """The fewest of the tokens, likeliest first, that have `wanted` between them; a whole vocabulary is sorted only where it must be."""
    count = NUCLEUS
    while True:
        first = tokens[likeliest(weights[tokens], min(count, len(tokens)))]
        sums = np.cumsum(weights[first])
        if sums[-1] >= wanted or len(first) == len(tokens):
            return first[:np.searchsorted(sums, wanted) + 1]
        count *= 8
