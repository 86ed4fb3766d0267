"""Ctrl-C during a run: remembered, raised at the next check, at once the second time, and never swallowed."""

from __future__ import annotations

import os
import signal
import threading
import weakref

import pytest

from wanvram.errors import PeerLost
from wanvram.recorder import interrupts
from wanvram.recorder.interrupts import (
    ENDINGS,
    Interrupted,
    agreed,
    call_off,
    catching,
    check,
    deferred,
    forget,
    hold,
    pending,
)


class Thing:
    """Something with a weakref callback."""


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def usual_handlers() -> None:
    """A background job of a script ignores SIGINT, and nohup SIGHUP."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in ENDINGS:
        signal.signal(number, signal.SIG_DFL)


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


def send(*signals: signal.Signals) -> None:
    for number in signals:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_is_ended_by_a_signal_that_is_named(number: signal.Signals) -> None:
    with pytest.raises(Interrupted, match=rf"^ended by {number.name}$"), catching():
        send(number)
    assert signal.getsignal(number) is signal.SIG_DFL


def ended_in_a_run(seen: list[str]) -> None:
    with deferred():
        send(signal.SIGTERM, signal.SIGHUP, signal.SIGTERM)
        seen.append("remembered")
        check()
        seen.append("not reached")


def test_in_a_run_an_ending_is_remembered_and_its_repetitions_change_nothing() -> None:
    seen: list[str] = []
    with catching():
        with pytest.raises(Interrupted, match=r"^ended by SIGTERM$"):
            ended_in_a_run(seen)
        send(signal.SIGHUP)  # while the record is written
        seen.append("recorded")
    assert seen == ["remembered", "recorded"]


def test_an_ending_long_after_the_first_is_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with catching():
        with pytest.raises(Interrupted):
            send(signal.SIGTERM)
        monkeypatch.setattr(interrupts, "SAME_ENDING_SECONDS", 0.0)
        with pytest.raises(Interrupted):
            send(signal.SIGTERM)


def test_a_signal_that_is_ignored_stays_so_and_a_program_keeps_its_own() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catching(), deferred():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with deferred():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_forked_process_ends_as_processes_usually_do() -> None:
    with catching():
        child = os.fork()
        if child == 0:
            try:
                send(signal.SIGTERM)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM


def held(*signals: signal.Signals) -> int:
    """In a run whose processes stop together: what waits after these."""
    with catching(), deferred():
        hold(60.0)
        send(*signals)
        check()
        waiting = pending()
        agreed(0)
        agreed(waiting)
    return waiting


def called_off() -> None:
    with deferred():
        call_off(PeerLost("rank 1 has ended"))
        check()


def test_a_held_signal_waits_until_all_processes_agree() -> None:
    assert held() == 0
    with pytest.raises(Interrupted) as raised:
        held(signal.SIGTERM)
    assert raised.traceback[-1].name == "agreed"


def test_a_second_interrupt_is_not_held() -> None:
    with pytest.raises(Interrupted) as raised:
        held(signal.SIGINT, signal.SIGINT)
    assert raised.traceback[-1].name == "check"
    with deferred():
        check()


def test_what_another_thread_calls_off_ends_at_the_next_unit() -> None:
    with pytest.raises(PeerLost, match="rank 1"):
        called_off()
    with deferred():
        check()


def test_what_came_between_is_raised_by_the_inner_of_two_and_forgotten_by_who_is_done() -> None:
    seen = []
    with deferred():
        interrupt()
        with pytest.raises(KeyboardInterrupt), deferred():
            seen.append("both wait")
        interrupt()
        forget()
        seen.append("it came too late")
    assert seen == ["both wait", "it came too late"]


def test_ctrl_c_that_would_end_a_command_at_once_is_caught_while_it_works() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt), catching():
            interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # else a Ctrl-C of a later test would end the process
