"""Atomic writes: a reader, or the next run after a crash, finds the old version or the new one, never a half of it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, TextIO, overload

if sys.platform != "win32":
    import fcntl

TEMPORARY_PREFIX = ".tmp-"


@overload
def atomic_write(path: str | Path, mode: Literal["wb"] = "wb") -> contextlib.AbstractContextManager[BinaryIO]: ...
@overload
def atomic_write(path: str | Path, mode: Literal["w"]) -> contextlib.AbstractContextManager[TextIO]: ...
def atomic_write(path: str | Path, mode: Literal["wb", "w"] = "wb") -> contextlib.AbstractContextManager[IO[Any]]:
    """Open a file object ("w" is UTF-8) whose content becomes ``path`` when the block ends without an error.

    It is written to a temporary file in the same folder, fsynced and renamed; after an error the temporary file is
    removed and ``path`` is as it was. The parent folder must exist.
    """
    return _atomic_write(Path(path).resolve(), mode)


@contextlib.contextmanager
def _atomic_write(path: Path, mode: str) -> Iterator[IO[Any]]:
    temporary = _temporary_name(path)
    try:
        with _naming_a_full_disk(path), temporary.open(mode, encoding="utf-8" if mode == "w" else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Give an empty temporary folder that becomes ``path`` when the block ends without an error.

    Everything in it is fsynced before it is renamed; after an error it is removed and ``path`` is as it was. An
    existing ``path`` that is not an empty folder is refused (FileExistsError), also one that appeared meanwhile,
    unless ``replace=True``, which exchanges old and new in one step where the system can (Linux), so that a complete
    version is there at every moment.
    """
    path = Path(path).resolve()
    if path.is_file() or (path.exists() and not replace and any(path.iterdir())):
        raise _exists_already(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    temporary.mkdir()
    try:
        with _naming_a_full_disk(path):
            yield temporary
            for folder, _, files in os.walk(temporary):
                for name in files:
                    _fsync(Path(folder, name))
                _fsync(Path(folder))
        if replace and path.exists():
            _exchange(temporary, path)
        else:
            _rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _fsync(path.parent)
    if temporary.exists():  # now the version that was replaced
        shutil.rmtree(temporary)


@contextlib.contextmanager
def lock(path: str | Path) -> Iterator[TextIO | None]:
    """Hold a lock, and give its file, or give None where another process holds it.

    The system frees it when the process ends, however it ends. On Windows nobody is kept out.
    """
    with Path(path).open("a+", encoding="utf-8") as file:
        if sys.platform != "win32":
            try:
                # Not flock: a data loader's workers would inherit it, and keep it for seconds after a kill.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                yield None
                return
        yield file


def digest(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_leftovers(folder: str | Path, name: str = "*") -> list[Path]:
    """Delete what killed processes left half-written for ``name`` (a glob) in ``folder``, and return it.

    Call it where no other process can be writing that name.
    """
    leftovers = sorted(Path(folder).glob(f"{TEMPORARY_PREFIX}{name}-????????"))
    for leftover in leftovers:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    return leftovers


def _temporary_name(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{secrets.token_hex(4)}")


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot fsync a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exists_already(path: Path) -> FileExistsError:
    return FileExistsError(f"{path} exists already; choose another folder or delete it first")


def _rename(new: Path, path: Path) -> None:
    """Rename a folder to where there is none, or an empty one; the system refuses anything else in the same step."""
    if os.name == "nt" and path.is_dir() and not any(path.iterdir()):
        path.rmdir()  # Windows renames to no existing folder
    try:
        new.rename(path)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise _exists_already(path) from error


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders in one step; where the system cannot, by three renames, with a moment without ``old``."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    at_fdcwd, rename_exchange = -100, 2
    if renameat2 and renameat2(at_fdcwd, os.fsencode(new), at_fdcwd, os.fsencode(old), rename_exchange) == 0:
        return
    aside = _temporary_name(old)
    old.rename(aside)
    new.rename(old)
    aside.rename(new)


@contextlib.contextmanager
def _naming_a_full_disk(path: Path) -> Iterator[None]:
    """Turn the error of a full disk into one that says so, and what became of ``path``."""
    try:
        yield
    except Exception as error:
        # safetensors has an exception of its own for a full disk; torch only finds an unexpected position in its file
        is_full = (
            getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            or "No space left on device" in str(error)
            or shutil.disk_usage(path.parent).free < 2**16
        )
        if not is_full:
            raise
        state = "the earlier version is intact" if path.exists() else "nothing was left there"
        message = f"the disk is full: {path} could not be written ({state}); free some space and run again"
        raise OSError(errno.ENOSPC, message) from error
