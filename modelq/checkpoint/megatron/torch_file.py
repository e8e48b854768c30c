"""Files of torch.save, read without torch: a zip archive of a pickle that says what there is, and one uncompressed member per storage.

Tensors stay where they are until they are read, as views of the mapped file. What a pickle may name is listed here (`TORCH_NAMES`);
see pickles.py for why nothing of the file is executed.
"""
from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from modelq.checkpoint.megatron.pickles import Name, Opaque, read_pickle
from modelq.checkpoint.megatron.places import AGAIN, Region
from modelq.checkpoint.safetensors import numpy_dtype

# torch's dtype -> NumPy's or ml_dtypes' spelling, and the storage class of the file format's first years.
_STORAGES = {"float32": "Float", "float64": "Double", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long", "int32": "Int",
             "int16": "Short", "int8": "Char", "uint8": "Byte", "bool": "Bool"}
_MORE_DTYPES = ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")


@dataclass(frozen=True)
class Storage:
    """The numbers that tensors are views of: dtype "" where each tensor says its own."""
    dtype: str
    key: str
    count: int


@dataclass(frozen=True, eq=False)
class FileTensor:
    """A tensor of the file, not read. offset and strides in elements."""
    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchFile:
    """One file of torch.save. value: what was saved, with a `FileTensor` for every tensor.

    ValueError if it is damaged, of another kind, or asks for a name that is not on the list.
    """

    def __init__(self, region: Region):
        self.region = region
        self._members = _members(region)
        names = [name for name in self._members if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise ValueError(f"{region.path}: no file of torch.save (no data.pkl in it); {AGAIN}")
        self._folder = names[0].removesuffix("data.pkl")
        order = self._members.get(f"{self._folder}byteorder")
        if order is not None and order.bytes() != b"little":
            raise ValueError(f"{region.path}: written on a machine of {order.bytes()[:20]!r} byte order; little is read")
        try:
            self.value = read_pickle(self._members[names[0]].bytes(), TORCH_NAMES, _storage)
        except ValueError as error:
            raise type(error)(f"{region.path}: {error}") from None

    def read(self, tensor: FileTensor) -> np.ndarray:
        """The tensor, a read-only view of the file. ValueError if it reaches beyond its storage."""
        data, dtype = self._data(tensor), numpy_dtype(tensor.dtype)
        last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides))
        if 0 in tensor.shape:
            return np.empty(tensor.shape, dtype)
        if tensor.offset < 0 or min(tensor.strides, default=0) < 0 or (last + 1) * dtype.itemsize > data.size:
            raise ValueError(f"{self.region.path}: a tensor {list(tensor.shape)} of {tensor.dtype} reaches beyond its storage of "
                             f"{data.size} bytes; {AGAIN}")
        flat = np.frombuffer(data.mapping, dtype, last + 1 - tensor.offset, data.start + tensor.offset * dtype.itemsize)
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)

    def release(self, tensor: FileTensor) -> None:
        self._data(tensor).release()

    def _data(self, tensor: FileTensor) -> Region:
        name = f"{self._folder}data/{tensor.storage.key}"
        if name not in self._members:
            raise ValueError(f"{self.region.path}: no member {name!r}, which a tensor lies in; {AGAIN}")
        return self._members[name]


class _Window:
    """A region as the seekable file that zipfile wants."""

    def __init__(self, region: Region):
        self.region, self.place = region, 0

    def read(self, size: int = -1) -> bytes:
        end = self.region.size if size is None or size < 0 else min(self.place + size, self.region.size)
        start, self.place = self.place, max(end, self.place)
        return self.region.mapping[self.region.start + start:self.region.start + max(end, start)]

    def seek(self, offset: int, whence: int = 0) -> int:
        self.place = max(0, offset + (0, self.place, self.region.size)[whence])
        return self.place

    def tell(self) -> int:
        return self.place

    def seekable(self) -> bool:
        return True


def _members(region: Region) -> dict[str, Region]:
    """The members of a zip archive whose members are stored as they are."""
    try:
        with zipfile.ZipFile(_Window(region)) as archive:   # type: ignore[call-overload]
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise ValueError(f"{region.path}: no zip archive, as torch.save has written since PyTorch 1.6 ({error}); load and save it anew "
                         "with a newer PyTorch, or copy it again") from None
    members = {}
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{region.path}: member {entry.filename!r} is compressed; torch.save compresses nothing; {AGAIN}")
        header = region.part(entry.header_offset, 30, f"the header of {entry.filename!r}").bytes()
        if header[:4] != b"PK\x03\x04":
            raise ValueError(f"{region.path}: member {entry.filename!r} has no header; {AGAIN}")
        behind = 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        members[entry.filename] = region.part(entry.header_offset + behind, entry.file_size, f"member {entry.filename!r}")
    return members


# What the pickles of torch and of Megatron-LM's training state name ------------------------------------------------------------

def _storage(identity: Any) -> Storage:
    kind, storage, key, _, count = identity
    if kind != "storage" or not isinstance(storage, Name) or storage.name not in _DTYPE_OF_STORAGE or not isinstance(key, str):
        raise ValueError(f"a tensor's storage is {identity!r}")
    return Storage(_DTYPE_OF_STORAGE[storage.name], key, count)


def _tensor(storage: Storage, offset: int, shape: Any, strides: Any, *_: Any) -> FileTensor:
    sizes = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or len(shape) != len(strides) or not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"a tensor has the offset, shape and strides {offset!r}, {shape!r}, {strides!r}")
    return FileTensor(storage, storage.dtype, offset, tuple(shape), tuple(strides))


def _tensor_of_dtype(storage: Storage, offset: int, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any) -> FileTensor:
    if not isinstance(dtype, Name):
        raise ValueError(f"a tensor has the dtype {dtype!r}")
    made = _tensor(storage, offset, shape, strides)
    return FileTensor(storage, dtype.name.removeprefix("torch."), made.offset, made.shape, made.strides)


def _first(value: Any, *_: Any) -> Any:
    return value


def _of_type(function: Any, _type: Any, arguments: Any, *_: Any) -> Any:
    if not isinstance(function, Name):
        raise ValueError("a tensor made by no function")
    return function.call(arguments)


def _encode(text: str, coding: str = "latin1") -> bytes:
    if coding != "latin1":
        raise ValueError(f"bytes spelt in {coding!r}")
    return text.encode("latin1")


def _of_bytes(kind: Callable[..., Any]) -> Callable[..., Any]:
    """bytes and bytearray of what is there; a number would ask for so much memory."""
    def build(*arguments: Any) -> Any:
        if arguments and not isinstance(arguments[0], (bytes, str)):
            raise ValueError(f"{kind.__name__} of a {type(arguments[0]).__name__}")
        return kind(*arguments)
    return build


_DTYPE_OF_STORAGE = {f"torch.{kind}Storage": dtype for dtype, kind in _STORAGES.items()} | {"torch.storage.UntypedStorage": ""}
_BUILTINS: dict[str, Callable[..., Any]] = {"set": set, "frozenset": frozenset, "list": list, "dict": dict, "complex": complex,
                                            "slice": slice}
# Kept as an Opaque: settings of the training run, states of random generators and of optimizers that no weight needs.
_OPAQUE = """
    argparse.Namespace collections.defaultdict collections.Counter _io.BytesIO pathlib.PosixPath pathlib.PurePosixPath pathlib.Path
    pathlib._local.PosixPath datetime.timedelta datetime.datetime signal.Signals types.SimpleNamespace functools.partial
    torch.device torch.Generator torch.serialization._get_layout torch.layout torch.memory_format torch.Tensor torch.nn.parameter.Parameter
    numpy.ndarray numpy.dtype numpy.core.multiarray._reconstruct numpy.core.multiarray.scalar numpy._core.multiarray._reconstruct
    numpy._core.multiarray.scalar numpy._core.numeric._frombuffer numpy.core.numeric._frombuffer
    torch.distributed.checkpoint.metadata.Metadata torch.distributed.checkpoint.metadata.MetadataIndex
    torch.distributed.checkpoint.metadata.TensorStorageMetadata torch.distributed.checkpoint.metadata.BytesStorageMetadata
    torch.distributed.checkpoint.metadata.ChunkStorageMetadata torch.distributed.checkpoint.metadata.TensorProperties
    torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING torch.distributed.checkpoint.metadata.StorageMeta
    torch.distributed.checkpoint.filesystem._StorageInfo torch.distributed._shard.sharded_tensor.metadata.TensorProperties
    torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING
    megatron.core.enums.ModelType megatron.core.enums.Fp8Recipe megatron.core.enums.Fp4Recipe
    megatron.core.transformer.enums.AttnBackend megatron.core.transformer.enums.AttnMaskType megatron.core.transformer.enums.AttnType
    megatron.core.transformer.enums.LayerType megatron.core.transformer.enums.ModelType megatron.core.transformer.enums.CudaGraphScope
    megatron.core.rerun_state_machine.RerunMode megatron.core.rerun_state_machine.RerunState
    megatron.core.rerun_state_machine.RerunDiagnostic megatron.core.rerun_state_machine.RerunErrorInjector
    megatron.core.rerun_state_machine.RerunValidationStatus megatron.core.optimizer.optimizer_config.OptimizerConfig
    megatron.core.dist_checkpointing.mapping.ShardedObject megatron.core.num_microbatches_calculator.ConstantNumMicroBatchesCalculator
    megatron.model.enums.ModelType megatron.model.enums.AttnMaskType megatron.model.enums.LayerType megatron.model.enums.AttnType
    megatron.model.enums.PositionEmbeddingType
""".split()
TORCH_NAMES: dict[str, Callable[..., Any] | None] = {
    **dict.fromkeys(_OPAQUE),
    **dict.fromkeys(_DTYPE_OF_STORAGE),
    **dict.fromkeys(f"torch.{dtype}" for dtype in (*_STORAGES, *_MORE_DTYPES, "complex64", "strided", "contiguous_format")),
    **{f"{module}.{name}": kind for module in ("builtins", "__builtin__") for name, kind in _BUILTINS.items()},
    **{f"{module}.{kind.__name__}": _of_bytes(kind) for module in ("builtins", "__builtin__") for kind in (bytes, bytearray)},
    "collections.OrderedDict": dict, "_codecs.encode": _encode, "torch.Size": tuple,
    "torch._utils._rebuild_tensor": _tensor, "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype, "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first, "torch._tensor._rebuild_from_type_v2": _of_type,
}


def plain(value: Any) -> Any:
    """Settings as plain values: a torch dtype as "bfloat16", an enumeration's member as what it was made of."""
    if isinstance(value, Name):
        return value.name.rpartition(".")[2]
    if isinstance(value, Opaque) and len(value.arguments) == 1 and isinstance(value.arguments[0], (int, str)):
        return value.arguments[0]
    return value
