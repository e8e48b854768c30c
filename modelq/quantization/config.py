"""`modelq.quantization.config`: the configs and presets under the names that Model Optimizer gives them."""
from modelq.config import *  # noqa: F403
from modelq.config import normalize_quant_cfg_list  # noqa: F401
from modelq.presets import *  # noqa: F403
