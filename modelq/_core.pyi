"""Types of the C core. Each function here has its documentation in C (help(modelq._core.<name>))."""
from typing import Any

import numpy as np

__version__: str

# csrc/py/system.c
def cpu_info() -> dict[str, Any]: ...
def set_threads(n: int, /) -> None: ...

# csrc/py/ndarray.c
def as_array(obj: Any, name: str = "array") -> np.ndarray: ...

# csrc/py/faults.c
def _alloc_fail_at(n: int, persistent: bool = False) -> int: ...
