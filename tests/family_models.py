"""Checkpoints of every family with random weights, of the sizes of micro_models.py, made without torch: the configs are stored, the tensors
are those that the runtime asks for."""
from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np

import modelq._core as core
from golden_data import write_safetensors
from modelq.checkpoint.config import runtime_config

CONFIGS = json.loads((Path(__file__).parent / "data" / "family_configs.json").read_text())


def save(name: str, folder: Path, seed: int = 0) -> Path:
    """Weights that are bfloat16 numbers, norms and vectors about where they are in a model."""
    random, config, tensors = np.random.default_rng(seed), CONFIGS[name], {}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for module in core.Runtime(*runtime_config(config), "float32").modules:
        for role in ("weight", "bias"):
            if module[role] is None or module[role] in tensors:
                continue
            shape = module["shape"] if role == "weight" else module["shape"][:1]
            numbers = random.standard_normal(shape)
            numbers = numbers * 0.15 if len(shape) == 2 else numbers * 0.2 + (module["kind"] == "norm")
            tensors[module[role]] = numbers.astype(ml_dtypes.bfloat16)
    write_safetensors(folder / "model.safetensors", tensors)
    return folder
