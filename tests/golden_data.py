"""The golden set: what an independent implementation made of micro models. See tests/data/README.md.

    from golden_data import cases

    @pytest.mark.parametrize("case", cases(dtype="bfloat16", configs=["FP8_DEFAULT_CFG"], needs=["model.safetensors"]))
    def test_export(case, tmp_path): ...

cases() lists what the folder holds (MODELQ_GOLDEN, else tests/data/golden), so a fuller folder means more tests.
"""
import copy
import json
import os
import warnings
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(os.environ.get("MODELQ_GOLDEN") or Path(__file__).parent / "data" / "golden").resolve()
SEARCH_ROOT = Path(os.environ.get("MODELQ_SEARCH_GOLDEN") or Path(__file__).parent / "data" / "search").resolve()
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16",
          "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}


def read_safetensors(path) -> dict[str, np.ndarray]:
    """Every tensor of a file, or of a folder's shards, as read by the safetensors library (never by modelq)."""
    import ml_dtypes
    import safetensors

    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    tensors = {}
    for file in files:
        for name, entry in safetensors.deserialize(file.read_bytes()):
            dtype = DTYPES[entry["dtype"]]
            dtype = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
            tensors[name] = np.frombuffer(bytes(entry["data"]), dtype=dtype).reshape(entry["shape"])
    return tensors


def write_safetensors(path, tensors) -> None:
    """The file format by hand: tests write folders that modelq would not."""
    tags = {name: tag for tag, name in DTYPES.items()}
    header, end = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": tags[tensor.dtype.name], "shape": tensor.shape, "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensor.tobytes() for tensor in tensors.values()))


@dataclass(frozen=True)
class Model:
    """golden/<name>: the unquantized model, its calibration tokens and its logits."""
    name: str

    @property
    def folder(self) -> Path:
        return ROOT / self.name

    @property
    def source(self) -> Path:
        return self.folder / "source"

    @property
    def calib(self) -> np.ndarray:
        """int64 [8, 64] token ids."""
        return np.load(self.folder / "calib.npy")

    @property
    def logits(self) -> np.ndarray:
        """float32 [1, 64, vocab], of calib[0]."""
        return np.load(self.folder / "logits.npy")


@dataclass(frozen=True)
class Case:
    """golden/<model>/<dtype>/<config>, or search/... where the reference searched."""
    model: Model
    dtype: str
    config: str
    root: Path = ROOT

    @property
    def folder(self) -> Path:
        return self.root / self.model.name / self.dtype / self.config

    @property
    def configs(self) -> list[str]:
        """The preset names that were merged: "FP8_DEFAULT_CFG__FP8_KV_CFG" is two."""
        return self.config.split("__")

    @property
    def amax(self) -> dict[str, np.ndarray]:
        """Quantizer name, dot, "amax" (or "pre_quant_scale", "bias_value", "global_amax") to float32."""
        return read_safetensors(self.folder / "amax.safetensors")

    @property
    def fake_logits(self) -> np.ndarray:
        return np.load(self.folder / "fake_logits.npy")

    @cached_property
    def exported(self) -> dict[str, np.ndarray]:
        """Tensors of the exported checkpoint."""
        return read_safetensors(self.folder / "model.safetensors")

    def has(self, *files: str) -> bool:
        return all((self.folder / file).exists() for file in files)

    def __str__(self) -> str:
        return f"{self.model.name}-{self.dtype}-{self.config}"


def is_known(name: str) -> bool:
    """Whether the runtime has this model's family: the set holds some that are for later."""
    from modelq._core import archs

    kind = json.loads((ROOT / name / "source" / "config.json").read_text())["model_type"]
    return any(kind in family["model_types"] for family in archs())


def models(names=None, any_family=False) -> list:
    """One pytest.param per model of the folder, of names, if given; of the families that the runtime has, unless any_family."""
    found = sorted(path.parent.name for path in ROOT.glob("*/source"))
    return [pytest.param(Model(name), id=name) for name in found if (names is None or name in names) and (any_family or is_known(name))]


def cases(dtype=None, configs=None, names=None, needs=(), any_family=False, root=ROOT) -> list:
    """One pytest.param per <model>/<dtype>/<config> that is there, has the files in needs, and is asked for (see models)."""
    out = []
    for model in models(names, any_family):
        for folder in sorted((root / model.values[0].name).glob("*[0-9]/*/")):   # float32/, bfloat16/
            case = Case(model.values[0], folder.parent.name, folder.name, root)
            wanted = (dtype is None or case.dtype == dtype) and (configs is None or case.config in configs)
            if wanted and case.has(*needs):
                out.append(pytest.param(case, id=str(case)))
    return out


# Calibrations that search -----------------------------------------------------------------------------------------------------

INT4, LAYERWISE = "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", {"method": "gptq", "layerwise": {"enable": True}}
OTHER_ALGORITHMS = {       # case: (preset, algorithm in the place of the preset's), as make_search_golden.py has them
    "INT4_AWQ_CLIP": ("INT4_AWQ_CFG", "awq_clip"), "INT4_AWQ_FULL": ("INT4_AWQ_CFG", "awq_full"),
    "INT8_SMOOTHQUANT_ALPHA_0.5": ("INT8_SMOOTHQUANT_CFG", {"method": "smoothquant", "alpha": 0.5}),
    "INT8_MSE": ("INT8_DEFAULT_CFG", "mse"), "INT4_MSE": (INT4, "mse"), "FP8_MSE": ("FP8_DEFAULT_CFG", "mse"), "INT4_GPTQ": (INT4, "gptq"),
    "INT8_GPTQ": ("INT8_WEIGHT_ONLY_CFG", "gptq"), "FP8_GPTQ": ("FP8_DEFAULT_CFG", "gptq"), "INT4_GPTQ_LAYERWISE": (INT4, LAYERWISE),
    "INT4_SVDQUANT": (INT4, {"method": "svdquant", "lowrank": 32})}
SEARCHING = ["INT8_SMOOTHQUANT_CFG", "INT4_AWQ_CFG", "W4A8_AWQ_BETA_CFG", "NVFP4_AWQ_LITE_CFG", "NVFP4_AWQ_CLIP_CFG",
             "NVFP4_SVDQUANT_DEFAULT_CFG"]
LITE_OF = {"NVFP4_SVDQUANT_DEFAULT_CFG": "NVFP4_AWQ_LITE_CFG", "NVFP4_AWQ_FULL_CFG": "NVFP4_AWQ_LITE_CFG",
           "INT4_AWQ_FULL": "INT4_AWQ_CFG", "INT4_SVDQUANT": "INT4_AWQ_CFG"}      # whose first step is awq_lite


def search_cases(dtype, needs) -> list:
    """Of both sets: what searches."""
    return cases(dtype, SEARCHING, needs=needs) + cases(dtype, needs=needs, root=SEARCH_ROOT)


@cache
def search_model(case):
    """The model, calibrated as the reference calibrated it."""
    import modelq
    import modelq.quantization as mtq

    preset, algorithm = OTHER_ALGORITHMS.get(case.config, (case.config, None))
    config = copy.deepcopy(getattr(mtq, preset))
    config = config if algorithm is None else {**config, "algorithm": algorithm}
    model = modelq.load(case.model.source, compute=case.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return mtq.quantize(model, config, lambda model: [model(row[None]) for row in case.model.calib], compat="modelopt")


def search_losses(case) -> dict[str, tuple[np.ndarray, int]]:
    """The reference's losses of a linear by exponent, and the index of the exponent that it chose. Empty where they were not kept."""
    path = SEARCH_ROOT / case.model.name / case.dtype / LITE_OF.get(case.config, case.config) / "losses.json"
    said = json.loads(path.read_text()) if path.exists() else {}
    return {module: (np.array(list(words["losses"].values())), list(map(float, words["losses"])).index(words["best_alpha"]))
            for module, words in said.items() if words["enabled"]}
