"""The exact choice (modelq/autoquantize/knapsack.py) against brute force and against a table over all costs."""
import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelq.autoquantize.knapsack import solve

items = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9)), min_size=1, max_size=4)


def brute_force(costs, scores, budget):
    """(the least score, the least cost that has it), None if nothing fits."""
    found = [(sum(s[i] for s, i in zip(scores, pick)), sum(c[i] for c, i in zip(costs, pick)))
             for pick in itertools.product(*[range(len(c)) for c in costs])]
    return min(((score, cost) for score, cost in found if cost <= budget), default=None)


@settings(max_examples=600, deadline=None)
@given(st.lists(items, min_size=1, max_size=5), st.integers(-1, 60), st.sampled_from([1, 10**12 + 7]))
def test_every_choice(classes, budget, unit):
    """Whole scores: equal ones are really equal, and the cheaper choice is taken."""
    costs = [[cost * unit for cost, _ in items] for items in classes]
    scores = [[float(score) for _, score in items] for items in classes]
    found, expected = solve(costs, scores, budget * unit), brute_force(costs, scores, budget * unit)
    assert (found is None) == (expected is None)
    if found is not None:
        assert (found.score, found.cost) == expected
        assert found.cost == sum(c[i] for c, i in zip(costs, found.choice)) and found.score == sum(s[i] for s, i in zip(scores, found.choice))


@pytest.mark.parametrize("seed", range(60))
def test_random_scores(seed):
    random = np.random.default_rng(seed)
    costs = [random.integers(1, 10**9, random.integers(1, 6)).tolist() for _ in range(6)]
    scores = [(random.lognormal(0, 3, len(c)) * 1e-6).tolist() for c in costs]
    budget = int(random.integers(sum(map(min, costs)), sum(map(max, costs)) + 1))
    found = solve(costs, scores, budget)
    assert found.cost <= budget and found.score == pytest.approx(brute_force(costs, scores, budget)[0], rel=1e-12)


def layers(random, kind):
    """1000 layers x 6 formats, as a search has them (alike) or harder (every layer another size; scores unlike their costs)."""
    sizes = [50331648, 16777216, 117440512, 58720256]
    costs, scores = [], []
    for layer in range(1000):
        size = sizes[layer % 4] if kind == "alike" else int(random.integers(10**3, 10**8))
        bits = np.array([4, 4.25, 4.5, 6, 8, 16])
        costs.append((size * bits * 4).astype(np.int64).tolist())
        falling = np.sort(random.random(6) * size)[::-1] if kind == "unlike" else size * 2.0**(-2 * bits) * random.lognormal(0, 1.5)
        scores.append((falling * random.uniform(0.8, 1.2, 6)).tolist())
    return costs, scores


@pytest.mark.measures
@pytest.mark.parametrize("kind", ["alike", "sizes", "unlike"])
@pytest.mark.parametrize("bits", [4.8, 6.0, 12.0])
def test_a_second_for_a_thousand_layers(kind, bits):
    costs, scores = layers(np.random.default_rng(int(bits)), kind)
    budget = int(sum(c[-1] for c in costs) * bits / 16)
    start = time.process_time()
    found = solve(costs, scores, budget)
    assert time.process_time() - start < 1
    assert found.cost <= budget and found.score >= relaxation(costs, scores, budget)


def relaxation(costs, scores, budget):
    """No choice scores less than the best Lagrange bound (Everett 1963), by bisection on its multiplier."""
    costs, scores, low, high = np.array(costs, float), np.array(scores), 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        picked = (scores + middle * costs).argmin(axis=1)
        low, high = (middle, high) if costs[np.arange(len(costs)), picked].sum() > budget else (low, middle)
    return (scores + high * costs).min(axis=1).sum() - high * budget


def test_a_table_over_all_costs():
    """Many layers and few costs: the usual dynamic program is exact there."""
    random = np.random.default_rng(5)
    costs = [random.integers(1, 9, 4).tolist() for _ in range(120)]
    scores = [random.random(4).tolist() for _ in range(120)]
    table = np.zeros(601)
    for c, s in zip(costs, scores):
        grown = np.full(601, np.inf)
        for cost, score in zip(c, s):
            grown[cost:] = np.minimum(grown[cost:], table[:601 - cost] + score)
        table = grown
    for budget in (sum(map(min, costs)), 300, 420, 600):
        assert solve(costs, scores, budget).score == pytest.approx(table[budget], rel=1e-12)
