"""A folder that appears whole or not at all.

Work goes into a temporary folder beside the target, which is synced and renamed into place at the end. Its name begins with a dot
and the target's name and ends in .partial; its owner holds a lock on it, which the kernel drops with the process: the next run
to the same target removes what no one holds.
"""
from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PARTIAL, _REPLACED = ".partial", ".replaced"
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100
_NOT_THERE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.ENOLCK)  # what a file system says that lacks an operation


@contextmanager
def atomic_directory(target: Path | str, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends; if it ends by an exception (Ctrl-C too), nothing is left.

    A target that exists, unless it is an empty folder, is refused with FileExistsError. With overwrite the old folder stays
    whole until the new one is complete and synced, and is then exchanged for it; only a folder that looks like a checkpoint (it
    has a config.json) is overwritten. OSError as the system reports it.
    """
    target = Path(os.path.realpath(target))
    _restore_or_remove_leftovers(target)
    check_target(target, overwrite)
    made, partial = _make_parents(target.parent), _Partial(target)
    try:
        partial.make()
        assert partial.path is not None
        yield partial.path
        sync_tree(partial.path)
        check_target(target, overwrite)
        _move_into_place(partial.path, target)
        _sync(target.parent)
    except BaseException:
        partial.remove()
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise
    finally:
        partial.unlock()


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below, then the folder itself."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_target(target: Path, overwrite: bool) -> None:
    """FileExistsError if atomic_directory would not write to target, and what `check_writable` raises. Callers with long work ahead ask
    first."""
    check_writable(target)
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(errno.EEXIST, "a file is there, a folder is to be made; choose another name", str(target))
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(errno.EEXIST, "the folder exists; choose another, or pass overwrite=True (--overwrite)", str(target))
    if not (target / "config.json").is_file() or target in (Path.cwd(), *Path.cwd().parents) or os.path.ismount(target):
        raise FileExistsError(errno.EEXIST, "the folder does not look like a checkpoint, so it is not overwritten", str(target))


def check_writable(target: Path) -> None:
    """Whether a file or folder can be made in this place: PermissionError, NotADirectoryError. Folders on the way may be missing."""
    folder = next(parent for parent in Path(os.path.realpath(target)).parents if parent.exists())
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"a file, not a folder that {target.name} could be in", str(folder))
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        why = f"{target.name} cannot be written there: no permission, or a read-only file system"
        raise PermissionError(errno.EACCES, why, str(folder))


def check_file(path: Path | str) -> None:
    """Whether a file can be written, asked before the work that would be in vain. IsADirectoryError, FileNotFoundError: there is no folder
    for it; and what `check_writable` raises."""
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder is there, a file is to be written; choose another name", str(path))
    check_writable(path)
    if not path.parent.exists():
        raise FileNotFoundError(errno.ENOENT, f"no such folder, to write {path.name} in", str(path.parent))


def _make_parents(folder: Path) -> list[Path]:
    """Make the folder; returns what had to be made, deepest first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


class _Partial:
    """The folder beside the target, locked. It knows of what it makes before that is there, so that no interrupt leaves it behind."""

    def __init__(self, target: Path):
        self.target = target
        self.path: Path | None = None
        self.lock: int | None = None

    def make(self) -> None:
        while self.lock is None:        # None: another process took it for a leftover, before it was locked
            self.path = self.target.parent / f".{self.target.name}.{secrets.token_hex(4)}{_PARTIAL}"
            try:
                self.path.mkdir()
            except FileExistsError:
                self.path = None
            else:
                self.lock = _lock(self.path, required=False)

    def remove(self) -> None:
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)

    def unlock(self) -> None:
        if self.lock is not None:
            os.close(self.lock)


def _lock(path: Path, required: bool = True) -> int | None:
    """A descriptor that holds an exclusive lock on the folder; None if another process holds it, the folder is gone, or the file
    system has no locks and one is required."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except OSError as error:
        if error.errno in _NOT_THERE and not required:
            return descriptor
    os.close(descriptor)
    return None


def _restore_or_remove_leftovers(target: Path) -> None:
    """What killed runs left: half-made folders go; an old target that had been set aside comes back if there is no new one."""
    for path in sorted(target.parent.glob(f".{_escaped(target.name)}.*")):
        if not path.name.removeprefix(f".{target.name}.").endswith((_PARTIAL, _REPLACED)) or path.is_symlink() or not path.is_dir():
            continue
        lock = _lock(path)
        if lock is None:
            continue
        try:
            if path.name.endswith(_REPLACED) and not target.exists():
                path.rename(target)
            else:
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)


def _escaped(name: str) -> str:
    return "".join(f"[{char}]" if char in "[]*?" else char for char in name)


def _move_into_place(partial: Path, target: Path) -> None:
    """Rename; an old target is exchanged in one step where the file system can, and then removed."""
    if not target.exists() or not any(target.iterdir()):
        try:
            partial.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # someone was faster
                raise FileExistsError(errno.EEXIST, "the folder was made by another process meanwhile", str(target)) from None
            raise
        return
    if _exchange(partial, target):
        shutil.rmtree(partial, ignore_errors=True)
        return
    aside = partial.with_name(partial.name.removesuffix(_PARTIAL) + _REPLACED)
    target.rename(aside)
    try:
        partial.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Linux's renameat2 with RENAME_EXCHANGE; False if the C library or the file system does not have it."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_THERE:
        return False
    raise OSError(code, os.strerror(code), str(second))
