"""Quantizers for models in the user's process, under Model Optimizer's names."""
from modelq.nn.tensor_quantizer import TensorQuantizer

__all__ = ["TensorQuantizer"]
