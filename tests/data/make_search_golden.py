"""Make golden results of nvidia-modelopt's search algorithms, for the micro models of the golden set (tests/data/golden/make_golden.py).

    pip install torch==2.13.0 nvidia-modelopt==0.47.0 transformers==5.17.0 accelerate     # CPU; triton is not needed
    OMP_NUM_THREADS=1 python tests/data/make_search_golden.py GOLDEN OUT [--models llama,...] [--cases INT4_AWQ_CFG,...] [--dtypes float32]

Reads GOLDEN/<model>/source and calib.npy. Writes per case OUT/<model>/<float32|bfloat16>/<CASE>/
  amax.safetensors         float32, of every quantizer (name, dot, ...): amax, pre_quant_scale, bias_value, global_amax,
                           svdquant_lora_a, svdquant_lora_b
  fake_logits.npy          float32 [1, 64, vocab]: calib[0] under fake quantization, as calibrated (before an export changes the model)
  losses.json              AWQ lite: per linear "losses" {alpha: summed loss}, "best_alpha", "enabled"
  clip_losses.safetensors  AWQ clip: per linear float32 [ratios], or [ratios, rows, blocks] where blocks are clipped; "ratios"
  weights.safetensors      GPTQ, llama in float32 only: float32 weights of the quantized linears after the update
  config.json, hf_quant_config.json, generation_config.json, model.safetensors   bfloat16 only: the exported checkpoint
  error.txt                where the reference fails: the end of its traceback. What it had made before that is there

The reference fake-quantizes NVFP4 on a GPU only. Two of its kernels have stand-ins here; all else is its own code on a CPU:
  dynamic blocks   its NVFP4QTensor (what an export writes), quantized and dequantized again. The kernel computes the same but for blocks
                   whose scale is under 1e-5 (it takes 1 instead) or under a 512th of the second scale (it may round to 0,
                   NVFP4QTensor stops at 2^-9), and for the sign of zeros; its division may be a unit off in the last place
  static blocks    its compute_fp4_scales and the body of its Triton function nvfp4_scalar_quant, both elementwise, run by torch
"""
import argparse
import copy
import functools
import json
import multiprocessing
import re
import shutil
import sys
import traceback
import types
import warnings
from pathlib import Path
from unittest import mock

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization import tensor_quant
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from modelopt.torch.quantization.utils import is_quantized_linear
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

STATE = ("_amax", "_pre_quant_scale", "_bias_value", "_global_amax", "svdquant_lora_a", "svdquant_lora_b")
GPTQ_LAYERWISE = {"method": "gptq", "layerwise": {"enable": True}}
CASES: dict[str, tuple[str, dict | None]] = {      # case: preset, algorithm in the place of the preset's
    **{name: (name, None) for name in (
        "NVFP4_AWQ_LITE_CFG", "NVFP4_AWQ_CLIP_CFG", "NVFP4_AWQ_FULL_CFG", "NVFP4_SVDQUANT_DEFAULT_CFG",
        "NVFP4_FOUR_OVER_SIX_CFG", "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG", "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG",
        "INT4_AWQ_CFG", "W4A8_AWQ_BETA_CFG")},
    "INT4_AWQ_CLIP": ("INT4_AWQ_CFG", {"method": "awq_clip"}),
    "INT4_AWQ_FULL": ("INT4_AWQ_CFG", {"method": "awq_full"}),
    "INT8_SMOOTHQUANT_ALPHA_0.5": ("INT8_SMOOTHQUANT_CFG", {"method": "smoothquant", "alpha": 0.5}),
    "INT8_MSE": ("INT8_DEFAULT_CFG", {"method": "mse"}),
    "INT4_MSE": ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", {"method": "mse"}),
    "FP8_MSE": ("FP8_DEFAULT_CFG", {"method": "mse"}),
    "INT4_GPTQ": ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", {"method": "gptq"}),
    "INT8_GPTQ": ("INT8_WEIGHT_ONLY_CFG", {"method": "gptq"}),
    "FP8_GPTQ": ("FP8_DEFAULT_CFG", {"method": "gptq"}),
    "INT4_GPTQ_LAYERWISE": ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", GPTQ_LAYERWISE),
    "INT4_SVDQUANT": ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", {"method": "svdquant", "lowrank": 32}),
}


def triton_functions() -> types.ModuleType:
    """The reference's fp4_kernel, imported with torch as its triton.language."""
    language = types.ModuleType("triton.language")
    language.__dict__.update(abs=torch.abs, where=torch.where, constexpr=object, float32=torch.float32, float16=torch.float16,
                             bfloat16=torch.bfloat16)
    triton = types.ModuleType("triton")
    triton.__dict__.update(jit=lambda function: function, language=language)
    cuda = types.ModuleType("triton.language.extra.cuda")
    cuda.__dict__.update(libdevice=types.SimpleNamespace(isnan=torch.isnan))
    modules = {"triton": triton, "triton.language": language, "triton.language.extra": types.ModuleType("extra"), cuda.__name__: cuda}
    with mock.patch.dict(sys.modules, modules):
        from modelopt.torch.kernels.quantization.gemm import fp4_kernel
    return fp4_kernel


def patch_kernels() -> None:
    kernels, other_formats = triton_functions(), tensor_quant.dynamic_block_quantize_op

    def dynamic(inputs, block_size, amax, num_bits, exponent_bits, scale_num_bits, scale_exponent_bits):
        """In the place of the op that asserts a CUDA tensor (tensor_quant._dynamic_block_quantize_impl)."""
        if (num_bits, exponent_bits, scale_num_bits, scale_exponent_bits) != (4, 2, 8, 4):
            return other_formats(inputs, block_size, amax, num_bits, exponent_bits, scale_num_bits, scale_exponent_bits)
        assert amax.max() > 0, "the kernel and NVFP4QTensor differ here"
        second = amax.amax().float() / (6 * 448)
        codes, scale, second = NVFP4QTensor.quantize(inputs, block_size, weights_scaling_factor_2=second)
        return codes.dequantize(inputs.dtype, scale=scale, double_scale=second, block_sizes={-1: block_size})

    def static(x, amax, global_amax=None, quantize_block_scales=True, fp8_max_for_normalization=448.0, out_dtype=None):
        """fp4_kernel.static_blockwise_fp4_fake_quant without its launch."""
        scale = kernels.compute_fp4_scales(amax, global_amax, quantize_block_scales, fp8_max_for_normalization)
        blocks = x.float().reshape(amax.numel(), -1)
        return kernels.nvfp4_scalar_quant(blocks, scale.reshape(-1, 1), blocks.shape[1]).reshape(x.shape).to(out_dtype or x.dtype)

    tensor_quant.dynamic_block_quantize_op = dynamic
    tensor_quant.triton_kernel.IS_AVAILABLE = True
    tensor_quant.triton_kernel.static_blockwise_fp4_fake_quant = static


def config_of(case: str) -> dict:
    preset, algorithm = CASES[case]
    config = copy.deepcopy(getattr(mtq, preset))
    algorithm = algorithm or config["algorithm"]
    algorithm = {"method": algorithm} if isinstance(algorithm, str) else dict(algorithm)
    if algorithm["method"].startswith("awq"):
        algorithm["debug"] = True      # keeps module.awq_lite and module.awq_clip
    return config | {"algorithm": algorithm}


def quantizer_state(model) -> dict[str, torch.Tensor]:
    found = {f"{name}.{key.removeprefix('_')}": getattr(module, key, None) for name, module in model.named_modules()
             if isinstance(module, TensorQuantizer) for key in STATE}
    return {name: value.detach().float().contiguous().clone() for name, value in found.items() if value is not None}


def save_searches(model, folder: Path) -> None:
    losses, clips = {}, {}
    for name, module in model.named_modules():
        if hasattr(module, "awq_lite"):
            search = module.awq_lite
            losses[name] = {"losses": {str(alpha): float(loss) for alpha, loss in search.loss.items()},
                            "best_alpha": search.best_alpha, "enabled": search.is_enabled}
            del module.awq_lite
        if hasattr(module, "awq_clip"):
            clips[name] = torch.stack(list(module.awq_clip.loss.values())).float()
            clips["ratios"] = torch.tensor(list(module.awq_clip.loss))
            del module.awq_clip
    if losses:
        (folder / "losses.json").write_text(json.dumps(losses, indent=1))
    if clips:
        save_file(clips, folder / "clip_losses.safetensors")


def make(golden: Path, name: str, dtype: str, case: str, folder: Path) -> None:
    torch.manual_seed(0)
    calib = torch.from_numpy(np.load(golden / name / "calib.npy"))
    model = AutoModelForCausalLM.from_pretrained(golden / name / "source", dtype=getattr(torch, dtype)).eval()

    def loop(model):
        with torch.no_grad():
            for batch in calib:
                model(batch[None], use_cache=False)     # as its own create_forward_loop does; layerwise replays would see old keys

    model = mtq.quantize(model, config_of(case), forward_loop=loop)
    save_searches(model, folder)
    save_file(quantizer_state(model), folder / "amax.safetensors")
    if "GPTQ" in case and (name, dtype) == ("llama", "float32"):
        save_file({f"{linear}.weight": module.weight.detach().clone() for linear, module in model.named_modules()
                   if is_quantized_linear(module) and module.weight_quantizer.is_enabled}, folder / "weights.safetensors")
    with torch.no_grad():
        np.save(folder / "fake_logits.npy", model(calib[:1]).logits.float().numpy())
    if dtype == "bfloat16":
        export_hf_checkpoint(model, export_dir=folder)


def run(golden: Path, name: str, dtype: str, case: str, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        make(golden, name, dtype, case, folder)
    except Exception:
        text = re.sub(r'File "[^"]*/(site-packages/|make_search)', r'File "\1', traceback.format_exc())
        (folder / "error.txt").write_text(text[-1500:])
    print(name, dtype, case, sorted(path.name for path in folder.iterdir()), flush=True)


def keep_subset(out: Path, target: Path) -> None:
    """What tests/data/search has room for: values of all float32 cases of llama, q_proj of layer 1 as GPTQ rounds it, of two exports
    layer 1, and AWQ's losses in bfloat16."""
    def keep(case: str, file: str, wanted) -> None:
        tensors = load_file(out / "llama" / case / file)
        (target / "llama" / case).mkdir(parents=True, exist_ok=True)
        save_file({name: tensor for name, tensor in tensors.items() if wanted(name)}, target / "llama" / case / file)

    for folder in sorted((out / "llama" / "float32").iterdir()):
        keep(f"float32/{folder.name}", "amax.safetensors", lambda name: "_shared_quant" not in name and "lora" not in name)
        if (folder / "weights.safetensors").exists():
            keep(f"float32/{folder.name}", "weights.safetensors", lambda name: name == "model.layers.1.self_attn.q_proj.weight")
    for case, part in (("NVFP4_AWQ_LITE_CFG", ""), ("NVFP4_SVDQUANT_DEFAULT_CFG", "mlp")):
        keep(f"bfloat16/{case}", "amax.safetensors", lambda name: "_shared_quant" not in name and "lora" not in name)
        keep(f"bfloat16/{case}", "model.safetensors", lambda name, part=part: f"layers.1.{part}" in name)
        for file in ("config.json", "hf_quant_config.json"):
            shutil.copy(out / "llama" / "bfloat16" / case / file, target / "llama" / "bfloat16" / case / file)
    for where in ("llama/float32", "llama/bfloat16", "qwen3/bfloat16"):
        for case in ("INT4_AWQ_CFG", "W4A8_AWQ_BETA_CFG", "NVFP4_AWQ_LITE_CFG"):
            (target / where / case).mkdir(parents=True, exist_ok=True)
            shutil.copy(out / where / case / "losses.json", target / where / case / "losses.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("golden", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", default="llama,qwen3,qwen3moe")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--subset", type=Path, help="afterwards, copy what tests/data/search holds there")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    patch_kernels()
    for name in args.models.split(","):
        for case in args.cases.split(","):
            for dtype in args.dtypes.split(","):      # a process each: one that fails leaves the reference's patches behind
                job = functools.partial(run, args.golden, name, dtype, case, args.out / name / dtype / case)
                process = multiprocessing.get_context("fork").Process(target=job)
                process.start()
                process.join()
    if args.subset:
        keep_subset(args.out, args.subset)


if __name__ == "__main__":
    main()
