"""`import modelq.quantization as mtq`: Model Optimizer's post-training quantization calls and presets."""
from modelq.config import *  # noqa: F403
from modelq.presets import *  # noqa: F403
from modelq.quantization import config, utils
from modelq.quantization.utils import update_quant_cfg_with_kv_cache_quant

__all__ = ["config", "update_quant_cfg_with_kv_cache_quant", "utils"]
