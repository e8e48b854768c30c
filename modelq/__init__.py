"""modelq: post-training quantization of language models without PyTorch.

    import modelq
    import modelq.quantization as mtq
    model = modelq.load("path/to/checkpoint")
    mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, forward_loop)
"""
from importlib import import_module
from typing import TYPE_CHECKING, Any

from modelq._version import __version__

if TYPE_CHECKING:
    from modelq.array_files import load_arrays, save_arrays
    from modelq.model import Model
    from modelq.opening import load
    from modelq.packed_array import QuantizedArray, dequantize_array, fake_quantize_array, quantize_array
    from modelq.saved import restore, save

_HOME = {"Model": "model", "load": "opening", "QuantizedArray": "packed_array", "dequantize_array": "packed_array",
         "fake_quantize_array": "packed_array", "quantize_array": "packed_array", "load_arrays": "array_files",
         "save_arrays": "array_files", "restore": "saved", "save": "saved"}
__all__ = ["Model", "QuantizedArray", "__version__", "dequantize_array", "fake_quantize_array", "load", "load_arrays", "quantize_array",
           "restore", "save", "save_arrays"]


def __getattr__(name: str) -> Any:
    """What needs the C core is imported when first asked for, so that `import modelq` is instant."""
    if name in _HOME:
        return getattr(import_module(f"modelq.{_HOME[name]}"), name)
    raise AttributeError(f"module 'modelq' has no attribute {name!r}")
