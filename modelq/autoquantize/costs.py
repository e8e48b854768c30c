"""What a choice costs, and what it may cost. In fractions, so that a budget that can be met to the last bit is met.

Bits are counted as Model Optimizer counts them (`bits="effective"`: a format's own word, or that of its element), or as a checkpoint
stores them (`bits="stored"`: block scales too). Embeddings and norms do not count, a quantizable lm_head does.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from math import lcm
from typing import Any

from modelq.autoquantize.groups import Group
from modelq.autoquantize.knapsack import Solution, solve
from modelq.autoquantize.recipes import NO_QUANT_BITS, exact

DEFAULT_BITS = 4.8
BITS = ("effective", "stored")
RATIO, EXCLUDED = "active_moe_expert_ratio", "excluded_module_name_patterns"
_COST_KEYS = {"weight": (EXCLUDED,), "active_moe": (RATIO, EXCLUDED)}
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k", "num_selected_experts")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


@dataclass(frozen=True)
class Constraints:
    """effective_bits: the mean of all weights at most. cost_model "active_moe" counts a routed expert's weights by the part of experts that
    a token reaches (ratio); excluded: patterns of modules that do not count."""

    effective_bits: float
    cost_model: str = "weight"
    ratio: float | None = None
    excluded: tuple[str, ...] = ()

    @classmethod
    def parse(cls, given: Any, config: Mapping[str, Any] | None = None) -> Constraints:
        """config: the model's, which may say the ratio. ValueError names the key."""
        given = {"effective_bits": DEFAULT_BITS} if given is None else given
        if not isinstance(given, Mapping) or set(given) - {"effective_bits", "cost_model", "cost"}:
            raise ValueError(f"constraints must be a dictionary of effective_bits, cost_model and cost, got {given!r}")
        bits = given.get("effective_bits", DEFAULT_BITS)
        if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not 0 < bits <= 16:
            raise ValueError(f"constraints: effective_bits must be a number above 0 and up to 16, got {bits!r}")
        model = given.get("cost_model", "weight")
        if model not in _COST_KEYS:
            raise ValueError(f"constraints: cost_model must be one of {', '.join(_COST_KEYS)}, got {model!r}")
        cost = given.get("cost") or {}
        if not isinstance(cost, Mapping) or set(cost) - set(_COST_KEYS[model]):
            raise ValueError(f"constraints: cost of cost_model {model!r} is a dictionary of {', '.join(_COST_KEYS[model])}, got {cost!r}")
        return cls(bits, model, _ratio(cost.get(RATIO), config or {}) if model == "active_moe" else None, _excluded(cost.get(EXCLUDED)))

    @property
    def cost(self) -> dict[str, Any]:
        """As it was, or could have been, given."""
        return {**({} if self.ratio is None else {RATIO: self.ratio}), **({EXCLUDED: list(self.excluded)} if self.excluded else {})}

    def weight_of(self, modules: Sequence[str]) -> float:
        """What a group of modules counts."""
        if modules and self.excluded and all(any(fnmatchcase(name, pattern) for pattern in self.excluded) for name in modules):
            return 0.0
        routed = any("experts" in name.split(".") and "shared_expert" not in name for name in modules)
        return self.ratio if routed and self.ratio is not None else 1.0


def _ratio(given: Any, config: Mapping[str, Any]) -> float:
    if given is None:
        for said in (config, *(config[key] for key in ("text_config", "language_config") if isinstance(config.get(key), Mapping))):
            active, experts = (next((said[key] for key in keys if isinstance(said.get(key), (int, float))), None)
                               for keys in (_ACTIVE, _EXPERTS))
            if active and experts:
                return min(active / experts, 1.0)
        raise ValueError(f"constraints: the model's config does not say how many experts a token reaches: give cost {{{RATIO!r}: ...}}")
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 < given <= 1:
        raise ValueError(f"constraints: {RATIO} must be a number above 0 and up to 1, got {given!r}")
    return float(given)


def _excluded(given: Any) -> tuple[str, ...]:
    patterns = [given] if isinstance(given, str) else list(given or ())
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"constraints: {EXCLUDED} must be a pattern or a list of patterns, got {given!r}")
    return tuple(patterns)


def candidate_stats(group: Group, scores: Mapping[str, float]) -> dict[str, Any]:
    """A group as a state keeps it. scores: by the recipe's words; a format of more bits never scores worse than one of fewer."""
    found, best = [], float("inf")
    for recipe in group.recipes:
        best = min(best, scores.get(str(recipe), 0.0))
        found.append(best)
    return {"formats": [str(recipe) for recipe in group.recipes], "scores": found, "module_names": list(group.modules),
            "bits": [float(recipe.bits) for recipe in group.recipes],
            "stored_bits": [float(group.stored_bits(recipe)) for recipe in group.recipes], "weights": group.weights,
            "quantizer_attrs": {module: _attributes(module, slots) for module, slots in group.modules.items()}}


def _attributes(module: str, slots: Sequence[Any]) -> list[str]:
    """The names of a module's quantizers, in the reference's order; those of experts as one."""
    names = (slot.name.removeprefix(f"{module}.").split("_quantizers.")[0] for slot in slots)
    unique = dict.fromkeys(name if name.endswith("quantizer") else f"{name}_quantizer" for name in names)
    return sorted(unique, key=lambda name: name.startswith("output"))


class Costs:
    """Of every format in every group (stats: a state's candidate_stats): Model Optimizer's number, weights times bits over 16."""

    def __init__(self, stats: Mapping[str, Mapping[str, Any]], constraints: Constraints, bits: str = "effective"):
        if bits not in BITS:
            raise ValueError(f"bits must be one of {', '.join(BITS)}, got {bits!r}")
        self.stats = stats
        self.weights = {key: exact(constraints.weight_of(group["module_names"])) for key, group in stats.items()}
        self.costs = {key: [self.weights[key] * self._bits(group, item, bits) / 16 for item in range(len(group["formats"]))]
                      for key, group in stats.items()}
        self.denominator = sum((self.weights[key] * group["weights"] for key, group in stats.items()), Fraction(0))
        if not self.denominator:
            raise ValueError(f"constraints: {EXCLUDED} leaves no weight that counts")
        self.budget = self.denominator * exact(constraints.effective_bits) / 16
        self.check(constraints.effective_bits, bits)

    @staticmethod
    def _bits(group: Mapping[str, Any], item: int, bits: str) -> Fraction:
        return Fraction(group["stored_bits"][item]) if bits == "stored" else exact(group["bits"][item]) * group["weights"]

    def check(self, wanted: float, bits: str) -> None:
        """ValueError: no choice meets the budget."""
        least, most = (sum(choose(costs) for costs in self.costs.values()) / self.denominator * NO_QUANT_BITS for choose in (min, max))
        if sum(min(costs) for costs in self.costs.values()) > self.budget:
            raise ValueError(f"constraints: {wanted} {bits} bits cannot be met: with these formats and layers, from {_up(least)} to "
                             f"{float(most):.4g} can be; add a format of fewer bits, disable fewer layers, or leave disabled layers out of "
                             f"the count by cost {{{EXCLUDED!r}: [...]}}")

    def solve(self) -> Solution:
        """The best choice within the budget."""
        unit = lcm(*(cost.denominator for costs in self.costs.values() for cost in costs))
        whole = [[int(cost * unit) for cost in costs] for costs in self.costs.values()]
        found = solve(whole, [group["scores"] for group in self.stats.values()], int(self.budget * unit))
        assert found is not None
        return found

    def mean_bits(self, choice: Sequence[int], bits: str) -> float:
        """Of a choice, over what counts."""
        total = sum((self.weights[key] * self._bits(self.stats[key], item, bits) for key, item in zip(self.stats, choice)), Fraction(0))
        return float(total / self.denominator)


def _up(bits: Fraction) -> float:
    """Rounded up, so that it can be met."""
    return -(-bits * 10000 // 1) / 10000
