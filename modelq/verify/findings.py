"""What a check finds: where, what is wrong, and what helps."""
from __future__ import annotations

from typing import NamedTuple

ERROR, NOTE = "error", "note"


class Finding(NamedTuple):
    """rule: its name in modelq.verify.rules; where: the tensor, the module or the key; level: "error" (the engine refuses the
    checkpoint, or loads it and computes nonsense) or "note" (it loads, with a loss that should be known)."""
    rule: str
    where: str
    problem: str
    remedy: str
    level: str = ERROR

    def __str__(self) -> str:
        return f"{self.level}: {self.where}: {self.problem}; {self.remedy} [{self.rule}]"
