"""Every allocation may fail: the first, then the second, and so on until an operation succeeds, each once alone and once from there on.
A failure must be a MemoryError, leave nothing allocated, and leave the operation able to succeed afterwards with the same result.
(After SQLite's out-of-memory tests.)"""
import gc

import numpy as np
import pytest

import modelq._core as core

WEIGHT = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
SCHEMES = sorted(core.schemes())


def every_allocation_fails(operation, at_least=1, limit=2000, step=1, does_without=False):
    """Runs operation() under all faults; returns how many allocations it makes. Its result is compared by bytes. step: only every so
    many-th, of what takes long. does_without: some are for what only saves time, and may fail without a word."""
    expected = operation()
    before = core._alloc_live()
    for persistent in (False, True):
        n = 1
        while True:
            core._alloc_fail_at(n, persistent)
            try:
                result = operation()
            except MemoryError:
                result = None
            seen = core._alloc_fail_at(0)
            assert result is None or same(result, expected)
            if result is not None and seen < n:
                break
            assert result is None or does_without, "it succeeded although an allocation had failed"
            result = None
            if core._alloc_live() != before:
                gc.collect()   # what an exception's traceback or a cycle held
            assert core._alloc_live() == before, f"allocation {n} failed, and something was left behind"
            n += step
            assert n < limit, "it never succeeds"
        assert n - 1 >= at_least, "nothing was made to fail: this operation does not go through mq_alloc"
        del result
        assert core._alloc_live() == before
    assert same(operation(), expected)
    return n - 1


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(autouse=True)
def faults_end_with_the_test(no_allocation_faults):
    yield


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantize(scheme):
    every_allocation_fails(lambda: core.quantize(WEIGHT, scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dequantize(scheme):
    parts = core.quantize(WEIGHT, scheme)
    every_allocation_fails(lambda: core.dequantize(parts, scheme), at_least=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fake_quantize(scheme):
    every_allocation_fails(lambda: core.fake_quantize(WEIGHT, scheme))


@pytest.mark.parametrize("options", [{}, {"axis": 0}, {"block": 16}, {"block": (8, 16)}])
def test_amax(options):
    every_allocation_fails(lambda: core.amax(WEIGHT, **options), at_least=0)


@pytest.mark.parametrize("options", [dict(num_bits=(4, 3)), dict(num_bits=8, axis=0),
                                     dict(num_bits=(2, 1), block_sizes={-1: 16, "type": "dynamic", "scale_bits": (4, 3)})])
def test_quantizer(options):
    def operation():
        quantizer = core.Quantizer(**options)
        if quantizer.needs_amax:
            quantizer.amax = np.abs(WEIGHT).max(axis=1, keepdims=True) if options.get("axis") == 0 else np.float32(3)
        quantizer.pre_quant_scale = np.linspace(0.5, 2, 256, dtype=np.float32)
        return quantizer(WEIGHT)
    every_allocation_fails(operation)


def int4_quantizer():
    quantizer = core.Quantizer(num_bits=4, block_sizes={-1: 16})
    quantizer.amax = core.amax(WEIGHT, block=16)
    return quantizer


GRAM = (WEIGHT.T @ WEIGHT + 50 * np.eye(256, dtype=np.float32)).astype(np.float32)
FACTORS = np.linspace(0.5, 1, 4, dtype=np.float32)
SCALES = np.exp(np.random.default_rng(1).standard_normal((3, 256))).astype(np.float32)
SIXTEENS = np.stack([GRAM[i:i + 16, i:i + 16] for i in range(0, 256, 16)])
SEARCHES = {
    "awq_weight_scale": lambda: core.awq_weight_scale(WEIGHT.T, 16),
    "losses by float32 products": lambda: core.quantization_losses(WEIGHT, int4_quantizer(), core.GramLoss(GRAM), factors=FACTORS),
    "losses by bfloat16 products": lambda: core.quantization_losses(WEIGHT.T.copy().T, int4_quantizer(), core.GramLoss(GRAM, "bfloat16"),
                                                                    SCALES, 1 / SCALES),
    "losses of maxima found anew": lambda: core.quantization_losses(WEIGHT, core.Quantizer(num_bits=(4, 3)), None, SCALES),
    "best_amax": lambda: core.best_amax(WEIGHT, int4_quantizer(), FACTORS),
    "best_amax by blocks": lambda: core.best_amax(WEIGHT, int4_quantizer(), FACTORS, core.GramLoss(SIXTEENS, "float32", 256)),
    "best_amax of the tensor": lambda: core.best_amax(WEIGHT, core.Quantizer(num_bits=8), FACTORS, core.GramLoss(GRAM)),
    "sweep_block_scales": lambda: core.sweep_block_scales(WEIGHT, 4.0, hessian=SIXTEENS),
    "subtract_product": lambda: core.subtract_product(WEIGHT, WEIGHT[:, :5].copy(), WEIGHT[:5])}


@pytest.mark.parametrize("search", SEARCHES)
def test_search(search):
    every_allocation_fails(SEARCHES[search], at_least=2)


def test_factor():
    """In place: what it leaves after a failure is of no use, so that every try has a matrix of its own."""
    def operation():
        h = GRAM.copy()
        return np.concatenate([core.factor(h).ravel(), h.ravel()])
    every_allocation_fails(operation, at_least=2)


@pytest.mark.parametrize("options", [dict(block_size=48), dict(block_size=256, regroup=True),
                                     dict(order=np.arange(256, dtype=np.int32)[::-1])])
def test_gptq(options):
    upper = GRAM.copy()
    curvature = core.factor(upper)

    def operation():
        made, amax, loss = core.gptq(WEIGHT, int4_quantizer(), upper, curvature, **options)
        return {"made": made, "amax": amax, "loss": loss}
    every_allocation_fails(operation, at_least=4)


@pytest.fixture(scope="module", params=["qwen3-float32", "qwen3-bfloat16", "qwen3moe-bfloat16"])
def model(request, golden):
    import modelq
    name, compute = request.param.split("-")
    return modelq.load(golden[name].source, compute=compute)


def test_forward(model, golden):
    ids = golden["qwen3"].calib[:2, :16]
    assert every_allocation_fails(lambda: model(ids).logits, at_least=5) < 500


def test_generate(model, golden):
    """Weights, caches, runs: and a decoder that failed is usable again."""
    ids = golden["qwen3"].calib[:2, :5]
    model.decoding()
    before = model.generate(ids, max_new_tokens=3)
    core._alloc_fail_at(3)
    with pytest.raises(MemoryError):
        model.generate(ids, max_new_tokens=3)
    core._alloc_fail_at(0)
    assert (model.generate(ids, max_new_tokens=3) == before).all()
    model.forget_decoding()

    def operation():
        try:
            return model.generate(ids, max_new_tokens=3)
        finally:
            model.forget_decoding()
    every_allocation_fails(operation, at_least=20, step=3)


def test_loss(model, golden):
    every_allocation_fails(lambda: model.loss([golden["qwen3"].calib[:2, :16]]), at_least=5)


@pytest.mark.filterwarnings("ignore:gptq. the Gram matrix")
@pytest.mark.parametrize("preset, step", [("NVFP4_DEFAULT_CFG", 1), ("FP8_DEFAULT_CFG", 1), ("INT4_AWQ_CFG", 3), ("INT4_GPTQ_CFG", 7)])
def test_quantize_a_model(golden, preset, step):
    """Calibration, too: and a model whose quantization failed is as it was before."""
    import modelq
    import modelq.quantization as mtq

    ids = golden["qwen3"].calib[:1, :16]

    def operation():
        model = modelq.load(golden["qwen3"].source, compute="bfloat16")
        try:
            mtq.quantize(model, getattr(mtq, preset), lambda m: m(ids))
        except MemoryError:
            assert not model.quantized and not model.quantizers
            raise
        return {name: quantizer.amax for name, quantizer in model.quantizers.items() if quantizer.enabled}
    every_allocation_fails(operation, at_least=20, step=step)


def test_the_harness_sees_what_is_left_behind():
    """Without this, a counter that always says 0 would pass everything above."""
    kept = []
    with pytest.raises(AssertionError):
        def operation():
            kept.append(core.Quantizer(num_bits=(4, 3), axis=0))
            kept[-1].amax = np.ones((64, 1), np.float32)
            return core.quantize(WEIGHT, "fp8")
        every_allocation_fails(operation)
