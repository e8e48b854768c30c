"""Prints one digest per kind of work of the kernels. Run under several MODELQ_ISA and MODELQ_NUM_THREADS, all must agree."""
import hashlib

import ml_dtypes
import numpy as np

import modelq._core as core

BF16 = ml_dtypes.bfloat16
DTYPES = {"float32": np.float32, "bfloat16": BF16, "float16": np.float16}
LENGTHS = [*range(68), 127, 128, 129, 1023, 1024, 1025, 2051, 4097]


class Digest:
    def __init__(self):
        self.hash = hashlib.sha256()

    def add(self, *arrays):
        for array in arrays:
            self.hash.update(repr((array.shape, array.dtype.name)).encode() + array.tobytes())

    def print(self, *labels):
        print(*labels, self.hash.hexdigest()[:16])


def wild(count, dtype, seed):
    """Finite numbers of every exponent, zeros and denormals among them."""
    patterns = np.random.default_rng(seed).integers(0, 1 << (32 if dtype == np.float32 else 16), count)
    x = patterns.astype(np.uint32 if dtype == np.float32 else np.uint16).view(dtype)
    return np.where(np.isfinite(x.astype(np.float32)), x, dtype(1))


def tame(count, dtype, seed):
    return np.random.default_rng(seed).standard_t(3, count).astype(dtype)


def every_bf16(seed):
    """All finite bfloat16 in an order that puts unlike ones into one block; and sorted, so that blocks hold like ones."""
    x = np.arange(1 << 16, dtype=np.uint16).view(BF16)
    x = x[np.isfinite(x.astype(np.float32))]
    return np.concatenate([np.random.default_rng(seed).permutation(x), x])[: 127 * 1024].reshape(127, 1024)


def shifted(x):
    """The same numbers at an address that is not aligned to a vector."""
    memory = np.empty(x.size + 3, x.dtype)
    memory[3:] = x.reshape(-1)
    return memory[3:].reshape(x.shape)


def digest_codecs():
    for name in core.formats():
        digest = Digest()
        for seed, n in enumerate(LENGTHS):
            x = np.concatenate([wild(n, np.float32, seed), tame(n, np.float32, seed), np.float32([np.nan, -np.nan, np.inf])])
            codes = core.encode(shifted(x), name)
            digest.add(codes, core.decode(shifted(codes), name))
        digest.print("codec", name)


def digest_amax():
    for label, dtype in DTYPES.items():
        digest = Digest()
        for seed, n in enumerate(LENGTHS):
            x = shifted(wild(3 * n, dtype, seed).reshape(3, n))
            digest.add(core.amax(x), core.amax(x, axis=0), core.amax(x, axis=-1))
            if n:
                digest.add(*(core.amax(x, block=block) for block in (1, 3, 8, 16, 32, 33, 128, 2000)))
                x[1, n // 2] = np.nan
                digest.add(core.amax(x), core.amax(x, block=16))
        digest.print("amax", label)


def digest_schemes():
    for scheme, row in core.schemes().items():
        block = max(row["block"][1], 1)
        for label, dtype in DTYPES.items():
            digest = Digest()
            for seed, n in enumerate(LENGTHS[1:] if block == 1 else range(1, 41)):
                cols = n * block if row["packing"] != "none" or row["scale"] != "fp32" else n
                for make in (wild, tame):
                    w = shifted(make(4 * cols, dtype, seed).reshape(4, cols))
                    parts = core.quantize(w, scheme)
                    digest.add(*parts.values(), core.fake_quantize(w, scheme))
                    digest.add(core.dequantize(parts, scheme, dtype=label))
            digest.print(scheme, label)


def digest_exhaustive():
    """Every bfloat16 with many tensor scales, through what has hand-written kernels."""
    x = every_bf16(0)
    amaxes = np.concatenate([np.abs(tame(12, np.float32, 1)) * 3, np.float32([3.3e38, 1e30, 448, 6, 2688, 1e-3, 1e-20, 1e-30, 1e-36,
                                                                           1e-37, 1e-38, 1e-39, 1e-40, 1e-42, 0])])
    for scheme in ("fp8", "nvfp4", "nvfp4_w4a8"):
        digest = Digest()
        for amax in amaxes:
            digest.add(*core.quantize(x, scheme, amax=amax).values(), core.fake_quantize(x, scheme, amax=amax))
        digest.print("every bfloat16", scheme)


def digest_quantizers():
    nvfp4 = {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}
    kinds = [dict(num_bits=(4, 3)), dict(num_bits=8), dict(num_bits=(4, 3), block_sizes={-1: None}, type="dynamic"),
             dict(num_bits=(2, 1), block_sizes=nvfp4), dict(num_bits=4, block_sizes={-1: 32, "type": "dynamic"})]
    x, odd = every_bf16(1), every_bf16(2)[:60]
    odd[3, 5], odd[7, 800], odd[9, 9] = np.nan, np.inf, -np.inf
    for number, kind in enumerate(kinds):
        digest = Digest()
        for amax in (None, 1.5, 448.0, 1e-3, 3e38, 1e-39, 0.0):
            quantizer = core.Quantizer(**kind)
            if quantizer.needs_amax:
                quantizer.amax = amax
            if amax is not None or not quantizer.needs_amax:
                digest.add(quantizer(odd), quantizer(odd.astype(np.float32)))
            digest.add(quantizer(x), quantizer(x.astype(np.float32)), quantizer(x[:, :999]))
            quantizer.pre_quant_scale = np.abs(tame(1024, np.float32, 3))
            digest.add(quantizer(x[:9]), quantizer(x[:9].astype(np.float32)))
        digest.print("quantizer", number)


def search_cases():
    """Weights of sizes that divide by nothing, and more rows than are tried at a time; with zeros, of every dtype."""
    for seed, (rows, columns) in enumerate([(1, 1), (3, 17), (20, 48), (97, 100), (130, 160)]):
        for label, dtype in DTYPES.items():
            weight = shifted((tame(rows * columns, np.float32, seed) * 0.05).astype(dtype).reshape(rows, columns))
            weight[rows // 2, : columns // 2] = 0
            yield label, weight


def gram_of(columns, seed):
    """Exact sums: small integers, so that no product depends on how it is added up."""
    x = np.random.default_rng(seed).integers(-3, 4, (2 * columns, columns)).astype(np.float32)
    return x.T @ x + np.eye(columns, dtype=np.float32)


def digest_scales():
    digests = {label: Digest() for label in DTYPES}
    alphas = np.arange(11, dtype=np.float32) / np.float32(10)
    for label, weight in search_cases():
        largest = core.amax(weight, axis=1).ravel()
        inputs = np.abs(wild(weight.shape[1], np.float32, 1))
        for block in (0, 1, 10, 16, 33):
            of_weight = core.awq_weight_scale(weight, block)
            digests[label].add(of_weight, core.awq_scales(inputs, of_weight, alphas))
        digests[label].add(*(core.smoothquant_scale(inputs, largest, alpha, label) for alpha in alphas))
    for label, digest in digests.items():
        digest.print("scales of columns", label)


def digest_trials():
    static = dict(num_bits=(2, 1), block_sizes={-1: 16, "type": "static", "scale_bits": (4, 3)})
    kinds = {"int4": dict(num_bits=4, block_sizes={-1: 10}), "int4 tall": dict(num_bits=4, block_sizes={-1: 10, -2: 98}),
             "int8": dict(num_bits=8, axis=0), "fp8": dict(num_bits=(4, 3)), "nvfp4": static,
             "nvfp4 dynamic": dict(num_bits=(2, 1), block_sizes={-1: 16, "type": "dynamic", "scale_bits": (4, 3)})}
    factors = np.linspace(0.25, 4, 13).astype(np.float32)
    for name, kind in kinds.items():
        digest = Digest()
        for _, weight in search_cases():
            quantizer, scales = core.Quantizer(**kind), np.exp(tame(3 * weight.shape[1], np.float32, 5)).reshape(3, -1)
            digest.add(core.best_amax(weight, quantizer, factors), core.quantization_losses(weight, quantizer, factors=factors))
            digest.add(core.quantization_losses(weight, quantizer, None, scales, 1 / scales))
        digest.print("trials", name)


def digest_sweeps():
    digest = Digest()
    for _, weight in search_cases():
        if weight.shape[1] % 16 == 0:
            h = gram_of(weight.shape[1], 6)
            blocks = np.stack([h[i:i + 16, i:i + 16] for i in range(0, len(h), 16)])
            largest = float(core.amax(weight))
            for divisor in (2688, 1536):
                digest.add(*(core.sweep_block_scales(weight, largest, divisor, hessian) for hessian in (None, blocks)))
    digest.print("sweeps of block scales")


def digest_gptq():
    """Factors of one block are sums in float64, and what comes to columns of one block is no product: bits of all ISAs agree."""
    kinds = {"int4": dict(num_bits=4, block_sizes={-1: 10}), "int8": dict(num_bits=8, axis=0), "fp8": dict(num_bits=(4, 3)),
             "nvfp4": dict(num_bits=(2, 1), block_sizes={-1: 16, "type": "static", "scale_bits": (4, 3)})}
    for name, kind in kinds.items():
        digest = Digest()
        for _, weight in search_cases():
            columns = weight.shape[1]
            upper = np.eye(columns, dtype=np.float32) + np.triu(gram_of(columns, 7), 1) / np.float32(8 * columns)
            curvature, quantizer = np.linspace(1, 9, columns, dtype=np.float32), core.Quantizer(**kind)
            quantizer.amax = core.amax(weight, block=kind.get("block_sizes", {-1: None})[-1], axis=kind.get("axis"))
            for options in (dict(), dict(order=np.random.default_rng(8).permutation(columns)), dict(regroup=True)):
                if "regroup" not in options or "block_sizes" in kind:
                    made, amax, loss = core.gptq(weight, quantizer, upper, curvature, block_size=160, **options)
                    digest.add(made, amax, np.float64([loss]))
            small = gram_of(min(columns, 64), 9)
            digest.add(core.factor(small), small)
        digest.print("gptq", name)


if __name__ == "__main__":
    np.seterr(all="ignore")
    digest_codecs()
    digest_amax()
    digest_schemes()
    digest_exhaustive()
    digest_quantizers()
    digest_scales()
    digest_trials()
    digest_sweeps()
    digest_gptq()
