"""Who owned the simulated device's memory, when: every allocator call of a run, logged compactly and replayed at its end. No torch.

A timeline keeps four integers per call and no tensor, so it changes neither what lives nor when it dies. The x axis is
the number of logged events; the state at x is the state after x of them. A malloc and the segment it needed are one event:
between them there is nothing a run could see.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np

from wanvram.errors import InputError
from wanvram.timeline_record import (
    WEIGHTS,
    AliveBlocks,
    BlockState,
    MemoryOwner,
    MemoryPoint,
    StageKind,
    TimelineMoment,
    TimelineRecord,
    TimelineSegment,
    TimelineStage,
    WeightsStretch,
    largest,
)

if TYPE_CHECKING:
    import torch

    from wanvram.simulate.allocator import CachingAllocator
    from wanvram.simulate.memory import SimulatedMemory

__all__ = ["Interval", "Places", "Timeline", "function_of"]

MAX_POINTS = 4000
MAX_GROUPS = 200
_FREE, _SEGMENT, _OUTSIDE = -1, -2, -3  # what an event is, when it is not a malloc by the owner of that number
_AnyTimeline = TypeVar("_AnyTimeline", bound="Timeline")
_ROOT = __name__.partition(".")[0]


class _Where(NamedTuple):
    """The load or stage that is open, and the component at work."""

    stage: str | None = None
    kind: str | None = None
    component: str | None = None


@dataclass
class Interval:
    """A load, stage or step on the x axis."""

    name: str
    kind: StageKind
    component: str | None
    start: int
    end: int | None = None

    @property
    def whole(self) -> bool:
        return self.kind in ("load", "stage")


@dataclass(frozen=True)
class _Blocks:
    """Every block of the run as columns: it is alive at x if born <= x < died. owner counts into the timeline's owners."""

    address: np.ndarray
    nbytes: np.ndarray
    owner: np.ndarray
    born: np.ndarray
    died: np.ndarray

    def alive(self, x: int) -> np.ndarray:
        return np.flatnonzero((self.born <= x) & (x < self.died))


class Timeline:
    """Observer of a SimulatedMemory (or of any allocator whose calls are told to it) and of a Recorder's spans.

    outside_bytes: device memory beside the allocator at the start; None if the driver's view is unknown. Raises
    InputError for an allocator that has already been used: what lives there has no known owner.
    """

    def __init__(self, allocator: CachingAllocator, outside_bytes: int | None = None) -> None:
        if allocator.allocated_bytes or allocator.reserved_bytes:
            raise InputError("a timeline must be attached before anything is allocated")
        self.allocator = allocator
        self._outside = outside_bytes
        self._kinds, self._addresses = array("q"), array("q")
        self._changes = array("q")  # what the event added to allocated, or to what is outside
        self._reserved = array("q")  # after the event
        self._segments: list[tuple[int, str, int, int]] = []  # x, event, address, bytes
        self._allocated = 0
        self._owners: dict[tuple[Any, ...], int] = {}
        self._entries: list[Interval] = []
        self._open: list[tuple[Interval | None, _Where]] = []
        self._where = _Where()
        self._places = Places()
        self._told = allocator.on_segment
        allocator.on_segment = self._segment

    @classmethod
    def attach(cls: type[_AnyTimeline], memory: SimulatedMemory) -> _AnyTimeline:
        """Observes `memory` from now on; nothing may have been allocated yet."""
        timeline = cls(memory.allocator, memory.device_memory())
        memory.observer = timeline
        return timeline

    # --- observing -----------------------------------------------------------------------------------------------------------

    def begin(self, name: str, kind: str, component: str | None) -> None:
        """A span begins; every begin has its `end`. Blocks name who allocates but are no entry of their own."""
        entry = None
        if kind != "block":
            entry = Interval(name, cast(StageKind, kind), component, len(self._kinds))
            self._entries.append(entry)
        self._open.append((entry, self._where))
        stage, stage_kind, outer = self._where
        if kind in ("load", "stage"):
            stage, stage_kind = name, kind
        self._where = _Where(stage, stage_kind, component or outer)

    def end(self) -> None:
        entry, self._where = self._open.pop()
        if entry is not None:
            entry.end = len(self._kinds)

    def malloc(self, handle: int, operation: str, tensor: torch.Tensor | None = None, *, shared: bool = False) -> None:
        """After the allocator's malloc: its handle, what asked, and the storage's first tensor for its shape and dtype, None for
        a library's buffer; a reference to it that was kept would move the free that is told later.

        shared: a library's buffer for good, whoever uses it first.
        """
        if shared:
            key: tuple[Any, ...] = (operation, None, self._where._replace(component=None), None, None)
        elif tensor is None:
            key = (operation, self._places.of_caller(), self._where, None, None)
        else:
            key = (operation, self._places.of_caller(), self._where, tensor.shape, tensor.dtype)
        owner = self._owners.get(key)
        if owner is None:
            owner = self._owners[key] = len(self._owners)
        self._log_allocator(owner, handle)

    def free(self, handle: int) -> None:
        """After the allocator's free."""
        self._log_allocator(_FREE, handle)

    def outside(self, nbytes: int) -> None:
        """Device memory taken outside the allocator, bytes."""
        self._log(_OUTSIDE, 0, nbytes)

    def _segment(self, event: str, address: int, size: int, stream: int) -> None:
        if event in ("segment_free", "segment_unmap"):
            self._log(_SEGMENT, address, 0)
            self._segments.append((len(self._kinds), event, address, size))
        else:
            self._segments.append((len(self._kinds) + 1, event, address, size))  # with the malloc it is for
        if self._told is not None:
            self._told(event, address, size, stream)

    def _log_allocator(self, kind: int, handle: int) -> None:
        before, self._allocated = self._allocated, self.allocator.allocated_bytes
        self._log(kind, handle, self._allocated - before)

    def _log(self, kind: int, address: int, change: int) -> None:
        self._kinds.append(kind)
        self._addresses.append(address)
        self._changes.append(change)
        self._reserved.append(self.allocator.reserved_bytes)

    def history(self) -> Iterator[tuple[str, int, int, MemoryOwner | None]]:
        """(action, address, bytes, owner) in order, actions as PyTorch's allocator snapshot names them.

        Allocations have an owner. Sizes are those of blocks.
        """
        owners = self._owner_list()
        segments = sorted(self._segments, key=lambda segment: segment[0])
        sizes: dict[int, int] = {}
        position = 0
        for index, (kind, address, change) in enumerate(zip(self._kinds, self._addresses, self._changes, strict=True)):
            while position < len(segments) and segments[position][0] <= index + 1:
                _, action, start, size = segments[position]
                position += 1
                yield action, start, size, None
            if kind >= 0:
                sizes[address] = change
                yield "alloc", address, change, owners[kind]
            elif kind == _FREE:
                yield "free_requested", address, sizes[address], None
                yield "free_completed", address, sizes.pop(address), None

    # --- the result ----------------------------------------------------------------------------------------------------------

    def record(self) -> TimelineRecord:
        """Points, stages, weights and moments; all bytes exact, in the allocator's block sizes."""
        entries = [(e, e.start, len(self._kinds) if e.end is None else e.end) for e in self._entries]
        series = self._series()
        wholes = [(e, start, end) for e, start, end in entries if e.whole]
        peaks = [start + int(series[0][start : end + 1].argmax()) for _, start, end in wholes]
        blocks, owners = self._blocks(), self._owner_list()
        weights = self._weights(blocks, wholes)
        marks = {x for _, start, end in entries if len(entries) <= MAX_POINTS // 8 for x in (start, end)}
        kept = _kept(series, marks.union(peaks, *((start, end) for _, start, end in wholes)))
        moments = (
            TimelineMoment(
                label,
                x,
                int(series[0][x]),
                int(series[1][x]),
                entry.name if entry else None,
                entry.component if entry else None,
                _groups(blocks, blocks.alive(x), owners, weights),
                self._map(blocks, x),
            )
            for label, x, entry in _moments(wholes, peaks, int(series[0].argmax()))
        )
        return TimelineRecord(
            "events",
            self._points(series, kept),
            tuple(TimelineStage(e.name, e.component, e.kind, start, end) for e, start, end in entries),
            _resident(blocks, weights),
            tuple(moments),
        )

    def _series(self) -> np.ndarray:
        """[3, events + 1] int64: allocated, reserved and outside bytes after each event."""
        kinds, changes = np.array(self._kinds, dtype=np.int64), np.array(self._changes, dtype=np.int64)
        series: np.ndarray = np.zeros((3, len(kinds) + 1), dtype=np.int64)
        series[0, 1:] = np.where(kinds >= _FREE, changes, 0).cumsum()
        series[1, 1:] = self._reserved
        series[2, 1:] = np.where(kinds == _OUTSIDE, changes, 0).cumsum()
        return series

    def _points(self, series: np.ndarray, kept: np.ndarray) -> tuple[MemoryPoint, ...]:
        allocated, reserved, outside = (row[kept].tolist() for row in series)
        start = self._outside
        device = [None if start is None else r + start + o for r, o in zip(reserved, outside, strict=True)]
        return tuple(zip(kept.tolist(), allocated, reserved, device, strict=True))

    def _blocks(self) -> _Blocks:
        """Calls ordered by address, then time, are malloc, free, malloc, ... of each address: pairs are neighbours."""
        kinds, addresses = np.array(self._kinds, dtype=np.int64), np.array(self._addresses, dtype=np.int64)
        calls = np.flatnonzero(kinds >= _FREE)
        calls = calls[np.argsort(addresses[calls], kind="stable")]
        following: np.ndarray = np.append(calls[1:], len(kinds))
        freed: np.ndarray = np.append(addresses[calls[1:]] == addresses[calls[:-1]], False)
        died = np.where(freed, following + 1, len(kinds) + 1)
        mallocs = kinds[calls] >= 0
        at, died = calls[mallocs], died[mallocs]
        order = np.argsort(at)
        at, died = at[order], died[order]
        return _Blocks(addresses[at], np.array(self._changes, dtype=np.int64)[at], kinds[at], at + 1, died)

    def _owner_list(self) -> list[MemoryOwner]:
        owners = []
        for operation, place, (stage, kind, component), shape, dtype in self._owners:
            sizes = None if shape is None else tuple(map(int, shape))
            text = None if dtype is None else str(dtype).removeprefix("torch.")
            name = place and self._places.names[place]
            owners.append(MemoryOwner(component, stage, kind, place, name, operation, sizes, text))
        return owners

    def _weights(self, blocks: _Blocks, wholes: Sequence[tuple[Interval, int, int]]) -> dict[int, str]:
        """Index of a block -> the component whose weights it holds: born in that component's load and alive after it.

        A load that nothing follows broke off, and what it had loaded was freed before it ended: there, what lived with the last block.
        """
        found: dict[int, str] = {}
        for entry, start, end in wholes:
            if entry.kind == "load":
                if entry is wholes[-1][0]:
                    end = int(blocks.born.max(initial=start, where=blocks.born <= end))
                survivors = (blocks.born > start) & (blocks.born <= end) & (blocks.died > end)
                found |= dict.fromkeys(np.flatnonzero(survivors).tolist(), entry.component or entry.name)
        return found

    def _map(self, blocks: _Blocks, x: int) -> tuple[TimelineSegment, ...]:
        """The allocator's segments at x by address; a gap between live blocks is one inactive block."""
        order = blocks.alive(x)
        order = order[np.argsort(blocks.address[order])]
        live = list(zip(blocks.address[order].tolist(), blocks.nbytes[order].tolist(), strict=True))
        result, index = [], 0
        for low, high in _ranges([s for s in self._segments if s[0] <= x]):
            cells: list[tuple[int, int, BlockState]] = []
            end = low
            while index < len(live) and live[index][0] < high:
                address, size = live[index]
                if address > end:
                    cells.append((end - low, address - end, "inactive"))
                cells.append((address - low, size, "active"))
                end, index = address + size, index + 1
            if end < high:
                cells.append((end - low, high - end, "inactive"))
            result.append(TimelineSegment(high - low, tuple(cells)))
        return tuple(result)


class Places:
    """Names the code that asks for memory, by its two innermost functions of models, else by wanvram's innermost.

    Whose memory a module asks for, MEMORY_IS says in it or in its package: "a model's", "the caller's", its own where nothing is
    said. Reads code objects only: a frame's f_locals would keep its tensors alive.
    """

    file_once = True  # where both functions are of the same

    def __init__(self) -> None:
        # By id of code, which is kept for it: hashing a code object reads all of it.
        self._named: dict[int, tuple[str, bool] | tuple[()]] = {}
        self._kept: list[CodeType] = []
        self._told: dict[tuple[int, ...], str] = {}
        self.names: dict[str, str] = {}  # of every place told, without lines

    def of_caller(self) -> str | None:
        """`dit.SelfAttention.forward:186 > Linear.forward:77` for what called the observer's malloc."""
        frame: FrameType | None = sys._getframe(3)  # over of_caller, Timeline.malloc and SimulatedMemory._malloc
        inner: FrameType | None = None
        named = self._named
        while frame is not None:
            code = frame.f_code
            known = named.get(id(code))
            if known is None:
                known = named[id(code)] = self._describe(code, frame.f_globals)
                self._kept.append(code)
            if known:
                if inner is not None:
                    return self._place(inner, frame if known[1] else None)
                if not known[1]:
                    return self._place(frame)
                inner = frame
            frame = frame.f_back
        return None if inner is None else self._place(inner)

    def _describe(self, code: CodeType, names: dict[str, Any]) -> tuple[str, bool] | tuple[()]:
        """(`module.Class.function`, is it a model's) of wanvram's code; nothing for code that asks on behalf of others.

        A comprehension or lambda counts as the function around it, as Python 3.12 itself has it.
        """
        root, _, module = names.get("__name__", "").partition(".")
        if root != _ROOT or code.co_name.startswith("<"):
            return ()
        whose = names.get("MEMORY_IS") or vars(sys.modules[names["__package__"]]).get("MEMORY_IS")
        if whose == "the caller's":
            return ()
        return f"{module.rpartition('.')[2]}.{function_of(code)}", whose == "a model's"

    def _place(self, inner: FrameType, outer: FrameType | None = None) -> str:
        key: tuple[int, ...] = (id(inner.f_code), inner.f_lasti)
        if outer is not None:
            key = (*key, id(outer.f_code), outer.f_lasti)
        return self._told.get(key) or self._tell(key, inner, outer)

    def _tell(self, key: tuple[int, ...], inner: FrameType, outer: FrameType | None) -> str:
        name, line = self._named[key[0]][0], inner.f_lineno  # type: ignore[misc]
        place = f"{name}:{line}"
        if outer is not None:
            above = self._named[key[2]][0]  # type: ignore[misc]
            name = name.removeprefix(above.split(".")[0] + ".") if self.file_once else name
            place, name = f"{above}:{outer.f_lineno} > {name}:{line}", f"{above} > {name}"
        self._told[key], self.names[place] = place, name
        return place


def function_of(code: CodeType) -> str:
    """`Class.function`."""
    return getattr(code, "co_qualname", code.co_name).replace("<locals>.", "")  # co_qualname: Python 3.11


def _moments(
    wholes: Sequence[tuple[Interval, int, int]], peaks: Sequence[int], highest: int
) -> Iterator[tuple[str, int, Interval | None]]:
    """The global peak first, then that of every load and stage."""
    yield "peak", highest, next((e for e, start, end in wholes if start <= highest <= end), None)
    for (entry, _, _), x in zip(wholes, peaks, strict=True):
        yield f"peak of {entry.name}", x, entry


def _kept(series: np.ndarray, marks: set[int]) -> np.ndarray:
    """At most MAX_POINTS x values: all marks, and of every stretch the highest and lowest allocated, the highest reserved and the
    highest share of reserved memory that is not allocated.

    Stretches end at marks, so that each stage keeps its own extremes.
    """
    last = series.shape[1] - 1
    if last < MAX_POINTS:
        return np.arange(last + 1)
    always = marks | {0, last, *(int(row.argmax()) for row in (*series, series[1] + series[2]))}
    unused = (series[1] - series[0]) / np.maximum(series[1], 1)
    count = (MAX_POINTS - len(always)) // 4 - len(always)
    edges = sorted(always | set(np.linspace(0, last, max(count, 2)).astype(int).tolist()))
    kept = set(always)
    for low, high in pairwise(edges):
        allocated, reserved = series[0, low:high], series[1, low:high]
        places = (allocated.argmax(), allocated.argmin(), reserved.argmax(), unused[low:high].argmax())
        kept.update(low + int(i) for i in places)
    result: np.ndarray = np.array(sorted(kept))
    return result


def _resident(blocks: _Blocks, weights: dict[int, str]) -> tuple[WeightsStretch, ...]:
    """Base memory as steps: per component, stretches [start, end) that follow each other, each with what it has there."""
    changes: dict[str, dict[int, int]] = {}
    for index, component in weights.items():
        own = changes.setdefault(component, {})
        nbytes = int(blocks.nbytes[index])
        for x, change in ((int(blocks.born[index]), nbytes), (int(blocks.died[index]), -nbytes)):
            own[x] = own.get(x, 0) + change
    result = []
    for component, own in changes.items():
        held, xs = 0, sorted(own)
        for x, following in pairwise(xs):
            held += own[x]
            if held:
                result.append(WeightsStretch(component, held, x, following))
    return tuple(result)


def _groups(
    blocks: _Blocks, alive: np.ndarray, owners: Sequence[MemoryOwner], weights: dict[int, str]
) -> tuple[AliveBlocks, ...]:
    """Equal blocks of equal owners together, largest group first; what is over MAX_GROUPS becomes one."""
    found: dict[AliveBlocks, int] = {}
    for index in alive.tolist():
        owner, component = owners[blocks.owner[index]], weights.get(index)
        whose = (owner.component, owner.stage, owner.module, owner.operation)
        if component is not None:
            whose = (component, owner.stage, None, WEIGHTS)
        block = AliveBlocks(int(blocks.nbytes[index]), 1, *whose, owner.shape, owner.dtype)
        found[block] = found.get(block, 0) + 1
    groups = [replace(block, bytes=block.bytes * count, count=count) for block, count in found.items()]
    groups.sort(key=lambda group: (-group.bytes, str(vars(group))))
    return largest(groups, MAX_GROUPS)


def _ranges(events: Sequence[tuple[int, str, int, int]]) -> list[tuple[int, int]]:
    """[low, high) of every reserved range by address; neighbouring pages of an expandable segment are one range."""
    whole: dict[int, int] = {}
    pages: list[tuple[int, int]] = []
    for _, event, address, size in events:
        low, high = address, address + size
        if event == "segment_alloc":
            whole[low] = high
        elif event == "segment_free":
            del whole[low]
        else:
            pages = [part for a, b in pages for part in ((a, min(b, low)), (max(a, high), b)) if part[0] < part[1]]
            pages += [(low, high)] if event == "segment_map" else []
    joined: list[tuple[int, int]] = []
    for low, high in sorted(pages):
        if joined and joined[-1][1] == low:
            joined[-1] = (joined[-1][0], high)
        else:
            joined.append((low, high))
    return sorted([*whole.items(), *joined])
