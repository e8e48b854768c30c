"""export_hf_checkpoint: plan everything, then read, quantize and write one tensor at a time into a folder that appears whole."""
from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modelq.checkpoint import dialects
from modelq.checkpoint.base import TensorInfo
from modelq.checkpoint.config import stated_dtype
from modelq.export import compressed_tensors, modelopt, native
from modelq.export.copies import FLOATS, most_common_float
from modelq.export.plan import Linear, Plan, make_plan
from modelq.export.side_files import copy_side_files, patched_config, write_json
from modelq.torch_models import is_torch_model

PIECE_BYTES = 4 << 20


# what each dialect says in config.json and beside it
WRITERS = {"modelopt": modelopt.config_files, "compressed-tensors": compressed_tensors.config_files,
           "autoawq": native.config_files, "gptq": native.config_files, "fp8": native.config_files}


def export_hf_checkpoint(model: Any, export_dir: str | os.PathLike[str] | None = None, dtype: Any = None, *,
                         max_shard_size: int | str = "10GB", overwrite: bool = False, dialect: str | None = None,
                         engine: str | None = None) -> Path:
    """Write a quantized model as a Hugging Face checkpoint folder; returns the folder.

    model: what modelq.quantization.quantize returned, a native model or a transformers model on the CPU. export_dir: the folder to
    make; it must not exist, or be empty, unless `overwrite`. dtype: of the tensors that stay unquantized (None: the config's); tensors that
    the model's family does not have, and those of an architecture that is not known, are copied bit for bit.
    max_shard_size: bytes, or "10GB", "500MB".
    dialect: "modelopt" (config.json and hf_quant_config.json in Model Optimizer's words: vLLM, SGLang and TensorRT-LLM read it;
    transformers does not, and would load codes without their scales), "compressed-tensors" (vLLM, SGLang, transformers), "autoawq" or
    "gptq" (INT4 weights, with float16 scales), "fp8" (FP8 weights in blocks of 128 x 128 as DeepSeek's, and mxfp8).

    engine: "vllm", "sglang", "tensorrt-llm" or "transformers": choose the dialect that it loads, or check the one given; linears that it
    fuses then share FP8 scales too (the engine would round their weights anew to the larger one). What is written is verified.
    Scales of smoothed linears (pre_quant_scale) go into what comes before, where the dialect or the engine has no place for them.

    The folder is complete or not there: it is written beside its place, synced and renamed. Memory stays at one tensor.
    ValueError before any byte is written: nothing is quantized, a layer was never calibrated, the dialect has no word for a
    layer's format, the engine does not load it. FileExistsError: the folder is there. TypeError: no model of modelq's. OSError: the disk is
    full; what was there before is left as it was.
    """
    export_dir, dtype = _order(export_dir, dtype)
    if is_torch_model(model):
        from modelq.torch_models.twin import twin_of
        model = twin_of(model)
    if not hasattr(model, "checkpoint") or not hasattr(model, "quantizers"):
        raise TypeError(f"expected a model opened by modelq.load, got {type(model).__name__}")
    if dtype is not None and getattr(model, "weights_only", False):
        raise ValueError(f"dtype={dtype!r}: tensors of an architecture that modelq does not know are copied as they are: leave it out")
    dtype = export_dtype(dtype, model.config, getattr(model.checkpoint, "tensors", {}))
    from modelq.export.engines import check_written

    model, plan = plan_export(model, dtype, dialect, engine)
    files = WRITERS[plan.dialect](plan)
    from modelq.checkpoint.stacked import StackingWriter, stacked_plan
    from modelq.checkpoint.writer import ShardedWriter, atomic_directory
    from modelq.stated import layout_written

    layout = layout_written(model, plan.dialect)
    tensors = plan.tensors if layout is None else stacked_plan(plan.tensors, layout)
    with atomic_directory(Path(export_dir), overwrite=overwrite) as folder:
        with ShardedWriter(folder, tensors, max_shard_size=max_shard_size) as writer:
            _write_tensors(model, plan, writer if layout is None else StackingWriter(writer, plan.tensors, layout))
        copy_side_files(model.checkpoint, folder)
        for name, content in files.others.items():
            write_json(folder / name, content)
        config = patched_config(model.checkpoint, dtype, files.quantization)
        write_json(folder / "config.json", config | ({"tie_word_embeddings": False} if plan.unties else {}))
        if engine is not None:
            check_written(folder, engine)
    return Path(export_dir)


def plan_export(model: Any, dtype: str, dialect: str | None, engine: str | None) -> tuple[Any, Plan]:
    """The model, or what stands in for it without smoothing scales, and the plan of its export."""
    from modelq.export.engines import ENGINES, NEEDS_PRE_QUANT_SCALE
    from modelq.export.folding import model_to_export

    model, chosen = model_to_export(model, dtype, dialect, engine)
    if engine is None:
        return model, make_plan(model, dtype, chosen)
    return model, make_plan(model, dtype, chosen, share_all=ENGINES[engine].fuses, smoothed_words=NEEDS_PRE_QUANT_SCALE.get(engine, ()))


def _order(export_dir: Any, dtype: Any) -> tuple[Any, Any]:
    """Model Optimizer takes (model, dtype, export_dir) by place, its guide shows (model, export_dir): take both."""
    if isinstance(dtype, (str, os.PathLike)) and str(dtype) not in FLOATS:
        export_dir, dtype = dtype, export_dir
    if not isinstance(export_dir, (str, os.PathLike)):
        raise TypeError(f"export_dir: expected the path of the folder to make, got {export_dir!r}")
    return export_dir, dtype


def export_dtype(dtype: Any, config: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    """The dtype of what an export leaves unquantized: the one asked for, or the config's, or that of most of its floats."""
    given = dtype if dtype is not None else stated_dtype(config) or most_common_float(tensors)
    name = getattr(given, "__name__", None) or str(given).removeprefix("torch.")
    if name not in FLOATS:
        raise ValueError(f"dtype: expected one of {', '.join(FLOATS)}, got {given!r}")
    return name


def _write_tensors(model: Any, plan: Plan, writer: Any) -> None:
    from modelq.progress import progress
    from modelq.smoothing import as_loaded, stated_weight, times_norm
    from modelq.stated import as_divided

    checkpoint = model.checkpoint
    for name in progress(plan.order, "export", unit="tensor"):
        array = checkpoint.read(plan.linears[name].weight if name in plan.linears else name)
        if name in plan.linears:
            linear = plan.linears[name]
            weight = stated_weight(model, linear.row, as_loaded(model, array))
            _write_linear(linear, as_divided(model, linear.row, weight), writer, plan.dialect)
        elif name in plan.norms:
            writer.write(name, _cast(times_norm(model, name, as_loaded(model, array), plan.norms[name]), plan.copies[name].dtype))
        else:
            del array
            copy_tensor(checkpoint, name, plan.copies[name].dtype, writer)
            continue
        del array
        checkpoint.release([plan.linears[name].weight if name in plan.linears else name])
    for name, array in plan.cache.tensors.items():
        writer.write(name, array)


def _write_linear(linear: Linear, weight: np.ndarray, writer: Any, dialect: str) -> None:
    from modelq import _core

    parts = dict(_core.quantize(weight, linear.pair.weight, block_size=linear.group_size, name=linear.weight, **linear.scaling.arguments()))
    if linear.rows is not None:
        scale = parts["weight_scale"]
        parts["weight_scale"] = scale * linear.rows.reshape(-1, *[1] * (scale.ndim - 1))
    parts |= linear.given
    for role, info in linear.tensors.items():
        writer.write(info.name, dialects.stored(dialect, linear.form, role, parts).reshape(info.shape))


def copy_tensor(checkpoint: Any, name: str, dtype: str, writer: Any) -> None:
    """Write one tensor as it is, or cast, some rows at a time (an embedding may be gigabytes), pages given back after each."""
    info = checkpoint.tensors[name]
    rows = info.shape[0] if info.shape else 1
    step = max(1, rows * PIECE_BYTES // max(1, info.nbytes))
    writer.write_pieces(name, (_cast(piece, dtype) for piece in _pieces(checkpoint, name, rows, step)))
    checkpoint.release([name])


def _pieces(checkpoint: Any, name: str, rows: int, step: int) -> Iterator[np.ndarray]:
    made_by_rows = getattr(checkpoint, "is_made_by_rows", lambda name: False)(name)
    whole = None if made_by_rows else checkpoint.read(name)
    if whole is not None and step >= rows:
        yield whole
        return
    for start in range(0, rows, step):
        yield checkpoint.read_rows(name, start, start + step) if whole is None else whole[start:start + step]
        checkpoint.release([name])


def _cast(array: np.ndarray, dtype: str) -> np.ndarray:
    from modelq.checkpoint.safetensors import numpy_dtype

    return array.astype(numpy_dtype(dtype), copy=False)
