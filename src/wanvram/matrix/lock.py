"""One series at a time in a folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["lock_folder"]

LOCK_FILE = ".wanvram-lock"  # where folders cannot be locked themselves: on Windows


def lock_folder(folder: Path) -> int:
    """A descriptor whose closing gives the lock back. Raises BlockingIOError if another process holds it, or OSError."""
    if sys.platform == "win32":
        return _locked_file(folder / LOCK_FILE)
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
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
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    except OSError as error:  # EACCES or EDEADLOCK: the byte is locked
        os.close(handle)
        raise BlockingIOError(*error.args) from error
    return handle
