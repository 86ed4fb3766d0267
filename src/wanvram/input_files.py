"""Files given by the user: regular ones only, and read to a limit. No torch.

A FIFO would wait for ever, and /dev/zero has no end though its size is 0.
"""

from __future__ import annotations

import gzip
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase, BufferedReader
from pathlib import Path

from wanvram.errors import InputError
from wanvram.foreign_text import shown

__all__ = ["DAMAGED_GZIP", "open_regular", "read_text", "state_of", "unpacked", "whole"]

DAMAGED_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)  # what reading one raises


def state_of(path: Path) -> os.stat_result | None:
    """None where nothing is. Raises InputError for a path that cannot be: too long, no permission, links in a circle."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{shown(path)} cannot be read: {_reason(error)}") from error


def whole(path: Path) -> Path:
    """Absolute and without links. Links in a circle stay as they are, where Path.resolve() raises before Python 3.13."""
    return Path(os.path.realpath(path))


def open_regular(path: Path) -> BufferedReader:
    """The file, opened for reading. Raises InputError unless it is a regular file; it is never waited for."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise InputError(f"{shown(path)} cannot be read: {_reason(error)}") from error
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        kind = "a directory" if stat.S_ISDIR(mode) else "a device, a pipe or a socket"
        raise InputError(f"{shown(path)} cannot be read: it is {kind}, not a regular file")
    return os.fdopen(handle, "rb")


@contextmanager
def unpacked(path: Path) -> Iterator[BufferedIOBase]:
    """The bytes of the file, or of what was gzipped into it. Raises InputError naming the path, also for what cannot be read
    inside.
    """
    with open_regular(path) as raw:
        try:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            yield gzip.GzipFile(fileobj=raw) if packed else raw
        except DAMAGED_GZIP as error:
            raise InputError(f"{shown(path)} is a truncated or damaged gzip file") from error
        except OSError as error:
            raise InputError(f"{shown(path)} cannot be read: {_reason(error)}") from error


def read_text(path: Path, limit: int) -> str:
    """UTF-8 text, also gzipped; a byte order mark is left out. Raises InputError naming the path for what is over `limit`
    bytes, cannot be read or is no text.
    """
    with unpacked(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise InputError(f"{shown(path)} has over {limit:,} bytes, which is the most that is read of such a file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{shown(path)} is no text: byte {error.start:,} is not UTF-8") from error


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or "no file can have that name"
