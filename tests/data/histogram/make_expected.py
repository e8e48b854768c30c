"""Makes expected.json: what nvidia-modelopt's own HistogramCalibrator finds for data that cases.py makes.

    python tests/data/histogram/make_expected.py        # in an environment with torch and nvidia-modelopt
"""
import json
import sys
from pathlib import Path

import ml_dtypes
import modelopt
import numpy as np
import torch
from modelopt.torch.quantization.calib import HistogramCalibrator

sys.path.insert(0, str(Path(__file__).parent))
from cases import CASES, batches_of  # noqa: E402

METHODS = {"entropy": {}, "entropy_coarse": {"stride": 16, "start_bin": 256}, "percentile": {}, "percentile_99": {"percentile": 99.0}}


def tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype == ml_dtypes.bfloat16 else torch.from_numpy(x)


def main() -> None:
    found: dict = {"modelopt": modelopt.__version__, "cases": {}}
    for name, (options, _) in CASES.items():
        calibrator = HistogramCalibrator(axis=None, **options)
        for batch in batches_of(name):
            calibrator.collect(tensor(batch))
        found["cases"][name] = {"bins": len(calibrator._calib_hist), "top": calibrator._calib_bin_edges[-1].item()}
        for method, arguments in METHODS.items():
            amax = calibrator.compute_amax(method.split("_")[0], **arguments)
            found["cases"][name][method] = amax.item()
    (Path(__file__).parent / "expected.json").write_text(json.dumps(found, indent=1) + "\n")


main()
