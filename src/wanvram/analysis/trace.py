"""torch.profiler Chrome traces of any size: events are decoded one at a time and only numbers are kept. No torch.

Of every event that matters 20 to 44 bytes stay in memory, so that a 2 GiB trace needs some 200 MiB. Memory is reported by
"[memory]" instant events (profile_memory=True), which may come in any order relative to the operators they belong to.
"""

from __future__ import annotations

import gzip
import re
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wanvram.analysis.event_scanner import EventScanner, Invalid, TruncatedError
from wanvram.analysis.points import Point, Points
from wanvram.errors import InputError
from wanvram.foreign_text import quoted, shown, why
from wanvram.input_files import open_regular

__all__ = ["Kernel", "MemoryCurve", "Operator", "TraceSpan", "TraceSummary", "read_trace"]

MAX_RECORDS = 24_000_000  # operators and memory events kept: 0.5 to 1 GB
MAX_NAMES = 50_000
MAX_SPANS = 20_000
TOP = 50
STEP = "ProfilerStep"
OUTSIDE = "(outside of any operator)"
_DEVICES = {-1: "a device of unknown kind", 0: "cpu", 1: "cuda", 12: "xpu", 13: "mps"}
_OPERATOR, _ON_DEVICE, _SPAN, _OTHER = range(4)
# Categories in small letters; torch 1.8 to 1.10 wrote Operator, Kernel, Memcpy and Memset.
_KINDS = {
    "cpu_op": _OPERATOR, "operator": _OPERATOR, "kernel": _ON_DEVICE, "gpu_memcpy": _ON_DEVICE, "memcpy": _ON_DEVICE,
    "gpu_memset": _ON_DEVICE, "memset": _ON_DEVICE, "user_annotation": _SPAN,
}  # fmt: skip
HALF_COST = 4  # what a begin or an end takes in memory, in records
HOUR = 3.6e9  # microseconds
FAR = 24  # hours without any event, beyond which a time is not of this recording
MAX_HOURS = 10_000
LONGEST = 31 * 24 * HOUR  # microseconds of one event
_NUMBER = re.compile(r"\s*[-+]?[0-9]{1,19}(?:\.[0-9]{0,30})?\s*")


# --- results ---------------------------------------------------------------------------------------------------------------


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


# --- collecting ------------------------------------------------------------------------------------------------------------


@dataclass
class _Thread:
    """The operators of one thread; times in microseconds."""

    start: array[float] = field(default_factory=lambda: array("d"))
    end: array[float] = field(default_factory=lambda: array("d"))
    name: array[int] = field(default_factory=lambda: array("I"))


@dataclass
class _Memory:
    """The memory events of one device; -1 for an allocated or reserved total that the event does not have."""

    at: array[float] = field(default_factory=lambda: array("d"))
    allocated: array[int] = field(default_factory=lambda: array("q"))
    reserved: array[int] = field(default_factory=lambda: array("q"))
    change: array[int] = field(default_factory=lambda: array("q"))
    thread: array[int] = field(default_factory=lambda: array("I"))


class _StrangeError(Exception):
    """Why an event is left out. kind: strange, unfinished or invalid; the sentence goes on after "event 5"."""

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind


_LEFT_OUT = {
    "invalid": ("1 event is no valid JSON and is left out", "{} events are no valid JSON and are left out"),
    "unfinished": ("1 event did not finish and is left out", "{} events did not finish and are left out"),
    "strange": ("1 event is left out", "{} events are left out"),
}


class _Collector:
    """What is kept of the events. A strange one costs itself: it is counted, and the first of its kind named."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.events = self.records = self.uncategorised = 0
        self.legacy = False
        self.threads: list[_Thread] = []
        self.memory: dict[tuple[int, int], _Memory] = {}
        self.names: dict[str, int] = {}
        self.kernels: dict[str, list[float]] = {}
        self.spans: list[tuple[str, float, float]] = []
        self.hours: dict[int, list[float]] = {}  # hour -> events, first start, last end, number of the first of them
        self.left_out: Counter[str] = Counter()
        self.firsts: dict[str, str] = {}
        self._kinds: dict[str, int] = dict(_KINDS)
        self._halves: dict[int, list[tuple[float, int, bool, str, int]]] = {}
        self._thread_index: dict[Any, int] = {}

    def take(self, event: Any) -> None:
        self.events += 1
        try:
            if event.__class__ is dict:
                self._take(event)
            elif event.__class__ is Invalid:
                raise _StrangeError("invalid", f" (near byte {event.where:,}): {event.reason}")
            else:
                raise _StrangeError("strange", f" is '{shown(event, 40)}'")
        except _StrangeError as error:
            self._leave_out(error, self.events)

    def _leave_out(self, error: _StrangeError, number: int) -> None:
        self.left_out[error.kind] += 1
        self.firsts.setdefault(error.kind, f"event {number}{error}")

    def _take(self, event: dict[str, Any]) -> None:
        category, phase = event.get("cat"), event.get("ph")
        kind = self._kinds.get(category) if category.__class__ is str else None  # type: ignore[arg-type]
        if kind is None:
            if event.get("name") == "[memory]":
                self._take_memory(event)
                return
            kind = self._kind(event, category, phase)
        if phase == "X" or (phase is None and kind != _OTHER):
            if kind != _OTHER:
                self._complete(kind, event, *self._times(event))
        elif phase == "B" or phase == "E":
            self._half(event, phase == "B", kind)
        elif event.get("name") == "[memory]":
            self._take_memory(event)

    def _kind(self, event: dict[str, Any], category: Any, phase: Any) -> int:
        """Of an event whose category is not written as in _KINDS."""
        if category.__class__ is str:
            kind = next((_KINDS[part] for part in category.lower().split(",") if part in _KINDS), _OTHER)
            if len(self._kinds) < 1000:
                self._kinds[category] = kind
            return kind
        if category is not None or phase not in ("X", "B"):
            return _OTHER
        self.uncategorised += 1  # torch.autograd.profiler, before Kineto
        process = event.get("pid")
        self.legacy = self.legacy or process == "CPU functions" or process == "CUDA functions"
        return _ON_DEVICE if process == "CUDA functions" else _OPERATOR

    def _complete(self, kind: int, event: dict[str, Any], start: float, end: float, name: str) -> None:
        if kind == _ON_DEVICE:
            if len(self.kernels) < MAX_NAMES or name in self.kernels:
                total = self.kernels.setdefault(name, [0, 0.0])
                total[0] += 1
                total[1] += end - start
        elif kind == _SPAN or name.startswith(STEP):
            if len(self.spans) < MAX_SPANS:
                self.spans.append((name, start, end))
        else:
            self._operator(self._thread(event), start, end, name)

    def _operator(self, index: int, start: float, end: float, name: str) -> None:
        thread = self.threads[index]
        thread.start.append(start)
        thread.end.append(end)
        thread.name.append(self.names.setdefault(name, len(self.names)))
        self._count()

    def _half(self, event: dict[str, Any], begins: bool, kind: int) -> None:
        at = self._number(event, "ts")
        halves = self._halves.setdefault(self._thread(event), [])
        halves.append((at, self.events, begins, self._name_of(event) if "name" in event else "", kind))
        self._count(HALF_COST)

    def join_halves(self) -> None:
        """Begin and end of one thread, in order of their times: the innermost begin of the same name is the partner."""
        for thread, halves in self._halves.items():
            opened: list[tuple[float, int, bool, str, int]] = []
            for half in sorted(halves, key=lambda h: h[:2]):
                if half[2]:
                    opened.append(half)
                    continue
                place = next((i for i in range(len(opened) - 1, -1, -1) if half[3] in ("", opened[i][3])), None)
                if place is None:
                    self._leave_out(_StrangeError("unfinished", f", {quoted(half[3])}, ends without a begin"), half[1])
                    continue
                self._unfinished(opened[place + 1 :])
                start, number, _, name, kind = opened[place]
                del opened[place:]
                if kind != _OTHER:
                    self._seen(start, half[0], number)
                    self._joined(kind, thread, start, half[0], name)
            self._unfinished(opened)
        self._halves.clear()

    def _joined(self, kind: int, thread: int, start: float, end: float, name: str) -> None:
        if kind == _OPERATOR and not name.startswith(STEP):
            self._operator(thread, start, end, name)
        else:
            self._complete(kind, {}, start, end, name)

    def _unfinished(self, begun: list[tuple[float, int, bool, str, int]]) -> None:
        for _, number, _, name, _ in begun:
            self._leave_out(_StrangeError("unfinished", f", {quoted(name)}, begins without an end"), number)

    def _take_memory(self, event: dict[str, Any]) -> None:
        at, numbers = self._number(event, "ts"), event.get("args")
        if numbers.__class__ is not dict:
            raise _StrangeError("strange", ", a [memory] event, has no args")
        device = (self._whole(numbers, "Device Type", missing=-1), self._whole(numbers, "Device Id", missing=-1))
        totals = [self._whole(numbers, f"Total {key}", 0, missing=-1) for key in ("Allocated", "Reserved")]
        change, thread = self._whole(numbers, "Bytes", missing=0), self._thread(event)
        if totals[0] < 0 and "Bytes" not in numbers:
            raise _StrangeError("strange", ", a [memory] event, has neither Bytes nor Total Allocated")
        if device not in self.memory and len(self.memory) >= 1024:
            raise _StrangeError("strange", " is of another device after 1,024 of them")
        memory = self.memory.setdefault(device, _Memory())
        memory.at.append(at)
        memory.allocated.append(totals[0])
        memory.reserved.append(totals[1])
        memory.change.append(change)
        memory.thread.append(thread)
        self._seen(at, at, self.events)
        self._count()

    def _times(self, event: dict[str, Any]) -> tuple[float, float, str]:
        start = self._number(event, "ts")
        duration = self._number(event, "dur") if "dur" in event else -1.0
        if duration < 0:
            lasts = f"lasts {duration} microseconds" if "dur" in event else "has no duration"
            raise _StrangeError("unfinished", f", {quoted(event.get('name'))}, {lasts}")
        if duration > LONGEST:
            raise _StrangeError("strange", f" lasts {duration:.0f} microseconds")
        self._seen(start, start + duration, self.events)
        return start, start + duration, self._name_of(event)

    def _seen(self, start: float, end: float, number: int) -> None:
        """Counts by the hour: what is days away from everything else is not of this recording."""
        hour = int(start // HOUR)
        seen = self.hours.get(hour)
        if seen is None:
            if len(self.hours) < MAX_HOURS:
                self.hours[hour] = [1, start, end, number]
            return
        seen[0] += 1
        if start < seen[1]:
            seen[1] = start
        if end > seen[2]:
            seen[2] = end

    def _name_of(self, event: dict[str, Any]) -> str:
        name: Any = event.get("name")
        if name.__class__ is not str:
            return "(no name)"
        if name not in self.names and (len(name) > 200 or len(self.names) >= MAX_NAMES):
            return name[:200] if len(self.names) < MAX_NAMES else "(other)"
        return str(name)

    def _number(self, event: dict[str, Any], key: str) -> float:
        value: Any = event.get(key)
        if value.__class__ is str and _NUMBER.fullmatch(value):
            value = float(value)
        if (value.__class__ is float or value.__class__ is int) and -1e18 < value < 1e18:  # false for NaN
            return float(value)
        raise _StrangeError("strange", f" has {key} {quoted(value, 40)}; expected a number")

    def _whole(self, numbers: dict[str, Any], key: str, least: int = -(1 << 62), *, missing: int | None = None) -> int:
        value: Any = numbers.get(key)
        if missing is not None and key not in numbers:
            return missing
        if value.__class__ is str and _NUMBER.fullmatch(value):
            value = float(value) if "." in value else int(value)
        if value.__class__ is float and value.is_integer():
            value = int(value)
        if value.__class__ is not int or not least <= value < 1 << 62:
            kind = "whole number that is not negative" if least == 0 else "whole number"
            raise _StrangeError("strange", f" has {key} {quoted(value, 40)}; expected a {kind}")
        return int(value)

    def _thread(self, event: dict[str, Any]) -> int:
        key = f"{event.get('pid')}/{event.get('tid')}"[:80]
        index = self._thread_index.get(key)
        if index is None:
            if len(self.threads) >= 65536:
                raise _StrangeError("strange", " is of another thread after 65,536 of them")
            index = self._thread_index[key] = len(self.threads)
            self.threads.append(_Thread())
        return index

    def _count(self, records: int = 1) -> None:
        self.records += records
        if self.records > MAX_RECORDS:
            raise InputError(f"{self._name} has over {MAX_RECORDS:,} operators and memory events; record fewer steps")


def read_trace(path: Path) -> TraceSummary:
    """The trace at `path` (.json, or gzipped), read in one pass.

    Raises InputError when it is missing, empty, not a trace, or when none of its events can be read. A trace that breaks off
    (a killed process) is read as far as it goes, events that cannot be read are left out, and `notes` says so.
    """
    collector, cut = _Collector(shown(path)), False
    with open_regular(path) as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        file: Any = gzip.GzipFile(fileobj=raw) if packed else raw
        scanner = EventScanner(file.read1 if packed else file.read, shown(path))
        try:
            for event in scanner.events():
                collector.take(event)
        except (TruncatedError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            if not collector.events:
                raise InputError(f"{shown(path)} breaks off or is damaged before its first event") from error
            cut = True
        except OSError as error:
            raise InputError(f"{shown(path)} cannot be read: {why(error)}") from error
    if not collector.events:
        raise InputError(f"{shown(path)} holds no events: nothing was recorded while the profiler ran")
    read = collector.events - sum(collector.left_out.values())
    if not read:
        first = next(iter(collector.firsts.values()))
        raise InputError(f"{shown(path)} is no torch.profiler trace: none of its events can be read; {first}")
    collector.join_halves()
    notes = [*scanner.notes, *_left_out(collector)]
    if cut:
        notes.append(f"the file breaks off after {collector.events:,} events; what follows them is missing")
    return _summary(path, collector, scanner.distributed, notes)


def _left_out(collector: _Collector) -> list[str]:
    """One sentence for each kind of event that is left out, with the place of the first; and what the file is, if it is old."""
    notes = []
    for kind, count in collector.left_out.items():
        one, many = _LEFT_OUT[kind]
        said = one if count == 1 else many.format(f"{count:,}")
        notes.append(f"{said}: {'' if count == 1 else 'the first, '}{collector.firsts[kind]}")
    if collector.legacy:
        notes.append("this is a list of torch.autograd.profiler, from before torch.profiler: operators and times alone")
    elif collector.uncategorised:
        count = collector.uncategorised
        notes.append(f"{count:,} events have no category, as torch.profiler writes it; they are taken for operators")
    return notes


# --- summing up ------------------------------------------------------------------------------------------------------------


def _summary(path: Path, collector: _Collector, distributed: dict[str, Any], notes: list[str]) -> TraceSummary:
    first, last = _window(collector, notes)
    sorted_memory = _memory_by_time(collector, first, last, notes)
    order = sorted(sorted_memory, key=lambda d: (d[0] == 0, -sorted_memory[d]["allocated"].max()))
    main = sorted_memory[order[0]] if order else None
    if main is None and not collector.legacy:
        notes.append("no memory events: record the trace with torch.profiler.profile(profile_memory=True)")
    if len(collector.spans) >= MAX_SPANS:
        notes.append(f"only the first {MAX_SPANS:,} annotations are kept")
    operators = _operators(collector, main)
    inside = [span for span in collector.spans if first <= span[1] and span[2] <= last]
    spans = [_span(span, first, main) for span in sorted(inside, key=lambda s: s[1:])]
    kernels = sorted(collector.kernels.items(), key=lambda k: -k[1][1])[:TOP]
    return TraceSummary(
        path=path,
        events=collector.events,
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


def _window(collector: _Collector, notes: list[str]) -> tuple[float, float]:
    """First and last microsecond of the recording: of the hours that lie together and hold most of the events.

    A kernel that the driver lost has a time of 0, 55 years before the others.
    """
    groups: list[list[int]] = []
    for hour in sorted(collector.hours):
        if groups and hour - groups[-1][-1] <= FAR:
            groups[-1].append(hour)
        else:
            groups.append([hour])
    if not groups:
        return 0.0, 0.0
    seen = [[collector.hours[hour] for hour in group] for group in groups]
    most = max(seen, key=lambda group: sum(part[0] for part in group))
    others = [part for group in seen if group is not most for part in group]
    if others:
        count = int(sum(part[0] for part in others))
        number, start = min((int(part[3]), part[1]) for part in others)
        notes.append(
            f"{count:,} {'event is' if count == 1 else 'events are'} left out of the time span, over a day away from the "
            f"rest: {'' if count == 1 else 'the first, '}event {number} at {start:.0f} microseconds"
        )
    return min(part[1] for part in most), max(part[2] for part in most)


def _memory_by_time(
    collector: _Collector, first: float, last: float, notes: list[str]
) -> dict[tuple[int, int], dict[str, Any]]:
    """The memory events inside the recording, in order, with a total in each."""
    result = {}
    for device, memory in collector.memory.items():
        columns = _by_time(memory)
        inside = (columns["at"] >= first) & (columns["at"] <= last)
        if not inside.any():
            continue
        columns = {key: value[inside] for key, value in columns.items()}
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


def _by_time(memory: _Memory) -> dict[str, Any]:
    columns = {key: np.asarray(value) for key, value in vars(memory).items()}
    order = np.argsort(columns["at"], kind="stable")
    return {key: value[order] for key, value in columns.items()}


def _device(device: tuple[int, int]) -> str:
    kind, index = device
    name = _DEVICES.get(kind, f"device type {kind}")
    return f"{name}:{index}" if index >= 0 else name


def _curve(device: tuple[int, int], first: float, memory: dict[str, Any]) -> MemoryCurve:
    at, allocated, reserved = (memory["at"] - first) / 1e6, memory["allocated"], memory["reserved"].clip(0)
    points = Points()
    for x, a, r in zip(at, allocated, reserved, strict=True):
        points.add(float(x), int(a), int(r))
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
