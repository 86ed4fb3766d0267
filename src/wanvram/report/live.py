"""A run while it goes on: its stages with their peaks, memory against the budget, the time left. On stderr; no torch.

On a terminal it is redrawn four times a second by a thread that only reads; elsewhere every stage is a line when it ends.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from functools import reduce
from typing import Protocol, TextIO, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from wanvram.progress_stream import ProgressStream
from wanvram.report.event_text import event_text
from wanvram.run_events import RunEvent, StageAdvanced, StageEnded
from wanvram.spans import Memory, Span
from wanvram.units import human, mib_cell, seconds

__all__ = ["LiveView", "Watched"]

FRAMES_PER_SECOND = 4  # the driver is asked that often; each time takes about 1 ms
BAR_WIDTH = 20  # with the longest figures beside it a line has 80 columns
_HEAD = ("stage", "peak MiB", "reserved MiB", "device MiB", "time")
MAX_FINISHED = 12  # lines of finished stages; several prompts have many


class _Meter(Protocol):
    def read(self) -> Memory: ...

    def device_memory(self) -> int | None: ...


class Watched(Protocol):
    """The part of a Recorder that is looked at."""

    spans: list[Span]

    @property
    def meter(self) -> _Meter: ...

    @property
    def open_spans(self) -> tuple[Span, ...]: ...


class LiveView:
    """`told` is given a run's events, `watch` its recorder."""

    def __init__(self, name: str, budget_bytes: int | None, stream: TextIO | None = None) -> None:
        self._name = name
        self._budget = budget_bytes
        self._stream = ProgressStream(sys.stderr if stream is None else stream)
        self._start = time.monotonic()
        self._recorder: Watched | None = None
        self._drawn = self._stream.isatty()
        self._lines = 0  # of finished spans
        self._last: RunEvent | None = None

    def told(self, event: RunEvent) -> None:
        self._last = event
        if not self._drawn:
            self._tell_finished()
            if not isinstance(event, StageEnded):  # its line says that and more
                self._stream.line(event_text(event))

    @contextmanager
    def watch(self, recorder: Watched) -> Iterator[None]:
        self._recorder = recorder
        if not self._drawn:
            yield
            self._tell_finished()
            return
        console = Console(file=cast(TextIO, self._stream))
        with Live(get_renderable=self.picture, console=console, refresh_per_second=FRAMES_PER_SECOND):
            yield
            self._last = None

    def _tell_finished(self) -> None:
        spans = self._recorder.spans if self._recorder is not None else []
        for span in spans[self._lines :]:
            self._stream.line(f"{span.name}: {self._peak(span)}")
        self._lines = len(spans)

    def _peak(self, span: Span) -> str:
        peak = span.peak
        text = f"peak {human(peak.allocated_bytes)} allocated, {human(peak.reserved_bytes)} reserved"
        if peak.device_bytes is not None:
            text += f", {human(peak.device_bytes)} device"
            if self._budget is not None:
                text += f" ({100 * peak.device_bytes / self._budget:.0f} % of {human(self._budget)})"
        return text + (f", {seconds(span.seconds)}" if span.seconds is not None else "")

    def picture(self) -> RenderableType:
        """What is on the screen now."""
        elapsed = seconds(time.monotonic() - self._start)
        if self._recorder is None:
            return _line(f"{self._name}  {elapsed}")
        finished, running = list(self._recorder.spans), self._recorder.open_spans
        parts: list[RenderableType] = [_line(f"{self._name}  {elapsed}", "bold"), self._tree(finished, running)]
        parts.append(self._bars(self._recorder.meter, [*finished, *running]))
        if isinstance(self._last, StageAdvanced) and self._last.seconds_left is not None:
            parts.append(_line(event_text(self._last)))
        return Group(*parts)

    def _tree(self, finished: Sequence[Span], running: Sequence[Span]) -> Table:
        rows = Table.grid(padding=(0, 2))
        rows.add_column()  # the one that shrinks
        for _ in _HEAD[1:]:
            rows.add_column(justify="right", no_wrap=True)
        rows.add_row(*(_line(title, "dim") for title in _HEAD))
        if len(finished) > MAX_FINISHED:
            rows.add_row(_line(f"{len(finished) - MAX_FINISHED} earlier stages", "dim"))
        for span in finished[-MAX_FINISHED:]:
            rows.add_row(*_row("done", span, 0))
        for depth, span in enumerate(running):
            rows.add_row(*_row("now", span, depth))
        return rows

    def _bars(self, meter: _Meter, spans: Sequence[Span]) -> Table:
        """Now, against the budget; without one against the highest peak so far."""
        memory, device = meter.read(), meter.device_memory()
        top = reduce(Memory.highest, (span.peak for span in spans), memory)
        figures = {
            "allocated": (memory.allocated_bytes, top.allocated_bytes),
            "reserved": (memory.reserved_bytes, top.reserved_bytes),
        }
        if device is not None:
            # Read one after the other while memory is given back, or at the last span's end: what is reserved is in it.
            highest = max(device, top.device_bytes or 0, top.reserved_bytes)
            figures["device"] = (max(device, memory.reserved_bytes), highest)
        full = self._budget or max(1, *(peak for _, peak in figures.values()))
        rows = Table.grid(padding=(0, 2))
        for name, (now, peak) in figures.items():
            style = "red" if self._budget is not None and peak > self._budget else "green"
            bar = ProgressBar(total=full, completed=min(now, full), width=BAR_WIDTH, complete_style=style)
            limit = f" of {human(full)}" if self._budget is not None else ""
            rows.add_row(name, bar, _line(f"{human(now)}{limit}, peak {human(peak)}"))
        return rows


def _row(state: str, span: Span, depth: int) -> list[Text]:
    name = "  " * depth + span.name
    if state == "now" and len(span.children) > 1:
        name += f" ({len(span.children)} parts done)"
    style = "bold" if state == "now" else ""
    time_text = "" if span.seconds is None else seconds(span.seconds)
    return [_line(cell, style) for cell in (name, *map(mib_cell, astuple(span.peak)), time_text)]


def _line(text: str, style: str = "") -> Text:
    """Never more than one line."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")
