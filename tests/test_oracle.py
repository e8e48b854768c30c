"""Codecs against the host routines of NVIDIA's own headers (cuda_fp8.h, cuda_fp6.h, cuda_fp4.h), compiled with g++."""
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import modelq._core as core
from test_formats import INPUTS, all_codes, neighbours

PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp4.h>
#include <cuda_fp6.h>
#include <cuda_fp8.h>

template <class Code, class Encode> void run(const std::vector<float> &values, Encode encode)
{
    std::vector<Code> codes(values.size());
    for (size_t i = 0; i < values.size(); i++) codes[i] = (Code)encode(values[i]);
    fwrite(codes.data(), sizeof(Code), codes.size(), stdout);
}

int main(int, char **argv)
{
    std::vector<float> v((size_t)atol(argv[2]));
    if (fread(v.data(), sizeof(float), v.size(), stdin) != v.size()) return 1;
    const char *name = argv[1];
    typedef unsigned char u8;
    typedef unsigned short u16;
    if (!strcmp(name, "fp8_e4m3")) run<u8>(v, [](float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); });
    if (!strcmp(name, "fp8_e5m2")) run<u8>(v, [](float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E5M2); });
    if (!strcmp(name, "fp6_e3m2")) run<u8>(v, [](float x) { return __nv_cvt_float_to_fp6(x, __NV_E3M2, cudaRoundNearest); });
    if (!strcmp(name, "fp6_e2m3")) run<u8>(v, [](float x) { return __nv_cvt_float_to_fp6(x, __NV_E2M3, cudaRoundNearest); });
    if (!strcmp(name, "fp4_e2m1")) run<u8>(v, [](float x) { return __nv_cvt_float_to_fp4(x, __NV_E2M1, cudaRoundNearest); });
    if (!strcmp(name, "e8m0")) run<u8>(v, [](float x) { return __nv_cvt_float_to_e8m0(x, __NV_SATFINITE, cudaRoundPosInf); });
    if (!strcmp(name, "bf16")) run<u16>(v, [](float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); });
    if (!strcmp(name, "fp16")) run<u16>(v, [](float x) { return __half_as_ushort(__float2half_rn(x)); });
    return 0;
}
"""
NAMES = ["fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1", "e8m0", "bf16", "fp16"]


def include_folders() -> list[Path]:
    """Where the toolkit's headers may be: CUDA_HOME, or what nvcc itself says."""
    folders = [Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if shutil.which("nvcc"):
        said = subprocess.run(["nvcc", "--dryrun", "-x", "cu", "-E", os.devnull], capture_output=True, text=True).stderr
        folders += [Path(found) for found in re.findall(r'"?-I\s*([^"\s]+)"?', said)]
        folders.append(Path(shutil.which("nvcc")).resolve().parents[1] / "include")
    return [folder for folder in folders if (folder / "cuda_fp4.h").exists()]


@pytest.fixture(scope="module")
def cuda_encode(tmp_path_factory):
    folders = include_folders()
    if not folders or not shutil.which("g++"):
        pytest.skip("needs the CUDA Toolkit's headers and g++")
    folder = tmp_path_factory.mktemp("oracle")
    (folder / "oracle.cc").write_text(PROGRAM)
    subprocess.run(["g++", "-O1", "-std=c++17", f"-I{folders[0]}", str(folder / "oracle.cc"), "-o", str(folder / "oracle")],
                   check=True)

    def encode(values: np.ndarray, name: str) -> np.ndarray:
        done = subprocess.run([str(folder / "oracle"), name, str(values.size)], input=values.tobytes(), capture_output=True, check=True)
        return np.frombuffer(done.stdout, np.uint16 if name in ("bf16", "fp16") else np.uint8)
    return encode


@pytest.mark.parametrize("name", NAMES)
def test_encode_as_cuda(cuda_encode, name):
    grid = core.decode(all_codes(name), name)
    grid = np.sort(grid[np.isfinite(grid)]).astype(np.float64)
    ties = neighbours(((grid[1:] + grid[:-1]) / 2).astype(np.float32))
    values = np.concatenate([INPUTS, neighbours(grid.astype(np.float32)), ties])
    values = values[~np.isnan(values)]
    if name == "e8m0":
        values = np.abs(values)
    np.testing.assert_array_equal(core.encode(values, name), cuda_encode(values, name))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("bf16", "fp16")])
def test_nan_as_cuda(cuda_encode, name):
    """CUDA drops the sign of NaN; so does nothing that these bytes end up in."""
    nan = np.float32([np.nan])
    np.testing.assert_array_equal(core.encode(nan, name), cuda_encode(nan, name))
