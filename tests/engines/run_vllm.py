"""A process that answers from vLLM on a CPU: one JSON order per line on stdin, one answer per line on stdout behind "ANSWER ".

    .venv-vllm/bin/python tests/engines/run_vllm.py [--emulate]

Order: {"folder", "prompts": [[ids]], "tokens": N, "forced": [[ids]] or null}, or {"make": arguments of make_model.make}.
Answer: {"tokens": [[ids]], "predicted": [[ids]]: for each position of "forced" the token that the model puts first after it,
"quantization", "kv_cache_dtype"}, or {"error": text}.
--emulate: vLLM has slow reference kernels for NVFP4, MXFP8 and MXFP4, which it offers on other platforms only, and no CPU operator for
FP8 with a static scale; register the former for the CPU and write the latter in PyTorch, as emulated_experts.py does for
quantized experts. Everything else, above all the loading of the checkpoint, is vLLM's own. Written for vLLM 0.32: private names may move in others.
"""
import gc
import json
import os
import sys
import traceback

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind",
                  VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_DO_NOT_TRACK="1", TORCHDYNAMO_DISABLE="1",
                  TOKENIZERS_PARALLELISM="false")
import torch
from emulated_experts import emulate_experts
from make_model import make


def emulate():
    import vllm._custom_ops as operators
    import vllm.model_executor.kernels.linear as linear
    from vllm.model_executor.layers.quantization import input_quant_fp8, modelopt
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_w8a8_fp8
    from vllm.platforms import PlatformEnum

    linear._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CPU] = [of_rows(linear.EmulationNvFp4LinearKernel)]
    linear._POSSIBLE_MXFP8_KERNELS[PlatformEnum.CPU] = [linear.EmulationMxfp8LinearKernel]
    linear._POSSIBLE_MXFP4_KERNELS[PlatformEnum.CPU] = [linear.EmulationMxfp4LinearKernel]
    linear.MarlinNvFp4LinearKernel = weight_only(linear.EmulationNvFp4LinearKernel)
    dynamic = operators.scaled_fp8_quant

    def scaled_fp8_quant(values, scale=None, *args, **kwargs):
        if scale is None:
            return dynamic(values, scale, *args, **kwargs)
        return (values.float() / scale.float().reshape(-1)[0]).clamp(-448, 448).to(torch.float8_e4m3fn), scale

    operators.scaled_fp8_quant = scaled_fp8_quant
    emulate_experts()
    input_quant_fp8.QuantFP8.forward_cpu = input_quant_fp8.QuantFP8.forward_cuda = input_quant_fp8.QuantFP8.forward_native
    modelopt.expose_input_quant_key = compressed_tensors_w8a8_fp8.expose_input_quant_key = lambda *args, **kwargs: None


def of_rows(emulation):
    """It takes two axes only, and OLMo 2's attention gives three."""
    class OfRows(emulation):
        def apply_weights(self, layer, x, bias=None):
            return super().apply_weights(layer, x.reshape(-1, x.shape[-1]), bias).reshape(*x.shape[:-1], -1)
    return OfRows


def weight_only(emulation):
    """NVFP4 weights with activations as they are, for which vLLM has no emulation: its own dequantization, then a plain product."""
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype

    class WeightOnly(emulation):
        def apply_weights(self, layer, x, bias=None):
            weight = dequantize_to_dtype(layer.weight.view(torch.uint8), layer.weight_scale, layer.weight_global_scale, x.dtype, 16, swizzle=False)
            return torch.nn.functional.linear(x, weight, bias)
    return WeightOnly


def predictions(output):
    """The first-ranked token after each position but the last, from the log-probabilities of the prompt."""
    return [next(token for token, value in position.items() if value.rank == 1) for position in output.prompt_logprobs[1:]]


def answer(order):
    from vllm import LLM, SamplingParams

    longest = max(map(len, order["prompts"] + (order.get("forced") or [])))
    model = LLM(model=order["folder"], trust_remote_code=True, skip_tokenizer_init=True, enforce_eager=True,
                max_model_len=longest + order["tokens"] + 8, max_num_seqs=8, dtype=order.get("dtype", "bfloat16"), disable_log_stats=True, gpu_memory_utilization=0.1,
                enable_prefix_caching=False)

    def run(rows, **settings):
        asked = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **settings)
        return model.generate([{"prompt_token_ids": row} for row in rows], asked, use_tqdm=False)

    try:
        settings = model.llm_engine.vllm_config
        reply = {"tokens": [list(one.outputs[0].token_ids) for one in run(order["prompts"], max_tokens=order["tokens"])],
                 "quantization": str(settings.model_config.quantization), "kv_cache_dtype": str(settings.cache_config.cache_dtype)}
        if order.get("forced"):
            reply["predicted"] = [predictions(one) for one in run(order["forced"], max_tokens=1, prompt_logprobs=1)]
        return reply
    finally:
        model.llm_engine.engine_core.shutdown()


def clean_up():
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


if "--emulate" in sys.argv[1:]:
    emulate()
for line in sys.stdin:
    try:
        order = json.loads(line)
        reply = make(**order["make"]) if "make" in order else answer(order)
    except Exception as error:
        traceback.print_exc()
        reply = {"error": f"{type(error).__name__}: {error}"}
    clean_up()
    print("ANSWER " + json.dumps(reply), flush=True)
os._exit(0)     # threads of the engine would wait for each other
