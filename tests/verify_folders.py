"""Small valid exports in the dialects that the golden set does not have, written from the engines' loaders: random codes, sound scales.

`Folder` holds an export in memory, so that a test can break one thing and write it down.
"""
import json
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
from golden_data import read_safetensors
from safetensors import TensorSpec, serialize_file

FP8 = ml_dtypes.float8_e4m3fn
AMAX = 0.5      # of every weight
INPUTS = 3.0    # of every linear's input


@dataclass
class Folder:
    config: dict
    tensors: dict[str, np.ndarray]
    nested: dict | None = None
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    @classmethod
    def read(cls, path: Path) -> "Folder":
        nested = path / "hf_quant_config.json"
        return cls(json.loads((path / "config.json").read_text()), read_safetensors(path / "model.safetensors"),
                   json.loads(nested.read_text()) if nested.exists() else None)

    def write(self, path: Path) -> Path:
        path.mkdir()
        arrays = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in self.tensors.items()}
        specs = {name: TensorSpec(dtype=array.dtype.name, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes)
                 for name, array in arrays.items()}
        serialize_file(specs, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(self.config))
        if self.nested is not None:
            (path / "hf_quant_config.json").write_text(json.dumps(self.nested))
        return path

    @property
    def flat(self) -> dict:
        return self.config["quantization_config"]

    @property
    def inner(self) -> dict:
        return self.nested["quantization"]

    def group(self) -> dict:
        return self.flat["config_groups"]["group_0"]

    def codes(self, dtype, *shape) -> np.ndarray:
        if dtype is FP8:
            return self.random.uniform(-448, 448, shape).astype(FP8)
        bits = np.iinfo(dtype)
        return self.random.integers(bits.min, bits.max, shape, dtype=dtype, endpoint=True)


def full(value, *shape, dtype=np.float32) -> np.ndarray:
    return np.full(shape, value, dtype=dtype)


def _fp8(folder, out, n, scale):
    return {"weight": folder.codes(FP8, out, n), "weight_scale": scale}


def _int4(folder, out, n, group=32):
    return {"weight_packed": folder.codes(np.int32, out, n // 8), "weight_scale": full(AMAX / 7, out, n // group, dtype=ml_dtypes.bfloat16),
            "weight_shape": np.array([out, n], dtype=np.int64)}


# dialect's format -> parts of an [out, in] linear
LAYERS = {
    "fp8 tensor": lambda f, out, n: _fp8(f, out, n, full(AMAX / 448, 1)) | {"input_scale": full(INPUTS / 448, 1)},
    "fp8 channel": lambda f, out, n: _fp8(f, out, n, full(AMAX / 448, out, 1)),
    "fp8 block": lambda f, out, n: _fp8(f, out, n, full(AMAX / 448, -(-out // 128), -(-n // 128))),
    "nvfp4": lambda f, out, n: {
        "weight_packed": f.codes(np.uint8, out, n // 2), "weight_scale": f.random.uniform(1, 448, (out, n // 16)).astype(FP8),
        "weight_global_scale": full(2688 / AMAX, 1), "input_global_scale": full(2688 / INPUTS, 1)},
    "mxfp8": lambda f, out, n: _fp8(f, out, n, full(117, out, n // 32, dtype=np.uint8)),
    "mxfp4": lambda f, out, n: {"weight_packed": f.codes(np.uint8, out, n // 2), "weight_scale": full(123, out, n // 32, dtype=np.uint8)},
    "int4": _int4,
    "int4 zeros": lambda f, out, n: _int4(f, out, n) | {"weight_zero_point": f.codes(np.int32, out // 8, n // 32)},
    "int8 packed": lambda f, out, n: {"weight_packed": f.codes(np.int32, out, n // 4), "weight_scale": full(AMAX / 127, out, 1),
                                      "weight_shape": np.array([out, n], dtype=np.int64)},
    "int8": lambda f, out, n: {"weight": f.codes(np.int8, out, n), "weight_scale": full(AMAX / 127, out, 1)},
    "int8 static": lambda f, out, n: {"weight": f.codes(np.int8, out, n), "weight_scale": full(AMAX / 127, out, 1),
                                      "input_scale": full(INPUTS / 127, 1)},
    "native fp8": lambda f, out, n: {"weight": f.codes(FP8, out, n), "weight_scale_inv": full(AMAX / 448, -(-out // 128), -(-n // 128))},
    "native mxfp8": lambda f, out, n: {"weight": f.codes(FP8, out, n), "weight_scale_inv": full(117, out, n // 32, dtype=np.uint8)},
    "awq": lambda f, out, n: {"qweight": f.codes(np.int32, n, out // 8), "qzeros": f.codes(np.int32, n // 32, out // 8),
                              "scales": full(AMAX / 7, n // 32, out, dtype=np.float16)},
    "gptq": lambda f, out, n: {"qweight": f.codes(np.int32, n // 8, out), "qzeros": full(0x77777777, n // 32, out // 8, dtype=np.int32),
                               "scales": full(AMAX / 7, n // 32, out, dtype=np.float16), "g_idx": np.arange(n, dtype=np.int32) // 32},
}


def _group(format_, bits, type_, strategy, inputs=None, **more):
    weights = {"num_bits": bits, "type": type_, "strategy": strategy, "symmetric": True, "dynamic": False} | more
    return {"quant_method": "compressed-tensors", "format": format_, "quantization_status": "compressed", "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": format_}}}


TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
LOCAL = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local", "symmetric": True}
BY_BLOCK = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True, "symmetric": True}
LEFT_OUT = {"modules_to_not_convert": ["lm_head"]}
CONFIGS = {
    "fp8 tensor": _group("float-quantized", 8, "float", "tensor", STATIC),
    "fp8 channel": _group("float-quantized", 8, "float", "channel", TOKEN),
    "fp8 block": _group("float-quantized", 8, "float", "block", BY_BLOCK, block_structure=[128, 128]),
    "nvfp4": _group("nvfp4-pack-quantized", 4, "float", "tensor_group", LOCAL, group_size=16, scale_dtype="torch.float8_e4m3fn"),
    "mxfp8": _group("mxfp8-quantized", 8, "float", "group", None, group_size=32, scale_dtype="torch.uint8"),
    "mxfp4": _group("mxfp4-pack-quantized", 4, "float", "group", None, group_size=32, scale_dtype="torch.uint8"),
    "int4": _group("pack-quantized", 4, "int", "group", None, group_size=32),
    "int4 zeros": _group("pack-quantized", 4, "int", "group", None, group_size=32, symmetric=False),
    "int8": _group("int-quantized", 8, "int", "channel", TOKEN | {"type": "int"}),
    "int8 static": _group("int-quantized", 8, "int", "channel", STATIC | {"type": "int"}),
    "int8 packed": _group("pack-quantized", 8, "int", "channel"),
    "native fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]} | LEFT_OUT,
    "native mxfp8": {"quant_method": "mxfp8"} | LEFT_OUT,
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"} | LEFT_OUT,
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False},
}


def make_folder(name: str, source: Path) -> Folder:
    """The model in `source` with every linear but lm_head replaced as LAYERS[name] says."""
    unquantized = read_safetensors(source)
    folder = Folder(json.loads((source / "config.json").read_text()) | {"quantization_config": json.loads(json.dumps(CONFIGS[name]))}, {})
    for tensor, array in unquantized.items():
        if tensor.endswith("_proj.weight"):
            module = tensor.removesuffix(".weight")
            folder.tensors |= {f"{module}.{part}": value for part, value in LAYERS[name](folder, *array.shape).items()}
        else:
            folder.tensors[tensor] = array
    return folder
