"""Ctrl-C, SIGTERM and SIGHUP without losing them: Python swallows an exception that a signal raises inside a weakref callback, of
which a run has many.

Inside `deferred` the first signal is only remembered, and `check`, called at every span and every unit of weights, raises
Interrupted. The second SIGINT raises at once. SIGTERM and SIGHUP are taken only inside `catching`, which the commands enter: a
program that runs wanvram keeps its own.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = [
    "INTERRUPTED",
    "Interrupted",
    "agreed",
    "call_off",
    "catching",
    "check",
    "deferred",
    "ending_begins",
    "forget",
    "hold",
    "pending",
]

INTERRUPTED = "interrupted by the user"
# A terminal that closes sends SIGHUP twice, a service manager SIGTERM and SIGHUP: they must not end the writing of the record.
SAME_ENDING_SECONDS = 20.0
# No SIGHUP on Windows.
ENDINGS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))

_pending: int | None = None
_ending_since: float | None = None
_called_off: Exception | None = None
_held_until = 0.0


class Interrupted(KeyboardInterrupt):
    """`number`: the signal that ends the work."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def __str__(self) -> str:
        return INTERRUPTED if self.number == signal.SIGINT else f"ended by {signal.Signals(self.number).name}"


def call_off(error: Exception) -> None:
    """From any thread: the next `check` raises it."""
    global _called_off
    _called_off = error


def hold(seconds: float) -> None:
    """For so long a first signal waits for `agreed`: several processes must not stop at different places."""
    global _held_until
    _held_until = time.monotonic() + seconds


def pending() -> int:
    """The signal that waits; 0: none."""
    return _pending or 0


def agreed(number: int) -> None:
    """Raises Interrupted for a signal that came to any of several processes; 0: to none."""
    global _pending
    if number:
        _pending = None
        raise Interrupted(number)


def ending_begins() -> None:
    """For a reason of its own: SIGTERM and SIGHUP, with which a launcher ends what is left, do not disturb the record."""
    _repeated(signal.SIGTERM)


def check() -> None:
    """Raises Interrupted if a signal came since the last call, or since `deferred` was entered; or what `call_off` was given."""
    global _pending, _called_off
    if _called_off is not None:
        error, _called_off = _called_off, None
        raise error
    if _pending is not None and time.monotonic() >= _held_until:
        number, _pending = _pending, None
        raise Interrupted(number)


def _remember(number: int, _frame: FrameType | None) -> None:
    global _pending
    if _repeated(number):
        return
    if _pending is not None:
        hold(0.0)
    check()
    _pending = number


def _raise(number: int, _frame: FrameType | None) -> None:
    if not _repeated(number):
        raise Interrupted(number)


def _repeated(number: int) -> bool:
    """Whether it belongs to an ending that has begun. Never SIGINT: who presses Ctrl-C twice means it."""
    global _ending_since
    if number == signal.SIGINT:
        return False
    now = time.monotonic()
    if _ending_since is not None and now - _ending_since < SAME_ENDING_SECONDS:
        return True
    _ending_since = now
    return False


def forget() -> None:
    """What came after all was made came too late to end it."""
    global _pending, _called_off
    _pending = _called_off = None
    hold(0.0)


@contextmanager
def deferred() -> Iterator[None]:
    """Does nothing in a thread, which gets no signals, and to a signal that is ignored or handled by somebody else.

    One within another raises at its own end what came since the outer one began.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDINGS)}
    ours = {number: handler for number, handler in usual.items() if handler in (signal.default_int_handler, _raise)}
    outermost = _remember not in usual.values()
    if outermost:
        forget()
    for number in ours:
        signal.signal(number, _remember)
    try:
        yield
        check()
    finally:
        if outermost:
            forget()
        for number, handler in ours.items():
            signal.signal(number, handler)


@contextmanager
def catching() -> Iterator[None]:
    """Signals raise Interrupted, SIGINT KeyboardInterrupt, unless they are ignored (nohup) or handled by somebody else. In the
    main thread only."""
    global _ending_since
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [number for number in (signal.SIGINT, *ENDINGS) if signal.getsignal(number) is signal.SIG_DFL]
    _ending_since = None
    for number in ours:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else _raise)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _in_child() -> None:
    """A forked process has nothing to record: it ends as processes usually do, without a traceback."""
    global _pending
    _pending = None
    for number in ENDINGS:
        if signal.getsignal(number) in (_raise, _remember):
            signal.signal(number, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
