"""Python's own garbage collection beside large programs. No torch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["settled"]

_depth = 0


@contextmanager
def settled() -> Iterator[None]:
    """Collections inside leave out what is there now: after the imports that is half a million objects, 0.2 s each time."""
    global _depth
    if _depth == 0:
        gc.collect()
        gc.freeze()
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            gc.unfreeze()
