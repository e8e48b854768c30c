"""The table of layouts: which tensors a quantized linear has in each dialect, of which dtype, shape and meaning.

A shape is written in terms of the linear's [out, in], its group size and its block: "out,in/group" is two axes; "" is no axis;
alternatives are parted by "|". Divisions round up.
"""
from __future__ import annotations

from typing import NamedTuple

FLOAT = "float32|bfloat16|float16"
SCALAR = "|1"
F8, U8, I8, I32, F32 = "float8_e4m3fn", "uint8", "int8", "int32", "float32"


class Part(NamedTuple):
    """One tensor. sense says how its values are judged (see values.py); top: what a scale of 1 lets the largest element stand for.

    only: "input" if it is there only where activations have a static scale, "zeros" only for asymmetric weights, "" always,
    "optional" may be. shared: siblings must agree on it ("always"), engines that fuse them round again if they do not
    ("rounded"), or it is each one's own ("").
    """
    suffix: str
    dtype: str
    shape: str
    sense: str = ""
    top: float = 1.0
    only: str = ""
    shared: str = ""


class Layout(NamedTuple):
    name: str
    parts: tuple[Part, ...]
    group: int | None = None        # the only group size there is; None: as the config says

    @property
    def weight(self) -> Part:
        return self.parts[0]


def _input(top: float, only: str = "input", shared: str = "rounded") -> Part:
    return Part("input_scale", F32, SCALAR, "input", top, only, shared)


SMOOTH = Part("pre_quant_scale", FLOAT, "in", "smooth", only="optional", shared="always")
NVFP4 = (Part("weight", U8, "out,in/2"), Part("weight_scale", F8, "out,in/16", "block"),
         Part("weight_scale_2", F32, SCALAR, "scale", 2688, shared="always"))
PACKED_NVFP4 = (Part("weight_packed", U8, "out,in/2"), Part("weight_scale", F8, "out,in/16", "block"),
                Part("weight_global_scale", F32, SCALAR, "reciprocal", 2688, shared="always"),
                Part("input_global_scale", F32, SCALAR, "input reciprocal", 2688, "input", "always"))
MXFP4 = (Part("weight", U8, "out,in/2"), Part("weight_scale", U8, "out,in/32", "exponent", 6))
PAIRS = Part("weight", U8, "out/2,in")      # rows 2j and 2j + 1 in one byte

MODELOPT = {layout.name: layout for layout in (
    Layout("FP8", (Part("weight", F8, "out,in"), Part("weight_scale", F32, SCALAR, "scale", 448, shared="rounded"), _input(448))),
    Layout("FP8_PER_CHANNEL_PER_TOKEN", (Part("weight", F8, "out,in"), Part("weight_scale", F32, "out", "scale", 448))),
    Layout("FP8_PB_WO", (Part("weight", F8, "out,in"), Part("weight_scale", F32, "out/128,1,in/128,1", "scale", 448))),
    Layout("NVFP4", (*NVFP4, _input(2688, shared="always")), group=16),
    Layout("W4A16_NVFP4", NVFP4, group=16),
    Layout("NVFP4_AWQ", (*NVFP4, _input(2688, shared="always"), SMOOTH), group=16),
    Layout("NVFP4_SVD", (*NVFP4, _input(2688, shared="always"), SMOOTH, Part("svdquant_lora_a", FLOAT, "rank,in", only="optional"),
                         Part("svdquant_lora_b", FLOAT, "out,rank", only="optional")), group=16),
    Layout("MXFP8", (Part("weight", F8, "out,in"), Part("weight_scale", U8, "out,in/32", "exponent", 448)), group=32),
    Layout("MXFP4", MXFP4, group=32),
    Layout("W4A8_MXFP4_FP8", (*MXFP4, _input(448, "optional")), group=32),
    Layout("W4A8_NVFP4_FP8", (Part("weight", U8, "out,in/2"), Part("weight_scale", F8, "out,in/group", "block"),
                              Part("weight_scale_2", F32, SCALAR, "scale", 448, shared="always"), _input(448, shared="always"))),
    Layout("W4A16_AWQ", (PAIRS, Part("weight_scale", FLOAT, "out,in/group", "scale", 8), SMOOTH)),
    Layout("W4A8_AWQ", (PAIRS, Part("weight_scale", FLOAT, "out,in/group", "scale", 8),
                        Part("weight_scale_2", F32, SCALAR, "scale", 448, shared="always"), _input(448, shared="always"), SMOOTH)),
    Layout("W8A8_SQ_PER_CHANNEL", (Part("weight", I8, "out,in"), Part("weight_scale", F32, "out", "scale", 127), _input(127), SMOOTH)),
    Layout("W8A16", (Part("weight", I8, "out,in"), Part("weight_scale", F32, "out", "scale", 127), SMOOTH)),
)}

COMPRESSED = {layout.name: layout for layout in (
    Layout("float-quantized tensor", (Part("weight", F8, "out,in"),
                                      Part("weight_scale", FLOAT, SCALAR, "scale", 448, shared="rounded"), _input(448))),
    Layout("float-quantized channel", (Part("weight", F8, "out,in"), Part("weight_scale", FLOAT, "out,1", "scale", 448), _input(448))),
    Layout("float-quantized block", (Part("weight", F8, "out,in"), Part("weight_scale", FLOAT, "out/rows,in/columns", "scale", 448))),
    Layout("nvfp4-pack-quantized tensor_group", PACKED_NVFP4, group=16),
    Layout("mxfp8-quantized group", (Part("weight", F8, "out,in"), Part("weight_scale", U8, "out,in/32", "exponent", 448)), group=32),
    Layout("mxfp4-pack-quantized group", (Part("weight_packed", U8, "out,in/2"), *MXFP4[1:]), group=32),
    *(Layout(f"pack-quantized{wide} {strategy}", (
        Part("weight_packed", I32, f"out,in/{per_word}"), Part("weight_scale", FLOAT, shape, "scale", top),
        Part("weight_shape", "int64|int32", "2", "shape"),
        Part("weight_zero_point", I32, f"out/{per_word},{shape.split(',')[1]}", only="zeros"), _input(448)))
      for strategy, shape in (("group", "out,in/group"), ("channel", "out,1"))
      for wide, per_word, top in (("", 8, 8), (" 8-bit", 4, 128))),
    Layout("int-quantized channel", (Part("weight", I8, "out,in"), Part("weight_scale", FLOAT, "out,1", "scale", 127), _input(127))),
    Layout("int-quantized tensor", (Part("weight", I8, "out,in"), Part("weight_scale", FLOAT, SCALAR, "scale", 127, shared="rounded"),
                                    _input(127))),
)}

NATIVE = {layout.name: layout for layout in (
    Layout("fp8", (Part("weight", F8, "out,in"), Part("weight_scale", FLOAT, SCALAR, "scale", 448, shared="rounded"), _input(448))),
    Layout("fp8 block", (Part("weight", F8, "out,in"), Part("weight_scale_inv", FLOAT, "out/rows,in/columns", "scale", 448))),
    Layout("mxfp8", (Part("weight", F8, "out,in"), Part("weight_scale_inv", U8, "out,in/32", "exponent", 448)), group=32),
    Layout("awq", (Part("qweight", I32, "in,out/8"), Part("qzeros", I32, "in/group,out/8"),
                   Part("scales", "float16", "in/group,out", "scale", 15))),
    Layout("gptq", (Part("qweight", I32, "in/8,out"), Part("qzeros", I32, "in/group,out/8", "gptq zeros"),
                    Part("scales", "float16", "in/group,out", "scale", 8), Part("g_idx", I32, "in", "group index", only="optional"))),
)}

ALL = (MODELOPT, COMPRESSED, NATIVE)
SUFFIXES = {part.suffix for table in ALL for layout in table.values() for part in layout.parts} | {"bias"}
KV_SCALES = ("k_scale", "v_scale")


def logical_shape(part: Part, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """[out, in] of the linear whose packed weight has this shape; None if it has not two axes."""
    terms = part.shape.split(",")
    if len(shape) != len(terms):
        return None
    found = {}
    for term, size in zip(terms, shape):
        name, _, divisor = term.partition("/")
        found[name] = size * int(divisor or 1)
    return found["out"], found["in"]


def expected_shapes(part: Part, sizes: dict[str, int]) -> list[tuple[int, ...] | None]:
    """The shapes that the part may have; None stands for one that the sizes do not decide."""
    return [_evaluate(text, sizes) for text in part.shape.split("|")]


def _evaluate(text: str, sizes: dict[str, int]) -> tuple[int, ...] | None:
    shape = []
    for term in filter(None, text.split(",")):
        name, _, divisor = term.partition("/")
        values = [int(word) if word.isdigit() else sizes.get(word) for word in (name, divisor or "1")]
        if None in values or not values[1]:
            return None
        shape.append(-(-values[0] // values[1]))
    return tuple(shape)
