"""Ctrl-C without losing it: Python swallows an exception that a signal raises inside a weakref callback, of which a run has many.

Inside `deferred` the first SIGINT is only remembered, and `check`, called at every span and every unit of weights, raises
KeyboardInterrupt. The second SIGINT raises at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["check", "deferred"]

_pending = False


def check() -> None:
    """Raises KeyboardInterrupt if SIGINT came since the last call, or since `deferred` was entered."""
    global _pending
    if _pending:
        _pending = False
        raise KeyboardInterrupt


def _remember(_number: int, _frame: FrameType | None) -> None:
    global _pending
    if _pending:
        _pending = False
        raise KeyboardInterrupt
    _pending = True


@contextmanager
def deferred() -> Iterator[None]:
    """Does nothing in a thread, which gets no signals, and where SIGINT is ignored or handled by somebody else."""
    global _pending
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    _pending = False
    signal.signal(signal.SIGINT, _remember)
    try:
        yield
        check()
    finally:
        _pending = False
        signal.signal(signal.SIGINT, signal.default_int_handler)
