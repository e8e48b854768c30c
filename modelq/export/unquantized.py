"""convert_to_hugging_face: a checkpoint of another file format (Megatron-LM, NeMo, GGUF) as a Hugging Face folder, not quantized."""
from __future__ import annotations

import os
from pathlib import Path


def convert_to_hugging_face(source: str | os.PathLike[str], out: str | os.PathLike[str], *, max_shard_size: int | str = "10GB",
                            overwrite: bool = False) -> Path:
    """Write the model as config.json, safetensors and, where there is one, its tokenizer; returns the folder `out`.

    source: a folder of Megatron-LM or NeMo, a .nemo archive, a GGUF file (whose quantized tensors are written dequantized). Tensors keep
    their dtype and bits. max_shard_size, overwrite: as for `export_hf_checkpoint`. ValueError for a folder that is Hugging Face's already.
    Memory stays at one tensor.
    """
    from modelq.checkpoint import open_checkpoint
    from modelq.checkpoint.folder import FolderCheckpoint
    from modelq.checkpoint.writer import ShardedWriter, atomic_directory
    from modelq.export.hf_checkpoint import copy_tensor
    from modelq.export.side_files import copy_side_files, write_json
    from modelq.progress import progress

    with open_checkpoint(Path(source)) as checkpoint:
        if isinstance(getattr(checkpoint, "inner", checkpoint), FolderCheckpoint):
            raise ValueError(f"{checkpoint.path}: a Hugging Face folder already; --dialect or --engine says which kind of export it "
                             "should become")
        with atomic_directory(Path(out), overwrite=overwrite) as folder:
            with ShardedWriter(folder, checkpoint.tensors.values(), max_shard_size=max_shard_size) as writer:
                for name, info in progress(list(checkpoint.tensors.items()), "convert", unit="tensor"):
                    copy_tensor(checkpoint, name, info.dtype, writer)
            copy_side_files(checkpoint, folder)
            write_json(folder / "config.json", {key: value for key, value in checkpoint.config.items() if value is not None})
    return Path(out)
