"""Block quantization once more, in NumPy and ml_dtypes, straight from the formulas (docs of each function): slow and plain.

Shares no code with modelq. Weights are float32, bfloat16 or float16 matrices; what comes back are the parts of an export.
"""
import ml_dtypes
import numpy as np

F32 = np.float32
FP8, FP4 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
E2M1 = F32([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def to_fp8(x):
    """Nearest-even, saturating."""
    return np.clip(x, F32(-448), F32(448)).astype(FP8)


def or_one(scale):
    return np.where(scale == 0, F32(1), scale)


def pack_row(codes):
    return (codes[:, 1::2] << 4 | codes[:, ::2]).astype(np.uint8)


def unpack_row(packed):
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)


def blocks(w, size):
    return w.astype(F32).reshape(w.shape[0], -1, size)


def fp8(w, amax=None):
    """The quotient is rounded to the weight's dtype, then to e4m3."""
    scale = or_one(F32(np.abs(w.astype(F32)).max(initial=0) if amax is None else amax) / F32(448))
    return {"weight": to_fp8((w.astype(F32) / scale).astype(w.dtype).astype(F32)), "weight_scale": np.asarray(scale, F32)}


def fp8_channel(w):
    scale = or_one(np.abs(w.astype(F32)).max(axis=1, initial=0) / F32(448))
    return {"weight": to_fp8(w.astype(F32) / scale[:, None]), "weight_scale": scale}


def fp8_block(w, size=128):
    rows, cols = (-(-n // size) for n in w.shape)
    padded = np.zeros((rows * size, cols * size), F32)
    padded[:w.shape[0], :w.shape[1]] = w.astype(F32)
    tiles = padded.reshape(rows, size, cols, size)
    scale = or_one(np.abs(tiles).max(axis=(1, 3), keepdims=True) / F32(448))
    weight = to_fp8(tiles / scale).reshape(padded.shape)[:w.shape[0], :w.shape[1]]
    return {"weight": weight, "weight_scale": scale if scale.size > 1 else scale.reshape(())}


def int8(w):
    scale = or_one(np.abs(w.astype(F32)).max(axis=1, initial=0) / F32(127))
    return {"weight": np.clip(np.rint(w.astype(F32) / scale[:, None]), -128, 127).astype(np.int8), "weight_scale": scale}


def int4(w, size=128):
    """Two rows share a byte: the even one in the low nibble."""
    tiles = blocks(w, size)
    scale = or_one(np.abs(tiles).max(axis=2) / F32(7))
    codes = np.clip(np.rint(tiles / scale[:, :, None]), -8, 7).astype(np.int8).reshape(w.shape).view(np.uint8) & 15
    return {"weight": codes[0::2] | codes[1::2] << 4, "weight_scale": scale}


def nvfp4(w, amax=None, size=16, divisor=2688):
    """weight_scale_2 = amax / divisor; block scale = e4m3(max / (6 s2)), 1 if zero, 2^-9 to 448; -0 becomes +0."""
    tiles = blocks(w, size)
    second = F32(np.abs(tiles).max(initial=0) if amax is None else amax) / F32(divisor)
    second = F32(6) / F32(divisor) if second == 0 else second
    scale = np.clip(or_one(np.abs(tiles).max(axis=2) / (F32(6) * second)), F32(2**-9), F32(448)).astype(FP8)
    x = tiles / (scale.astype(F32) * second)[:, :, None]
    magnitude = np.searchsorted(F32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]), np.abs(x), side="left")
    magnitude += np.isin(np.abs(x), F32([0.75, 1.75, 3.5]))
    codes = (magnitude | (x < 0).astype(np.int64) << 3).astype(np.uint8).reshape(w.shape)
    return {"weight": pack_row(codes), "weight_scale": scale, "weight_scale_2": np.asarray(second, F32)}


def mx_scale(tiles, largest):
    """Exponent bytes of 2^ceil(log2(max / largest)), and the powers of two."""
    mantissa, exponent = np.frexp((np.abs(tiles).max(axis=2) / F32(largest)).astype(np.float64))
    power = np.where(mantissa == 0, -127, np.clip(exponent - (mantissa == 0.5), -127, 127))
    return (power + 127).astype(np.uint8), np.ldexp(1.0, power)[:, :, None]


def mxfp4(w):
    """Ties go toward zero, and zero has its sign bit set."""
    tiles = blocks(w, 32)
    scale, power = mx_scale(tiles, 6)
    x = tiles / power
    magnitude = (np.abs(x)[..., None] > [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]).sum(-1)
    codes = (magnitude | np.where(x > 0, 0, 8)).astype(np.uint8).reshape(w.shape)
    return {"weight": pack_row(codes), "weight_scale": scale}


def mx_plain(w, dtype, largest):
    tiles = blocks(w, 32)
    scale, power = mx_scale(tiles, largest)
    x = (tiles / power).astype(F32).reshape(w.shape)
    return (np.rint(x) if dtype == np.int8 else x).astype(dtype), scale


def mxfp8(w, dtype=FP8, largest=448):
    weight, scale = mx_plain(w, dtype, largest)
    return {"weight": weight, "weight_scale": scale}


def mxfp6(w, dtype=ml_dtypes.float6_e3m2fn, largest=28):
    """Four 6-bit codes in three bytes, the first in the lowest bits."""
    codes, scale = mx_plain(w, dtype, largest)
    four = codes.view(np.uint8).astype(np.uint32).reshape(w.shape[0], -1, 4)
    word = four[..., 0] | four[..., 1] << 6 | four[..., 2] << 12 | four[..., 3] << 18
    packed = np.stack([word & 255, word >> 8 & 255, word >> 16], axis=-1).astype(np.uint8)
    return {"weight": packed.reshape(w.shape[0], -1), "weight_scale": scale}


SCHEMES = {
    "fp8": fp8, "fp8_channel": fp8_channel, "fp8_block": fp8_block, "int8": int8, "int4": int4, "nvfp4": nvfp4,
    "nvfp4_w4a8": lambda w: nvfp4(w, size=32, divisor=448), "mxfp4": mxfp4, "mxfp8": mxfp8, "mxfp6": mxfp6,
    "mxfp8_e5m2": lambda w: mxfp8(w, ml_dtypes.float8_e5m2, 57344), "mxint8": lambda w: mxfp8(w, np.int8, 127),
    "mxfp6_e2m3": lambda w: mxfp6(w, ml_dtypes.float6_e2m3fn, 7.5),
}


def fake_fp8(x, amax):
    """Model Optimizer's _fp8_eager: scale = fl(fl(1 / amax) * 448), back by fl(1 / scale)."""
    amax = np.where(F32(amax) <= F32(2**-24), F32(1), F32(amax))
    scale = (F32(1) / amax) * F32(448)
    return (to_fp8(x.astype(F32) * scale).astype(F32) * (F32(1) / scale)).astype(x.dtype)


def fake_int(x, amax, bits=8, narrow=False, unsigned=False):
    bound = F32(2 ** (bits - 1 + unsigned) - 1)
    low = F32(0) if unsigned else -bound if narrow else -bound - 1
    tiny = F32(amax) <= F32(2**-24)
    scale = np.where(tiny, F32(0), bound / np.where(tiny, F32(1), F32(amax)))
    y = np.clip(np.rint(x.astype(F32) * scale), low, bound) / np.where(tiny, F32(1), scale)
    return y.astype(x.dtype)


def fake_nvfp4(x, amax):
    parts = nvfp4(x, amax)
    codes = unpack_row(parts["weight"])
    values = np.where(codes & 8, -E2M1[codes & 7], E2M1[codes & 7]).reshape(x.shape[0], -1, 16)
    scale = parts["weight_scale"].astype(F32) * parts["weight_scale_2"]
    return (values * scale[:, :, None]).reshape(x.shape).astype(x.dtype)


# Layouts of INT4 codes in -8..7, [rows, cols] -----------------------------------------------------------------------------------

def _words(codes, order, axis):
    """int32 of eight codes along axis, the one at order[k] in bits 4k, each stored plus 8."""
    unsigned = np.moveaxis((codes + 8).astype(np.uint32), axis, -1)
    groups = unsigned.reshape(*unsigned.shape[:-1], -1, 8)
    words = sum(groups[..., index] << np.uint32(4 * k) for k, index in enumerate(order))
    return np.moveaxis(words, -1, axis).astype(np.uint32).view(np.int32)


AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
INT4_LAYOUTS = {
    "row_pairs": lambda q: ((q[0::2] & 15) | (q[1::2] & 15) << 4).astype(np.uint8),
    "int32_row": lambda q: _words(q, range(8), 1),
    "awq": lambda q: np.ascontiguousarray(_words(q, AWQ_ORDER, 0).T),
    "gptq": lambda q: np.ascontiguousarray(_words(q, range(8), 1).T),
}


def _nibbles(words, order, axis, bits=4):
    """The codes of int32 words along axis, as unsigned."""
    unsigned = np.moveaxis(words.view(np.uint32), axis, -1)
    per_word = 32 // bits
    codes = np.empty((*unsigned.shape, per_word), np.int64)
    for k, index in enumerate(order):
        codes[..., index] = unsigned >> np.uint32(bits * k) & np.uint32(2**bits - 1)
    return np.moveaxis(codes.reshape(*unsigned.shape[:-1], -1), -1, axis)



# Exports of other dialects, by the formulas of their libraries --------------------------------------------------------------------

def unpack(dialect, tensors, module, config):
    """float32 weight of a module from what is stored."""
    part = {name.removeprefix(f"{module}."): tensor for name, tensor in tensors.items() if name.startswith(f"{module}.")}
    return {"autoawq": _unpack_awq, "gptq": _unpack_gptq, "fp8": _unpack_fp8}.get(dialect, _unpack_compressed)(part, module, config)


def _unpack_awq(part, module, config):
    """(q - z) * s, everything [in, out] (AutoAWQ, awq/utils/packing_utils.py)."""
    codes, zeros = _nibbles(part["qweight"], AWQ_ORDER, 1), _nibbles(part["qzeros"], AWQ_ORDER, 1)
    size = config["group_size"]
    return ((codes - np.repeat(zeros, size, 0)) * np.repeat(part["scales"].astype(F32), size, 0)).T


def _unpack_gptq(part, module, config):
    """(q - (z + 1)) * s by g_idx, everything [in, out] (AutoGPTQ, the "gptq" checkpoint format)."""
    codes, zeros = _nibbles(part["qweight"], range(8), 0), _nibbles(part["qzeros"], range(8), 1) + 1
    groups = part["g_idx"]
    return ((codes - zeros[groups]) * part["scales"].astype(F32)[groups]).T


def _unpack_fp8(part, module, config):
    scale = part["weight_scale_inv"]
    if scale.dtype == np.uint8:     # exponents, one per 32 columns
        return part["weight"].astype(F32) * np.repeat(np.ldexp(F32(1), scale.astype(int) - 127), 32, 1)
    return part["weight"].astype(F32) * _blocks_of_128(scale, part["weight"].shape)


def _blocks_of_128(scale, shape):
    return np.repeat(np.repeat(scale, 128, 0), 128, 1)[:shape[0], :shape[1]]


def _unpack_compressed(part, module, config):
    groups = list(config["config_groups"].values())
    said = next(group for group in groups if len(groups) == 1 or module in group["targets"])["weights"]
    scale = part["weight_scale"]
    if scale.dtype == np.uint8:
        scale = np.ldexp(F32(1), scale.astype(int) - 127)
    scale = scale.astype(F32)
    if "weight_global_scale" in part:
        scale = scale / part["weight_global_scale"]
    if "weight" in part:
        codes = part["weight"].astype(F32)
    elif said["type"] == "int":
        bits = said["num_bits"]
        codes = (_nibbles(part["weight_packed"], range(32 // bits), 1, bits) - 2**(bits - 1)).astype(F32)
        assert tuple(part["weight_shape"]) == codes.shape
    elif said["num_bits"] == 4:
        codes = unpack_row(part["weight_packed"]).view(FP4).astype(F32)
    else:
        three = part["weight_packed"].reshape(part["weight_packed"].shape[0], -1, 3).astype(np.uint32)
        word = three[..., 0] | three[..., 1] << 8 | three[..., 2] << 16
        four = np.stack([word >> np.uint32(6 * k) & np.uint32(63) for k in range(4)], axis=-1).astype(np.uint8)
        codes = four.reshape(four.shape[0], -1).view(ml_dtypes.float6_e2m3fn).astype(F32)
    strategy = said["strategy"]
    if strategy == "block":
        return codes * _blocks_of_128(scale, codes.shape)
    if strategy in ("group", "tensor_group"):
        return codes * np.repeat(scale, said["group_size"], 1)
    assert scale.shape == {"tensor": (1,), "channel": (codes.shape[0], 1)}[strategy]
    return codes * scale
