"""Exports: a quantized model as a Hugging Face folder that vLLM, SGLang and TensorRT-LLM load."""
from modelq.export.check import check_exportable, needs_data
from modelq.export.convert import convert_checkpoint
from modelq.export.hf_checkpoint import export_hf_checkpoint
from modelq.export.unquantized import convert_to_hugging_face
from modelq.verify import verify_checkpoint

__all__ = ["check_exportable", "convert_checkpoint", "convert_to_hugging_face", "export_hf_checkpoint", "needs_data", "verify_checkpoint"]
