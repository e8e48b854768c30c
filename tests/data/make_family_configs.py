"""Make tests/data/family_configs.json: config.json of every model of micro_models.py, for tests that have no transformers.

    PYTHONPATH=tests python tests/data/make_family_configs.py
"""
import json
from pathlib import Path

from micro_models import MODELS

OUT = Path(__file__).with_name("family_configs.json")


def config_of(name: str) -> dict:
    """As a folder saved by transformers has it, without what says nothing of the model."""
    import transformers as tf

    kind, arguments = MODELS[name]
    config = getattr(tf, kind)(**arguments)
    model = tf.AutoModelForCausalLM.from_config(config)
    config = json.loads(model.config.to_json_string()) | {"architectures": [type(model).__name__]}
    return {key: value for key, value in config.items() if key != "transformers_version"}


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}: {json.dumps(config_of(name))}" for name in sorted(MODELS)]
    OUT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
