"""Run in the reference's environment: writes micro models, and what nvidia-modelopt exports of them on a CPU.

    python run_reference.py OUT [FAMILY/FORMAT ...]

OUT/<family>/source, and OUT/<family>/<format>/: the export, or error.txt with what it raised.
"""
import os
import sys
import traceback
import warnings
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
import transformers
from reference_cases import FAMILIES, FORMATS, configuration, dtype_of, folder_of, token_ids, values_of
from modelopt.torch.export import export_hf_checkpoint
from safetensors.torch import load_file, save_file


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wanted = sys.argv[2:] or [f"{family}/{format}" for family in FAMILIES for format in FORMATS]
    for family in dict.fromkeys(case.split("/")[0] for case in wanted):
        if not (out / family / "source").exists():
            save_source(family, out / family / "source")
    running: dict[int, Path] = {}
    for case in wanted:
        family, format = case.split("/")
        if len(running) == (os.cpu_count() or 1):
            wait(running)
        folder = out / family / folder_of(format)
        if (child := os.fork()) == 0:       # a process each: what fails leaves patches behind
            one(out / family / "source", format, folder)
            os._exit(0)
        running[child] = folder
    while running:
        wait(running)


def wait(running: dict[int, Path]) -> None:
    """For one of the processes. What the kernel ended (memory that others have) is no result, and says so."""
    child, status = os.wait()
    folder = running.pop(child)
    if status != 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(f"the reference's process ended with {os.waitstatus_to_exitcode(status)} (-9: no memory was left)")


def save_source(family: str, folder: Path) -> None:
    """As the Hub has it: bfloat16, routers' corrections in float32."""
    kind, arguments = FAMILIES[family]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**arguments), dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        base = float(tensor.flatten()[0]) if tensor.ndim == 1 and len(tensor.unique()) == 1 else 0.0
        dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        tensors[name] = torch.from_numpy(values_of(name, tuple(tensor.shape), base)).to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def one(source: Path, format: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    dtype, ids = getattr(torch, dtype_of(format)), torch.from_numpy(token_ids())
    try:
        torch.manual_seed(0)
        # eager: the other implementations of attention leave Gemma 2's soft caps out
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="eager").eval()
        with torch.no_grad():
            mtq.quantize(model, configuration(mtq, format), lambda model: model(ids))
            export_hf_checkpoint(model, dtype=dtype, export_dir=folder)
    except Exception as error:
        (folder / "error.txt").write_text(f"{type(error).__name__}: {error}\n\n{traceback.format_exc()}")


if __name__ == "__main__":
    main()
