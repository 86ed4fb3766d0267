"""What a torch.profiler trace says, from the columns that its reader kept. No torch."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wanvram.analysis.points import Point, Points

__all__ = [
    "HOUR",
    "OUTSIDE",
    "STEP",
    "Kept",
    "Kernel",
    "MemoryCurve",
    "MemoryEvents",
    "Operator",
    "Thread",
    "TraceSpan",
    "TraceSummary",
    "summarize",
]

TOP = 50
STEP = "ProfilerStep"
OUTSIDE = "(outside of any operator)"
HOUR = 3.6e9  # microseconds
FAR = 24  # hours without any event, beyond which a time is not of this recording
_DEVICES = {-1: "a device of unknown kind", 0: "cpu", 1: "cuda", 12: "xpu", 13: "mps"}


@dataclass(frozen=True)
class MemoryCurve:
    """One device over time. Fragmentation is (reserved - allocated) / reserved; the mean is weighted by time. Both, and what
    was reserved, are None where the trace does not say what was: of the CPU, which has no cache, and of torch before 1.10.

    fluctuation_bytes: highest minus lowest allocated. points: at most 4,000, see Points.
    """

    device: str
    events: int
    points: tuple[Point, ...]
    peak_allocated_bytes: int
    peak_seconds: float
    reserved_at_peak_bytes: int | None
    peak_reserved_bytes: int | None
    peak_reserved_seconds: float | None
    fragmentation_at_peak: float | None
    fragmentation_mean: float | None
    fragmentation_max: float | None
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
    """A trace. Seconds count from its first event that matters. notes: one sentence each on what is missing or estimated.

    rank, world_size: of a distributed run, else None.
    """

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
    rank: int | None = None
    world_size: int | None = None

    @property
    def main(self) -> MemoryCurve | None:
        """The accelerator with the highest peak, else the CPU; None without memory events."""
        return self.memory[0] if self.memory else None


@dataclass
class Thread:
    """The operators of one thread; times in microseconds."""

    start: array[float] = field(default_factory=lambda: array("d"))
    end: array[float] = field(default_factory=lambda: array("d"))
    name: array[int] = field(default_factory=lambda: array("I"))


@dataclass
class MemoryEvents:
    """The memory events of one device; -1 for an allocated or reserved total that the event does not have."""

    at: array[float] = field(default_factory=lambda: array("d"))
    allocated: array[int] = field(default_factory=lambda: array("q"))
    reserved: array[int] = field(default_factory=lambda: array("q"))
    change: array[int] = field(default_factory=lambda: array("q"))
    thread: array[int] = field(default_factory=lambda: array("I"))


@dataclass
class Kept:
    """What is kept of a trace's events. names and kernels by name, spans (name, start, end), times in microseconds.

    hours: hour -> how many events, first start, last end, number of the first of them.
    """

    events: int = 0
    legacy: bool = False
    threads: list[Thread] = field(default_factory=list)
    memory: dict[tuple[int, int], MemoryEvents] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, list[float]] = field(default_factory=dict)
    spans: list[tuple[str, float, float]] = field(default_factory=list)
    spans_full: bool = False
    hours: dict[int, list[float]] = field(default_factory=dict)


def summarize(path: Path, kept: Kept, distributed: dict[str, Any], notes: list[str]) -> TraceSummary:
    first, last = _window(kept, notes)
    sorted_memory = _memory_by_time(kept, first, last, notes)
    order = sorted(sorted_memory, key=lambda d: (d[0] == 0, -sorted_memory[d]["allocated"].max()))
    main = sorted_memory[order[0]] if order else None
    if main is None and not kept.legacy:
        notes.append("no memory events: record the trace with torch.profiler.profile(profile_memory=True)")
    if kept.spans_full:
        notes.append(f"only the first {len(kept.spans):,} annotations are kept")
    operators = _operators(kept, main)
    inside = [span for span in kept.spans if first <= span[1] and span[2] <= last]
    spans = [_span(span, first, main) for span in sorted(inside, key=lambda s: s[1:])]
    kernels = sorted(kept.kernels.items(), key=lambda k: -k[1][1])[:TOP]
    return TraceSummary(
        path=path,
        events=kept.events,
        seconds=(last - first) / 1e6,
        memory=tuple(_curve(device, first, sorted_memory[device]) for device in order),
        operators_by_memory=tuple(sorted(operators, key=lambda o: -o.allocated_bytes)[:TOP]),
        operators_by_time=tuple(sorted(operators, key=lambda o: -o.self_seconds)[:TOP]),
        kernels=tuple(Kernel(name, int(calls), us / 1e6) for name, (calls, us) in kernels),
        steps=tuple(span for span in spans if span.name.startswith(STEP)),
        annotations=tuple(span for span in spans if not span.name.startswith(STEP)),
        notes=tuple(notes),
        rank=_rank(distributed, "rank"),
        world_size=_rank(distributed, "world_size"),
    )


def _rank(distributed: dict[str, Any], key: str) -> int | None:
    value = distributed.get(key)
    return value if value.__class__ is int and 0 <= value < 1 << 31 else None


def _window(kept: Kept, notes: list[str]) -> tuple[float, float]:
    """First and last microsecond of the recording: of the hours that lie together and hold most of the events.

    A kernel that the driver lost has a time of 0, 55 years before the others.
    """
    groups: list[list[list[float]]] = []
    before = -math.inf
    for hour, seen in sorted(kept.hours.items()):
        if hour - before > FAR:
            groups.append([])
        groups[-1].append(seen)
        before = hour
    if not groups:
        return 0.0, 0.0
    most = max(groups, key=lambda group: sum(part[0] for part in group))
    others = [part for group in groups if group is not most for part in group]
    if others:
        count = int(sum(part[0] for part in others))
        number, start = min((int(part[3]), part[1]) for part in others)
        notes.append(
            f"{count:,} {'event is' if count == 1 else 'events are'} left out of the time span, over a day away from the "
            f"rest: {'' if count == 1 else 'the first, '}event {number} at {start:.0f} microseconds"
        )
    return min(part[1] for part in most), max(part[2] for part in most)


def _memory_by_time(kept: Kept, first: float, last: float, notes: list[str]) -> dict[tuple[int, int], dict[str, Any]]:
    """The memory events inside the recording, in order, with a total in each."""
    result = {}
    for device, memory in kept.memory.items():
        columns = {key: np.asarray(value) for key, value in vars(memory).items()}
        order = np.argsort(columns["at"], kind="stable")
        order = order[(columns["at"][order] >= first) & (columns["at"][order] <= last)]
        if not len(order):
            continue
        columns = {key: value[order] for key, value in columns.items()}
        missing = columns["allocated"] < 0
        if missing.any():
            columns["allocated"] = _running(columns["allocated"], columns["change"], missing)
            notes.append(
                f"{int(missing.sum()):,} memory events of {_device(device)} have no Total Allocated (torch before 1.10): "
                "the sum of what was allocated and freed since the trace began stands for it"
            )
        result[device] = columns
    return result


def _running(allocated: Any, change: Any, missing: Any) -> Any:
    """A missing total is the last known one and what was allocated since; at no time below zero."""
    totals = np.cumsum(change, dtype=np.float64)
    known = np.where(~missing, allocated - totals, np.nan)
    at = np.maximum.accumulate(np.where(~missing, np.arange(len(missing)), -1))
    base = np.where(at >= 0, known[at], 0.0)
    result = totals + base
    unknown = at < 0  # before any total: what the trace frees first was there when it began
    if unknown.any():
        result[unknown] -= min(float(result[unknown].min()), 0.0)
    return np.where(missing, result.clip(0, 1 << 62), allocated).astype(np.int64)


def _device(device: tuple[int, int]) -> str:
    kind, index = device
    name = _DEVICES.get(kind, f"device type {kind}")
    return f"{name}:{index}" if index >= 0 else name


def _curve(device: tuple[int, int], first: float, memory: dict[str, Any]) -> MemoryCurve:
    at, allocated, reserved = (memory["at"] - first) / 1e6, memory["allocated"], memory["reserved"].clip(0)
    points = Points()
    for x, a, r in zip(at, allocated, reserved, strict=True):
        points.add((float(x), int(a), int(r)))
    peak, held = int(allocated.argmax()), int(reserved.argmax())
    free = np.where(reserved > 0, 1.0 - allocated / np.maximum(reserved, 1), 0.0).clip(0.0)
    spent = np.diff(at, append=at[-1])
    mean = float((free * spent).sum() / spent.sum()) if spent.sum() > 0 else float(free[peak])
    known = bool(reserved[held] > 0)
    return MemoryCurve(
        device=_device(device),
        events=len(at),
        points=tuple(points.result()),
        peak_allocated_bytes=int(allocated[peak]),
        peak_seconds=float(at[peak]),
        reserved_at_peak_bytes=int(reserved[peak]) if known else None,
        peak_reserved_bytes=int(reserved[held]) if known else None,
        peak_reserved_seconds=float(at[held]) if known else None,
        fragmentation_at_peak=float(free[peak]) if known else None,
        fragmentation_mean=mean if known else None,
        fragmentation_max=float(free.max()) if known else None,
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
            held = int(memory["reserved"][begin:stop].max())
            peaks = [int(memory["allocated"][begin:stop].max()), held if held > 0 else None]
    return TraceSpan(name, (start - first) / 1e6, (end - first) / 1e6, peaks[0], peaks[1])


def _operators(kept: Kept, memory: dict[str, Any] | None) -> list[Operator]:
    names = [*kept.names, OUTSIDE]
    outside = len(names) - 1
    calls: Any = np.zeros(len(names), dtype=np.int64)
    count, taken, total, alone = calls.copy(), calls.copy(), calls.astype(float), calls.astype(float)
    for index, thread in enumerate(kept.threads):
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


def _ordered(thread: Thread) -> tuple[Any, Any, Any]:
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
