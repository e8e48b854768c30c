"""How a part of a quantized linear is called on disk: role x dialect to suffix and transform.

A role is what `_core.quantize` calls an array it returns, plus what only an export has (input_scale). The transform says how
the stored number follows from ours, where a scale multiplies codes back to values. Another dialect is another column.
"""
from __future__ import annotations

from typing import NamedTuple


class Name(NamedTuple):
    """Suffix behind the module's name, and "same" or "reciprocal"."""
    suffix: str
    transform: str = "same"


NAMES: dict[str, dict[str, Name]] = {
    "modelopt": {
        "weight": Name("weight"),
        "weight_scale": Name("weight_scale"),
        "weight_scale_2": Name("weight_scale_2"),
        "input_scale": Name("input_scale"),
        "pre_quant_scale": Name("pre_quant_scale"),
        "k_scale": Name("k_scale"),
        "v_scale": Name("v_scale"),
    },
}
