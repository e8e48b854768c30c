"""`import modelq.quantization as mtq`: Model Optimizer's post-training quantization calls and presets."""
from modelq.compression import compress, fold_weight
from modelq.config import *  # noqa: F403
from modelq.presets import *  # noqa: F403
from modelq.quantization import config, utils
from modelq.quantization.api import (calibrate, disable_quantizer, enable_quantizer, quantize, register, set_quantizer_attributes_full,
                                     set_quantizer_attributes_partial, set_quantizer_by_cfg, set_quantizer_by_cfg_context,
                                     unregister)
from modelq.quantization.auto import auto_quantize, get_auto_quantize_config
from modelq.quantization.utils import update_quant_cfg_with_kv_cache_quant
from modelq.summary import print_quant_summary

__all__ = ["auto_quantize", "calibrate", "compress", "config", "disable_quantizer", "enable_quantizer", "fold_weight",
           "get_auto_quantize_config", "print_quant_summary", "quantize", "register", "set_quantizer_attributes_full",
           "set_quantizer_attributes_partial", "set_quantizer_by_cfg", "set_quantizer_by_cfg_context", "unregister",
           "update_quant_cfg_with_kv_cache_quant", "utils"]
