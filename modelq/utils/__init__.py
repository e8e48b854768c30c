"""Utilities around quantization: calibration data, and a model to try things on."""
from modelq.utils.embedded_model import example_model

__all__ = ["example_model"]
