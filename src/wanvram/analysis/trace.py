"""torch.profiler Chrome traces of any size: events are decoded one at a time and only numbers are kept. No torch.

Of every event that matters 20 to 44 bytes stay in memory, so that a 2 GiB trace needs some 200 MiB. Memory is reported by
"[memory]" instant events (profile_memory=True), which may come in any order relative to the operators they belong to.
"""

from __future__ import annotations

import gzip
import math
import zlib
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wanvram.analysis.event_scanner import EventScanner, TruncatedError
from wanvram.analysis.points import Point, Points
from wanvram.errors import InputError

__all__ = ["Kernel", "MemoryCurve", "Operator", "TraceSpan", "TraceSummary", "read_trace"]

MAX_RECORDS = 24_000_000  # operators and memory events kept: 0.5 to 1 GB
MAX_NAMES = 50_000
MAX_SPANS = 20_000
TOP = 50
OUTSIDE = "(outside of any operator)"
_DEVICES = {0: "cpu", 1: "cuda", 12: "xpu", 13: "mps"}
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset", "Kernel")


# --- results ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryCurve:
    """One device over time. Fragmentation is (reserved - allocated) / reserved; the mean is weighted by time.

    fluctuation_bytes: highest minus lowest allocated. points: at most 4,000, see Points.
    """

    device: str
    events: int
    points: tuple[Point, ...]
    peak_allocated_bytes: int
    peak_seconds: float
    reserved_at_peak_bytes: int
    peak_reserved_bytes: int
    peak_reserved_seconds: float
    fragmentation_at_peak: float
    fragmentation_mean: float
    fragmentation_max: float
    fluctuation_bytes: int


@dataclass(frozen=True)
class Operator:
    """All calls of one operator. self_seconds: without the operators it called. allocated_bytes: on the main device, by
    `allocations` allocations while it was the innermost operator of its thread; not reduced by what was freed.
    """

    name: str
    calls: int
    seconds: float
    self_seconds: float
    allocated_bytes: int
    allocations: int


@dataclass(frozen=True)
class Kernel:
    """All runs of one kernel or copy on the device."""

    name: str
    calls: int
    seconds: float


@dataclass(frozen=True)
class TraceSpan:
    """A ProfilerStep or a record_function, with the highest memory of the main device in it (None: no memory events)."""

    name: str
    start: float
    end: float
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None


@dataclass(frozen=True)
class TraceSummary:
    """A trace. Seconds count from its first event that matters. notes: one sentence each on what is missing or estimated."""

    path: Path
    events: int
    seconds: float
    memory: tuple[MemoryCurve, ...]
    operators_by_memory: tuple[Operator, ...]
    operators_by_time: tuple[Operator, ...]
    kernels: tuple[Kernel, ...]
    steps: tuple[TraceSpan, ...]
    annotations: tuple[TraceSpan, ...]
    notes: tuple[str, ...]

    @property
    def main(self) -> MemoryCurve | None:
        """The accelerator with the highest peak, else the CPU; None without memory events."""
        return self.memory[0] if self.memory else None


# --- collecting ------------------------------------------------------------------------------------------------------------


@dataclass
class _Thread:
    """The operators of one thread; times in microseconds."""

    start: array[float] = field(default_factory=lambda: array("d"))
    end: array[float] = field(default_factory=lambda: array("d"))
    name: array[int] = field(default_factory=lambda: array("I"))


@dataclass
class _Memory:
    """The memory events of one device."""

    at: array[float] = field(default_factory=lambda: array("d"))
    allocated: array[int] = field(default_factory=lambda: array("q"))
    reserved: array[int] = field(default_factory=lambda: array("q"))
    change: array[int] = field(default_factory=lambda: array("q"))
    thread: array[int] = field(default_factory=lambda: array("I"))


class _Collector:
    """What is kept of the events."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.events = self.records = 0
        self.threads: list[_Thread] = []
        self.memory: dict[tuple[int, int], _Memory] = {}
        self.names: dict[str, int] = {}
        self.kernels: dict[str, list[float]] = {}
        self.spans: list[tuple[str, float, float]] = []
        self.first, self.last = math.inf, -math.inf
        self._thread_index: dict[Any, int] = {}

    def take(self, event: Any) -> None:
        self.events += 1
        if event.__class__ is not dict:
            raise InputError(f"{self._name} is no torch.profiler trace: event {self.events} is {str(event)[:40]!r}")
        category = event.get("cat")
        if category == "cpu_op":
            start, end, name = self._times(event)
            thread = self.threads[self._thread(event)]
            thread.start.append(start)
            thread.end.append(end)
            thread.name.append(self.names.setdefault(name, len(self.names)))
            self._count()
        elif category in _ON_DEVICE:
            start, end, name = self._times(event)
            if len(self.kernels) < MAX_NAMES or name in self.kernels:
                total = self.kernels.setdefault(name, [0, 0.0])
                total[0] += 1
                total[1] += end - start
        elif category == "user_annotation":
            start, end, name = self._times(event)
            if len(self.spans) < MAX_SPANS:
                self.spans.append((name, start, end))
        elif event.get("name") == "[memory]":
            self._take_memory(event)

    def _take_memory(self, event: dict[str, Any]) -> None:
        at, numbers = self._number(event, "ts"), event.get("args")
        if numbers.__class__ is not dict:
            raise InputError(f"{self._name}: a [memory] event has no args")
        device = (self._whole(numbers, "Device Type"), self._whole(numbers, "Device Id"))
        if device not in self.memory and len(self.memory) >= 1024:
            raise InputError(f"{self._name} is no torch.profiler trace: memory events of over 1,024 devices")
        memory = self.memory.setdefault(device, _Memory())
        memory.at.append(at)
        memory.allocated.append(self._whole(numbers, "Total Allocated", 0))
        memory.reserved.append(self._whole(numbers, "Total Reserved", 0))
        memory.change.append(self._whole(numbers, "Bytes"))
        memory.thread.append(self._thread(event))
        self.first, self.last = min(self.first, at), max(self.last, at)
        self._count()

    def _times(self, event: dict[str, Any]) -> tuple[float, float, str]:
        start, duration, name = self._number(event, "ts"), self._number(event, "dur"), event.get("name")
        if duration < 0:
            raise InputError(f"{self._name}: event {self.events} lasts {duration} microseconds; the trace is damaged")
        end = start + duration
        self.first, self.last = min(self.first, start), max(self.last, end)
        if name.__class__ is not str:
            name = "(no name)"
        elif name not in self.names and (len(name) > 200 or len(self.names) >= MAX_NAMES):
            name = name[:200] if len(self.names) < MAX_NAMES else "(other)"
        return start, end, name

    def _number(self, event: dict[str, Any], key: str) -> float:
        value: Any = event.get(key)
        if (value.__class__ is float or value.__class__ is int) and -1e18 < value < 1e18:  # false for NaN
            return float(value)
        raise InputError(f"{self._name}: event {self.events} has {key} {str(value)[:40]}; expected a number")

    def _whole(self, numbers: dict[str, Any], key: str, least: int = -(1 << 62)) -> int:
        value: Any = numbers.get(key)
        if value.__class__ is not int or not least <= value < 1 << 62:
            kind = "whole number that is not negative" if least == 0 else "whole number"
            raise InputError(f"{self._name}: event {self.events} has {key} {str(value)[:40]}; expected a {kind}")
        return int(value)

    def _thread(self, event: dict[str, Any]) -> int:
        key = f"{event.get('pid')}/{event.get('tid')}"[:80]
        index = self._thread_index.get(key)
        if index is None:
            if len(self.threads) >= 65536:
                raise InputError(f"{self._name} is no torch.profiler trace: it names over 65,536 threads")
            index = self._thread_index[key] = len(self.threads)
            self.threads.append(_Thread())
        return index

    def _count(self) -> None:
        self.records += 1
        if self.records > MAX_RECORDS:
            raise InputError(f"{self._name} has over {MAX_RECORDS:,} operators and memory events; record fewer steps")


def read_trace(path: Path) -> TraceSummary:
    """The trace at `path` (.json, or gzipped), read in one pass.

    Raises InputError when it is missing, empty, not a trace or damaged. A trace that breaks off (a killed process) is read
    as far as it goes, and `notes` says so.
    """
    collector, notes = _Collector(str(path)), []
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            file: Any = gzip.GzipFile(fileobj=raw) if packed else raw
            for event in EventScanner(file.read1 if packed else file.read, str(path)).events():
                collector.take(event)
    except (TruncatedError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        if not collector.events:
            raise InputError(f"{path} breaks off or is damaged before its first event") from error
        notes.append(f"the file breaks off after {collector.events:,} events; what follows them is missing")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    if not collector.events:
        raise InputError(f"{path} holds no events: nothing was recorded while the profiler ran")
    return _summary(path, collector, notes)


# --- summing up ------------------------------------------------------------------------------------------------------------


def _summary(path: Path, collector: _Collector, notes: list[str]) -> TraceSummary:
    first = collector.first
    order = sorted(collector.memory, key=lambda d: (d[0] == 0, -max(collector.memory[d].allocated)))
    sorted_memory = {device: _by_time(collector.memory[device]) for device in order}
    main = sorted_memory[order[0]] if order else None
    if main is None:
        notes.append("no memory events: record the trace with torch.profiler.profile(profile_memory=True)")
    if len(collector.spans) >= MAX_SPANS:
        notes.append(f"only the first {MAX_SPANS:,} annotations are kept")
    operators = _operators(collector, main)
    spans = [_span(span, first, main) for span in sorted(collector.spans, key=lambda s: s[1:])]
    kernels = sorted(collector.kernels.items(), key=lambda k: -k[1][1])[:TOP]
    return TraceSummary(
        path=path,
        events=collector.events,
        seconds=max(collector.last - first, 0.0) / 1e6 if math.isfinite(first) else 0.0,
        memory=tuple(_curve(device, first, sorted_memory[device]) for device in order),
        operators_by_memory=tuple(sorted(operators, key=lambda o: -o.allocated_bytes)[:TOP]),
        operators_by_time=tuple(sorted(operators, key=lambda o: -o.self_seconds)[:TOP]),
        kernels=tuple(Kernel(name, int(calls), us / 1e6) for name, (calls, us) in kernels),
        steps=tuple(span for span in spans if span.name.startswith("ProfilerStep")),
        annotations=tuple(span for span in spans if not span.name.startswith("ProfilerStep")),
        notes=tuple(notes),
    )


def _by_time(memory: _Memory) -> dict[str, Any]:
    columns = {key: np.asarray(value) for key, value in vars(memory).items()}
    order = np.argsort(columns["at"], kind="stable")
    return {key: value[order] for key, value in columns.items()}


def _curve(device: tuple[int, int], first: float, memory: dict[str, Any]) -> MemoryCurve:
    at, allocated, reserved = (memory["at"] - first) / 1e6, memory["allocated"], memory["reserved"]
    points = Points()
    for x, a, r in zip(at, allocated, reserved, strict=True):
        points.add(float(x), int(a), int(r))
    free = np.where(reserved > 0, 1.0 - allocated / np.maximum(reserved, 1), 0.0).clip(0.0)
    spent = np.diff(at, append=at[-1])
    peak, held = int(allocated.argmax()), int(reserved.argmax())
    kind, index = device
    name = _DEVICES.get(kind, f"device type {kind}")
    return MemoryCurve(
        device=f"{name}:{index}" if index >= 0 else name,
        events=len(at),
        points=tuple(points.result()),
        peak_allocated_bytes=int(allocated[peak]),
        peak_seconds=float(at[peak]),
        reserved_at_peak_bytes=int(reserved[peak]),
        peak_reserved_bytes=int(reserved[held]),
        peak_reserved_seconds=float(at[held]),
        fragmentation_at_peak=float(free[peak]),
        fragmentation_mean=float((free * spent).sum() / spent.sum()) if spent.sum() > 0 else float(free[peak]),
        fragmentation_max=float(free.max()),
        fluctuation_bytes=int(allocated.max() - allocated.min()),
    )


def _span(span: tuple[str, float, float], first: float, memory: dict[str, Any] | None) -> TraceSpan:
    """What was allocated when the span began counts as well: the event before it."""
    name, start, end = span
    peaks: list[int | None] = [None, None]
    if memory is not None:
        begin = max(int(np.searchsorted(memory["at"], start, side="right")) - 1, 0)
        stop = int(np.searchsorted(memory["at"], end, side="right"))
        if stop > begin:
            peaks = [int(memory[key][begin:stop].max()) for key in ("allocated", "reserved")]
    return TraceSpan(name, (start - first) / 1e6, (end - first) / 1e6, peaks[0], peaks[1])


def _operators(collector: _Collector, memory: dict[str, Any] | None) -> list[Operator]:
    names = [*collector.names, OUTSIDE]
    outside = len(names) - 1
    calls: Any = np.zeros(len(names), dtype=np.int64)
    count, taken, total, alone = calls.copy(), calls.copy(), calls.astype(float), calls.astype(float)
    for index, thread in enumerate(collector.threads):
        start, end, name = _ordered(thread)
        if len(start):
            parent, inside = _parents(start, end)
            own = np.maximum(end - start - inside, 0.0)
            calls += np.bincount(name, minlength=len(names))
            total += np.bincount(name, end - start, len(names))
            alone += np.bincount(name, own, len(names))
        if memory is not None:
            mine = (memory["thread"] == index) & (memory["change"] > 0)
            place = _innermost(memory["at"][mine], start, end, parent if len(start) else start)
            owner = np.where(place >= 0, name[place], outside) if len(start) else np.full(int(mine.sum()), outside)
            np.add.at(taken, owner, memory["change"][mine])
            np.add.at(count, owner, 1)
    return [
        Operator(names[i], int(calls[i]), float(total[i]) / 1e6, float(alone[i]) / 1e6, int(taken[i]), int(count[i]))
        for i in np.flatnonzero((calls > 0) | (count > 0))
    ]


def _ordered(thread: _Thread) -> tuple[Any, Any, Any]:
    start, end, name = np.asarray(thread.start), np.asarray(thread.end), np.asarray(thread.name)
    steps = np.diff(start)
    if np.any(steps < 0) or np.any((steps == 0) & (np.diff(end) > 0)):
        order = np.lexsort((-end, start))  # of two that start together, the longer one called the other
        start, end, name = start[order], end[order], name[order]
    return start, end, name


def _parents(start: Any, end: Any) -> tuple[Any, Any]:
    """Which operator called each (-1: none), and the time each spent in those it called directly."""
    parent = array("i", [-1]) * len(start)
    opened: list[tuple[float, int]] = []
    for index, (begin, finish) in enumerate(zip(array("d", start), array("d", end), strict=True)):
        while opened and opened[-1][0] <= begin:
            opened.pop()
        if opened:
            parent[index] = opened[-1][1]
        opened.append((finish, index))
    callers = np.asarray(parent)
    called = callers >= 0
    return callers, np.bincount(callers[called], weights=(end - start)[called], minlength=len(start))


def _innermost(at: Any, start: Any, end: Any, parent: Any) -> Any:
    """Index of the innermost operator active at each time; -1 where there is none."""
    place = np.searchsorted(start, at, side="right") - 1
    if not len(start):
        return place
    for _ in range(1000):  # deeper nesting than a Python stack allows
        over = np.flatnonzero((place >= 0) & (end[place] < at))
        if not len(over):
            return place
        place[over] = parent[place[over]]
    return place
