"""memory_events.json: what an event says, and a file for each process that logs any."""

from __future__ import annotations

import json
import math
import os
import threading
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wanvram.output_files import writing
from wanvram.recorder.event_file import ListFile, claim
from wanvram.spans import Memory
from wanvram.units import MIB

__all__ = ["EventLog", "ProcessLock", "base_memory", "warn"]

MAX_DEPTH = 10  # of lists and dicts in metadata; what is deeper is written as its text
# A text with fewer brackets is not nested more deeply than any reader of JSON goes (Python's: 1,000, less the caller's frames).
MANY_BRACKETS = 100
LARGEST_INT = 2**63


class ProcessLock:
    """A lock for each process: a child may be forked while another thread of the parent holds the parent's."""

    def __init__(self) -> None:
        self._locks: dict[int, threading.RLock] = {}

    def here(self) -> threading.RLock:
        pid = os.getpid()
        return self._locks.get(pid) or self._locks.setdefault(pid, threading.RLock())


class EventLog:
    """Appends `{name, timestamp, memory_log, metadata}` and the exact byte counts. Any thread may.

    A process that was forked from the one that made the log gets a file of its own when it logs its first event:
    `memory_events-2.json`, or the next number that is free.
    """

    def __init__(self, path: Path, *, keep_existing: bool = False, goes_on: bool = False) -> None:
        """keep_existing: a file that is there stays, and this log takes the next free number; goes_on: only if it is no list of
        events, to which others are added; else it is replaced.
        """
        self._lock = ProcessLock()
        self._pid = os.getpid()
        with writing(path):
            self._files = {self._pid: _list_file(path, keep_existing, goes_on)}

    @property
    def path(self) -> Path:
        """Of this process's file; of the first one's while this one has logged nothing."""
        return self._files.get(os.getpid(), self._files[self._pid]).path

    def log(self, name: str, memory: Memory, metadata: Any = None, *, traced: bool = False) -> dict[str, Any]:
        """With `base_memory` (bytes) in the metadata the text gives the increment over it, else the peak. traced: said in the
        event, because the device memory then holds torch.profiler's buffers, too.

        Metadata may be anything: what JSON cannot hold is written as its text. Raises OutputError when the disk is full.
        """
        name = name if isinstance(name, str) else _said(name)
        base = base_memory(metadata)
        if base is None:
            _warn_of_base(metadata)
            text = f"{name}: peak_memory={memory.allocated_bytes / MIB:.2f} MB"
        else:
            text = f"{name}: incremental_memory={(memory.allocated_bytes - base) / MIB:.2f} MB"
        event = {"name": name, "timestamp": time.time(), "memory_log": text, "metadata": metadata, **asdict(memory)}
        event |= {"traced": True} if traced else {}
        written = _dumps(event)
        with writing(self.path):
            self._own_file().append(written)
        return event

    def _own_file(self) -> ListFile:
        pid = os.getpid()
        with self._lock.here():
            if pid not in self._files:
                self._files[pid] = ListFile(claim(self._files[self._pid].path, 2))
            return self._files[pid]

    def close(self) -> None:
        """Gives the file back; a later event opens it again."""
        file = self._files.get(os.getpid())
        if file is not None:
            with writing(self.path):
                file.close()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _list_file(path: Path, keep_existing: bool, goes_on: bool) -> ListFile:
    if goes_on:
        with suppress(ValueError, RecursionError):
            return ListFile(path, goes_on=True)
    return ListFile(claim(path) if keep_existing or goes_on else path)


def base_memory(metadata: Any) -> int | None:
    """Bytes of the metadata's `base_memory`; None without one, and where it is no number of bytes."""
    try:
        if not isinstance(metadata, Mapping) or "base_memory" not in metadata:
            return None
        nbytes = int(metadata["base_memory"])
    except Exception:  # of any class that metadata may hold
        return None
    return nbytes if abs(nbytes) < LARGEST_INT else None


def _warn_of_base(metadata: Any) -> None:
    with suppress(Exception):
        if isinstance(metadata, Mapping) and "base_memory" in metadata:
            given = _said(metadata["base_memory"])[:80]
            warn(f"base_memory: {given} is not a number of bytes; the event says the peak instead")


def warn(message: str) -> None:
    """Never raises, also where warnings are errors: the program's own exception may be on its way."""
    with suppress(Warning):
        warnings.warn(message, stacklevel=3)


def _dumps(event: dict[str, Any]) -> str:
    """One JSON object. What JSON cannot hold (an object, a key that is no text, NaN) is replaced by its text in the event, too."""
    try:
        text = json.dumps(event, ensure_ascii=False, allow_nan=False)
        text.encode()  # a lone surrogate, of a file name that is not UTF-8, is no text for most readers
        if text.count("[") + text.count("{") < MANY_BRACKETS or _depth(event["metadata"]) <= MAX_DEPTH:
            return text
    except Exception:  # json's own, and those of any class that metadata may hold
        pass
    event.update({key: _plain(event[key]) for key in ("name", "memory_log", "metadata")})
    return json.dumps(event, ensure_ascii=False)


def _depth(value: Any, depth: int = 0) -> int:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return depth if depth > MAX_DEPTH else max((_depth(item, depth + 1) for item in inside), default=depth)


def _plain(value: Any, depth: int = 0) -> Any:
    try:
        if isinstance(value, Mapping) and depth < MAX_DEPTH:
            return {_said(key): _plain(item, depth + 1) for key, item in list(value.items())}
        if isinstance(value, (list, tuple)) and depth < MAX_DEPTH:
            return [_plain(item, depth + 1) for item in list(value)]
        if value is None or isinstance(value, bool) or (isinstance(value, int) and abs(value) < LARGEST_INT):
            return value
        if isinstance(value, float) and math.isfinite(value):
            return float(value)
    except Exception:  # a class whose items or comparisons raise
        pass
    return _said(value)


def _said(value: Any) -> str:
    """The text of anything; a number too long for Python's decimal text in base 16."""
    try:
        text = hex(value) if isinstance(value, int) and abs(value) >= LARGEST_INT else str(value)
        return str.encode(text, "utf-8", "backslashreplace").decode()
    except KeyboardInterrupt:
        raise
    except BaseException:  # a class's own __str__ may raise anything
        return f"<{type(value).__name__}>".encode("utf-8", "backslashreplace").decode()
