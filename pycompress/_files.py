"""Files that are whole or not there, JSON that says its own hash, folders that one process writes to at a time."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

HASH = "sha256"
LOCK = "lock"
_held: WeakSet[io.FileIO] = WeakSet()


def write_whole(file: Path, data: bytes) -> None:
    """Write a file so that after an interruption it is the old one or the new one, never part of it.

    What it was written to first is removed by any error, and what killed processes left of this file goes.
    """
    sweep_parts(file.parent, file.name)
    try:
        part, descriptor = _part(file)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
            os.replace(part, file)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ValueError(f"cannot write {file}: {error.strerror}") from error


def sweep_parts(folder: Path, name: str = "") -> None:
    """Delete what processes that are gone have left of unfinished files, all or those that were to be called `name`."""
    pattern = re.compile(rf"\.{re.escape(name) or '.*'}\.[0-9a-f]{{8}}\.part")
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            if pattern.fullmatch(entry.name):
                with suppress(OSError), io.FileIO(os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as f:
                    # Who writes it holds its lock.
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(entry.path)


def _part(file: Path) -> tuple[Path, int]:
    """A new file beside `file`, locked, and its descriptor."""
    while True:
        part = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process sweeps it at this moment
            os.close(descriptor)
            continue
        except OSError:  # a file system without locks
            pass
        return part, descriptor


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write an object that `read_json` takes back; numbers that are not finite become null."""
    write_whole(file, encoded(content))


def encoded(content: dict[str, Any]) -> bytes:
    """What `write_json` writes."""
    return json.dumps(sealed(content), indent=1, allow_nan=False).encode()


def read_json(file: Path, remedy: str | None = None) -> dict[str, Any]:
    """The object that `write_json` wrote; `ValueError` where the file holds something else, with the remedy."""
    try:
        return unsealed(json.loads(file.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged; {remedy or f'delete {file.parent} to start over'}") from error


def of_earlier_version(file: Path) -> bool:
    """Whether a file holds an object without a hash, as earlier versions wrote."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and HASH not in content


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The object with a hash of itself."""
    content = json.loads(json.dumps(finite(content)))
    return content | {HASH: _hash(content)}


def unsealed(content: Any) -> dict[str, Any]:
    """The object without its hash; `ValueError` where that is another's."""
    if not isinstance(content, dict) or HASH not in content:
        raise ValueError("there is no hash")
    rest = {name: value for name, value in content.items() if name != HASH}
    if content[HASH] != _hash(rest):
        raise ValueError("the hash is another's")
    return rest


def finite(value: Any) -> Any:
    """JSON values with null for every number that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def hash_of_file(file: Path) -> str:
    """The SHA-256 of what is in a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while data := stream.read(1 << 22):
            digest.update(data)
    return digest.hexdigest()


def folder_of(given: str | Path, what: str) -> Path:
    """A folder that the user names; `ValueError` for an empty name, which would be the working directory."""
    if not isinstance(given, (str, os.PathLike)):
        raise TypeError(f"{what} must be a directory, got {type(given).__name__}")
    if not str(given).strip():
        raise ValueError(f"{what} is an empty name; give a directory, '.' for this one")
    return Path(given)


@contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Be the only process that writes to a folder, for the block; `ValueError` where another is. `what`: its kind."""
    lock = locked(folder)
    if lock is None:
        with suppress(OSError, ValueError):
            what += f" (process {int((folder / LOCK).read_bytes()[:16])})"
        raise ValueError(f"another {what} is writing to {folder}; wait until it ends, or give another folder")
    with lock:
        yield


def locked(folder: Path, name: str = LOCK) -> io.FileIO | None:
    """The folder's lock, held until it is closed or its process ends; None while it is held."""
    file = folder / name
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EROFS) and not os.access(folder, os.W_OK):
            return io.FileIO(os.devnull)  # who cannot write need not be alone
        if error.errno == errno.ELOOP:
            raise ValueError(f"{file} is a symbolic link; delete it") from error
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from error
    lock = io.FileIO(descriptor, "r+")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        lock.close()
        raise ValueError(f"{file} is not a file; delete it")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    except OSError as error:
        lock.close()
        raise ValueError(f"cannot lock {folder}: {error.strerror}; give a folder on another file system") from error
    # Anything but a number is not ours to overwrite.
    with suppress(OSError):
        if re.fullmatch(rb"\d*", lock.read(32)):
            lock.truncate(0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    _held.add(lock)
    return lock


def _release_in_child() -> None:
    for lock in list(_held):
        lock.close()


# A forked worker would hold the lock beyond its parent's end.
os.register_at_fork(after_in_child=_release_in_child)


def read_text(file: str | Path) -> str:
    """A UTF-8 text; `ValueError` where it cannot be read."""
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read the text {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read the text {file}: it is not UTF-8") from error
