"""Memory that torch's tensors share with us, both ways. (tests/test_dlpack.py has capsules made by hand.)"""
import gc
import threading

import ml_dtypes
import numpy as np
import pytest
import torch

import modelq
import modelq._core as core

DTYPES = {torch.float32: np.float32, torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float64: np.float64,
          torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn, torch.float8_e5m2: ml_dtypes.float8_e5m2, torch.int8: np.int8, torch.uint8: np.uint8,
          torch.int16: np.int16, torch.int32: np.int32, torch.int64: np.int64, torch.bool: np.bool_}


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_are_viewed(dtype):
    tensor = torch.tensor([[1, 0, 1], [0, 1, 1]]).to(dtype)
    array = core.as_array(tensor)
    assert array.dtype == DTYPES[dtype] and array.ctypes.data == tensor.data_ptr() and array.astype(int).tolist() == [[1, 0, 1], [0, 1, 1]]
    tensor[1, 0] = 1
    assert array[1, 0] == 1
    size = tensor.element_size()
    assert core.as_array(tensor.t()).strides == (size, 3 * size) and core.as_array(tensor[:, 1:]).ctypes.data == tensor.data_ptr() + size
    assert core.as_array(tensor[:1].expand(4, 3)).strides == (0, size)
    del tensor
    gc.collect()
    assert array.astype(int).tolist() == [[1, 0, 1], [1, 1, 1]]


def test_what_torch_will_not_share():
    with pytest.raises((BufferError, RuntimeError), match="grad"):
        core.as_array(torch.zeros(2, requires_grad=True))
    with pytest.raises((TypeError, ValueError, BufferError)):
        core.as_array(torch.zeros(2, device="meta"))
    for tensor in (torch.zeros(2, dtype=torch.complex64), torch.zeros(3, 3).to_sparse()):
        with pytest.raises((TypeError, BufferError, RuntimeError)):
            core.as_array(tensor)


def test_torch_takes_what_we_make():
    parts = core.quantize(np.random.default_rng(0).standard_normal((16, 128)).astype(np.float32), "int4")
    taken = {role: torch.from_dlpack(part) for role, part in parts.items()}
    expected = core.dequantize(parts, "int4")
    assert all(taken[role].data_ptr() == part.ctypes.data for role, part in parts.items())
    del parts
    gc.collect()
    np.testing.assert_array_equal(core.dequantize(taken, "int4"), expected)      # and they come back in


def test_threads_that_share_a_tensor():
    tensor, wrong = torch.randn(64, 256).to(torch.bfloat16), []
    expected = modelq.fake_quantize_array(tensor, "nvfp4")

    def work():
        for _ in range(30):
            if not torch.equal(modelq.fake_quantize_array(tensor, "nvfp4"), expected) or not torch.equal(
                    modelq.quantize_array(tensor.clone(), "nvfp4").dequantize(), expected):
                wrong.append(1)
    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
