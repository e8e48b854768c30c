"""Capsules of both generations: consumed, never consumed, refused, twice, by several threads; every deleter runs once."""
import sys
import threading
from pathlib import Path

import numpy as np
from harness import check

import modelq._core as core

sys.path.insert(0, str(Path(__file__).parents[1]))
from dlpack_producer import COPIED, CUDA, LEGACY, READ_ONLY, VERSIONED, Producer

REFUSED = [dict(code=5, bits=64), dict(lanes=4), dict(said_device=(1, 0), device=(CUDA, 0)), dict(shape=(1,) * 9), dict(shape=(2, -1)),
           dict(shape=(1 << 40, 1 << 40)), dict(strides=(1 << 62, 1)), dict(null=True), dict(no_shape=True)]
USED = [dict(), dict(flags=READ_ONLY), dict(flags=COPIED), dict(strides=(1, 2)), dict(strides=(0, -1), offset=8), dict(offset=3),
        dict(shape=()), dict(shape=(0, 3), null=True), dict(know_max_version=False), dict(code=4, bits=16)]


def consume(options):
    producer = Producer(**options)
    view = core.as_array(producer)[..., :1] if options.get("shape") != () else core.as_array(producer)
    core.amax(producer)
    del view
    return producer


def refuse(options):
    producer = Producer(**options)
    try:
        core.as_array(producer)
    except (TypeError, ValueError):
        producer.capsule = None
        return producer
    raise AssertionError(f"{options} was not refused")


def compute():
    core.quantize(Producer(shape=(2, 16), keep_capsule=False), "nvfp4")


def one_round():
    producers = []
    for kind in (VERSIONED, LEGACY):
        producers += [consume(dict(kind=kind, **options)) for options in USED]
        producers += [refuse(dict(kind=kind, **options)) for options in REFUSED]
        producers.append(Producer(kind))
        producers[-1].__dlpack__()
        producers[-1].capsule = None
    assert all(producer.deleted == producer.capsules > 0 for producer in producers)
    half = Producer(shape=(2, 8), code=1, bits=8)      # viewed, when another part turns out to be missing
    try:
        core.dequantize({"weight": half, "weight_scale": np.ones(3)}, "nvfp4")
    except ValueError:
        assert half.deleted == half.capsules == 1
    threads = [threading.Thread(target=compute) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


check(one_round)
