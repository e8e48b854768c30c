"""An export next to the reference's of the same model: names, shapes, dtypes, values, and what the config files say."""
from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from reference_cases import EXACT, SEARCHED, STACKED, WITH_EXPERTS, configuration, dtype_of, token_ids, values_of
from golden_data import read_safetensors, write_safetensors

FILES = {"hf_quant_config.json": "quantization", "config.json": "quantization_config"}
FOUR_BITS = ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "INT4_AWQ_CFG", "W4A8_AWQ_BETA_CFG")
# Of activations, which two implementations in bfloat16 round differently.
SEEN = ("input_scale", "k_scale", "v_scale")
NEAR_SEEN = 0.02
# Of what searches choose, in float32: scales; how many codes are the same, the others a step off. Measured: scales of INT8_SMOOTHQUANT_CFG
# are within 1.2e-6, and no code differs, for every instruction set; the reference's bytes are the same at every run, modelq's for every
# number of threads (tests/test_threads.py).
NEAR_SEARCHED, SAME_CODES = 1e-4, 0.99

# What the reference fails at on a CPU, and its words.
CANNOT = {
    **{(family, format): "not supported|has no len|out of bounds|Changing shape" for family in WITH_EXPERTS for format in FOUR_BITS},
    **{(family, format): "must match the size of tensor" for family in STACKED for format in ("INT8_DEFAULT_CFG", "INT8_SMOOTHQUANT_CFG")},
}
# What modelq refuses: a stack has room for FP8 and NVFP4. (The reference takes one scale for an expert, and blocks along the other axis.)
REFUSED = {(family, format) for family in STACKED for format in (*EXACT, *SEARCHED) if "NVFP4" not in format and "FP8_DEFAULT" not in format
           or format == "MXFP8_DEFAULT_CFG"}
# Names that the reference leaves as transformers has them in memory, in this one format.
_MIXTRAL = [*((rf"\.mlp\.experts\.(\d+)\.{theirs}_proj", rf".block_sparse_moe.experts.\1.{hub}")
              for theirs, hub in (("gate", "w1"), ("up", "w3"), ("down", "w2"))), (r"\.mlp\.gate\b", ".block_sparse_moe.gate")]
OTHER_NAMES = {("mixtral", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"): _MIXTRAL}
# Their embedding is a class of transformers' own, which the reference does not look at.
UNSAID = {"gemma2": ["model.embed_tokens"], "gemma3": ["model.embed_tokens"]}


class Expected(NamedTuple):
    """A tensor of the reference's: its bytes' digest ("": of any bytes), and the array where another may be near it."""
    dtype: str
    shape: tuple[int, ...]
    digest: str
    array: np.ndarray | None


def may_be_near(name: str, array: np.ndarray, format: str) -> bool:
    """What is seen or searched, codes among it, and norms, which take scales up."""
    is_plain = name.endswith(".weight") and array.dtype.kind != "u" and array.dtype != np.int8 and array.ndim > 1
    return name.endswith(SEEN) or format in SEARCHED and not is_plain


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def expected(array: np.ndarray, name: str, format: str) -> Expected:
    return Expected(array.dtype.name, array.shape, digest(array), array if may_be_near(name, array, format) else None)


def renamed(text: str, family: str, format: str) -> str:
    for pattern, name in OTHER_NAMES.get((family, format), ()):
        text = re.sub(pattern, name, text)
    return text


def read_export(folder: Path, family: str, format: str) -> tuple[dict[str, Expected], dict[str, Any]]:
    """(tensors, what the config files say) of the reference's export, as it would be with the names and words that it leaves out."""
    tensors = {renamed(name, family, format): array for name, array in read_safetensors(folder).items()}
    words = json.loads(renamed(json.dumps(words_of(folder)), family, format))
    for said, key in ((words["hf_quant_config.json"], "exclude_modules"), (words["config.json"], "ignore")):
        said[key] = sorted([*said.get(key, ()), *UNSAID.get(family, ())])
    return {name: expected(array, name, format) for name, array in tensors.items()}, words


def words_of(folder: Path) -> dict[str, Any]:
    said = {file: json.loads((folder / file).read_text())[section] for file, section in FILES.items()}
    return {file: {key: value for key, value in words.items() if key != "producer"} for file, words in said.items()}


def export(source: Path, format: str, out: Path) -> Path:
    """As run_reference.py does it, with modelq."""
    import modelq
    import modelq.quantization as mtq
    from modelq.export import export_hf_checkpoint

    model = modelq.load(source, compute=dtype_of(format))
    mtq.quantize(model, configuration(mtq, format), lambda model: model(token_ids()), compat="modelopt")
    return export_hf_checkpoint(model, dtype=dtype_of(format), export_dir=out)


def differences(folder: Path, tensors: dict[str, Expected], words: dict[str, Any], format: str) -> list[str]:
    """In what our export differs by more than it may."""
    ours, found = read_safetensors(folder), []
    if missing := sorted(tensors.keys() ^ ours.keys()):
        found.append(f"on one side only: {missing}")
    for name in tensors.keys() & ours.keys():
        wanted, array = tensors[name], ours[name]
        if (array.dtype.name, array.shape) != (wanted.dtype, wanted.shape):
            found.append(f"{name} is {array.dtype.name} {array.shape}, there {wanted.dtype} {wanted.shape}")
        elif wanted.digest and digest(array) != wanted.digest and (wanted.array is None or not is_near(name, array, wanted.array, format)):
            found.append(f"{name} has other values" + ("" if wanted.array is None else f": {distance(array, wanted.array)}"))
    for file, said in words_of(folder).items():
        found += [f"{file}: {key} is {said.get(key)}, there {words[file].get(key)}" for key in sorted(said.keys() | words[file].keys())
                  if said.get(key) != words[file].get(key)]
    return found


def distance(ours: np.ndarray, theirs: np.ndarray) -> str:
    """How far two arrays that may be near are, for whoever reads a failure."""
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    largest = np.abs(ours - theirs).max()
    return f"{np.count_nonzero(ours != theirs)} of {ours.size}, by {largest:.3g} at most, largest there {np.abs(theirs).max():.3g}"


def is_near(name: str, ours: np.ndarray, theirs: np.ndarray, format: str) -> bool:
    if ours.dtype == np.uint8:      # a pair of rows: two's complement of four bits
        ours, theirs = (np.concatenate([pair & 15, pair >> 4]).astype(np.int8) ^ 8 for pair in (ours, theirs))
    if ours.dtype == np.int8:
        off = np.abs(ours.astype(int) - theirs)
        return bool(off.max() <= 1 and (off == 0).mean() >= SAME_CODES)
    near = NEAR_SEARCHED if format in SEARCHED else NEAR_SEEN
    return bool(np.allclose(ours.astype(np.float64), theirs.astype(np.float64), rtol=near, atol=1e-6 if name.endswith(".weight") else 0))


# What the usual suite compares with --------------------------------------------------------------------------------------------------

def packed(tensors: dict[str, Expected]) -> dict[str, list[Any]]:
    """As JSON holds it; codes that may be a step off only of the first layer, of the others dtype and shape."""
    tensors = {name: item._replace(digest="", array=None) if item.dtype in ("int8", "uint8") and item.array is not None
               and ".layers.0." not in name else item for name, item in tensors.items()}
    return {name: [item.dtype, list(item.shape), item.digest,
                   *([] if item.array is None else [base64.b64encode(zlib.compress(item.array.tobytes(), 9)).decode()])]
            for name, item in sorted(tensors.items())}


def bases_of(tensors: dict[str, np.ndarray]) -> dict[str, list[Any]]:
    """A source by what `values_of` needs of each tensor: dtype, shape, and what norms and biases of this name are near."""
    return {name: [array.dtype.name, list(array.shape), int(array.ndim == 1 and array.astype(np.float32).mean() > 0.5)]
            for name, array in sorted(tensors.items())}


def write_source(folder: Path, config: dict[str, Any], bases: dict[str, list[Any]]) -> Path:
    """The micro model that run_reference.py writes, without torch."""
    import ml_dtypes

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", {
        name: values_of(name, tuple(shape), base).astype(getattr(ml_dtypes, dtype, None) or dtype)
        for name, (dtype, shape, base) in bases.items()})
    return folder


def unpacked(stored: dict[str, list[Any]]) -> dict[str, Expected]:
    import ml_dtypes

    found = {}
    for name, (dtype, shape, said, *data) in stored.items():
        kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
        array = np.frombuffer(zlib.decompress(base64.b64decode(data[0])), kind).reshape(shape) if data else None
        found[name] = Expected(dtype, tuple(shape), said, array)
    return found
