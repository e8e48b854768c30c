"""An export as an engine meets it: its configs, its tensors by module, and the layout that the config promises for each module."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from modelq.checkpoint.base import Checkpoint, TensorInfo, read_json_object
from modelq.checkpoint.folder import FolderCheckpoint
from modelq.checkpoint.matrices import is_embedding
from modelq.checkpoint.stacked import unstacked
from modelq.verify import engines, layouts
from modelq.verify.layouts import KV_SCALES, Layout

NESTED_FILE = "hf_quant_config.json"
PACKED = ("uint8", "int8", "int32", "float8_e4m3fn", "float8_e5m2")
PACKED_NAMES = ("weight_packed", "qweight", "qzeros", "g_idx")
NOT_LINEAR = ("embed_tokens", "norm", "layernorm", "q_norm", "k_norm", "embeddings")


@dataclass(frozen=True)
class Layer:
    """A linear. parts: suffix to tensor, whatever is there. said: what the config says of it (modelopt: an entry with quant_algo;
    compressed-tensors: a config group; native: the whole section), None if the config leaves it alone. layout: None if the
    config's words name none."""
    module: str
    parts: Mapping[str, TensorInfo]
    said: dict[str, Any] | None
    layout: Layout | None

    @property
    def stored_quantized(self) -> bool:
        weight = self.parts.get("weight")
        return any(suffix in self.parts for suffix in ("weight_packed", "qweight")) or (weight is not None and weight.dtype in PACKED)

    @property
    def shape(self) -> tuple[int, int] | None:
        """[out, in]: of a packed weight, what it stands for."""
        packed = self.layout is not None and self.stored_quantized
        weight = self.parts.get(self.layout.weight.suffix if packed and self.layout else "weight")
        if weight is None or len(weight.shape) != 2:
            return None
        return layouts.logical_shape(self.layout.weight, weight.shape) if packed and self.layout else (weight.shape[0], weight.shape[1])

    def sizes(self) -> dict[str, int]:
        """What the shapes of the other parts are written in terms of."""
        said, shape = self.said or {}, self.shape or (None, None)
        weights = said.get("weights") or said
        block = weights.get("block_structure") or weights.get("weight_block_size") or (128, 128)
        group = (self.layout.group if self.layout else None) or weights.get("group_size")
        if group == -1:      # one group as long as the row
            group = shape[1]
        found = {"out": shape[0], "in": shape[1], "group": group, "rows": block[0], "columns": block[1]}
        return {name: int(size) for name, size in found.items() if size}


@dataclass
class Export:
    """flat: config.json's quantization_config; nested: hf_quant_config.json's "quantization"; None if not there. checkpoint: experts in
    stacks are linears of their own, as engines take them apart."""
    checkpoint: Checkpoint
    engine_name: str
    flat: dict[str, Any] | None = None
    nested: dict[str, Any] | None = None
    nested_file: dict[str, Any] | None = None
    others: dict[str, list[TensorInfo]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, engine: str) -> Export:
        checkpoint = unstacked(FolderCheckpoint(path))
        export = cls(checkpoint, engine)
        export.flat = checkpoint.config.get("quantization_config")
        if (path / NESTED_FILE).is_file():
            export.nested_file = read_json_object(path / NESTED_FILE, "the quantization config")
            export.nested = export.nested_file.get("quantization")
        return export

    @property
    def engine(self) -> engines.Engine:
        return engines.ENGINES[self.engine_name]

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @cached_property
    def dialect(self) -> str | None:
        """"modelopt", "compressed-tensors", or a native quant_method; None if nothing says that the folder is quantized."""
        if self.flat is not None:
            return str(self.flat.get("quant_method", "modelopt"))
        return "modelopt" if self.nested is not None else None

    @cached_property
    def stated(self) -> dict[str, Any]:
        """The section that this engine goes by. modelopt: in the words of the nested file, whichever file it is from."""
        if self.dialect == "modelopt" and self.nested is not None and (self.engine.nested_first or self.flat is None):
            return self.nested
        flat = dict(self.flat or {})
        if self.dialect != "modelopt":
            return flat
        sizes = {group.get("weights", {}).get("group_size") for group in flat.get("config_groups", {}).values()} - {None}
        if "group_size" not in flat:
            flat["group_size"] = sizes.pop() if len(sizes) == 1 else (self.nested or {}).get("group_size")
        return flat | {"exclude_modules": flat.get("ignore") or []}

    @cached_property
    def excluded(self) -> list[str]:
        """Patterns of what stays unquantized, as this dialect spells them."""
        keys = {"modelopt": ("exclude_modules",), "compressed-tensors": ("ignore",)}
        for key in keys.get(self.dialect or "", ("modules_to_not_convert", "ignored_layers")):
            if self.stated.get(key):
                return list(self.stated[key])
        return []

    def is_excluded(self, module: str) -> bool:
        matcher = self.engine.matchers.get(self.dialect or "")
        return matcher is not None and matcher(module, self.excluded)

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """Every linear, quantized or not."""
        parts: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self.checkpoint.tensors.items():
            module, _, suffix = name.rpartition(".")
            if suffix in KV_SCALES or module.rpartition(".")[2] in NOT_LINEAR or is_embedding(module):
                continue
            parts.setdefault(module, {})[suffix] = info
        return {module: self._layer(module, found) for module, found in parts.items() if _is_linear(found)}

    @property
    def quantized(self) -> list[Layer]:
        return [layer for layer in self.layers.values() if layer.stored_quantized]

    def kv_scales(self) -> dict[str, dict[str, TensorInfo]]:
        """Attention module to {"k_scale", "v_scale"}, wherever they are (see layouts.KV_SCALES)."""
        found: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self.checkpoint.tensors.items():
            module, _, suffix = name.rpartition(".")
            if suffix in KV_SCALES:
                found.setdefault(module.removesuffix(".k_proj").removesuffix(".v_proj"), {})[suffix] = info
        return found

    def read(self, info: TensorInfo) -> np.ndarray:
        """The tensor's values, in float64 if it is of a small float type."""
        array = self.checkpoint.read(info.name)
        values = array.astype(np.float64) if array.dtype.kind not in "iub" else np.array(array)
        self.checkpoint.release([info.name])
        return values

    def _layer(self, module: str, parts: dict[str, TensorInfo]) -> Layer:
        said = self._said(module)
        return Layer(module, parts, said, self._layout(said))

    def _said(self, module: str) -> dict[str, Any] | None:
        if self.dialect == "modelopt":
            if self.stated.get("quant_algo") != engines.MIXED:
                return self.stated
            entry = (self.stated.get("quantized_layers") or {}).get(module)
            return entry if isinstance(entry, dict) else None
        if self.dialect == "compressed-tensors":
            return None if self.is_excluded(module) else _group_of(module, self.stated)
        return self.stated

    def _layout(self, said: dict[str, Any] | None) -> Layout | None:
        if said is None:
            return None
        if self.dialect == "modelopt":
            return layouts.MODELOPT.get(str(said.get("quant_algo")).upper())
        if self.dialect == "compressed-tensors":
            return layouts.COMPRESSED.get(format_of(said, self.stated))
        return layouts.NATIVE.get("fp8 block" if self.dialect == "fp8" and said.get("weight_block_size") else str(self.dialect))


def format_of(group: dict[str, Any], stated: dict[str, Any]) -> str:
    """compressed-tensors' "format strategy" of a config group; packed integers of 8 bits say so."""
    weights, word = group.get("weights") or {}, group.get("format") or stated.get("format")
    wide = " 8-bit" if word == "pack-quantized" and weights.get("num_bits") == 8 else ""
    return f"{word}{wide} {weights.get('strategy')}"


def _group_of(module: str, stated: dict[str, Any]) -> dict[str, Any] | None:
    """The config group whose targets name the module: exact names before `re:` before classes, as the library orders them."""
    groups = [group for group in (stated.get("config_groups") or {}).values() if isinstance(group, dict)]
    for accepts in (lambda target: target == module, lambda target: target.startswith("re:") and engines.exact_or_regex(module, [target]),
                    lambda target: target == "Linear"):
        for group in groups:
            if any(accepts(target) for target in group.get("targets", [])):
                return group
    return None


def _is_linear(parts: dict[str, TensorInfo]) -> bool:
    weight = parts.get("weight")
    return (weight is not None and len(weight.shape) == 2) or any("scale" in suffix or suffix in PACKED_NAMES for suffix in parts)
