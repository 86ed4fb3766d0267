"""Stages of a program that is not ours: of any thread, asyncio task or generator, ended in any order."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace

from wanvram.recorder.events import ProcessLock
from wanvram.recorder.meters import Meter
from wanvram.recorder.recorder import with_device
from wanvram.spans import Memory, Span

__all__ = ["OpenStage", "Stages"]


@dataclass(eq=False)
class OpenStage:
    """A stage that has begun. outer: the one it began in, by thread, task or generator."""

    owner: Stages
    span: Span
    started: float | None
    outer: OpenStage | None
    ended: bool = False


_innermost: ContextVar[OpenStage | None] = ContextVar("wanvram_stage", default=None)


class Stages:
    """Finished top-level stages are in `spans`, `highest` is the peak since `restart`.

    Memory belongs to the process, so a peak counts for every stage that is open then, whichever thread it began in. The
    meter's peak counter is reset at both ends of a stage; what it had seen goes into all open stages first.
    """

    def __init__(self, meter: Callable[[], Meter]) -> None:
        self.spans: list[Span] = []
        self.highest = Memory(0, 0, None)
        self._meter = meter
        self._open: list[OpenStage] = []
        self._lock = ProcessLock()

    def restart(self) -> None:
        with self._lock.here():
            self._meter().reset_peak()
            self.highest = Memory(0, 0, None)

    def seen(self, peak: Memory) -> Memory:
        """The highest of this peak and the earlier ones."""
        with self._lock.here():
            self.highest = self.highest.highest(peak)
            return self.highest

    def begin(self, name: str) -> OpenStage:
        meter = self._meter()
        meter.synchronize()
        with self._lock.here():
            self._carry_peak()
            start = self._now()
            stage = OpenStage(self, Span(name, "stage", None, start, start, start), meter.now("stage"), _still_open())
            self._open.append(stage)
        _innermost.set(stage)
        return stage

    def end(self, stage: OpenStage) -> Span:
        """The stage is ended even where reading the meter raises."""
        stage.ended = True
        if _innermost.get() is stage:
            _innermost.set(_still_open())
        meter, span = self._meter(), stage.span
        try:
            meter.synchronize()
            ended = meter.now("stage")
            span.seconds = None if ended is None or stage.started is None else ended - stage.started
            span.host_rss_bytes, span.pinned_bytes = meter.host()
            with self._lock.here():
                driver_unasked = self._carry_peak().device_bytes is None
                span.end = self._now()
                span.peak = span.peak.highest(span.end)
                if driver_unasked:
                    span.peak = with_device(span.peak, span.end)
        finally:
            with self._lock.here():
                self._open = [other for other in self._open if other is not stage]
                parent = self._parent(stage)
                (parent.children if parent else self.spans).append(span)
                if parent:
                    parent.peak = parent.peak.highest(span.peak)
                self.highest = self.highest.highest(span.peak)
        return span

    def _parent(self, stage: OpenStage) -> Span | None:
        outer = stage.outer
        while outer is not None and (outer.ended or outer.owner is not self):
            outer = outer.outer
        return outer.span if outer else None

    def _now(self) -> Memory:
        meter = self._meter()
        return replace(meter.read(), device_bytes=meter.device_memory())

    def _carry_peak(self) -> Memory:
        meter = self._meter()
        peak = meter.peak()
        for stage in self._open:
            stage.span.peak = stage.span.peak.highest(peak)
        self.highest = self.highest.highest(peak)
        meter.reset_peak()
        return peak


def _still_open() -> OpenStage | None:
    """The innermost stage of this thread, task or generator that has not ended."""
    stage = _innermost.get()
    while stage is not None and stage.ended:
        stage = stage.outer
    return stage
