"""Arrays in: as they are, converted, refused, through DLPack."""
import ml_dtypes
import numpy as np
from harness import check

import modelq._core as core


class Producer:
    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def one_round():
    core.as_array(Producer(np.arange(6.0)))
    core.as_array(np.zeros(3, ml_dtypes.bfloat16))
    core.as_array([1, 2, 3])
    core.amax(Producer(np.ones((4, 8), np.float32)[:, ::2]))
    for wrong in (object(), ["a"], Producer(np.zeros(2, complex))):
        try:
            core.as_array(wrong)
        except (TypeError, ValueError):
            pass
        else:
            raise AssertionError("nothing was refused")


check(one_round)
