"""integers.npz: what AutoGPTQ and AutoAWQ write of small matrices, and what they take them for.

    pip download --no-deps auto-gptq==0.7.1 autoawq==0.2.9     # unpacked into FOLDER; nothing of them needs to be installed
    python tests/data/make_integers.py FOLDER                   # with torch and transformers

"<case>.qweight", ".qzeros", ".scales" (float16), ".g_idx" (GPTQ): the tensors; ".weight": float16 [out, in] by AutoGPTQ's own forward of the
identity, or AutoAWQ's dequantize_gemm. Cases: gptq<bits>[_order], awq.
"""
import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch

ROWS, COLUMNS, GROUP = 32, 64, 16


def module_of(folder: Path, path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, next(folder.rglob(path)))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def asymmetric(weight, bits, groups):
    """(scales, zeros) [out, groups] of minima and maxima; no zero point is 0."""
    parts = [weight[:, groups == index] for index in range(int(groups.max()) + 1)]
    low = torch.stack([part.amin(1) for part in parts], 1)
    scale = ((torch.stack([part.amax(1) for part in parts], 1) - low) / (2 ** bits - 1)).half().float()
    return scale, torch.round(-low / scale).clamp(1, 2 ** bits - 1)


def gptq(module, bits, order):
    torch.manual_seed(bits)
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    groups = torch.arange(COLUMNS) // GROUP
    groups = groups[torch.randperm(COLUMNS)] if order else groups
    scale, zero = asymmetric(linear.weight.detach(), bits, groups)
    made = module.QuantLinear(bits, GROUP, COLUMNS, ROWS, False, weight_dtype=torch.float16)
    made.pack(linear.half(), scale.half(), zero.half(), g_idx=groups.int())
    with torch.no_grad():
        weight = made.float()(torch.eye(COLUMNS)).T.half()
    return {"qweight": made.qweight, "qzeros": made.qzeros, "scales": made.scales.half(), "g_idx": made.g_idx, "weight": weight}


def awq(folder):
    """AutoAWQ's order of nibbles as WQLinear_GEMM.from_linear writes it; its class itself needs a GPU to be imported."""
    packing = module_of(folder, "packing_utils.py")
    torch.manual_seed(9)
    code, zero = torch.randint(0, 16, (COLUMNS, ROWS)), torch.randint(0, 16, (COLUMNS // GROUP, ROWS))
    scale = (torch.rand(COLUMNS // GROUP, ROWS) * 0.1 + 0.01).half()

    def packed(values):
        words = torch.zeros(len(values), ROWS // 8, dtype=torch.int32)
        for word in range(ROWS // 8):
            for place, column in enumerate(packing.AWQ_ORDER):
                words[:, word] |= (values[:, word * 8 + column] << (place * 4)).int()
        return words
    tensors = {"qweight": packed(code), "qzeros": packed(zero), "scales": scale}
    return {**tensors, "weight": packing.dequantize_gemm(*tensors.values(), 4, GROUP).T}


def main() -> None:
    folder = Path(sys.argv[1])
    module = module_of(folder, "qlinear_cuda.py")
    cases = {f"gptq{bits}{'_order' if order else ''}": gptq(module, bits, order) for bits in (2, 3, 4, 8) for order in (False, True)}
    arrays = {f"{case}.{name}": tensor.contiguous().numpy() for case, tensors in {**cases, "awq": awq(folder)}.items()
              for name, tensor in tensors.items()}
    np.savez_compressed(Path(__file__).with_name("integers.npz"), **arrays)


if __name__ == "__main__":
    main()
