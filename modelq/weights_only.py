"""Models that are not computed: an architecture that the core's table does not have, or one that is opened for its weights alone.

Such a `Model` has a `WeightsOnly` in the place of the C runtime. Whatever needs no forward works on it: formats without calibrated
activations, exports, opening them again. Everything else is refused, with what would work.
"""
from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from modelq import _core
from modelq.checkpoint.config import UnknownFamily, runtime_config
from modelq.checkpoint.matrices import rows_of
from modelq.rules import Setting, stages
from modelq.supported import partial_block
from modelq.tables import listed

if TYPE_CHECKING:
    from modelq.model import Model

FAST_BFLOAT16 = ("amx_bf16", "avx512_bf16")
# Scheme of a weight -> the preset nearest to it that needs no data, and the command line's word for it.
NEEDS_NO_DATA = {
    "fp8": ("FP8_PER_CHANNEL_PER_TOKEN_CFG", "fp8_pc_pt"), "fp8_channel": ("FP8_PER_CHANNEL_PER_TOKEN_CFG", "fp8_pc_pt"),
    "fp8_block": ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "fp8_pb_wo"), "int8": ("INT8_WEIGHT_ONLY_CFG", "int8_wo"),
    "int4": ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "int4_wo"), "nvfp4": ("W4A16_NVFP4_CFG", "nvfp4_wo"),
    "mxfp4": ("MXFP4_DEFAULT_CFG", "mxfp4"), "mxfp8": ("MXFP8_DEFAULT_CFG", "mxfp8"),
}


class WeightsOnly:
    """What a model asks of its runtime, for one that has only weights. why: why it is not computed."""

    def __init__(self, checkpoint: Any, compute: str, why: str):
        self.why, self.compute = why, compute
        stored = () if getattr(checkpoint, "is_source", False) else getattr(checkpoint, "layers", ())
        self.modules = rows_of(checkpoint.tensors, checkpoint.config, stored)
        self.layers = 1 + max((row["layer"] for row in self.modules), default=-1)
        self.config: dict[str, Any] = {"vocab_size": 0, "head_dim": 0, "hidden_size": 1}
        self._names: dict[int, list[str]] = {}
        for row in self.modules:
            self._names.setdefault(row["layer"], []).append(row["weight"])

    def layer_tensors(self, layer: int) -> list[str]:
        """Of two axes and more."""
        return self._names.get(layer, [])

    def experts(self, layer: int) -> int:
        """None that are known to be: on disk they are linears like others."""
        return 0

    def set_quantizer(self, name: str, quantizer: Any) -> None:
        """Nothing passes here."""

    def start(self, *ignored: Any) -> NoReturn:
        raise ValueError(f"{self.why}: it cannot be run; its weights can be quantized by formats that need no data")

    embed_tensors = head_tensors = start


def runtime_of(checkpoint: Any, compute: str, weights_only: bool = False) -> Any:
    """The runtime, and a check that the checkpoint holds every tensor that it will ask for, in the right shape; a `WeightsOnly` for an
    architecture that there is none for."""
    if compute == "auto":
        features = _core.cpu_info()["features"].split()
        compute = "bfloat16" if any(feature in features for feature in FAST_BFLOAT16) else "float32"
    if weights_only:
        return WeightsOnly(checkpoint, compute, f"{checkpoint.path} was opened for its weights alone")
    try:
        runtime = _core.Runtime(*runtime_config(checkpoint.config, checkpoint.tensors), compute)
    except UnknownFamily:
        named = (checkpoint.config.get("architectures") or [None])[0]
        return WeightsOnly(checkpoint, compute, f"{checkpoint.path}: modelq computes no models of type "
                           f"{checkpoint.config.get('model_type')!r}, architecture {named!r}")
    except (TypeError, ValueError) as error:
        raise type(error)(f"{checkpoint.path}: {error} (modelq.load(..., weights_only=True), --weights-only: formats that need no data "
                          "work all the same)") from error
    for module in runtime.modules:
        for tensor, shape in ((module["weight"], tuple(module["shape"])), (module["bias"], tuple(module["shape"][:1]))):
            if tensor is None:
                continue
            if tensor not in checkpoint.tensors:
                raise ValueError(f"{checkpoint.path}: no tensor {tensor!r}, which a {checkpoint.config.get('model_type')} model with this "
                                 "config.json needs: is a file missing, or config.json another model's?")
            if checkpoint.tensors[tensor].shape != shape:
                raise ValueError(f"{checkpoint.tensors[tensor].file or checkpoint.path}: tensor {tensor!r} has shape "
                                 f"{list(checkpoint.tensors[tensor].shape)}, config.json asks for {list(shape)}")
    return runtime


class PerhapsWeightsOnly:
    """What a Model says of whether it can be run."""

    runtime: Any

    @property
    def weights_only(self) -> bool:
        """Whether it cannot be run: an architecture that modelq does not compute, or one opened so."""
        return bool(why_not_computed(self))

    def must_compute(self) -> None:
        """ValueError, with the reason, for a model that cannot be run."""
        if self.weights_only:
            self.runtime.start()


def why_not_computed(model: Any) -> str:
    """Why a model cannot be run; empty if it can."""
    return getattr(model.runtime, "why", "")


def refuse_data(model: Model, why_data: str) -> None:
    """ValueError for a model that cannot be run, of a config that looks at activations: why_data says how."""
    why = why_not_computed(model)
    if not why or not why_data:
        return
    scheme = next((quantizer.scheme for name, quantizer in model.quantizers.items()
                   if model.settings[name].slot.role == "weight" and quantizer.enabled), None)
    preset, word = NEEDS_NO_DATA.get(str(scheme), NEEDS_NO_DATA["nvfp4"])
    raise ValueError(f"{why}, and {why_data}. The nearest format that needs no data is {preset} (--format {word})")


def fitting(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """Settings of a model whose names nobody told, without those of linears that the blocks of their format do not fit."""
    result = dict(settings)
    for name, setting in settings.items():
        if setting.slot.role == "weight" and setting.enable and (why := _misfit(setting)):
            result[name] = replace(setting, enable=False, why=why)
            for other in ("input", "output"):
                side = f"{setting.slot.module}.{other}_quantizer"
                result[side] = replace(result[side], enable=False, why=why)
    return result


def warn_misfits(settings: Iterable[Setting]) -> None:
    """UserWarning for linears that stay as they are because blocks do not fit them."""
    found = [f"{setting.slot.module} ({setting.why})" for setting in settings if setting.why and setting.slot.role == "weight"]
    if found:
        warnings.warn(f"{len(found)} linears stay in high precision: {listed(found, 3)}", UserWarning, stacklevel=3)


def _misfit(setting: Setting) -> str:
    if partial_block(setting.slot, stages(setting)[0], 0):
        return f"{setting.slot.shape[1] if setting.slot.shape else 0} columns do not divide by the format's blocks"
    attributes = stages(setting)[0]
    if attributes.num_bits == 4 and setting.slot.shape and setting.slot.shape[0] % 2:
        return f"{setting.slot.shape[0]} rows: INT4 is packed in pairs of rows"
    return ""
