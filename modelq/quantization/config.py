"""`modelq.quantization.config`: the configs and presets under the names that Model Optimizer gives them."""
from modelq.config import *  # noqa: F403
from modelq.presets import *  # noqa: F403
