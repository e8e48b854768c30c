"""From the state of a search to a config: what was chosen, or what another budget would choose by the same scores."""
from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from modelq.autoquantize.candidates import METHODS
from modelq.autoquantize.costs import Constraints
from modelq.autoquantize.recipes import NO_QUANT, Recipe
from modelq.autoquantize.search import say_choice, take_choice
from modelq.config import QuantizeConfig
from modelq.experts import PARENT as EXPERTS
from modelq.rules import Slot


def get_auto_quantize_config(search_state: Mapping[str, Any], constraints: Any = None, verbose: bool = False, *, bits: str | None = None
                             ) -> dict[str, Any]:
    """A config for `quantize` with a rule for every quantizer of what `auto_quantize` chose, and the algorithm "max".

    search_state: what it returned, or the "state" of its checkpoint's search.json. constraints: another budget, for which the best choice
    is found anew by the same scores; bits: how it is counted, as in the search if None. verbose: print what was chosen. UserWarning: a
    chosen format was calibrated by another algorithm. ValueError: no such state; a budget that cannot be met.
    """
    if not isinstance(search_state, Mapping) or search_state.get("method") not in METHODS or "candidate_stats" not in search_state:
        raise ValueError("search_state must be the state that auto_quantize returned")
    state = dict(copy.deepcopy(search_state))
    if constraints is not None:
        if isinstance(constraints, Mapping):        # what counts stays as it was, unless said otherwise
            constraints = {"cost_model": state["cost_model"], "cost": state["cost"], **constraints}
        take_choice(state, Constraints.parse(constraints), bits or state["bits"])
    if verbose:
        say_choice(state)
    chosen = {key: _recipe(state, words) for key, words in state["best"]["recipe"].items()}
    searching = sorted({recipe.name for recipe in chosen.values() for step in recipe.steps if step["method"] != "max"})
    if searching:
        warnings.warn(f"get_auto_quantize_config: the config calibrates with 'max', {', '.join(searching)} with an algorithm of its own; "
                      "auto_quantize itself keeps what that found", UserWarning, stacklevel=2)
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for key, recipe in chosen.items():
        if recipe.config is not None:
            for module, attributes in state["candidate_stats"][key]["quantizer_attrs"].items():
                rules += _rules(module, attributes, recipe)
    cache = state["kv_cache_cfg"]
    return {"quant_cfg": rules + (cache["quant_cfg"] if cache is not None else []), "algorithm": "max"}


def _recipe(state: Mapping[str, Any], words: str) -> Recipe:
    config = state["recipes"].get(words)
    return NO_QUANT if config is None else Recipe(words.partition("(")[0], QuantizeConfig.parse(config), NO_QUANT.bits)


def _rules(module: str, attributes: Sequence[str], recipe: Recipe) -> list[dict[str, Any]]:
    """One for every quantizer of a module."""
    parent = EXPERTS if "weight_quantizer" not in attributes else "nn.Linear"
    slots = [Slot(f"{module}.{name}", module, name.removesuffix("_quantizer").rpartition("_")[2], parent) for name in attributes]
    made = []
    for name, setting in recipe.settings(slots).items():
        stages = setting.attributes if isinstance(setting.attributes, tuple) else (setting.attributes,)
        cfg = [{"num_bits": attributes.num_bits, **attributes.to_dict()} for attributes in stages]
        made.append({"quantizer_name": name, "cfg": cfg if isinstance(setting.attributes, tuple) else cfg[0]} if setting.enable
                    else {"quantizer_name": name, "enable": False})
    return made
