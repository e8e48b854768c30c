"""modelq: post-training quantization of language models without PyTorch."""
from modelq._version import __version__

__all__ = ["__version__"]
