"""memory_events.json read: base memory per component, peaks by name, the largest growth between two events. No torch.

Also events of the specification's own MemoryProfiler (section 4.1), which hold no byte counts but the text of memory_log; those
figures are exact to 0.01 MB.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from wanvram.errors import DamagedError, InputError
from wanvram.foreign_text import quoted, shown, why
from wanvram.input_files import read_text
from wanvram.strict_json import strict_json
from wanvram.units import MIB

__all__ = ["EventSummary", "read_events"]

MAX_FILE_BYTES = 256 * MIB  # an event has about 300 bytes
START = ": start"
_LOG = re.compile(r"(incremental_memory|peak_memory)=(-?[0-9]{1,12}(?:\.[0-9]{1,12})?) MB")


@dataclass(frozen=True)
class EventGroup:
    """All events of one name; each figure its highest, None where no event has it.

    incremental_bytes: over the base_memory that was given, so base memory where a model was loaded; of a run's own events,
    over what there was at `NAME: start`.
    """

    name: str
    count: int
    first_seconds: float
    allocated_bytes: int | None
    reserved_bytes: int | None
    device_bytes: int | None
    incremental_bytes: int | None


@dataclass(frozen=True)
class EventGrowth:
    """From one event to the next, allocated bytes."""

    after: str
    before: str
    bytes: int


@dataclass(frozen=True)
class EventSummary:
    """groups: in order of their first event. peak: the group with the most allocated. seconds: first event to last."""

    events: int
    seconds: float
    peak: EventGroup | None
    groups: tuple[EventGroup, ...]
    growth: tuple[EventGrowth, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"schema": 1, **asdict(self)}


@dataclass(frozen=True)
class _Event:
    name: str
    timestamp: float
    allocated: int | None
    reserved: int | None
    device: int | None
    incremental: int | None


def read_events(path: Path) -> EventSummary:
    """Raises InputError when the file is missing, too large, truncated or no list of memory events. An event that is none is
    left out, and `notes` says so.
    """
    try:
        data = strict_json(read_text(path, MAX_FILE_BYTES))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{shown(path)} is no memory_events.json: {why(error)}") from error
    if not isinstance(data, list):
        raise InputError(f"{shown(path)} is no memory_events.json: it holds no list")
    events, strange = [], []
    for number, item in enumerate(data, 1):
        try:
            events.append(_event(number, item))
        except DamagedError as error:
            strange.append(str(error))
    if strange and not events:
        raise InputError(f"{shown(path)} is no memory_events.json: {strange[0]}")
    if not events:
        raise InputError(f"{shown(path)} holds no events: the run ended before its first stage")
    traced = sum(isinstance(item, dict) and item.get("traced") is True for item in data)
    return _summary(_over_their_starts(events), strange, traced)


def _event(number: int, item: Any) -> _Event:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        raise DamagedError(f"event {number} has no name")
    timestamp = item.get("timestamp")
    if isinstance(timestamp, bool) or not isinstance(timestamp, (int, float)):
        raise DamagedError(f"event {number} has no timestamp")
    allocated, reserved, device = (_whole(number, item, f"{key}_bytes") for key in ("allocated", "reserved", "device"))
    log = item.get("memory_log")
    found = _LOG.search(log[-200:]) if isinstance(log, str) else None
    said = round(float(found[2]) * MIB) if found else None
    incremental = said if found and found[1] == "incremental_memory" else None
    metadata = item.get("metadata")
    base = metadata.get("base_memory") if isinstance(metadata, dict) else None
    if allocated is None and found and found[1] == "peak_memory":
        allocated = said
    if allocated is not None and isinstance(base, int) and not isinstance(base, bool):
        incremental = allocated - base
    return _Event(item["name"], float(timestamp), allocated, reserved, device, incremental)


def _over_their_starts(events: list[_Event]) -> list[_Event]:
    """The recorder logs a stage's start and, when it ends, its peak."""
    starts: dict[str, int] = {}
    result = []
    for event in events:
        before = starts.pop(event.name, None)
        if event.name.endswith(START) and event.allocated is not None:
            starts[event.name.removesuffix(START)] = event.allocated
        if before is not None and event.incremental is None and event.allocated is not None:
            event = replace(event, incremental=event.allocated - before)
        result.append(event)
    return result


def _whole(number: int, item: dict[str, Any], key: str) -> int | None:
    value = item.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise DamagedError(f"event {number} has {key} {quoted(value)}")
    return value


def _summary(events: list[_Event], strange: Sequence[str], traced: int) -> EventSummary:
    first = events[0].timestamp
    by_name: dict[str, list[_Event]] = {}
    for event in events:
        by_name.setdefault(event.name, []).append(event)
    groups = tuple(_group(name, same, first) for name, same in by_name.items())
    known = [group for group in groups if group.allocated_bytes is not None]
    growth = [
        EventGrowth(before.name, after.name, after.allocated - before.allocated)
        for before, after in pairwise(events)
        if before.allocated is not None and after.allocated is not None and after.allocated > before.allocated
    ]
    notes = []
    if strange:
        notes.append(f"{len(strange):,} of the file's events are none and are left out; the first: {strange[0]}")
    if not any(event.reserved is not None for event in events):
        notes.append("the events hold no byte counts; figures are read from memory_log, to 0.01 MB")
    if traced:
        notes.append(f"of {traced:,} events the device memory holds torch.profiler's own buffers, too")
    return EventSummary(
        events=len(events),
        seconds=max(event.timestamp for event in events) - first,
        peak=max(known, key=lambda group: group.allocated_bytes or 0, default=None),
        groups=groups,
        growth=tuple(sorted(growth, key=lambda g: -g.bytes)[:5]),
        notes=tuple(notes),
    )


def _group(name: str, events: list[_Event], first: float) -> EventGroup:
    def highest(key: str) -> int | None:
        return max((value for event in events if (value := getattr(event, key)) is not None), default=None)

    figures = map(highest, ("allocated", "reserved", "device", "incremental"))
    return EventGroup(name, len(events), events[0].timestamp - first, *figures)
