"""One run, series or conversion at a time in a folder: a lock that ends with the process that holds it. No torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wanvram.errors import InputError

__all__ = ["LOCK_FILE", "alone_in"]

LOCK_FILE = ".wanvram-lock"  # where folders cannot be locked themselves: on Windows


@contextmanager
def alone_in(folder: Path, program: str = "wanvram") -> Iterator[None]:
    """Raises InputError if another process is writing to `folder`, which exists. Where nothing can be locked (some network
    file systems, folders that cannot be read) the work goes on without."""
    handle = None
    try:
        handle = lock_folder(folder)
    except BlockingIOError as error:
        raise InputError(f"another {program} is writing to {folder}; wait for it or give -o DIR") from error
    except OSError:
        pass
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def lock_folder(folder: Path) -> int:
    """A descriptor whose closing gives the lock back. Raises BlockingIOError if another process holds it, or OSError."""
    if sys.platform == "win32":
        return _locked_file(folder / LOCK_FILE)
    import fcntl

    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # a pipe of that name would wait for somebody who writes
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _locked_file(path: Path) -> int:
    import msvcrt

    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]  # there on Windows
    except OSError as error:  # EACCES or EDEADLOCK: the byte is locked
        os.close(handle)
        raise BlockingIOError(*error.args) from error
    return handle
