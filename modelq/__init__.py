"""modelq: post-training quantization of language models without PyTorch.

    import modelq
    import modelq.quantization as mtq
    model = modelq.load("path/to/checkpoint")
    mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, forward_loop)
"""
from typing import TYPE_CHECKING, Any

from modelq._version import __version__

if TYPE_CHECKING:
    from modelq.model import Model, load

__all__ = ["Model", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """`load` and `Model` come with the runtime: imported when first asked for, so that `import modelq` is instant."""
    if name in ("load", "Model"):
        from modelq import model
        return getattr(model, name)
    raise AttributeError(f"module 'modelq' has no attribute {name!r}")
