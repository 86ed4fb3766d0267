"""memory_events.json: a valid JSON list after every event, so that a kill at any moment leaves what was logged."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from wanvram.errors import OutputError
from wanvram.record import Memory
from wanvram.units import MIB

__all__ = ["EventLog"]


class EventLog:
    """Appends `{name, timestamp, memory_log, metadata}` and the exact byte counts.

    Every event is one write over the closing bracket, `,{...}]`: the kernel applies it whole even if the process is killed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            os.pwrite(self._file, b"[]\n", 0)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        self._end = 1
        self._count = 0

    def log(self, name: str, memory: Memory, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """With `base_memory` (bytes) in the metadata the text gives the increment over it, else the peak."""
        if metadata and "base_memory" in metadata:
            increment = memory.allocated_bytes - int(metadata["base_memory"])
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
        self._append(json.dumps(event, ensure_ascii=False, default=str))
        return event

    def _append(self, text: str) -> None:
        data = ((",\n" if self._count else "\n") + text).encode()
        try:
            os.pwrite(self._file, data + b"]\n", self._end)
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}") from error
        self._end += len(data)
        self._count += 1

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
