"""What a folder's config says of its quantization, in one form for every dialect."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from modelq.checkpoint.dialects import Pair

AGAIN = "export the model again, or download the file again"


@dataclass(frozen=True)
class Said:
    """find(module) -> (its pair of formats, its group size, the dialect's word) or None where the config leaves the module out.

    every: modules that must be stored quantized. word: of the whole model.
    """
    dialect: str
    find: Callable[[str], tuple[Pair, int | None, str] | None]
    every: tuple[str, ...] = ()
    word: str | None = None
