"""Trees of arrays in a file: what was saved is what is loaded, and a file that lies is refused."""
import json
from collections import namedtuple

import ml_dtypes
import numpy as np
import pytest
import safetensors

import modelq
import modelq._core as core
from modelq.checkpoint.safetensors import SafetensorsFile
from modelq.checkpoint.writer import write_tensors

Layer = namedtuple("Layer", "kernel bias")


def array(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def tree():
    return {"layers": [Layer(array(32, 48), array(48)), Layer(array(2, 32, 16, dtype=ml_dtypes.bfloat16), None)], "step": 3,
            "table": np.arange(6).reshape(2, 3), "mask": np.array([True, False])}


@pytest.mark.parametrize("scheme", sorted(core.schemes()))
def test_what_is_saved_is_loaded(scheme, tmp_path):
    x = array(64, 256)
    modelq.save_arrays({"a": [modelq.quantize_array(x.T, scheme, axis=0)]}, tmp_path / "file")
    found = modelq.load_arrays(tmp_path / "file")
    np.testing.assert_array_equal(found["a.0"].dequantize(), modelq.fake_quantize_array(x, scheme).T)
    with safetensors.safe_open(tmp_path / "file", "numpy") as file:
        assert list(found) == ["a.0"] and {name.removeprefix("a.0") for name in file.keys()} <= {"", "_scale", "_scale_2"}


def test_a_tree_again(tmp_path):
    packed = modelq.quantize_array(tree(), "nvfp4", axis=-2)
    assert modelq.save_arrays(packed, tmp_path / "file") == tmp_path / "file"
    expected = modelq.dequantize_array(packed)
    for like in (tree(), packed):
        found = modelq.load_arrays(tmp_path / "file", like)
        assert type(found["layers"][1]) is Layer and found["step"] == 3 and found["layers"][1].bias is None
        made = modelq.dequantize_array(found)
        for get in (lambda t: t["layers"][0].kernel, lambda t: t["layers"][0].bias, lambda t: t["layers"][1].kernel, lambda t: t["table"],
                    lambda t: t["mask"]):
            assert get(made).dtype == get(expected).dtype
            np.testing.assert_array_equal(get(made), get(expected))


@pytest.mark.parametrize("change, words", [
    (dict(layers=[]), "no place in this tree for 'layers.0.bias'"),
    (dict(more=array(2)), "there is no array 'more'; the file holds layers.0.bias")])
def test_another_tree(change, words, tmp_path):
    modelq.save_arrays(tree(), tmp_path / "file")
    with pytest.raises(ValueError, match=words):
        modelq.load_arrays(tmp_path / "file", {**tree(), **change})


@pytest.mark.parametrize("wrong, words", [
    ({}, "no array"), ({"a": None, "b": 3}, "no array"), ({"a": {"b": array(2)}, "a.b": array(3)}, "two arrays .* 'a.b'"),
    ({"a": modelq.quantize_array(array(2, 32), "fp8"), "a_scale": array(2)}, "two arrays .* 'a_scale'")])
def test_what_cannot_be_saved(wrong, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        modelq.save_arrays(wrong, tmp_path / "file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [
    dict(scheme="fp3"), dict(scheme=["fp8"]), dict(shape=3), dict(shape=[2, -1]), dict(shape=[2.0, 32]), dict(shape=[]), dict(dtype="int8"),
    dict(block_size="x"), dict(axis=2), dict(axis=None), dict(axis=True), None, [], "text"])
def test_files_that_lie(change, tmp_path):
    path = tmp_path / "file"
    modelq.save_arrays({"a": modelq.quantize_array(array(2, 32), "nvfp4")}, path)
    said = json.loads(SafetensorsFile(path).metadata["modelq.arrays"])
    tensors = safetensors_of(path)
    write_tensors(path, tensors, {"modelq.arrays": json.dumps({"a": {**said["a"], **change} if isinstance(change, dict) else change})})
    with pytest.raises(ValueError, match="what it says of a is no packed array"):
        modelq.load_arrays(path)


def safetensors_of(path):
    file = SafetensorsFile(path)
    return {name: np.array(file.read(name)) for name in file.tensors}


def test_files_that_lack_something(tmp_path):
    path = tmp_path / "file"
    modelq.save_arrays({"a": modelq.quantize_array(array(2, 32), "nvfp4")}, path)
    metadata, tensors = SafetensorsFile(path).metadata, safetensors_of(path)
    write_tensors(path, {"a": tensors["a"]}, metadata)
    with pytest.raises(ValueError, match="a needs a_scale and a_scale_2, which are not there"):
        modelq.load_arrays(path)
    write_tensors(path, {**tensors, "a": tensors["a"][:, :8]}, metadata)
    with pytest.raises(ValueError, match="weight_scale"):
        modelq.load_arrays(path)["a"].dequantize()
    for metadata in ({}, {"modelq.arrays": "{"}, {"modelq.arrays": "[]"}, {"modelq.arrays": "[" * 9999}):
        write_tensors(path, tensors, metadata)
        with pytest.raises(ValueError, match="not a file that modelq.save_arrays wrote"):
            modelq.load_arrays(path)
    path.write_bytes(b"text")
    with pytest.raises(ValueError):
        modelq.load_arrays(path)
    with pytest.raises(FileNotFoundError):
        modelq.load_arrays(tmp_path / "nothing")
