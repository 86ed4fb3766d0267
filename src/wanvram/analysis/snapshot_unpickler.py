"""A CUDA allocator snapshot's pickle, its events replayed while they are read; of every stack one frame is kept. No torch.

A value that cannot be costs what it belongs to: an event, a block, a segment.
"""

from __future__ import annotations

from collections import Counter
from io import BufferedIOBase
from typing import Any

from wanvram.analysis.pickles import ODD, PlainUnpickler
from wanvram.analysis.places import is_own, place_of
from wanvram.analysis.replay import NO_STACK, Frame, Replay, Rules, Segment, SnapshotBlock, Stack
from wanvram.foreign_text import quoted

__all__ = ["Mark", "SnapshotUnpickler"]

FRAME_COST = 4  # what a stack frame takes in memory, in values that are kept
REPLAY_COST = 16


class _AllocatorEvent(tuple[Any, ...]):
    """action, address, size, stream, time in microseconds, stack: as Replay.feed takes it."""

    __slots__ = ()


class _Framed(tuple[Any, ...]):
    """(the stack of this one frame, whether the frame is outside of PyTorch)"""

    __slots__ = ()


class Mark(tuple[Any, ...]):
    """device, START or END, name, time in microseconds: where a record_function began or ended"""

    __slots__ = ()


class SnapshotUnpickler(PlainUnpickler):
    """Feeds trace entries to a replay per trace as they complete, and shrinks frames, blocks and segments."""

    def __init__(self, file: BufferedIOBase, name: str, rules: Rules) -> None:
        super().__init__(file, name)
        self._rules = rules
        self._frames: dict[Frame, _Framed] = {}
        self._named: dict[Frame, Stack] = {}
        self.odd: Counter[str] = Counter()  # what was left out: block, segment, annotation
        self.first_odd: dict[str, str] = {}
        self._replays: dict[int, tuple[Any, Replay]] = {}  # id of the trace's list -> (the list, its replay)
        self._held: dict[int, int] = {}  # id of the trace's list -> the values that its replay holds

    def replay_of(self, trace: Any) -> Replay:
        known = self._replays.get(id(trace))
        if known is None:
            self._keep(REPLAY_COST)
            known = self._replays[id(trace)] = (trace, Replay(self._rules))
        return known[1]

    def _feed(self, trace: Any, entries: list[Any]) -> None:
        replay = self.replay_of(trace)
        replay.feed(entries)
        live = len(replay.alive) + len(replay.pending) + len(replay.gone)
        held = live + len(replay.ranges) + len(replay.refusals)
        self._keep(held - self._held.get(id(trace), 0))
        self._held[id(trace)] = held

    def finish_dict(self, value: dict[Any, Any]) -> Any:
        if "action" in value:
            return self._entry(value)
        if "filename" in value and "line" in value:
            return self._frame(value)
        if "state" in value and "size" in value:
            return self._block(value)
        if "blocks" in value and "total_size" in value:
            return self._segment(value)
        if "stage" in value and "time_us" in value:
            return _mark(value) or self._odd("annotation", "time_us", value["time_us"])
        return value

    def finish_list(self, target: Any, items: list[Any]) -> Any:
        kinds = {item.__class__ for item in items}
        if _AllocatorEvent in kinds:
            if len(kinds) > 1:
                for _ in range(sum(item.__class__ is not _AllocatorEvent for item in items)):
                    self.replay_of(target).leave_out("is no event")
                items = [item for item in items if item.__class__ is _AllocatorEvent]
            self._feed(target, items)
            return target
        if _Framed in kinds and target.__class__ is list and not target:
            return self._place([item for item in items if item.__class__ is _Framed])
        return super().finish_list(target, items) if target.__class__ is list and _Framed not in kinds else target

    def _odd(self, what: str, key: str, value: Any) -> Any:
        """What stands for something that cannot be; it is counted, and the first of its kind named."""
        self.odd[what] += 1
        self.first_odd.setdefault(what, f"{key} {quoted(value)}")
        return ODD

    def _entry(self, value: dict[Any, Any]) -> _AllocatorEvent:
        self.forget(value, None)
        for item in value.values():
            if item.__class__ is list or item.__class__ is dict:
                self.forget(item, NO_STACK)
        get, action = value.get, value["action"]
        addr, size = get("device_free" if action == "oom" else "addr", 0), get("size", 0)
        return _AllocatorEvent((action, addr, size, get("stream", 0), get("time_us", 0), _stack(get("frames"))))

    def _frame(self, value: dict[Any, Any]) -> _Framed:
        filename, line, name = value["filename"], value["line"], value.get("name")
        frame = Frame(_text(filename, "??"), line if line.__class__ is int else 0, _text(name, ""))
        known = self._frames.get(frame)
        if known is None:
            self._keep(FRAME_COST)
            known = self._frames[frame] = _Framed((Stack((frame,)), is_own(frame.filename)))
        return known

    def _place(self, framed: list[Any]) -> Stack:
        """The stack of the frame that names it."""
        own: Stack | None = next((stack for stack, outside in framed if outside), None)
        if own is not None:
            return own
        frame = place_of([stack[0] for stack, _ in framed])
        known = self._named.get(frame)
        if known is None:
            self._keep(FRAME_COST)
            known = self._named[frame] = Stack((frame,))
        return known

    def _block(self, value: dict[Any, Any]) -> Any:
        size, state = value["size"], value["state"]
        address, asked = value.get("address", 0), value.get("requested_size", size)
        for key, number in (("size", size), ("address", address), ("requested_size", asked)):
            if not _is_count(number):
                return self._odd("block", key, number)
        if state.__class__ is not str:
            return self._odd("block", "state", state)
        self._keep(1)
        return SnapshotBlock(address, size, asked, state, _stack(value.get("frames")))

    def _segment(self, value: dict[Any, Any]) -> Any:
        at = address = value.get("address", -1)
        size, stream, device = value["total_size"], value.get("stream", 0), value.get("device", 0)
        for key, number in (("address", address), ("total_size", size), ("device", device)):
            if not _is_count(number):
                return self._odd("segment", key, number)
        if stream.__class__ is not int or value["blocks"].__class__ is not list:
            return self._odd("segment", "stream or blocks", stream)
        blocks = []
        for block in value["blocks"]:
            if block.__class__ is SnapshotBlock:  # torch before 2.1 wrote no addresses
                at = max(block.address, at)
                blocks.append(SnapshotBlock(at, block.size, block.requested_size, block.state, block.frames))
                at += block.size
        kind = value.get("segment_type") == "small"
        return Segment(address, size, stream, kind, value.get("is_expandable") is True, tuple(blocks), device)


def _stack(frames: Any) -> Stack:
    return frames if frames.__class__ is Stack else NO_STACK


def _text(value: Any, instead: str) -> str:
    return value if value.__class__ is str else instead


def _mark(value: dict[Any, Any]) -> Mark | None:
    device, time_us = value.get("device", 0), value["time_us"]
    if not _is_count(time_us):
        return None
    return Mark((device, value["stage"], _text(value.get("name"), "(no name)"), time_us))


def _is_count(value: Any) -> bool:
    return value.__class__ is int and 0 <= value < 1 << 62
