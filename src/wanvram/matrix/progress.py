"""How far a series of runs is: a bar on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from wanvram.matrix.runner import Display, Outcome
from wanvram.progress_stream import ProgressStream
from wanvram.units import human, seconds

__all__ = ["Lines", "describe", "display"]


def describe(outcome: Outcome) -> str:
    """`peak 9,870.5 MiB, fits`: one run in a line."""
    record, peak = outcome.record, outcome.record.peak()
    parts = ["already done"] if outcome.seconds is None else [seconds(outcome.seconds)]
    if peak is not None:
        parts.append(f"peak {human(peak.deciding_bytes)}")
    if record.failure is not None:
        parts.append(f"{record.failure.kind}: {record.failure.message}")
    elif record.fits is not None:
        parts.append("fits" if record.fits else "does not fit")
    return ", ".join(parts)


class Lines:
    """One line per event, with the time since the start; of no stream none."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = ProgressStream(stream)

    def started(self, number: int, count: int, name: str) -> None:
        self._stream.line(f"{number}/{count} {name}: started")

    def message(self, name: str, text: str) -> None:
        self._stream.line(f"  {text}")

    def finished(self, number: int, count: int, outcome: Outcome) -> None:
        self._stream.line(f"{number}/{count} {outcome.job.name}: {describe(outcome)}")


class _Bar:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None)

    def started(self, number: int, count: int, name: str) -> None:
        self._progress.update(self._task, total=count, completed=number - 1, description=escape(name))

    def message(self, name: str, text: str) -> None:
        self._progress.update(self._task, description=f"{escape(name)}: {escape(text[:100])}")

    def finished(self, number: int, count: int, outcome: Outcome) -> None:
        self._progress.update(self._task, total=count, completed=number)
        line = f"{number}/{count} {outcome.job.name}: {describe(outcome)}"
        self._progress.console.print(line, markup=False, highlight=False)


@contextmanager
def display(*, quiet: bool) -> Iterator[Display]:
    """quiet: nothing at all unless stderr is a terminal."""
    stream = ProgressStream(sys.stderr)
    if not stream.isatty():
        yield Lines(None if quiet else sys.stderr)
        return
    text = TextColumn("{task.description}")
    columns = (SpinnerColumn(), MofNCompleteColumn(), BarColumn(20), TimeElapsedColumn(), text)
    with Progress(*columns, console=Console(file=cast(TextIO, stream))) as progress:
        yield _Bar(progress)
