"""Quantization configs: what a user may write, checked before anything is opened or computed.

A config is {"quant_cfg": rules, "algorithm": ..., "effective_bits": ...}. Rules come in two spellings, both Model Optimizer's:
a list of {"quantizer_name": glob, "cfg": attributes, "enable": bool, "parent_class": "nn.Linear"}, or the older dictionary
{glob: attributes}, where "default" stands for "*" and a key "nn.X" holds rules for the children of that class. Every mistake is a
ValueError that names the rule. Which number formats can be computed is not decided here but by the tables of the C core.
"""
from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from modelq.algorithms import normalize_algorithm
from modelq.attributes import QuantizerAttributeConfig, check_effective_bits
from modelq.presets import choices

__all__ = ["QuantizeConfig", "QuantizerAttributeConfig", "QuantizerCfgEntry", "choices", "find_quant_cfg_entry_by_path", "load_config",
           "need_calibration", "normalize_quant_cfg_list"]

@dataclass(frozen=True)
class QuantizerCfgEntry:
    """One rule. cfg None leaves the attributes as they are and only switches; otherwise cfg replaces all of them.
    A tuple of attributes means quantizers one after the other (INT4 then FP8, say)."""

    quantizer_name: str
    parent_class: str | None = None
    cfg: QuantizerAttributeConfig | tuple[QuantizerAttributeConfig, ...] | None = None
    enable: bool = True

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> QuantizerCfgEntry:
        known = [f.name for f in fields(cls)]
        name = given.get("quantizer_name")
        where = f"quant_cfg rule {name!r}"
        if not isinstance(name, str) or not name:
            raise ValueError(f"quant_cfg: every rule needs a quantizer_name, a pattern such as '*weight_quantizer': {dict(given)!r}")
        for key in given:
            if key not in known:
                raise ValueError(f"{where}: unknown key {key!r}: known are {', '.join(known)}")
        if "cfg" not in given and "enable" not in given:
            raise ValueError(f"{where} must specify cfg, enable, or both: alone, a pattern does nothing")
        enable, parent_class, cfg = given.get("enable", True), given.get("parent_class"), given.get("cfg")
        if not isinstance(enable, bool):
            raise ValueError(f"{where}: enable must be True or False, got {enable!r}")
        if parent_class is not None and not isinstance(parent_class, str):
            raise ValueError(f"{where}: parent_class must be a string such as 'nn.Linear', got {parent_class!r}")
        return cls(name, parent_class, _parse_cfg(cfg, enable, where), enable)

    def to_dict(self) -> dict[str, Any]:
        rule: dict[str, Any] = {"quantizer_name": self.quantizer_name}
        if self.parent_class is not None:
            rule["parent_class"] = self.parent_class
        if self.cfg is not None:
            stages = [c.to_dict() or {"num_bits": c.num_bits} for c in _as_stages(self.cfg)]
            rule["cfg"] = stages if isinstance(self.cfg, tuple) else stages[0]
        if self.cfg is None or not self.enable:
            rule["enable"] = self.enable
        return rule


@dataclass(frozen=True)
class QuantizeConfig:
    """A whole config, checked: rules in order (later wins) and the calibration steps."""

    quant_cfg: list[QuantizerCfgEntry]
    algorithm: Any = "max"
    effective_bits: float | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def parse(cls, config: Any) -> QuantizeConfig:
        if isinstance(config, cls):
            return config
        if not isinstance(config, Mapping):
            raise ValueError(f"a config is a dictionary with quant_cfg and algorithm (mtq.FP8_DEFAULT_CFG, say), got {config!r}")
        for key in config:
            if key not in ("quant_cfg", "algorithm", "effective_bits"):
                raise ValueError(f"config: unknown key {key!r}: known are quant_cfg, algorithm, effective_bits")
        bits = config.get("effective_bits")
        check_effective_bits(bits)
        rules = normalize_quant_cfg_list(config.get("quant_cfg", [{"quantizer_name": "*", "cfg": {"num_bits": 8, "axis": None}}]))
        algorithm = config.get("algorithm", "max")
        return cls(rules, algorithm, bits, normalize_algorithm(algorithm))

    def to_dict(self) -> dict[str, Any]:
        return {"quant_cfg": [rule.to_dict() for rule in self.quant_cfg], "algorithm": self.algorithm}


def normalize_quant_cfg_list(quant_cfg: Any) -> list[QuantizerCfgEntry]:
    """Rules (quant_cfg of a config) of either spelling as a list of checked entries. The older spelling draws a DeprecationWarning.
    ValueError: a rule with a mistake.

    >>> rule, = normalize_quant_cfg_list([{"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}}])
    >>> rule.cfg.num_bits, rule.cfg.axis, rule.enable
    (8, 0, True)
    """
    if isinstance(quant_cfg, Mapping):
        _warn_legacy()
        return [QuantizerCfgEntry.parse(rule) for key, value in quant_cfg.items() for rule in _from_legacy(key, value)]
    if not isinstance(quant_cfg, Sequence) or isinstance(quant_cfg, (str, bytes)):
        raise ValueError(f"quant_cfg must be a list of rules (or the older dictionary), got {type(quant_cfg).__name__}: {quant_cfg!r}")
    entries: list[QuantizerCfgEntry] = []
    for raw in quant_cfg:
        if isinstance(raw, QuantizerCfgEntry):
            entries.append(raw)
        elif isinstance(raw, Mapping) and "quantizer_name" in raw:
            entries.append(QuantizerCfgEntry.parse(raw))
        elif isinstance(raw, Mapping) and _is_legacy_item(raw):
            _warn_legacy()
            entries += [QuantizerCfgEntry.parse(rule) for key, value in raw.items() for rule in _from_legacy(key, value)]
        else:
            raise ValueError(f"Invalid quant_cfg entry: {raw!r}: a rule is {{'quantizer_name': pattern, 'cfg': ..., 'enable': ...}}")
    return entries


def find_quant_cfg_entry_by_path(quant_cfg_list: Sequence[Any], quantizer_name: str) -> Any:
    """The last rule of quant_cfg_list whose quantizer_name equals the given text exactly (no pattern matching). KeyError if there is none.

    >>> find_quant_cfg_entry_by_path([{"quantizer_name": "*", "enable": False}], "*")
    {'quantizer_name': '*', 'enable': False}
    """
    for entry in reversed(quant_cfg_list):
        name = entry.quantizer_name if isinstance(entry, QuantizerCfgEntry) else entry.get("quantizer_name")
        if name == quantizer_name:
            return entry
    raise KeyError(f"no quant_cfg rule has quantizer_name={quantizer_name!r}")


def need_calibration(config: Any) -> bool:
    """Whether the config wants calibration data: an algorithm other than max, or an enabled static quantizer that is not a weight's.

    As the reference does, it reads only the quantizer's own `type`: for microscaling formats it answers True, though a run without
    data works for them.
    """
    parsed = QuantizeConfig.parse(config)
    if parsed.algorithm is not None and parsed.algorithm != "max":
        return True
    for rule in parsed.quant_cfg:
        if "weight_quantizer" in rule.quantizer_name:
            continue
        stages = _as_stages(rule.cfg) if rule.cfg is not None else (QuantizerAttributeConfig(),)
        if rule.enable and any(stage.enable and stage.type != "dynamic" for stage in stages):
            return True
    return False


def load_config(path: Any) -> dict[str, Any]:
    """A config from a .yaml, .yml or .json file (path), checked, as the dictionary that `quantize` takes.

    Lists stand for tuples ([4, 3] or "E4M3"), and a file whose top holds `quantize:` (a recipe) is read from there. ValueError names the
    file and what is wrong with it.
    """
    import json
    from pathlib import Path
    text = Path(path).read_text(encoding="utf-8")
    try:
        if str(path).endswith(".json"):
            document = json.loads(text)
        else:
            import yaml
            document = yaml.safe_load(text)
    except Exception as error:
        raise ValueError(f"{path}: not a readable config: {error}") from error
    if isinstance(document, Mapping) and isinstance(document.get("quantize"), Mapping):
        document = document["quantize"]
    try:
        return QuantizeConfig.parse(document).to_dict()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# Reading of single fields --------------------------------------------------------------------------------------------------

def _as_stages(cfg: Any) -> tuple[QuantizerAttributeConfig, ...]:
    return cfg if isinstance(cfg, tuple) else (cfg,)


def _parse_cfg(cfg: Any, enable: bool, where: str) -> Any:
    is_list = isinstance(cfg, (list, tuple))
    if cfg is None and not isinstance(cfg, Mapping):
        return None
    if (is_list and all(isinstance(c, Mapping) and not c for c in cfg)) or (isinstance(cfg, Mapping) and not cfg):
        if not enable:
            return None
        raise ValueError(f"{where}: cfg is empty: name at least one attribute, or drop cfg and keep enable")
    if is_list:
        return tuple(QuantizerAttributeConfig.parse(c, f"{where}, stage {i}") for i, c in enumerate(cfg))
    return QuantizerAttributeConfig.parse(cfg, where)


def _warn_legacy() -> None:
    warnings.warn("quant_cfg as a dictionary of patterns is the older spelling: prefer a list of rules with 'quantizer_name'",
                  DeprecationWarning, stacklevel=4)


def _is_legacy_item(raw: Mapping[str, Any]) -> bool:
    return len(raw) == 1 or (len(raw) > 1 and any(str(key).startswith("nn.") for key in raw))


def _from_legacy(key: str, value: Any) -> list[dict[str, Any]]:
    """The rules that one item {pattern: attributes} of the older spelling stands for."""
    if key.startswith("nn."):
        if not isinstance(value, Mapping):
            raise ValueError(f"quant_cfg {key!r}: expected a dictionary of patterns, got {value!r}")
        return [{"parent_class": key, **rule} for name, cfg in value.items() for rule in _from_legacy(name, cfg)]
    rule: dict[str, Any] = {"quantizer_name": "*" if key == "default" else key}
    if isinstance(value, Mapping):
        rule["cfg"] = {k: v for k, v in value.items() if k != "enable"} or None
        if "enable" in value:
            rule["enable"] = value["enable"]
    else:
        rule["cfg"] = value
    return [rule]
