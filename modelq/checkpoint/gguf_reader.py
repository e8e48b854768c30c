"""The gguf library's reader, made safe for damaged files and quick for large vocabularies."""
from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np


def parse(path: Path) -> tuple[Any, dict[str, Any]]:
    """(the library's GGUFReader, {metadata key: value}). ValueError if the file is damaged, OSError if it cannot be opened."""
    try:
        with open(path, "rb"):
            reader = _reader_class()(path)
        return reader, {name: reader.value_of(field) for name, field in reader.fields.items()}
    except OSError:
        raise
    except Exception as error:  # the library raises ValueError, KeyError, IndexError, OverflowError as it stumbles
        raise ValueError(f"{path}: not a readable GGUF file ({error}); download the file again") from None


def _reader_class() -> type:
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):
        """Overrides two internals of the library. Every access is checked against the end of the file, which also keeps a damaged
        count from being counted to for hours; and arrays are read at once, not an object per element."""

        def plain(self) -> np.ndarray:
            """The file's bytes; slices of a memmap are an order of magnitude slower."""
            if "bytes" not in self.__dict__:
                self.bytes, self.arrays = np.asarray(self.data), {}
            return self.bytes

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
            dtype = np.dtype(dtype).newbyteorder(self.byte_order if override_order is None else override_order)
            offset, end = int(offset), int(offset) + int(count) * dtype.itemsize
            if end > len(self.plain()):
                raise ValueError(f"the file ends at byte {len(self.bytes)}, {end} are needed")
            return self.bytes[offset:end].view(dtype)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list, list[int], list]:
            if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
                return super()._get_field_parts(orig_offs, raw_type)
            kind = GGUFValueType(self._get(orig_offs, np.uint32)[0])
            count = int(self._get(orig_offs + 4, np.uint64)[0])
            start = orig_offs + 12
            if kind == GGUFValueType.STRING:
                values, end = _strings(self.plain(), start, count)
            elif kind in self.gguf_scalar_to_np:
                array = self._get(start, self.gguf_scalar_to_np[kind], count)
                values, end = array.tolist(), start + array.nbytes
            else:
                return super()._get_field_parts(orig_offs, raw_type)
            self.arrays[orig_offs] = values
            return end - orig_offs, [], [], [GGUFValueType.ARRAY, kind]

        def value_of(self, field: Any) -> Any:
            """The field's value: what was read at once, else as the library gives it."""
            place = field.offset + 8 + len(field.name.encode()) + 4  # behind the key's length, the key and the type
            return self.arrays[place] if place in self.arrays else field.contents()

    return Reader


def _strings(data: np.ndarray, offset: int, count: int) -> tuple[list[str], int]:
    """count strings, each behind its length in 8 bytes; and where they end."""
    view, read_length = memoryview(data), struct.Struct("<Q").unpack_from
    values: list[str] = []
    while len(values) < count:
        if offset + 8 > len(view):
            raise ValueError(f"the file ends within a list of {count} strings")
        end = offset + 8 + read_length(view, offset)[0]
        if end > len(view):
            raise ValueError(f"the file ends within a list of {count} strings")
        values.append(str(view[offset + 8 : end], "utf-8"))
        offset = end
    return values, offset
