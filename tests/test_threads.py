"""The thread pool as a user meets it: its size, fork after use, several Python threads at once. test_pool.py-like details are in C."""
import os
import threading

import numpy as np
import pytest

import modelq._core as core


@pytest.fixture(autouse=True)
def default_threads():
    yield
    core.set_threads(0)


def test_set_threads():
    for n in (1, 2, 7):
        core.set_threads(n)
        assert core.cpu_info()["threads"] == n
    core.set_threads(0)
    assert core.cpu_info()["threads"] == int(os.environ.get("MODELQ_NUM_THREADS") or len(os.sched_getaffinity(0)))


@pytest.mark.parametrize("wrong", [-1, 257, 10**30])
def test_set_threads_refuses(wrong):
    with pytest.raises((ValueError, OverflowError)):
        core.set_threads(wrong)
    with pytest.raises(TypeError):
        core.set_threads("2")


@pytest.mark.parametrize("text, expected", [("3", "3"), ("1", "1"), ("", None), ("0", None), ("many", None), ("100000", "256")])
def test_environment(run_python, text, expected):
    got = run_python("import modelq._core as c; print(c.cpu_info()['threads'])", MODELQ_NUM_THREADS=text)
    assert got == (expected or str(len(os.sched_getaffinity(0))))
