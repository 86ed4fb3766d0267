"""A run exported as a pickle that https://pytorch.org/memory_viz opens: the structure of torch.cuda.memory._dump_snapshot. No torch.

Protocol 4 of plain containers: the viewer's own unpickler knows nothing else.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from wanvram.analysis.replay import ACTIVE, INACTIVE, Frame, Segment, SnapshotBlock, TraceEntry
from wanvram.output_files import whole_file, writing
from wanvram.simulate.allocator import CachingAllocator, SegmentView
from wanvram.timeline_record import MemoryOwner

__all__ = ["allocator_segments", "export_timeline", "write_memory_viz"]

EXACT = 1 << 53  # the viewer's numbers are doubles; simulated addresses begin at 2**62
_FIRST = 1 << 40
_PLACELESS = ("oom", "snapshot")  # events whose addr is no address
_STATES = {"allocated": ACTIVE, "free": INACTIVE}


def write_memory_viz(path: Path, traces: Iterable[TraceEntry], segments: Iterable[Segment]) -> None:
    """Writes the whole file or none of it. traces: the events of GPU 0 in order; segments: the allocator after them.

    Addresses over 2**53 are moved down, all by the same distance. Raises OutputError naming the path.
    """
    traces, segments = list(traces), list(segments)
    used = [entry.addr for entry in traces if entry.action not in _PLACELESS] + [s.address for s in segments]
    shift = _FIRST - min(used) if max(used, default=0) >= EXACT else 0
    writer = _Writer(shift)
    content = {
        "segments": [writer.segment(segment) for segment in segments],
        "device_traces": [[writer.entry(entry) for entry in traces]],
        "allocator_settings": {},
        "external_annotations": [],
    }
    with writing(path), whole_file(path) as beside, beside.open("wb") as file:
        pickle.dump(content, file, protocol=4)


class History(Protocol):
    """What a simulated run's Timeline tells: its allocator, and (action, address, bytes, owner) in order."""

    @property
    def allocator(self) -> CachingAllocator: ...

    def history(self) -> Iterable[tuple[str, int, int, MemoryOwner | None]]: ...


def export_timeline(path: Path, timeline: History) -> None:
    """A predicted run. Its time axis counts events; the stack of an allocation is operation, module and stage."""
    traces = [
        TraceEntry(action, address, nbytes, 0, time, _frames(owner))
        for time, (action, address, nbytes, owner) in enumerate(timeline.history())
    ]
    write_memory_viz(path, traces, allocator_segments(timeline.allocator.segments(), {}, {}))


def _frames(owner: MemoryOwner | None) -> tuple[Frame, ...]:
    names = () if owner is None else (owner.operation, owner.module, owner.stage)
    return tuple(Frame(name, 0, "") for name in names if name)


class _Writer:
    """Equal frames and stacks become one object each, which pickle stores once."""

    def __init__(self, shift: int) -> None:
        self._shift = shift
        self._frames: dict[Frame, dict[str, Any]] = {}
        self._stacks: dict[tuple[Frame, ...], list[dict[str, Any]]] = {}

    def entry(self, entry: TraceEntry) -> dict[str, Any]:
        shift = 0 if entry.action in _PLACELESS else self._shift
        return {
            "action": entry.action,
            "device_free" if entry.action == "oom" else "addr": entry.addr + shift,
            "size": entry.size,
            "stream": entry.stream,
            "time_us": entry.time_us,
            "frames": self._stack(entry.frames),
        }

    def segment(self, segment: Segment) -> dict[str, Any]:
        active = [block for block in segment.blocks if block.state != INACTIVE]
        return {
            "device": segment.device,
            "address": segment.address + self._shift,
            "total_size": segment.size,
            "allocated_size": sum(block.size for block in active if block.state == ACTIVE),
            "active_size": sum(block.size for block in active),
            "requested_size": sum(block.requested_size for block in active),
            "stream": segment.stream,
            "segment_type": "small" if segment.small else "large",
            "segment_pool_id": (0, 0),
            "is_expandable": segment.expandable,
            "frames": self._stack(()),
            "blocks": [
                vars(block) | {"address": block.address + self._shift, "frames": self._stack(block.frames)}
                for block in segment.blocks
            ],
        }

    def _stack(self, frames: tuple[Frame, ...]) -> list[dict[str, Any]]:
        if frames not in self._stacks:
            self._stacks[frames] = [self._frames.setdefault(frame, vars(frame)) for frame in frames]
        return self._stacks[frames]


def allocator_segments(
    views: Iterable[SegmentView], requested: Mapping[int, int], frames: Mapping[int, tuple[Frame, ...]]
) -> list[Segment]:
    """CachingAllocator.segments() as the viewer's: of an expandable one, each mapped stretch is a segment.

    requested, frames: the bytes asked for and the stack of each live block, by address; what is missing there is the
    whole block, allocated nowhere.
    """
    segments: list[Segment] = []
    for view in views:
        expandable = any(state == "unmapped" for _, _, state in view.blocks)
        stretch: list[SnapshotBlock] = []
        for address, size, state in (*view.blocks, (0, 0, "unmapped")):
            if state != "unmapped":
                live = state == "allocated"
                asked, stack = (requested.get(address, size), frames.get(address, ())) if live else (0, ())
                stretch.append(SnapshotBlock(address, size, asked, _STATES[state], stack))
            elif stretch:
                total = sum(block.size for block in stretch)
                start = stretch[0].address
                segments.append(Segment(start, total, view.stream, view.small, expandable, tuple(stretch)))
                stretch = []
    return segments
