"""Threads of a foreign program: PyTorch's modes are per thread, so each that starts inside enters them, too."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from wanvram.foreign.cuda_api import patched

__all__ = ["in_threads"]


@contextmanager
def in_threads(facade: Any, memory: Any) -> Iterator[None]:
    """One at a time: the modes keep what they are doing in themselves."""
    plain = threading.Thread.run

    def run(thread: threading.Thread) -> None:
        if memory.closed:
            plain(thread)
            return
        with memory, facade:
            plain(thread)

    with patched([(threading.Thread, "run", run)]):
        yield
