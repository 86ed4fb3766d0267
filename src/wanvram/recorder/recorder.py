"""Nested spans over a run: memory at start, peak and end of each, with peaks of children carried to their parents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from wanvram.record import Failure
from wanvram.recorder.events import EventLog
from wanvram.recorder.interrupts import check
from wanvram.recorder.meters import Meter
from wanvram.run_events import StageBegan, StageEnded, TellRun
from wanvram.spans import Memory, Span

__all__ = ["Recorder", "SpanObserver", "repeated_seconds", "with_device"]


class SpanObserver(Protocol):
    """Hears where the run is: every span's begin and end, properly nested."""

    def begin(self, name: str, kind: str, component: str | None) -> None: ...

    def end(self) -> None: ...


class Recorder:
    """Watches one run through a Meter. Finished top-level spans are in `spans`.

    The meter's peak counter is reset at every span's start and end; what it had seen goes into all open spans first, so
    nothing between two reads is lost. For a block nothing is synchronised, timed or asked of the driver.
    """

    def __init__(
        self, meter: Meter, events: EventLog | None, progress: TellRun | None, observer: SpanObserver | None = None
    ) -> None:
        self.meter = meter
        self.events = events
        self.progress = progress
        self.observer = observer
        self.spans: list[Span] = []
        self._open: list[Span] = []
        self._started: list[float | None] = []

    @property
    def open_spans(self) -> tuple[Span, ...]:
        """The spans begun and not ended, outermost first; each holds those ended inside it."""
        return tuple(self._open)

    @contextmanager
    def span(self, name: str, *, kind: str, component: str | None = None, part: str = "") -> Iterator[Span]:
        """Records everything inside. A span left by an exception stays open until `finish_open`."""
        check()
        detailed = kind != "block"
        if detailed:
            self.meter.synchronize()
        self._carry_peak()
        start = self._read(detailed)
        span = Span(name, kind, component, start, start, start, part=part)
        self._open.append(span)
        self._started.append(self.meter.now(kind))
        if self.observer is not None:
            self.observer.begin(name, kind, component)
        if kind in ("load", "stage"):
            self._log(f"{name}: start", start, kind, component)
            if self.progress:
                self.progress(StageBegan(name))
        yield span
        self._close(span, detailed)

    def _close(self, span: Span, detailed: bool) -> None:
        while self._open[-1] is not span:  # left by an exception that was caught inside this span
            self._close(self._open[-1], False)
        if detailed:
            self.meter.synchronize()
            span.seconds = self._seconds(span)
            span.host_rss_bytes, span.pinned_bytes = self.meter.host()
        self._carry_peak()
        span.end = self._read(detailed)
        span.peak = span.peak.highest(span.end)
        if self.meter.caches:
            span.peak = with_device(span.peak, span.end)
        self._put_away(span)
        if span.kind != "block":
            self._log(span.name, span.peak, span.kind, span.component)
        if self.progress and span.kind == "stage":
            self.progress(StageEnded(span.name, span.peak.allocated_bytes))

    def _put_away(self, span: Span) -> None:
        self._started.pop()
        self._open.pop()
        parent = self._open[-1] if self._open else None
        (parent.children if parent else self.spans).append(span)
        if parent:
            parent.peak = parent.peak.highest(span.peak)
        if self.observer is not None:
            self.observer.end()

    def _seconds(self, span: Span) -> float | None:
        """Since the span began, with the repeats of spans inside it that stand for several and ran once."""
        started, now = self._started[-1], self.meter.now(span.kind)
        if started is None or now is None:
            return None
        return now - started + repeated_seconds(span.children)

    def finish_open(self, failure: Failure) -> Failure:
        """Closes what an exception left open, outermost last; the failure is returned with its stage and component."""
        failure = self.located(failure)
        while self._open:
            span = self._open[-1]
            try:
                self._close(span, True)
            except Exception:  # the device or the disk that failed fails again: what was seen before is kept
                if self._open and self._open[-1] is span:
                    self._put_away(span)
        return failure

    def located(self, failure: Failure) -> Failure:
        """With the stage and component that are open now, unless it has its own."""
        stage = next((s for s in self._open if s.kind in ("load", "stage")), None)
        if stage is None or failure.stage is not None:
            return failure
        return replace(failure, stage=stage.name, component=stage.component)

    def abandon_open(self) -> None:
        """As `finish_open`, from another thread than the one that hangs: the device is not asked for anything."""
        while self._open:
            self._put_away(self._open[-1])

    def _read(self, detailed: bool) -> Memory:
        memory = self.meter.read()
        return replace(memory, device_bytes=self.meter.device_memory()) if detailed else memory

    def _carry_peak(self) -> None:
        peak = self.meter.peak()
        for span in self._open:
            span.peak = span.peak.highest(peak)
        self.meter.reset_peak()

    def _log(self, name: str, memory: Memory, kind: str, component: str | None) -> None:
        if self.events is not None:
            self.events.log(name, memory, {"kind": kind, "component": component})


def repeated_seconds(spans: Sequence[Span]) -> float:
    """Of the repeats, at any depth, that stand for spans which did not run."""
    return sum((span.repeats - 1) * (span.seconds or 0.0) + repeated_seconds(span.children) for span in spans)


def with_device(peak: Memory, end: Memory) -> Memory:
    """The driver is asked at the ends only. If the allocator gave memory back in between, the driver's peak was higher.

    What the process uses outside the allocator (context, libraries) only grows, so it is taken from the end.
    """
    if end.device_bytes is None or peak.device_bytes is None or end.reserved_bytes >= peak.reserved_bytes:
        return peak
    outside = max(0, end.device_bytes - end.reserved_bytes)
    return replace(peak, device_bytes=max(peak.device_bytes, peak.reserved_bytes + outside))
