"""torch.profiler as a guest in somebody's program: one trace, and never an exception or a crash for its sake.

torch.profiler is one for the process and is ended in the thread that began it. A second one takes the first one's events and
ends the process with a segmentation fault when both are stopped (torch 2.11 to 2.13), so what is in use is looked at before
every change of state.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch
from torch.profiler import ProfilerAction

from wanvram.recorder.events import warn
from wanvram.recorder.tracing import CYCLE_STEPS, trace_settings

__all__ = ["GuestProfile"]

_AT_WORK = (ProfilerAction.WARMUP, ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)
_IN_USE = "torch.profiler is already in use in this process"

_owner: GuestProfile | None = None  # has prepared torch.profiler and not ended it


class GuestProfile(torch.profiler.profile):
    """With the settings of `setup_profiler`. After one trace it is over; what goes wrong ends it with a warning.

    `step` counts in the thread that called it first, and does nothing in a forked process; a fork ends it. The warm-up
    step is recorded without stacks and thrown away: torch.profiler would only be prepared in it, and nothing tells whether another
    one came and went meanwhile.
    """

    def __init__(self, log_dir: str) -> None:
        super().__init__(**trace_settings(log_dir))
        begin = [self.prepare_trace, self.start_trace]
        self.action_map[ProfilerAction.NONE, ProfilerAction.WARMUP] = [partial(self._begin_with, False), *begin]
        end = [self.stop_trace, partial(self._begin_with, True)]
        self.action_map[ProfilerAction.WARMUP, ProfilerAction.RECORD] = [*end, *begin]
        self.action_map[ProfilerAction.WARMUP, None] = [self.stop_trace]
        self.prepared = False  # torch.profiler took its buffers, which the driver counts as used until the process ends
        self._over = False
        self._pid = os.getpid()
        self._thread: int | None = None
        self._stray = False  # a step of another thread was told of
        self._closing = False  # the next step ends it

    def start(self) -> None:
        if _in_use(self):
            self._give_up(_IN_USE)
            return
        self._guarded(super().start)

    def step(self) -> None:
        if self._ended():
            return
        if self._elsewhere():
            if not self._stray:
                warn("wanvram's MemoryProfiler: steps are counted in the thread that called step() first")
            self._stray = True
            return
        if not self._closing and self._may_change():
            self._guarded(super().step)
        if self._closing or self.step_num >= CYCLE_STEPS:
            self.stop()

    def stop(self) -> None:
        if self._ended():
            return
        if self._thread is not None and self._elsewhere() and self.prepared:
            self._closing = True
            warn(
                "wanvram's MemoryProfiler: the trace goes on: torch.profiler is stopped in the thread that called step(), "
                "by its next step()"
            )
            return
        if self._may_change():
            self._guarded(super().stop)
        self._end()

    def _begin_with(self, details: bool) -> None:
        self.with_stack = self.record_shapes = self.profile_memory = details
        self.profiler = None  # and its events

    def _ended(self) -> bool:
        return self._over or os.getpid() != self._pid

    def _elsewhere(self) -> bool:
        here = threading.get_ident()
        if self._thread is None:
            self._thread = here
        return self._thread != here

    def _may_change(self) -> bool:
        """Looks at who uses torch.profiler now, and takes it for this one where a trace is about to be prepared."""
        global _owner
        if self.current_action in _AT_WORK:
            if not torch.autograd._profiler_enabled():
                self._give_up("another torch.profiler took its place")
            return not self._over
        if _in_use(self):
            self._give_up(_IN_USE)
        elif sys.getprofile() is not None:
            self._give_up("it would replace the program's own sys.setprofile")
        elif self.schedule(self.step_num + 1) is ProfilerAction.WARMUP:
            _owner = self
            self.prepared = True
            atexit.register(self.stop)  # a process that ends while it records is ended by a segmentation fault
        return not self._over

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._give_up(str(error))

    def _give_up(self, why: str) -> None:
        self._end()
        warn(f"wanvram's MemoryProfiler: no trace: {why}")

    def _end(self) -> None:
        global _owner
        self._over = True
        if self.step_rec_fn is not None:
            with suppress(Exception):
                self.step_rec_fn.__exit__(None, None, None)
            self.step_rec_fn = None
        if _owner is self:
            _owner = None
            atexit.unregister(self.stop)


def _in_use(guest: GuestProfile) -> bool:
    """By anybody but this one: torch's own flags, of this thread and of the process, say nothing of one that is only prepared."""
    if _owner is not None and _owner is not guest and _owner._pid == os.getpid():
        return True
    enabled = torch.autograd._profiler_enabled() or getattr(torch.autograd.profiler, "_is_profiler_enabled", False)
    return bool(enabled) and guest.current_action not in _AT_WORK


def _before_fork() -> None:
    """A child that inherits a torch.profiler at work hangs or crashes when it ends."""
    if _owner is not None and _owner._thread == threading.get_ident():
        _owner.stop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork)
