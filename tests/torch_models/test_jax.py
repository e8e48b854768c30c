"""Single arrays and trees of JAX: what comes out is JAX's again, with the bits that NumPy arrays get. (tests/test_arrays.py: the rest.)"""
import collections
import copy
import dataclasses
import gc
import os
import pickle

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=3"

import ml_dtypes
import numpy as np
import pytest

import modelq
import modelq._core as core
import modelq.quantization as mtq
from modelq.nn import TensorQuantizer

jax = pytest.importorskip("jax", reason="needs jax: make test-torch")
jnp, tree_util = jax.numpy, jax.tree_util
DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]


def values(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def same(made, expected):
    """The array that JAX has is this NumPy array."""
    assert isinstance(made, jax.Array) and made.dtype == expected.dtype and made.shape == expected.shape
    np.testing.assert_array_equal(np.asarray(made), expected)
    return True


# Arrays --------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", sorted(core.schemes()))
def test_every_scheme_as_on_numpy(scheme, dtype):
    x = values(2, 64, 256, dtype=dtype)
    ours, numpys = (modelq.quantize_array(given, scheme) for given in (jnp.asarray(x), x))
    assert ours.dtype == np.dtype(dtype).name and ours.shape == (2, 64, 256)
    for role, part in numpys.parts.items():
        np.testing.assert_array_equal(ours.parts[role], part)
    same(ours.dequantize(), numpys.dequantize())
    same(ours.dequantize("float32"), numpys.dequantize("float32"))
    same(modelq.fake_quantize_array(jnp.asarray(x), scheme), modelq.fake_quantize_array(x, scheme))


@pytest.mark.parametrize("preset", ["NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG", "INT4_AWQ_CFG"])
def test_presets_and_kernels(preset):
    """A kernel [in, out], jitted or not, is quantized along its inputs as the weight is."""
    kernel = jax.jit(jnp.transpose)(jnp.asarray(values(32, 256)))
    for format in (preset, getattr(mtq, preset)):
        same(modelq.quantize_array(kernel, format, axis=0).dequantize(), modelq.quantize_array(values(32, 256), format).dequantize().T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_copy_on_the_way_in(dtype):
    x = jnp.asarray(values(8, 32, dtype=dtype))
    assert core.as_array(x).ctypes.data == x.unsafe_buffer_pointer()
    assert not core.as_array(x).flags.writeable      # JAX's arrays never change


def test_memory_that_jax_lets_go_of_stays_ours():
    """Deleted, or donated to a function that would write over it."""
    x, y = jnp.asarray(values(64, 64)), jnp.asarray(values(64, 64))
    views = core.as_array(x), core.as_array(y)
    x.delete()
    jax.jit(lambda y: y * 0, donate_argnums=0)(y).block_until_ready()
    others = [jnp.zeros((64, 64)) + count for count in range(50)]
    assert len(others) == 50 and all(np.array_equal(view, values(64, 64)) for view in views)


def test_a_thousand_rounds_leave_nothing_behind():
    tree = {"x": jnp.asarray(values(64, 256, dtype=ml_dtypes.bfloat16))}

    def rounds(count):
        for _ in range(count):
            modelq.dequantize_array(modelq.quantize_array(tree, "nvfp4"))["x"].block_until_ready()
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096, len(jax.live_arrays())
    (before, alive), (after, still) = rounds(200), rounds(1000)
    assert still == alive and after - before < 16 << 20      # one array left per round would be 32 MB


def test_amax_may_be_of_jax_too():
    x, amax = values(4, 32), np.full(4, 2.0)
    same(modelq.fake_quantize_array(jnp.asarray(x), "int8", amax=jnp.asarray(amax)), modelq.fake_quantize_array(x, "int8", amax=amax))


def test_results_go_where_the_array_is():
    second = jax.devices()[1]
    x = jax.device_put(values(4, 32), second)
    for made in (modelq.fake_quantize_array(x, "fp8"), modelq.quantize_array(x, "fp8").dequantize()):
        assert made.devices() == {second} and same(made, modelq.fake_quantize_array(values(4, 32), "fp8"))
    free = modelq.fake_quantize_array(jnp.asarray(values(4, 32)), "fp8")
    assert not free.committed and (free + x).devices() == {second}      # may still go anywhere, as what it was made of


@pytest.mark.parametrize("spec", [("rows", None), (None, "rows"), (None, None)])
def test_arrays_over_several_devices(spec):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("rows",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    x = jax.device_put(values(4, 64, dtype=ml_dtypes.bfloat16), sharding)
    for made in (modelq.fake_quantize_array(x, "nvfp4"), modelq.quantize_array(x, "nvfp4").dequantize()):
        assert made.sharding == sharding
        same(made, modelq.fake_quantize_array(values(4, 64, dtype=ml_dtypes.bfloat16), "nvfp4"))


def test_copies_and_pickles_are_of_jax():
    x = jax.device_put(values(4, 32), jax.devices()[1])
    packed = modelq.quantize_array(x, "nvfp4")
    assert copy.deepcopy(packed).dequantize().devices() == x.devices()
    same(pickle.loads(pickle.dumps(packed)).dequantize(), np.asarray(packed.dequantize()))


def test_a_quantizer_by_hand():
    x, quantizer = values(8, 64), TensorQuantizer({"num_bits": 8, "axis": 0}, amax=np.full((8, 1), 3, np.float32))
    same(quantizer(jnp.asarray(x)), quantizer(x))


def test_what_has_no_values():
    for transform in (jax.jit, jax.vmap, jax.grad):
        with pytest.raises(TypeError, match="layer.kernel: is being traced by JAX .*outside"):
            transform(lambda x: modelq.fake_quantize_array({"layer": {"kernel": x}}, "fp8")["layer"]["kernel"].sum())(jnp.ones((2, 4, 32)))
    with pytest.raises(TypeError, match="w: dtype object"):
        modelq.quantize_array(jax.eval_shape(lambda: {"w": jnp.ones((4, 32))}), "fp8")

    def inside(x):
        return jax.pure_callback(lambda x: modelq.fake_quantize_array(x, "fp8"), jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    same(jax.jit(inside)(jnp.asarray(values(4, 32))), modelq.fake_quantize_array(values(4, 32), "fp8"))


@pytest.mark.parametrize("dtype, words", [(jnp.int32, "int32"), (jnp.float8_e4m3fn, "float8_e4m3fn"), (jnp.bool_, "bool")])
def test_other_dtypes(dtype, words):
    with pytest.raises(TypeError, match=f"array .*{words}"):
        modelq.quantize_array(jnp.ones((4, 32), dtype), "fp8")


# Trees ---------------------------------------------------------------------------------------------------------------------------

@tree_util.register_dataclass
@dataclasses.dataclass
class Dense:
    kernel: object
    bias: object
    features: int = dataclasses.field(default=3, metadata={"static": True})


@tree_util.register_pytree_with_keys_class
class Frozen(collections.abc.Mapping):
    """As Flax's: a mapping that is a node, and of which only its keys can make another."""

    def __init__(self, **items):
        self.items_ = items

    def __getitem__(self, key):
        return self.items_[key]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)

    def tree_flatten_with_keys(self):
        return [(tree_util.DictKey(key), value) for key, value in self.items_.items()], tuple(self.items_)

    @classmethod
    def tree_unflatten(cls, keys, children):
        return cls(**dict(zip(keys, children)))


@tree_util.register_pytree_node_class
class Nameless:
    """A node that does not say what its children are called."""

    def __init__(self, *children):
        self.children = children

    def tree_flatten(self):
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


class Plain:
    """No node: a leaf that is no array."""


State = collections.namedtuple("State", "params step")


def parameters():
    dense = Dense(jnp.asarray(values(32, 48)), jnp.zeros(48))
    norm = collections.OrderedDict(scale=jnp.ones(32), table=jnp.arange(8).reshape(2, 4))
    heads = Dense(jnp.asarray(values(2, 64, 16, dtype=ml_dtypes.bfloat16)), None)
    return State(Frozen(dense=dense, blocks=[norm, (heads,)]), jnp.asarray(3))


def test_trees_are_what_jax_says():
    tree, plain = parameters(), Plain()
    tree.params.items_["plain"] = plain
    packed = modelq.quantize_array(tree, "nvfp4", axis=-2)
    is_packed = [isinstance(leaf, modelq.QuantizedArray) for leaf in tree_util.tree_leaves(packed)]
    assert is_packed == [True, False, False, False, True, False, False]      # kernel, bias, scale, table, kernel, plain, step
    back, fake = modelq.dequantize_array(packed), modelq.fake_quantize_array(tree, "nvfp4", axis=-2)
    for made in (packed, back, fake):
        assert tree_util.tree_structure(made) == tree_util.tree_structure(tree)
        assert made.params["dense"].features == 3 and made.params["plain"] is plain and made.step is tree.step
        assert made.params["dense"].bias is tree.params["dense"].bias and type(made.params["blocks"][0]) is collections.OrderedDict
    expected = modelq.fake_quantize_array(np.ascontiguousarray(values(32, 48).T), "nvfp4").T
    for made in (back, fake):
        same(made.params["dense"].kernel, expected)
        assert made.params["blocks"][1][0].kernel.dtype == jnp.bfloat16
    tree_util.tree_map(np.testing.assert_array_equal, *(tree_util.tree_leaves(made)[:5] for made in (back, fake)))


def test_paths_name_fields_keys_and_places():
    seen, tree = [], parameters()
    modelq.quantize_array(tree, "fp8", where=lambda path, leaf: seen.append(path) or path.endswith("kernel"))
    assert seen == ["params.dense.kernel", "params.dense.bias", "params.blocks.0.scale", "params.blocks.0.table",
                    "params.blocks.1.0.kernel", "step"]
    with pytest.raises(ValueError, match=r"params\.dense\.kernel \[48, 32\]: scheme nvfp4_w4a8 needs .* 64"):
        modelq.quantize_array(tree, "nvfp4_w4a8", axis=-2, block_size=64)
    with pytest.raises(ValueError, match=r"a\.1 \[2, 7\]: scheme nvfp4 needs"):
        modelq.quantize_array({"a": Nameless(jnp.ones((2, 16)), jnp.ones((2, 7)))}, "nvfp4")
    with pytest.raises(TypeError, match="params.blocks.0.table"):
        modelq.quantize_array(tree, "fp8", where=lambda path, leaf: path.endswith("table"))
    with pytest.raises(TypeError, match="key"):
        modelq.quantize_array({"key": jax.random.key(0)}, "fp8", where=lambda path, leaf: True)


def test_a_file_of_what_jax_made(tmp_path):
    tree = parameters()
    packed = modelq.quantize_array(tree, "nvfp4", axis=-2)
    modelq.save_arrays(packed, tmp_path / "file")
    found = modelq.load_arrays(tmp_path / "file", like=tree)
    assert tree_util.tree_structure(found) == tree_util.tree_structure(packed)
    for made, expected in zip(*(tree_util.tree_leaves(modelq.dequantize_array(given)) for given in (found, packed))):
        same(made, np.asarray(expected))


def test_a_quantized_model_computes():
    """Through jit, with what came back in the place of what was trained."""
    tree = {"dense": Dense(jnp.asarray(values(64, 32)), jnp.ones(32))}
    apply = jax.jit(lambda tree, x: x @ tree["dense"].kernel + tree["dense"].bias)
    x = jnp.asarray(values(5, 64, seed=1))
    made = apply(modelq.dequantize_array(modelq.quantize_array(tree, "fp8_channel", axis=0)), x)
    assert 0 < jnp.abs(made - apply(tree, x)).max() < 0.1 * jnp.abs(made).max()


def test_jax_is_never_imported_here(run_python):
    code = "import sys, numpy as np, modelq\npacked = modelq.quantize_array({'a': [np.ones((2, 32), np.float32)]}, 'fp8')\n" \
           "modelq.dequantize_array(packed)\nprint('jax' in sys.modules)"
    assert run_python(code) == "False"


def test_what_was_pickled_with_jax_opens_without(run_python):
    packed = pickle.dumps(modelq.quantize_array(jnp.ones((2, 32)), "fp8")).hex()
    code = "import pickle, sys\nmade = pickle.loads(bytes.fromhex(sys.argv[1])).dequantize()\nprint(type(made).__module__, made.sum())"
    assert run_python(code, args=[packed]) == "numpy 64.0"
