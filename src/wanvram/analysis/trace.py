"""torch.profiler Chrome traces of any size: events are decoded one at a time and only numbers are kept. No torch.

Of every event that matters 20 to 44 bytes stay in memory, so that a 2 GiB trace needs some 200 MiB. Memory is reported by
"[memory]" instant events (profile_memory=True), which may come in any order relative to the operators they belong to.
"""

from __future__ import annotations

import re
from collections import Counter
from gzip import GzipFile
from pathlib import Path
from typing import Any

from wanvram.analysis.event_scanner import EventScanner, Invalid, TruncatedError
from wanvram.analysis.trace_summary import HOUR, STEP, Kept, MemoryEvents, Thread, TraceSummary, summarize
from wanvram.errors import InputError
from wanvram.foreign_text import quoted, shown
from wanvram.input_files import DAMAGED_GZIP, unpacked

__all__ = ["read_trace"]

MAX_RECORDS = 24_000_000  # operators and memory events kept: 0.5 to 1 GB
MAX_NAMES = 50_000
MAX_SPANS = 20_000
_OPERATOR, _ON_DEVICE, _SPAN, _OTHER = range(4)
# Categories in small letters; torch 1.8 to 1.10 wrote Operator, Kernel, Memcpy and Memset.
_KINDS = {
    "cpu_op": _OPERATOR, "operator": _OPERATOR, "kernel": _ON_DEVICE, "gpu_memcpy": _ON_DEVICE, "memcpy": _ON_DEVICE,
    "gpu_memset": _ON_DEVICE, "memset": _ON_DEVICE, "user_annotation": _SPAN,
}  # fmt: skip
HALF_COST = 4  # what a begin or an end takes in memory, in records
MAX_HOURS = 10_000
LONGEST = 31 * 24 * HOUR  # microseconds of one event
_NUMBER = re.compile(r"\s*[-+]?[0-9]{1,19}(?:\.[0-9]{0,30})?\s*")


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


class _Collector(Kept):
    """What is kept of the events. A strange one costs itself: it is counted, and the first of its kind named."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self.records = self.uncategorised = self.phases = 0  # phases: events that have one, whatever else they hold
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
        self.phases += phase.__class__ is str
        kind = self._kinds.get(category) if category.__class__ is str else None
        if kind is None:
            if event.get("name") == "[memory]":
                self._take_memory(event)
                return
            kind = self._kind(event, category, phase)
        if phase == "X" or (phase is None and kind != _OTHER):
            if kind != _OTHER:
                times = self._times(event)
                if not self._keep_aside(kind, *times):
                    self._operator(self._thread(event), *times)
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

    def _keep_aside(self, kind: int, start: float, end: float, name: str) -> bool:
        """Keeps a kernel or a span; False for an operator, which goes to its thread."""
        if kind == _ON_DEVICE:
            if len(self.kernels) < MAX_NAMES or name in self.kernels:
                total = self.kernels.setdefault(name, [0, 0.0])
                total[0] += 1
                total[1] += end - start
        elif kind == _SPAN or name.startswith(STEP):
            if len(self.spans) < MAX_SPANS:
                self.spans.append((name, start, end))
            self.spans_full = len(self.spans) >= MAX_SPANS
        else:
            return False
        return True

    def _operator(self, index: int, start: float, end: float, name: str) -> None:
        thread = self.threads[index]
        thread.start.append(start)
        thread.end.append(end)
        thread.name.append(self.names.setdefault(name, len(self.names)))
        self._count()

    def _half(self, event: dict[str, Any], begins: bool, kind: int) -> None:
        at = _number(event, "ts")
        halves = self._halves.setdefault(self._thread(event), [])
        halves.append((at, self.events, begins, self._name_of(event) if "name" in event else "", kind))
        self._count(HALF_COST)

    def join_halves(self) -> None:
        """Begin and end of one thread, in order of their times: the innermost begin of the same name is the partner."""
        for thread, halves in self._halves.items():
            opened: list[tuple[float, int, bool, str, int]] = []
            for half in sorted(halves):  # by time, then by number, which no other has
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
                    if not self._keep_aside(kind, start, half[0], name):
                        self._operator(thread, start, half[0], name)
            self._unfinished(opened)
        self._halves.clear()

    def _unfinished(self, begun: list[tuple[float, int, bool, str, int]]) -> None:
        for _, number, _, name, _ in begun:
            self._leave_out(_StrangeError("unfinished", f", {quoted(name)}, begins without an end"), number)

    def _take_memory(self, event: dict[str, Any]) -> None:
        at, numbers = _number(event, "ts"), event.get("args")
        if numbers.__class__ is not dict:
            raise _StrangeError("strange", ", a [memory] event, has no args")
        device = (_whole(numbers, "Device Type", -1), _whole(numbers, "Device Id", -1))
        totals = [_whole(numbers, f"Total {key}", -1, least=0) for key in ("Allocated", "Reserved")]
        change, thread = _whole(numbers, "Bytes", 0), self._thread(event)
        if totals[0] < 0 and "Bytes" not in numbers:
            raise _StrangeError("strange", ", a [memory] event, has neither Bytes nor Total Allocated")
        if device not in self.memory and len(self.memory) >= 1024:
            raise _StrangeError("strange", " is of another device after 1,024 of them")
        memory = self.memory.setdefault(device, MemoryEvents())
        memory.at.append(at)
        memory.allocated.append(totals[0])
        memory.reserved.append(totals[1])
        memory.change.append(change)
        memory.thread.append(thread)
        self._seen(at, at, self.events)
        self._count()

    def _times(self, event: dict[str, Any]) -> tuple[float, float, str]:
        start = _number(event, "ts")
        duration = _number(event, "dur") if "dur" in event else -1.0
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

    def _thread(self, event: dict[str, Any]) -> int:
        key = f"{event.get('pid')}/{event.get('tid')}"[:80]
        index = self._thread_index.get(key)
        if index is None:
            if len(self.threads) >= 65536:
                raise _StrangeError("strange", " is of another thread after 65,536 of them")
            index = self._thread_index[key] = len(self.threads)
            self.threads.append(Thread())
        return index

    def _count(self, records: int = 1) -> None:
        self.records += records
        if self.records > MAX_RECORDS:
            raise InputError(f"{self._name} has over {MAX_RECORDS:,} operators and memory events; record fewer steps")


def _number(event: dict[str, Any], key: str) -> float:
    value: Any = event.get(key)
    if value.__class__ is str and _NUMBER.fullmatch(value):
        value = float(value)
    if (value.__class__ is float or value.__class__ is int) and -1e18 < value < 1e18:  # false for NaN
        return float(value)
    raise _StrangeError("strange", f" has {key} {quoted(value, 40)}; expected a number")


def _whole(numbers: dict[str, Any], key: str, missing: int, *, least: int = -(1 << 62)) -> int:
    """missing: what stands for a number that is not there."""
    if key not in numbers:
        return missing
    value: Any = numbers[key]
    if value.__class__ is str and _NUMBER.fullmatch(value):
        value = float(value) if "." in value else int(value)
    if value.__class__ is float and value.is_integer():
        value = int(value)
    if value.__class__ is not int or not least <= value < 1 << 62:
        kind = "whole number that is not negative" if least == 0 else "whole number"
        raise _StrangeError("strange", f" has {key} {quoted(value, 40)}; expected a {kind}")
    return int(value)


def read_trace(path: Path) -> TraceSummary:
    """The trace at `path` (.json, or gzipped), read in one pass.

    Raises InputError when it is missing, empty, not a trace, or when none of its events is one. A trace that breaks off
    (a killed process) is read as far as it goes, events that cannot be read are left out, and `notes` says so.
    """
    collector, cut = _Collector(shown(path)), False
    with unpacked(path) as file:
        # GzipFile.read would keep what precedes a damaged place to itself.
        scanner = EventScanner(file.read1 if isinstance(file, GzipFile) else file.read, shown(path))
        try:
            for event in scanner.events():
                collector.take(event)
        except (TruncatedError, *DAMAGED_GZIP) as error:
            if not collector.events:
                raise InputError(f"{shown(path)} breaks off or is damaged before its first event") from error
            cut = True
    if not collector.events:
        raise InputError(f"{shown(path)} holds no events: nothing was recorded while the profiler ran")
    read = collector.events - sum(collector.left_out.values())
    if not read and not collector.phases:
        first = next(iter(collector.firsts.values()))
        raise InputError(f"{shown(path)} is no torch.profiler trace: none of its events can be read; {first}")
    collector.join_halves()
    notes = [*scanner.notes, *_left_out(collector)]
    if cut:
        notes.append(f"the file breaks off after {collector.events:,} events; what follows them is missing")
    return summarize(path, collector, scanner.distributed, notes)


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
