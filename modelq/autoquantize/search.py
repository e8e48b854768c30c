"""The order of work of a search: every format is calibrated once, every group scored with every format, then the best choice within the
budget is taken and given to the model.

The method is Model Optimizer's: "gradient" takes sum((g * d)^2) over a group's outputs, g the gradient of the loss, d what the format
changes of them (the loss to second order, with the empirical Fisher information in the place of the Hessian); "kl_div" measures what
quantizing one group does to the model's answers.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from modelq.autoquantize.candidates import Calibrated, Candidate, Steps, Subject, add, settings_of
from modelq.autoquantize.costs import Constraints, Costs, candidate_stats
from modelq.autoquantize.groups import Group, listed, make_groups
from modelq.autoquantize.recipes import Recipe, plain_config
from modelq.autoquantize.saved import Saved
from modelq.progress import progress
from modelq.rules import Setting, apply_rules, default_setting

KV_CACHE = "kv_cache"


@dataclass(frozen=True)
class Request:
    """What is searched for. batches: as many as the longer of calibration and scoring needs; kv_cache: a config's rules for caches."""
    constraints: Constraints
    recipes: Sequence[Recipe]
    steps: Steps
    batches: Sequence[Any]
    num_calib_steps: int
    num_score_steps: int
    disabled_layers: Any = None
    checkpoint: Any = None
    bits: str = "effective"
    kv_cache: Any = None
    verbose: bool = False


def take_batches(data_loader: Any, count: int) -> list[Any]:
    """At most so many. ValueError: there is none."""
    if data_loader is None or not isinstance(data_loader, Iterable):
        raise ValueError(f"auto_quantize needs a data_loader, an iterable of batches, got {type(data_loader).__name__}")
    batches = list(islice(iter(data_loader), count))
    if not batches:
        raise ValueError("auto_quantize: data_loader gave no batch")
    return batches


def search(subject: Subject, request: Request) -> dict[str, Any]:
    """Search, give the model what was chosen, and return the state. ValueError before any work if the budget cannot be met."""
    groups = make_groups(subject.slots.values(), request.recipes, request.disabled_layers, subject.module_names)
    Costs({group.key: candidate_stats(group, {}) for group in groups}, request.constraints, request.bits)
    cache_settings = _cache_settings(subject, request)
    for recipe in request.recipes:
        subject.check(settings_of(groups, recipe))
    subject.check(cache_settings)
    saved = Saved(subject.own_folder(request.checkpoint), _signature(subject, request, groups))
    with subject.searching():
        candidates = _calibrate(subject, request, groups, saved)
        cache_values = _calibrate_cache(subject, request, cache_settings, saved)
        _score(subject, request, groups, candidates, saved)
        state = _state(request, groups, saved)
        take_choice(state, request.constraints, request.bits, request.verbose)
        settings, values = dict(cache_settings), dict(cache_values)
        for group in groups:
            chosen = candidates.get(state["best"]["recipe"][group.key])
            for slot in group.slots if chosen is not None else ():
                settings[slot.name] = chosen.settings[slot.name]
                if slot.name in chosen.values:
                    values[slot.name] = chosen.values[slot.name]
        subject.apply(settings, values)
    saved.keep_scores(state)
    return state


def take_choice(state: dict[str, Any], constraints: Constraints, bits: str, verbose: bool = False) -> None:
    """Write the best choice within a budget into a state, from its scores. ValueError: the budget cannot be met."""
    stats = state["candidate_stats"]
    costs = Costs(stats, constraints, bits)
    choice = costs.solve().choice
    for key, group in stats.items():
        group |= {"costs": [float(cost) for cost in costs.costs[key]], "cost_weight": float(costs.weights[key]),
                  "uncompressed_cost": float(costs.weights[key] * group["weights"])}
    picked = dict(zip(stats, choice))
    state |= {"bits": bits, "cost_model": constraints.cost_model, "cost": constraints.cost, "active_moe_expert_ratio": constraints.ratio,
              "cost_denominator": float(costs.denominator), "constraints": {"effective_bits": constraints.effective_bits}}
    state["best"] = {"recipe": {key: stats[key]["formats"][item] for key, item in picked.items()},
                     "constraints": {"effective_bits": costs.mean_bits(choice, "effective")},
                     "stored_bits": costs.mean_bits(choice, "stored"),
                     "score": sum(stats[key]["scores"][item] for key, item in picked.items()), "is_satisfied": True}
    if verbose:
        say_choice(state)


def say_choice(state: Mapping[str, Any]) -> None:
    best, ratio = state["best"], state["active_moe_expert_ratio"]
    print(f"AutoQuantize cost model: {state['cost_model']}" + ("" if ratio is None else f" (active_moe_expert_ratio={ratio})"))
    for key, recipe in best["recipe"].items():
        print(f"AutoQuantize best recipe for {key.removesuffix('.quant_recipe')}: {recipe}")
    print(f"AutoQuantize effective bits: {best['constraints']['effective_bits']:.2f} (stored: {best['stored_bits']:.2f})")


# Steps ---------------------------------------------------------------------------------------------------------------------------

def _calibrate(subject: Subject, request: Request, groups: Sequence[Group], saved: Saved) -> dict[str, Candidate]:
    found = {}
    for recipe in progress(request.recipes, "calibrate formats", unit="format"):
        settings = settings_of(groups, recipe)
        values = _kept(subject, saved, recipe.name)
        if values is None:
            # as in Model Optimizer: a quarter of the data is enough for the search for smoothing scales
            smooths = any("awq" in step["method"] for step in recipe.steps)
            count = max(1, request.num_calib_steps // 4) if smooths else request.num_calib_steps
            values = subject.calibrate(settings, recipe.steps, _loop(request, count))
            saved.keep_values(recipe.name, values)
        found[str(recipe)] = Candidate(recipe, settings, values)
    return found


def _kept(subject: Subject, saved: Saved, name: str) -> dict[str, Calibrated] | None:
    """What was found before, if every process has it: else all calibrate, together."""
    values = saved.values(name)
    return values if subject.agree(values is not None) else None


def _cache_settings(subject: Subject, request: Request) -> dict[str, Setting]:
    """Of the quantizers of keys and values."""
    if request.kv_cache is None:
        return {}
    off = {name: replace(default_setting(slot), enable=False) for name, slot in subject.slots.items() if slot.parent == "Attention"}
    settings, _ = apply_rules(off, request.kv_cache.quant_cfg)
    if not any(setting.enable for setting in settings.values()):
        raise ValueError("kv_cache_cfg quantizes no keys or values of this model: give a config such as mtq.FP8_KV_CFG")
    return settings


def _calibrate_cache(subject: Subject, request: Request, settings: Mapping[str, Setting], saved: Saved) -> Mapping[str, Calibrated]:
    if request.kv_cache is None:
        return {}
    if (values := _kept(subject, saved, KV_CACHE)) is None:
        values = subject.calibrate(settings, request.kv_cache.steps, _loop(request, request.num_calib_steps))
        saved.keep_values(KV_CACHE, values)
    return values


def _loop(request: Request, count: int) -> Callable[[Any], None]:
    def forward_loop(model: Any) -> None:
        for batch in request.batches[:count]:
            request.steps.forward_step(model, batch)
    return forward_loop


def _score(subject: Subject, request: Request, groups: Sequence[Group], candidates: Mapping[str, Candidate], saved: Saved) -> None:
    """Go on from the batches that were scored before."""
    searched = [group for group in groups if len(group.recipes) > 1]
    if not subject.agree(saved.batches):
        saved.batches, saved.scores = 0, {}
    batches = request.batches[saved.batches:request.num_score_steps]
    if not batches:
        return
    with closing(subject.scores(searched, candidates, request.steps, batches, saved.batches)) as scored:
        for done, found in progress(scored, "score formats", unit="batch", total=len(batches)):
            add(saved.scores, found)
            saved.batches += done
            saved.keep_scores()


def _state(request: Request, groups: Sequence[Group], saved: Saved) -> dict[str, Any]:
    return {"method": request.steps.method, "disabled_layers": listed(request.disabled_layers), "num_score_steps": saved.batches,
            "recipes": {str(recipe): plain_config(recipe.config) for recipe in request.recipes},
            "kv_cache_cfg": plain_config(request.kv_cache),
            "candidate_stats": {group.key: candidate_stats(group, saved.scores.get(group.key, {})) for group in groups}}


def _signature(subject: Subject, request: Request, groups: Sequence[Group]) -> dict[str, Any]:
    """By words that say what differs."""
    return {"method": request.steps.method, "quantization_formats": [recipe.signature for recipe in request.recipes],
            "groups of layers or disabled_layers": [[group.key, list(group.modules), group.weights, list(group.scored_at),
                                                     [str(recipe) for recipe in group.recipes]] for group in groups],
            "calibration data": min(request.num_calib_steps, len(request.batches)),
            "kv_cache_cfg": plain_config(request.kv_cache), "weights": subject.fingerprint()}
