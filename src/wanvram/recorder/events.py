"""memory_events.json: a valid JSON list after every event, so that a kill at any moment leaves what was logged."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from wanvram.errors import InputError, OutputError
from wanvram.record import Memory
from wanvram.units import MIB

__all__ = ["EventLog"]


# The kernel looks for a deadly signal between the pages of one write, never within one.
PAGE = 4096
# Above this a copy takes about 5 ms; a larger file is extended in place, and a kill can then tear its last event.
LARGEST_COPY = 16 * MIB


BINARY = getattr(os, "O_BINARY", 0)  # Windows would write \r\n for \n


class EventLog:
    """Appends `{name, timestamp, memory_log, metadata}` and the exact byte counts.

    An event within one page is one write over the closing bracket, `,{...}]`, which no kill tears. One that crosses
    into the next page goes into a copy that replaces the file. In place, 84 of 906 killed processes left half an event,
    all of them with long metadata.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = -1
        self._end = 1
        self._count = 0
        try:
            self._replace(b"[]\n")
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error

    def log(self, name: str, memory: Memory, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """With `base_memory` (bytes) in the metadata the text gives the increment over it, else the peak."""
        if metadata and "base_memory" in metadata:
            increment = memory.allocated_bytes - _bytes(metadata["base_memory"])
            text = f"{name}: incremental_memory={increment / MIB:.2f} MB"
        else:
            text = f"{name}: peak_memory={memory.allocated_bytes / MIB:.2f} MB"
        event = {
            "name": name,
            "timestamp": time.time(),
            "memory_log": text,
            "metadata": metadata,
            "allocated_bytes": memory.allocated_bytes,
            "reserved_bytes": memory.reserved_bytes,
            "device_bytes": memory.device_bytes,
        }
        self._append(_dumps(event))
        return event

    def _append(self, text: str) -> None:
        # A lone surrogate (a file name that is not UTF-8) becomes its JSON escape.
        data = ((",\n" if self._count else "\n") + text).encode("utf-8", "backslashreplace")
        try:
            if self._file < 0:
                self._file = os.open(self.path, os.O_RDWR | BINARY)
            self._write(data + b"]\n")
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}") from error
        self._end += len(data)
        self._count += 1

    def _write(self, data: bytes) -> None:
        """`data` at the closing bracket, in a way that leaves a valid list whenever the process is killed."""
        first, last = self._end, self._end + len(data) - 1
        if first // PAGE == last // PAGE or self._end > LARGEST_COPY:
            self._write_in_place(data)
        else:
            os.lseek(self._file, 0, os.SEEK_SET)
            self._replace(os.read(self._file, self._end) + data)

    def _write_in_place(self, data: bytes) -> None:
        """Puts the bracket back if the disk takes less than everything."""
        try:
            _write_all(self._file, data, self._end)
        except OSError:
            os.lseek(self._file, self._end, os.SEEK_SET)
            os.write(self._file, b"]\n")
            os.ftruncate(self._file, self._end + 2)
            raise

    def _replace(self, content: bytes) -> None:
        """A new file under the same name; the old one stays until the new one is complete. Windows replaces no open file."""
        new = self.path.with_name(f".{self.path.name}.new")
        try:
            file = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | BINARY, 0o666)
            try:
                _write_all(file, content, 0)
            finally:
                os.close(file)
            self.close()
            os.replace(new, self.path)
        except OSError:
            new.unlink(missing_ok=True)
            raise

    def close(self) -> None:
        """Gives the file back; a later event opens it again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _write_all(file: int, data: bytes, place: int) -> None:
    """One write at `place`; OSError if the disk takes less than everything."""
    os.lseek(file, place, os.SEEK_SET)
    if os.write(file, data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _bytes(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"base_memory: {value!r} is not a number of bytes") from error


def _dumps(event: dict[str, Any]) -> str:
    """One JSON object; what JSON cannot hold (an object, a key that is no text, NaN) is written as its text."""
    try:
        return json.dumps(event, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return json.dumps(event | {"metadata": _plain(event["metadata"])}, ensure_ascii=False)


def _plain(value: Any, depth: int = 0) -> Any:
    if isinstance(value, dict) and depth < 10:
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and depth < 10:
        return [_plain(item, depth + 1) for item in value]
    exact = value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))
    return value if exact else str(value)
