"""One family in each format, against what nvidia-modelopt exported (tests/data/reference, of tests/reference's making)."""
import json
import sys
import warnings
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "reference"))
from reference_cases import STORED, folder_of      # noqa: E402
from comparison import differences, export, unpacked, write_source      # noqa: E402


@pytest.fixture(scope="module", params=STORED)
def pair(request, tmp_path_factory):
    """(format, our export, the reference's tensors, what its config files say)"""
    said = json.loads((HERE / "data" / "reference" / f"{folder_of(request.param)}.json").read_text())
    folder = tmp_path_factory.mktemp("reference")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        ours = export(write_source(folder / "source", said["config"], said["source"]), request.param, folder / "ours")
    return request.param, ours, unpacked(said["export"]), said["words"]


def test_an_export_is_the_references(pair):
    format, ours, tensors, words = pair
    assert not differences(ours, tensors, words, format)


def test_a_difference_is_seen(pair):
    """In any one tensor, and in a word."""
    format, ours, tensors, words = pair
    for name, item in tensors.items():
        if item.digest:
            array = None if item.array is None else item.array ^ 0x30 if item.array.dtype.kind in "iu" else item.array * 2 + 1
            wrong = {**tensors, name: item._replace(digest="other", array=array)}
            assert any(name in said for said in differences(ours, wrong, words, format)), name
    wrong = {file: {**section, "quant_algo": "OTHER"} for file, section in words.items()}
    assert len(differences(ours, tensors, wrong, format)) == 2
