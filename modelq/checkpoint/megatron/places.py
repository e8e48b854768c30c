"""Where the files of a checkpoint are: a folder, or a tar archive (.nemo) that is read without being unpacked."""
from __future__ import annotations

import mmap
import os
import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from modelq.checkpoint.safetensors import close_mapping, drop_pages

AGAIN = "copy or save it again"


class Region(NamedTuple):
    """Some bytes of a mapped file: all of it, or a file within it."""
    mapping: mmap.mmap
    path: Path
    start: int
    size: int

    def part(self, start: int, size: int, what: str) -> Region:
        if start < 0 or size < 0 or start + size > self.size:
            raise ValueError(f"{self.path}: {what} is said to be at bytes {start} to {start + size} of {self.size}; {AGAIN}")
        return self._replace(start=self.start + start, size=size)

    def bytes(self) -> bytes:
        return self.mapping[self.start:self.start + self.size]

    def release(self) -> None:
        drop_pages(self.mapping, self.start, self.size)


class Place:
    """Files by their names below `path`, mapped when first asked for.

    names: of all files, "/" between folders.
    """

    def __init__(self, path: Path, names: frozenset[str]):
        self.path, self.names = path, names
        self._mapped: dict[Path, mmap.mmap] = {}

    def region(self, name: str) -> Region:
        """The bytes of a file. FileNotFoundError if there is none of the name, ValueError if it is empty."""
        raise NotImplementedError

    def release(self) -> None:
        for mapping in self._mapped.values():
            mapping.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        mapped, self._mapped = self._mapped, {}
        for mapping in mapped.values():
            close_mapping(mapping)

    def _map(self, path: Path) -> Region:
        if path not in self._mapped:
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size == 0:
                    raise ValueError(f"{path}: the file is empty; {AGAIN}")
                self._mapped[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapping = self._mapped[path]
        return Region(mapping, path, 0, len(mapping))


class Folder(Place):
    """A folder on disk."""

    def __init__(self, path: Path, depth: int = 3):
        super().__init__(path, frozenset(_files_below(path, depth)))

    def region(self, name: str) -> Region:
        return self._map(self.path / name)


class Archive(Place):
    """A tar archive. One that is compressed is unpacked into the temporary folder, and taken away again when it is closed."""

    def __init__(self, path: Path):
        self._unpacked: tempfile.TemporaryDirectory[str] | None = None
        self._places: dict[str, tuple[int, int]] = {}
        try:
            with open(path, "rb") as file:
                packed = file.read(2) == b"\x1f\x8b"
            with tarfile.open(path, "r:gz" if packed else "r:") as archive:
                for member in archive:
                    self._take(archive, member, packed)
        except (tarfile.TarError, EOFError, OSError) as error:
            self.close()
            if isinstance(error, FileNotFoundError):
                raise
            raise ValueError(f"{path}: no readable tar archive ({error}); {AGAIN}") from None
        super().__init__(path, frozenset(self._places))

    def region(self, name: str) -> Region:
        if name not in self._places:
            raise FileNotFoundError(f"{self.path}: no file {name!r} in it; {AGAIN}")
        if self._unpacked is not None:
            return self._map(Path(self._unpacked.name) / name)._replace(path=self.path / name)
        start, size = self._places[name]
        return self._map(self.path).part(start, size, f"file {name!r}")._replace(path=self.path / name)

    def close(self) -> None:
        if hasattr(self, "_mapped"):
            super().close()
        if self._unpacked is not None:
            self._unpacked.cleanup()
            self._unpacked = None

    def _take(self, archive: tarfile.TarFile, member: tarfile.TarInfo, packed: bool) -> None:
        if not member.isreg():
            return
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts:
            raise tarfile.TarError(f"it holds {member.name!r}, a place outside of it; do not trust this file")
        self._places[str(name)] = (member.offset_data, member.size)
        if packed:
            self._unpacked = self._unpacked or tempfile.TemporaryDirectory(prefix="modelq-nemo-")
            source = archive.extractfile(member)
            assert source is not None
            _copy(source, Path(self._unpacked.name) / name)


def _copy(source: IO[bytes], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)


def _files_below(path: Path, depth: int, prefix: str = "") -> list[str]:
    found = []
    for entry in sorted(path.iterdir()):
        if entry.is_file():
            found.append(prefix + entry.name)
        elif depth > 1 and entry.is_dir():
            found += _files_below(entry, depth - 1, f"{prefix}{entry.name}/")
    return found
