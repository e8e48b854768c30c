"""Every family in every format, against what nvidia-modelopt exports of the same micro model."""
import re

import modelq
import pytest
from reference_cases import FAMILIES, FORMATS, folder_of
from comparison import CANNOT, REFUSED, differences, export, read_export


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_the_references(reference, tmp_path, family, format):
    source, theirs = reference / family / "source", reference / family / folder_of(format)
    if (family, format) in CANNOT:
        said = (theirs / "error.txt").read_text()
        assert re.search(CANNOT[family, format], said), said
    else:
        assert not (theirs / "error.txt").exists(), (theirs / "error.txt").read_text()
    if (family, format) in REFUSED:
        with pytest.raises(ValueError, match="experts in one tensor have fp8 and nvfp4"):
            export(source, format, tmp_path / "ours")
        return
    ours = export(source, format, tmp_path / "ours")
    if (family, format) in CANNOT:
        modelq.load(ours)
        return
    assert not differences(ours, *read_export(theirs, family, format), format)
