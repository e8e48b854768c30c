"""What the CUDA library hands to cuBLASLt is what torch hands to it: tiled scales by torch's own rearrangement, and FP8 products by
torch._scaled_mm, which computes on the CPU too."""
import ml_dtypes
import numpy as np
import pytest
import torch

import modelq._core as core
from cuda_gemm import Gemm
from cuda_library import Library, library_to_test
from test_cuda_linear import normal, tiled

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("shape", [(1, 4), (32, 16), (128, 4), (130, 7), (300, 64), (257, 130)])
def test_tiles_are_torchs(shape):
    """The formula that tests/test_cuda_linear.py compares the kernel's bytes with."""
    quantized = pytest.importorskip("torch.testing._internal.common_quantized")
    scales = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    np.testing.assert_array_equal(tiled(scales), quantized.to_blocked(torch.from_numpy(scales)).numpy())


@pytest.mark.parametrize("bias", [False, True])
def test_fp8_products_are_torchs(bias):
    """Within the rounding of the result: torch multiplies the same codes by the same two scales."""
    parts, x = core.quantize(normal((48, 128), BF16, 1), "fp8"), normal((7, 128), BF16, 2)
    amax, out = np.float32([np.abs(x.astype(np.float32)).max()]), np.zeros((7, 48), BF16)
    added = normal((1, 48), BF16, 3)[0] if bias else None
    with Gemm(Library(library_to_test()), capability=89) as gemm:
        assert gemm.run_linear(x, parts, "fp8", out, added, inputs="tensor", input_amax=amax) == "fp8_tensor"
    multiplier = np.float32(1) / amax * np.float32(448)
    codes = core.encode(x.astype(np.float32) * multiplier, "fp8_e4m3").view(np.uint8)
    def tensor(array):
        return torch.from_numpy(np.array(array).view(np.uint8)).view(torch.float8_e4m3fn)
    wanted = torch._scaled_mm(tensor(codes), tensor(parts["weight"]).t(), torch.tensor(1 / multiplier).reshape(()),
                              torch.tensor(np.float32(parts["weight_scale"])).reshape(()), out_dtype=torch.float32).numpy()
    wanted = wanted + (added.astype(np.float32) if bias else 0)
    np.testing.assert_allclose(out.astype(np.float32), wanted, rtol=2.0**-8, atol=1e-3)
