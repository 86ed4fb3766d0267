"""Where progress goes: what cannot be shown there is dropped, and the work goes on. No torch."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any, TextIO

__all__ = ["ProgressStream"]


class ProgressStream:
    """A text stream of which nobody may be reading: full, closed, or None, as Python has a stderr that was closed at its start.

    ValueError: the stream was closed in this process. Every text is tried anew, for a full disk may have room again.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._start = time.monotonic()

    def line(self, text: str) -> None:
        """`text` with the time since this stream was made."""
        self.write(f"[{time.monotonic() - self._start:6.1f} s] {text}\n")
        self.flush()

    def write(self, text: str) -> int:
        if self._stream is not None:
            with suppress(OSError, ValueError):
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            with suppress(OSError, ValueError):
                self._stream.flush()

    def isatty(self) -> bool:
        with suppress(OSError, ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        """encoding and fileno, of which rich makes its picture."""
        return getattr(self._stream, name)
