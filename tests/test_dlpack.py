"""DLPack import: who owns the memory when, both capsule generations, dtypes, what is refused. Producers are made with ctypes
(tests/dlpack_producer.py), so that their deleters can be watched; NumPy is one nobody here wrote. tests/torch_models has torch and JAX."""
import gc
import threading
import weakref

import ml_dtypes
import numpy as np
import pytest

import modelq
import modelq._core as core
from dlpack_producer import COPIED, CPU, CUDA, LEGACY, READ_ONLY, VERSIONED, Producer, is_named


@pytest.mark.parametrize("kind", [VERSIONED, LEGACY])
def test_memory_is_shared_and_returned_once(kind):
    producer = Producer(kind, strides=(3, 1))
    array = core.as_array(producer)
    assert array.dtype == np.float32 and array.shape == (2, 3)
    assert array.ctypes.data == producer.buffer.ctypes.data
    np.testing.assert_array_equal(array.ravel(), producer.values()[:6])
    assert is_named(producer.capsule, b"used_" + kind)   # so its own destructor leaves the memory alone
    view = array[1:]
    del array
    gc.collect()
    assert producer.deleted == 0   # a view still needs it
    del view
    assert producer.deleted == 1


def test_max_version_is_offered_and_old_producers_are_asked_again():
    producer = Producer()
    core.as_array(producer)
    assert producer.options == {"max_version": (1, 0)}
    old = Producer(LEGACY, know_max_version=False)
    core.as_array(old)
    assert (old.options, old.capsules, old.deleted) == ({}, 1, 1)


def test_missing_strides_mean_contiguous_and_offsets_count():
    array = core.as_array(Producer(shape=(2, 2), code=1, bits=8, offset=5))
    assert array.tolist() == [[5, 6], [7, 8]]


def test_any_strides():
    array = core.as_array(Producer(shape=(3, 2), strides=(1, 4), code=1, bits=8))
    assert array.tolist() == [[0, 4], [1, 5], [2, 6]]
    backwards = core.as_array(Producer(shape=(3,), strides=(-2,), code=1, bits=8, offset=10))
    assert backwards.tolist() == [10, 8, 6]
    one = core.as_array(Producer(shape=(1, 3), strides=(1 << 62, 1), code=1, bits=8))   # the stride of one element means nothing
    assert one.tolist() == [[0, 1, 2]] and one.flags.c_contiguous


def test_strides_that_overlap_and_memory_between_elements():
    repeated = core.as_array(Producer(shape=(3, 4), strides=(0, 1), offset=8))
    assert repeated.tolist() == [Producer().values()[2:6].tolist()] * 3
    window = core.as_array(Producer(shape=(3, 2), strides=(1, 1), code=1, bits=8))
    assert window.tolist() == [[0, 1], [1, 2], [2, 3]]
    producer = Producer(shape=(3, 4), offset=5)      # the core reads what is not aligned, too
    np.testing.assert_array_equal(core.amax(producer, axis=0), np.abs(producer.values(offset=5)[:12].reshape(3, 4)).max(1, keepdims=True))


def test_scalar_and_empty():
    scalar = Producer(shape=(), code=1, bits=8, offset=9, no_shape=True)
    assert core.as_array(scalar).item() == 9
    assert scalar.deleted == 1
    producer = Producer(shape=(0, 3), null=True)
    array = core.as_array(producer)
    assert array.shape == (0, 3)
    del array
    assert producer.deleted == 1


def test_read_only():
    assert core.as_array(Producer()).flags.writeable and core.as_array(Producer(flags=COPIED)).flags.writeable
    assert not core.as_array(Producer(flags=READ_ONLY)).flags.writeable
    assert not core.as_array(Producer(LEGACY)).flags.writeable   # that generation cannot say
    for flags in (READ_ONLY, READ_ONLY | COPIED):
        producer = Producer(shape=(4, 4), flags=flags)
        with pytest.raises(ValueError, match="writable"):
            core.factor(producer)
        assert producer.deleted == 1
    writable = Producer(shape=(2, 2))
    writable.values()[:4] = [4, 0, 0, 9]
    assert core.factor(writable).tolist() == [4, 9] and writable.values()[:4].tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("code, bits, dtype", [
    (2, 16, "float16"), (2, 32, "float32"), (2, 64, "float64"), (4, 16, "bfloat16"), (6, 8, "bool"),
    (10, 8, "float8_e4m3fn"), (12, 8, "float8_e5m2"), (14, 8, "float8_e8m0fnu"),
    (0, 8, "int8"), (0, 16, "int16"), (0, 32, "int32"), (0, 64, "int64"),
    (1, 8, "uint8"), (1, 16, "uint16"), (1, 32, "uint32"), (1, 64, "uint64")])
def test_dtypes(code, bits, dtype):
    expected = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    producer = Producer(shape=(4,), code=code, bits=bits)
    array = core.as_array(producer)
    assert array.dtype == expected
    assert array.tobytes() == producer.buffer.tobytes()[:4 * expected.itemsize]


@pytest.mark.parametrize("options, error, message", [
    (dict(code=5, bits=64), TypeError, r"weight: DLPack dtype .code 5, 64 bits, 1 lanes. is not supported"),
    (dict(code=17, bits=4), TypeError, "code 17, 4 bits"),
    (dict(lanes=4), TypeError, "4 lanes"),
    (dict(device=(CUDA, 3)), ValueError, "weight: is on cuda:3 .* move it"),
    (dict(device=(99, 0)), ValueError, "device type 99"),
    (dict(shape=(1,) * 9), ValueError, "9 dimensions, at most 8"),
    (dict(shape=(2, -1)), ValueError, "dimension 1 of -1 is negative"),
    (dict(shape=(1 << 40, 1 << 40)), ValueError, "too large"),
    (dict(shape=(2,), strides=(1 << 62,)), ValueError, "stride 0 of .* is too large"),
    (dict(shape=(3, 3, 3), strides=(1 << 58, 1 << 58, 1)), ValueError, "stride 1 of .* is too large"),
    (dict(shape=(2,), strides=(-1 << 63,)), ValueError, "stride 0 of -9223372036854775808 is too large"),
    (dict(null=True), ValueError, "has elements but no memory"),
    (dict(no_shape=True), ValueError, "2 dimensions but no shape"),
    (dict(said_device=(CPU, 0), device=(CUDA, 0)), ValueError, "capsule is not of CPU memory .device type 2"),
    (dict(shape=(1 << 62, 0, 1 << 62)), ValueError, "too large"),
    (dict(version=(2, 0)), BufferError, "DLPack version 2.0, expected 1.x"),
])
def test_what_is_refused_stays_the_producers(options, error, message):
    kinds = [VERSIONED] if "version" in options else [VERSIONED, LEGACY]
    for producer in [Producer(kind, **options) for kind in kinds]:
        with pytest.raises(error, match=message):
            core.as_array(producer, name="weight")
        assert producer.deleted == 0   # not consumed: the capsule keeps its name, and its own destructor deletes
        if producer.capsules:
            assert is_named(producer.capsule, producer.kind)
        else:
            assert options.get("device")   # refused before the producer was made to do anything
        producer.capsule = None
        assert producer.deleted == producer.capsules


def test_a_consumer_that_fails_after_the_import_returns_the_memory():
    producer = Producer(shape=(2, 3))
    with pytest.raises(ValueError, match="could not broadcast|cannot reshape"):
        core.as_array(producer).reshape(7)
    gc.collect()
    assert producer.deleted == 1


def test_capsules_cannot_be_used_twice():
    producer = Producer()
    first = producer.__dlpack__()
    again = type("Again", (), {"__dlpack__": lambda self, **options: first, "__dlpack_device__": lambda self: (CPU, 0)})()
    array = core.as_array(again)
    with pytest.raises(ValueError, match="consumed before"):
        core.as_array(again)
    assert producer.deleted == 0
    del array
    assert producer.deleted == 1


def test_producers_that_misbehave():
    def broken(capsule=None, device=(CPU, 0)):
        def give(self, **options):
            if isinstance(capsule, Exception):
                raise capsule
            return capsule
        return type("Broken", (), {"__dlpack__": give, "__dlpack_device__": lambda self: device})()
    with pytest.raises(TypeError, match="gave no DLPack capsule"):
        core.as_array(broken("text"))
    with pytest.raises(BufferError, match="needs grad"):
        core.as_array(broken(BufferError("needs grad")))
    with pytest.raises(TypeError):
        core.as_array(broken(device="cpu"))
    with pytest.raises(AttributeError):
        core.as_array(type("Half", (), {"__dlpack__": lambda self: None})())


def test_a_capsule_that_nobody_consumes_deletes_its_tensor():
    for kind in (VERSIONED, LEGACY):
        producer = Producer(kind)
        producer.__dlpack__()
        assert is_named(producer.capsule, kind) and producer.deleted == 0
        producer.capsule = None
        assert producer.deleted == 1


def test_a_destructor_that_is_python_code_does_not_hide_why_a_capsule_was_refused():
    for kind in (VERSIONED, LEGACY):
        producer = Producer(kind, lanes=2, keep_capsule=False)      # so the destructor runs within the call
        with pytest.raises(TypeError, match="2 lanes"):
            core.as_array(producer)
        assert producer.deleted == 1


def test_a_tensor_without_a_deleter():
    for kind in (VERSIONED, LEGACY):
        producer = Producer(kind, deleter=False)
        array = core.as_array(producer)
        assert array.ravel().tolist() == producer.values()[:6].tolist()
        del array
        assert producer.deleted == 0


@pytest.mark.parametrize("kind", [VERSIONED, LEGACY])
def test_the_producer_may_go_first(kind):
    """All that keeps the memory then is what the deleter lets go of."""
    producer = Producer(kind, shape=(2, 4))
    buffer, gone, deleted = weakref.ref(producer.buffer), weakref.ref(producer), producer.alive
    expected = producer.values()[:8].tolist()
    view = core.as_array(producer)[1:]
    del producer
    gc.collect()
    assert gone() is None and buffer() is not None and len(deleted) == 1
    assert view.tolist() == [expected[4:]]
    del view
    gc.collect()
    assert buffer() is None and not deleted


def test_numpy_memory_outlives_its_array():
    class Fleeting:
        def __init__(self):
            self.array = np.arange(5.0)

        def __dlpack__(self, **options):
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    array = core.as_array(Fleeting())
    gc.collect()
    assert array.tolist() == [0, 1, 2, 3, 4]


ONCE = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)


class Once:
    """A producer of a capsule that it hands out one time."""

    def __init__(self, array):
        self.array, self.asked = array, 0

    def __dlpack_device__(self):
        return CPU, 0

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        self.asked += 1
        assert self.asked == 1, "asked again"
        return self.array.__dlpack__(max_version=max_version)


def quantizer(**options):
    made = core.Quantizer(**options)
    made.amax = core.amax(ONCE, block=16) if "block_sizes" in options else core.amax(ONCE)
    return made


@pytest.mark.parametrize("call", [
    lambda once: core.amax(once(ONCE)), lambda once: core.amax(once(ONCE.reshape(4, 4, 32)), axis=0), lambda once: core.amax(once(ONCE[0])),
    *(lambda once, scheme=scheme: core.quantize(once(ONCE), scheme, block_size=32)["weight"] for scheme in ("int4", "mxfp4")),
    *(lambda once, scheme=scheme: core.dequantize({role: part if part.dtype.kind == "V" else once(part) for role, part in
                                                   core.quantize(ONCE, scheme).items()}, scheme) for scheme in ("int4", "nvfp4", "int8")),
    lambda once: core.fake_quantize(once(ONCE), "fp8", amax=once(np.array(3, np.float32))), lambda once: quantizer(num_bits=8)(once(ONCE)),
    lambda once: core.encode(once(ONCE), "fp8_e4m3"), lambda once: core.awq_weight_scale(once(ONCE)),
    lambda once: core.quantization_losses(once(ONCE), quantizer(num_bits=8), core.GramLoss(once(np.eye(32, dtype=np.float32))),
                                          factors=once(np.float32([1, 0.5]))),
    lambda once: core.best_amax(once(ONCE), quantizer(num_bits=8), once(np.float32([1, 0.5]))),
    lambda once: core.sweep_block_scales(once(ONCE), 4.0, hessian=once(np.ones((2, 16, 16), np.float32))),
    lambda once: core.gptq(once(ONCE), quantizer(num_bits=4, block_sizes={-1: 16}), once(np.eye(32, dtype=np.float32)),
                           once(np.ones(32, np.float32)))[0],
    lambda once: core.subtract_product(once(ONCE), once(ONCE[:, :2].copy()), once(ONCE[:2])),
    lambda once: modelq.quantize_array(once(ONCE), "nvfp4").dequantize(), lambda once: modelq.fake_quantize_array(once(ONCE), "fp8"),
    *(lambda once, dtype=dtype: collected(once(ONCE.astype(dtype))) for dtype in (np.float32, np.float16))])
def test_a_producer_is_asked_once(call):
    made = []

    def once(array):
        made.append(Once(array))
        return made[-1]
    np.testing.assert_array_equal(call(once), call(lambda array: array))
    assert made and all(producer.asked == 1 for producer in made)


def collected(x):
    calibrator = core.Calibrator("max")
    calibrator.collect(x)
    return calibrator.compute_amax()


def in_threads(work, count=8):
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("kind", [VERSIONED, LEGACY])
def test_many_threads_consume_at_once(kind):
    """Producers of their own, computed on while others let go of theirs; and one producer that all of them ask."""
    shared, results, wrong = [Producer(kind, shape=(4, 4)) for _ in range(50)], [], []
    expected = core.amax(shared[0].values()[:16])

    def work(number):
        for round in range(50):
            own = Producer(kind, shape=(4, 4), lanes=1 + (round % 5 == 4))
            try:
                results.append(core.amax(own) == expected and core.as_array(shared[round]).shape == (4, 4))
            except TypeError:
                own.capsule = None
            wrong.extend([own] * (own.deleted != 1))
    in_threads(work)
    assert len(results) == 8 * 40 and all(results) and not wrong
    assert [producer.deleted for producer in shared] == [producer.capsules for producer in shared]


def test_of_many_threads_one_gets_a_capsule():
    for _ in range(50):
        producer, got, refused = Producer(), [], []
        capsule = producer.__dlpack__()
        again = type("Again", (), {"__dlpack__": lambda self, **options: capsule, "__dlpack_device__": lambda self: (CPU, 0)})()

        def work(number):
            try:
                got.append(core.as_array(again))
            except ValueError as error:
                refused.append(str(error))
        in_threads(work, 4)
        assert len(got) == 1 and len(refused) == 3 and all("consumed before" in text for text in refused)
        assert producer.deleted == 0
        got.clear()
        assert producer.deleted == 1


def test_the_last_reference_may_go_on_another_thread():
    producers = [Producer() for _ in range(50)]
    arrays = [core.as_array(producer) for producer in producers]

    def drop():
        while arrays:
            try:
                arrays.pop()
            except IndexError:
                return
    threads = [threading.Thread(target=drop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [producer.deleted for producer in producers] == [1] * 50


def test_a_pending_exception_survives_the_deleter():
    producer = Producer()

    def fail():
        array = core.as_array(producer)   # noqa: F841  dropped while the exception is under way
        raise KeyError("mine")
    with pytest.raises(KeyError, match="mine"):
        fail()
    gc.collect()
    assert producer.deleted == 1


def test_what_fails_behind_the_import_returns_the_memory(run_python):
    """A dtype that nobody can make an array of: ml_dtypes is missing."""
    code = """
import sys
sys.modules["ml_dtypes"] = None
import modelq._core as core
from dlpack_producer import LEGACY, VERSIONED, Producer
for kind in (VERSIONED, LEGACY):
    producer = Producer(kind, code=4, bits=16)
    try:
        core.as_array(producer)
    except ImportError:
        print(producer.deleted)
"""
    assert run_python(code) == "1\n1"


def test_what_modelq_hands_out_is_a_producer():
    """Results are NumPy arrays that own their memory, which any consumer may take, and outlive."""
    parts = core.quantize(ONCE, "int8")
    taken = np.from_dlpack(parts["weight"])
    assert taken.ctypes.data == parts["weight"].ctypes.data
    expected = parts["weight"].copy()
    del parts
    np.testing.assert_array_equal(taken, expected)


def test_numpy_arrays_pass_through_and_other_things_are_converted():
    array = np.arange(3)
    assert core.as_array(array) is array
    assert core.as_array([1.5, 2]).tolist() == [1.5, 2.0]
    with pytest.raises(TypeError, match="tokens: dtype object is not supported"):
        core.as_array([object()], name="tokens")
