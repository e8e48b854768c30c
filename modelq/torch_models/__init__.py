"""torch.nn.Module models in the user's process. Only what the user has imported is used: `import modelq` never imports torch."""
from __future__ import annotations

import sys
from typing import Any


def is_torch_model(model: Any) -> bool:
    """Whether it is a torch.nn.Module."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def unwrapped(model: Any) -> Any:
    """The model inside of torch.compile, DataParallel and DistributedDataParallel."""
    torch = sys.modules["torch"]
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model
