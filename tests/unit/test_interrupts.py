"""Ctrl-C during a run: remembered, raised at the next check, at once the second time, and never swallowed."""

from __future__ import annotations

import os
import signal
import threading
import weakref

import pytest

from wanvram.recorder.interrupts import check, deferred


class Thing:
    """Something with a weakref callback."""


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def usual_handler() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def die_and_check(seen: list[str]) -> None:
    with deferred():
        thing = Thing()
        weakref.finalize(thing, interrupt)
        del thing
        seen.append("the callback is over")
        check()
        seen.append("not reached")


def test_an_interrupt_in_a_weakref_callback_is_not_lost() -> None:
    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        die_and_check(seen)
    assert seen == ["the callback is over"]


def test_an_interrupt_that_nobody_checked_is_raised_at_the_end() -> None:
    with pytest.raises(KeyboardInterrupt), deferred():
        interrupt()


def interrupt_twice(seen: list[str]) -> None:
    with deferred():
        interrupt()
        seen.append("once")
        interrupt()
        seen.append("not reached")


def test_the_second_interrupt_raises_at_once() -> None:
    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        interrupt_twice(seen)
    assert seen == ["once"]


def test_without_an_interrupt_nothing_happens_and_the_handler_is_given_back() -> None:
    with deferred():
        check()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    check()


def test_a_handler_of_somebody_else_and_other_threads_are_left_alone() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with deferred():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seen = []

    def other() -> None:
        with deferred():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
