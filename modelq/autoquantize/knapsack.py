"""The multiple-choice knapsack: one item of every class, the least total score, the total cost within a budget. Exact.

The linear relaxation takes convex-hull items by slope and splits at most one class (Sinha and Zoltners 1979). From its integral part the
optimum differs in few classes, those whose slopes are nearest to the one where it splits; they are taken in that order (the expanding core
of Pisinger 1995, "A minimal algorithm for the multiple-choice knapsack problem"). A state is what some choice in the classes taken so far
changes of cost and score; one that costs no less and scores no better than another goes, as does one whose bound is no better than the
best choice known.
"""
from __future__ import annotations

from collections.abc import Sequence
from math import fsum
from typing import NamedTuple

import numpy as np

ROUNDING = 1e-12        # of the sum of all scores: bounds this near to each other are not told apart


class Solution(NamedTuple):
    """choice: the index of an item, by class; cost and score: their totals."""
    choice: list[int]
    cost: int
    score: float


class _Class(NamedTuple):
    """Items that can be worth choosing: costs rise, scores fall. index: in the caller's list; hull: those on the lower convex hull."""
    costs: np.ndarray
    scores: np.ndarray
    index: np.ndarray
    hull: np.ndarray


def solve(costs: Sequence[Sequence[int]], scores: Sequence[Sequence[float]], budget: int) -> Solution | None:
    """The best choice, the cheaper one among equals; None: even the cheapest items are above the budget. Costs are integers below 2^62 in
    total, scores finite numbers."""
    classes = [_class(np.asarray(c, np.int64), np.asarray(s, np.float64)) for c, s in zip(costs, scores, strict=True)]
    if sum(int(items.costs[0]) for items in classes) > budget:
        return None
    start, slope = _relaxed(classes, budget)
    chosen = _improved(classes, start, slope, budget)
    choice = [int(items.index[item]) for items, item in zip(classes, chosen)]
    return Solution(choice, sum(int(c[item]) for c, item in zip(costs, choice)), fsum(s[item] for s, item in zip(scores, choice)))


def _class(costs: np.ndarray, scores: np.ndarray) -> _Class:
    order = np.lexsort((scores, costs))
    best_before = np.concatenate(([np.inf], np.minimum.accumulate(scores[order])[:-1]))
    order = order[scores[order] < best_before]
    costs, scores = costs[order], scores[order]
    hull: list[int] = []
    for item in range(len(order)):
        while len(hull) > 1 and _fall(costs, scores, hull[-2], hull[-1]) <= _fall(costs, scores, hull[-1], item):
            hull.pop()
        hull.append(item)
    return _Class(costs, scores, order, np.array(hull))


def _fall(costs: np.ndarray, scores: np.ndarray, first: int, second: int) -> float:
    """By how much the score falls for each unit of cost from one item to a dearer one."""
    return float((scores[first] - scores[second]) / (costs[second] - costs[first]))


def _relaxed(classes: list[_Class], budget: int) -> tuple[list[int], float]:
    """(items of the relaxation's integral part, the slope where the budget ends). It fits the budget."""
    chosen, room = [0] * len(classes), budget - sum(int(items.costs[0]) for items in classes)
    steps = sorted(((_fall(items.costs, items.scores, first, second), number, int(second)) for number, items in enumerate(classes)
                    for first, second in zip(items.hull, items.hull[1:])), key=lambda step: (-step[0], step[1], step[2]))
    for slope, number, second in steps:
        more = int(classes[number].costs[second] - classes[number].costs[chosen[number]])
        if more > room:
            return chosen, slope
        chosen[number], room = second, room - more
    return chosen, 0.0


def _improved(classes: list[_Class], start: list[int], slope: float, budget: int) -> list[int]:
    """The best items, from the relaxation's."""
    room = budget - sum(int(items.costs[item]) for items, item in zip(classes, start))
    tolerance = ROUNDING * float(sum(np.abs(items.scores).max() for items in classes))
    changes = [(items.costs - items.costs[item], items.scores - items.scores[item]) for items, item in zip(classes, start)]
    cheaper, dearer = _slopes(changes)
    order = sorted(range(len(classes)), key=lambda number: min(cheaper[number] - slope, slope - dearer[number]))
    # For every unit of cost that the classes not taken yet save, the score rises by this at least; for every one they spend, falls by this
    # at most.
    rise = np.minimum.accumulate([np.inf] + [cheaper[number] for number in reversed(order)])[::-1]
    fall = np.maximum.accumulate([0.0] + [dearer[number] for number in reversed(order)])[::-1]
    cost, score = np.zeros(1, np.int64), np.zeros(1)
    best, best_at = 0.0, (-1, 0)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for step, number in enumerate(order):
        more, change = changes[number]
        # what alone is above the best choice known by so much that no other class makes up for it
        useful = np.flatnonzero(_bound(more, change, room, rise[0], fall[0]) <= best + tolerance)
        if not np.isin(start[number], useful):
            useful = np.append(useful, start[number])
        costs = (cost[:, None] + more[useful]).ravel()
        scores = (score[:, None] + change[useful]).ravel()
        kept = _undominated(costs, scores)
        kept = kept[_bound(costs[kept], scores[kept], room, rise[step + 1], fall[step + 1]) <= best + tolerance]
        trail.append((kept // len(useful), useful[kept % len(useful)]))
        cost, score = costs[kept], scores[kept]
        fitting = np.flatnonzero(cost <= room)
        if fitting.size and score[fitting[-1]] < best:      # by rising cost, scores fall
            best, best_at = float(score[fitting[-1]]), (step, int(fitting[-1]))
        if not kept.size or _nothing_left(cost, score, room, rise[step + 1], fall[step + 1], best):
            break
    chosen, (step, state) = list(start), best_at
    for back in range(step, -1, -1):
        parents, items = trail[back]
        chosen[order[back]], state = int(items[state]), int(parents[state])
    return chosen


def _nothing_left(cost: np.ndarray, score: np.ndarray, room: int, rise: float, fall: float, best: float) -> bool:
    """Whether no state can become better than the best known."""
    return bool((_bound(cost, score, room, rise, fall) >= best).all())


def _slopes(changes: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """By class, the least rise of the score for a unit of cost saved, the greatest fall for one spent."""
    cheaper, dearer = np.full(len(changes), np.inf), np.zeros(len(changes))
    for number, (cost, score) in enumerate(changes):
        below, above = cost < 0, cost > 0
        cheaper[number] = (score[below] / -cost[below]).min(initial=np.inf)
        dearer[number] = (-score[above] / cost[above]).max(initial=0.0)
    return cheaper, dearer


def _bound(cost: np.ndarray, score: np.ndarray, room: int, rise: float, fall: float) -> np.ndarray:
    """No completion of a state scores less."""
    over = (cost - room).astype(np.float64)
    up = np.full(over.shape, np.inf) if np.isinf(rise) else rise * over
    return score + np.where(over > 0, up, fall * over)


def _undominated(costs: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Indices by rising cost, of those that score better than all that cost no more."""
    order = np.lexsort((scores, costs))
    sorted_scores = scores[order]
    before = np.concatenate(([np.inf], np.minimum.accumulate(sorted_scores)[:-1]))
    return order[sorted_scores < before]
