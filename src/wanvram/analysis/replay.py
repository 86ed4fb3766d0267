"""A CUDA caching allocator's history replayed event by event: exact block sizes, the peak, and what was alive at it. No torch.

Addresses are known here, so nothing has to be searched for: only what a block leaves to its neighbour has to be worked out.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from wanvram.analysis.points import Point, Points
from wanvram.foreign_text import quoted
from wanvram.simulate.allocator import MIN_BLOCK, SMALL_BUFFER, SMALL_SIZE

__all__ = [
    "ACTIVE",
    "INACTIVE",
    "NO_STACK",
    "PENDING",
    "Frame",
    "Live",
    "OutOfMemoryEvent",
    "Replay",
    "Rules",
    "Segment",
    "SnapshotBlock",
    "Stack",
    "TraceEntry",
]

ACTIVE, PENDING, INACTIVE = "active_allocated", "active_pending_free", "inactive"


@dataclass(frozen=True)
class Frame:
    """One line of a stack."""

    filename: str
    line: int
    name: str

    @property
    def where(self) -> str:
        """`models/dit.py:120 forward`: the file with its folder; of a predicted run, whose frames have no lines, the name alone."""
        if not self.line and not self.name:
            return self.filename
        parts = self.filename.replace("\\", "/").split("/")
        return f"{'/'.join(parts[-2:])}:{self.line} {self.name}"


@dataclass(frozen=True)
class TraceEntry:
    """One event of the allocator. action: alloc, free_requested, free_completed, segment_alloc, segment_free, segment_map,
    segment_unmap, oom (`addr` is then the driver's free bytes) or snapshot. size: the bytes asked for. frames: innermost first.
    """

    action: str
    addr: int
    size: int
    stream: int
    time_us: int
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class SnapshotBlock:
    """A part of a segment. state: active_allocated, active_pending_free (waits for another stream) or inactive."""

    address: int
    size: int
    requested_size: int
    state: str
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class Segment:
    """A range of reserved memory and its blocks by address; small: serves only requests up to 1 MiB."""

    address: int
    size: int
    stream: int
    small: bool
    expandable: bool
    blocks: tuple[SnapshotBlock, ...]
    device: int = 0


@dataclass(frozen=True)
class OutOfMemoryEvent:
    """An out-of-memory event: the bytes asked for and what the driver had free."""

    seconds: float
    requested_bytes: int
    free_bytes: int


class Stack(tuple[Frame, ...]):
    """What is left of a recorded stack: its innermost own frame, or nothing. One object for equal ones."""

    __slots__ = ()

    @property
    def where(self) -> str:
        return self[0].where if self else "(no stack recorded)"


NO_STACK = Stack()
BEFORE = Stack((Frame("(before the recording)", 0, ""),))


@dataclass(frozen=True)
class Rules:
    """How a request becomes a block. divisions: roundup_power2_divisions from 1 MiB to 32 GiB, by power of two."""

    max_split: int | None = None
    divisions: tuple[int, ...] = ()

    def rounded(self, size: int) -> int:
        """c10/cuda/CUDACachingAllocator.cpp, round_size."""
        if self.divisions:
            index = min(max(size.bit_length() - SMALL_SIZE.bit_length(), 0), len(self.divisions) - 1)
            parts = self.divisions[index]
            if parts > 1 and size > MIN_BLOCK * parts:
                step = (1 << (size.bit_length() - 1)) // parts
                return -(-size // step) * step
        return max(-(-size // MIN_BLOCK), 1) * MIN_BLOCK


Live = tuple[int, int, Stack, int, int]  # block bytes, requested bytes, stack, event of alloc, event of free_requested
NEVER = 1 << 62
LONGEST = 31 * 86_400.0  # seconds between two events of one recording


def _impossible(action: Any, addr: Any, size: Any, stream: Any, time_us: Any) -> str:
    """Which value of an event is none that an allocator gives; empty if all are."""
    if size.__class__ is not int or not 0 <= size < NEVER:
        return f"has size {quoted(size)}"
    if addr.__class__ is not int or not 0 <= addr < 1 << 64:
        return f"has addr {quoted(addr)}"
    if time_us.__class__ is not int or not 0 <= time_us < NEVER:
        return f"has time_us {quoted(time_us)}"
    if stream.__class__ is not int or not -1 << 63 <= stream < 1 << 64:
        return f"has stream {quoted(stream)}"
    return "" if action.__class__ is str else f"has action {quoted(action)}"


@dataclass
class Replay:
    """The allocator's state from its events, and what is needed to go back from the end to the peak."""

    rules: Rules
    allocated: int = 0
    active: int = 0
    reserved: int = 0
    events: int = 0
    first_us: int = 0
    last: float = 0.0
    freed_before: int = 0  # bytes of blocks freed here that were allocated before the recording
    peak: Point = (0.0, 0, 0)
    peak_event: int = 0
    peak_active: int = 0
    peak_reserved: int = 0
    alive: dict[int, Live] = field(default_factory=dict)
    pending: dict[int, Live] = field(default_factory=dict)
    gone: dict[int, Live] = field(default_factory=dict)  # completed since the peak, allocated before it
    large: list[int] = field(default_factory=list)  # sorted addresses of blocks whose size depends on their neighbour
    ranges: dict[int, Segment] = field(default_factory=dict)  # reserved, by address; without blocks
    starts: list[int] = field(default_factory=list)  # sorted keys of ranges
    peak_ranges: dict[int, Segment] | None = None  # None: the same as ranges
    points: Points = field(default_factory=Points)
    refusals: list[OutOfMemoryEvent] = field(default_factory=list)
    strange: int = 0  # events that cannot be, which are left out
    first_strange: str = ""

    def feed(self, entries: Iterable[Any]) -> None:
        for action, addr, size, stream, time_us, stack in entries:
            wrong = _impossible(action, addr, size, stream, time_us)
            if wrong:
                self.leave_out(wrong)
                continue
            if not self.events:
                self.first_us = time_us
            self.events += 1
            x = (time_us - self.first_us) / 1e6
            if abs(x - self.last) > LONGEST:  # a clock that was not set: the order still tells
                self.first_us, x = (time_us, 0.0) if self.events == 2 else (self.first_us, self.last)
            self.last = x
            if action == "alloc":
                self._alloc(addr, size, stack, x)
            elif action == "free_requested":
                self._request(addr, size)
            elif action == "free_completed":
                self._complete(addr, size)
            elif action == "oom":
                self.refusals.append(OutOfMemoryEvent(x, size, addr))
            else:
                self._segment_event(action, addr, size, stream)
            self.points.add((x, self.allocated, self.reserved))

    def leave_out(self, reason: str) -> None:
        """An event that costs itself: it is counted, and the first one is named by its number in the trace."""
        self.strange += 1
        if self.strange == 1:
            self.first_strange = f"event {self.events + self.strange:,} {reason}"

    def _alloc(self, addr: int, size: int, stack: Stack, x: float) -> None:
        if addr in self.alive or addr in self.pending:  # its free was not recorded
            self._complete(addr, size)
        block = self.rules.rounded(size)
        if block > SMALL_SIZE:
            block = self._unsplit(addr, block)
            insort(self.large, addr)
        self.alive[addr] = (block, size, stack, self.events, NEVER)
        self.allocated += block
        self.active += block
        if self.active > self.peak_active:
            self.peak_active = self.active
        if self.allocated > self.peak[1]:
            self.peak = (x, self.allocated, self.reserved)
            self.peak_event = self.events
            self.peak_ranges = None
            self.gone.clear()

    def _unsplit(self, addr: int, block: int) -> int:
        """The block's size: a rest of up to 1 MiB stays with it, or any rest beyond max_split_size."""
        place = bisect_right(self.starts, addr) - 1
        if place < 0:
            return block
        held = self.ranges[self.starts[place]]
        after = bisect_left(self.large, addr)
        end = min(held.address + held.size, self.large[after] if after < len(self.large) else NEVER)
        room = end - addr
        splits = self.rules.max_split is None or block < self.rules.max_split
        return block if held.expandable or room < block or (splits and room - block > SMALL_SIZE) else room

    def _request(self, addr: int, size: int) -> None:
        if addr in self.alive:
            live = self.alive.pop(addr)
        else:
            block = self.rules.rounded(size)
            self.freed_before += block
            live = (block, size, BEFORE, 0, NEVER)
        self.pending[addr] = (*live[:4], self.events)
        self.allocated -= live[0]

    def _complete(self, addr: int, size: int) -> None:
        if addr not in self.pending:
            self._request(addr, size)
        live = self.pending.pop(addr)
        self.active -= live[0]
        if live[3] <= self.peak_event:
            self.gone[addr] = live
        if live[0] > SMALL_SIZE:
            place = bisect_left(self.large, addr)
            if place < len(self.large) and self.large[place] == addr:
                del self.large[place]

    def _segment_event(self, action: str, addr: int, size: int, stream: int) -> None:
        if action not in ("segment_alloc", "segment_free", "segment_map", "segment_unmap"):
            return  # "snapshot", and what later versions may add
        if self.peak_ranges is None:
            self.peak_ranges = dict(self.ranges)
        if action in ("segment_alloc", "segment_map"):
            self.reserved += size
            self.peak_reserved = max(self.peak_reserved, self.reserved)
            self._reserve(Segment(addr, size, stream, size <= SMALL_BUFFER, action == "segment_map", ()))
        else:
            self.reserved -= size
            self._release(addr, size)

    def _reserve(self, new: Segment) -> None:
        """Mapped pages join their neighbours of the same pool; cudaMalloc's segments never do."""
        if new.expandable:
            place = bisect_left(self.starts, new.address)
            near = [self.ranges[start] for start in self.starts[max(place - 1, 0) : place + 1]]
            for other in near:
                touches = other.address + other.size == new.address or new.address + new.size == other.address
                if touches and other.expandable and (other.stream, other.small) == (new.stream, new.small):
                    self._drop(other.address)
                    start = min(other.address, new.address)
                    new = replace(new, address=start, size=other.size + new.size)
        if new.address not in self.ranges:
            insort(self.starts, new.address)
        self.ranges[new.address] = new

    def _release(self, addr: int, size: int) -> None:
        place = bisect_right(self.starts, addr) - 1
        held = self.ranges[self.starts[place]] if place >= 0 else None
        if held is None or addr + size > held.address + held.size:
            return  # reserved before the recording
        self._drop(held.address)
        for start, end in ((held.address, addr), (addr + size, held.address + held.size)):
            if end > start:
                insort(self.starts, start)
                self.ranges[start] = replace(held, address=start, size=end - start)

    def _drop(self, start: int) -> None:
        del self.ranges[start]
        del self.starts[bisect_left(self.starts, start)]

    def at_peak(self) -> Iterator[tuple[int, Live, str]]:
        """(address, block, ACTIVE or PENDING) of each then."""
        for blocks in (self.gone, self.pending, self.alive):
            for addr, live in blocks.items():
                if live[3] <= self.peak_event:
                    yield addr, live, ACTIVE if live[4] > self.peak_event else PENDING
