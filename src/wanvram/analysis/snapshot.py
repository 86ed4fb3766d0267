"""PyTorch's CUDA allocator snapshots (torch.cuda.memory._dump_snapshot): replayed while they are read, nothing executed. No torch.

The structure is that of torch/csrc/cuda/Module.cpp (2.11): segments, device_traces, allocator_settings, external_annotations.
Of every recorded stack only the innermost frame outside of PyTorch is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wanvram.analysis.peak import OwnerShare, owners, shape_of
from wanvram.analysis.points import Point
from wanvram.analysis.replay import (
    ACTIVE,
    INACTIVE,
    NO_STACK,
    PENDING,
    Live,
    OutOfMemoryEvent,
    Replay,
    Rules,
    Segment,
    SnapshotBlock,
)
from wanvram.analysis.snapshot_unpickler import Mark, SnapshotUnpickler
from wanvram.errors import InputError
from wanvram.foreign_text import shown
from wanvram.input_files import unpacked
from wanvram.timeline_record import (
    AliveBlocks,
    BlockState,
    TimelineMoment,
    TimelineRecord,
    TimelineSegment,
    TimelineStage,
    largest,
)
from wanvram.units import human

__all__ = ["DeviceHistory", "HostMemory", "Snapshot", "read_snapshot", "snapshot_timeline"]

MAX_GROUPS = 200  # alive groups of a moment in a timeline
MAX_STAGES = 1000
BESIDE_LIVE = "beside live blocks"  # why a hole may be of no use, where its size decides


@dataclass(frozen=True)
class Hole:
    """Reserved bytes that no tensor uses, and why the next request may not get them."""

    bytes: int
    segment: int
    offset: int
    reason: str

    @property
    def why(self) -> str:
        """The reason in full."""
        size = f": fits only requests up to {human(self.bytes)}" if self.reason == BESIDE_LIVE else ""
        return self.reason + size


@dataclass(frozen=True)
class AllocatorMoment:
    """The allocator at one time. alive: equal blocks, with the place of their allocation as operation; their sum is allocated_bytes.
    segments and holes are empty where the history is incomplete.
    """

    seconds: float
    allocated_bytes: int
    reserved_bytes: int
    alive: tuple[AliveBlocks, ...]
    segments: tuple[Segment, ...]
    holes: tuple[Hole, ...]


@dataclass(frozen=True)
class DeviceHistory:
    """One device. allocated: in tensors (torch.cuda.memory_allocated); active: with what still waits for another stream.

    complete: recorded from before the first allocation, so that every figure is exact. stages: (name, depth, start, end).
    """

    device: int
    events: int
    complete: bool
    points: tuple[Point, ...]
    peak: AllocatorMoment
    peak_active_bytes: int
    peak_reserved_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    out_of_memory: tuple[OutOfMemoryEvent, ...]
    stages: tuple[tuple[str, int, float, float], ...]

    @property
    def recorded(self) -> bool:
        """False: `peak` is the state when the snapshot was taken, whatever was higher before."""
        return self.events > 0

    @property
    def peak_allocated_bytes(self) -> int:
        return self.peak.allocated_bytes

    def by_place(self) -> tuple[OwnerShare, ...]:
        """What is alive at the peak, one owner a place, whatever the sizes of its blocks; largest first."""
        return owners(self.peak.alive, shape_of)


@dataclass(frozen=True)
class HostMemory:
    """Pinned (page-locked) host memory of the process: the most that was held, what is held at the end and used of that."""

    peak_reserved_bytes: int
    reserved_bytes: int
    allocated_bytes: int


@dataclass(frozen=True)
class Snapshot:
    """A snapshot file. notes: what a reader of the numbers has to know, one sentence each."""

    devices: tuple[DeviceHistory, ...]
    notes: tuple[str, ...]
    host: HostMemory | None = None

    @property
    def main(self) -> DeviceHistory:
        """The device with the highest peak."""
        return max(self.devices, key=lambda d: d.peak_allocated_bytes)


def read_snapshot(path: Path) -> Snapshot:
    """The snapshot at `path`, replayed. A pickle (gzipped or not) is interpreted, never executed; memory stays bounded.

    Raises InputError when the file is missing, empty, truncated, no snapshot, or would run code when unpickled.
    """
    root, reader = _load(path, Rules())
    rules = _rules(root)
    if rules != Rules():  # known only behind the events, and they decide the sizes of blocks
        root, reader = _load(path, rules)
    notes: list[str] = []
    segments = _items(root, "segments", Segment)
    traces = _items(root, "device_traces", list)
    marks = _items(root, "external_annotations", Mark)
    by_device: dict[int, list[Segment]] = {i: [] for i, trace in enumerate(traces) if reader.replay_of(trace).events}
    for segment in segments:
        by_device.setdefault(segment.device, []).append(segment)
    host = _host(root, reader)
    _note_strange(traces, reader, notes)
    if not by_device:
        if notes:
            raise InputError(f"{shown(path)} is damaged: none of its events and segments can be read; {notes[0]}")
        said = f"; its {human(host.peak_reserved_bytes)} are pinned host memory" if host else ""
        raise InputError(f"{shown(path)} holds no segment and no event: nothing was allocated on any GPU{said}")
    devices = []
    for device in sorted(by_device):
        replay = reader.replay_of(traces[device]) if device < len(traces) else Replay(rules)
        stages = _stages([mark for mark in marks if mark[0] == device], replay)
        devices.append(_history(device, replay, by_device[device], stages, notes))
    return Snapshot(tuple(devices), tuple(notes), host)


def _load(path: Path, rules: Rules) -> tuple[Any, SnapshotUnpickler]:
    with unpacked(path) as file:
        reader = SnapshotUnpickler(file, shown(path), rules)
        root = reader.load()
    parts = [root.get(key) for key in ("segments", "device_traces")] if isinstance(root, dict) else [root]
    if not any(isinstance(part, list) for part in parts):
        raise InputError(f"{shown(path)} is no CUDA allocator snapshot: it has neither segments nor device_traces")
    if isinstance(root, list) and root and not any(isinstance(item, Segment) for item in root):
        raise InputError(f"{shown(path)} is no CUDA allocator snapshot: it is a list, but not one of segments")
    return root, reader


def _items(root: Any, key: str, kind: type) -> list[Any]:
    """One of the lists; before torch 2.0 a snapshot was the list of segments alone. A trace keeps its place: that is its GPU."""
    items = root.get(key, []) if isinstance(root, dict) else root if key == "segments" else []
    if not isinstance(items, list):
        return []
    if kind is list:
        return [item if isinstance(item, list) else [] for item in items]
    return [item for item in items if isinstance(item, kind)]


def _note_strange(traces: Sequence[list[Any]], reader: SnapshotUnpickler, notes: list[str]) -> None:
    """What was left out, a sentence for each kind, with the place of the first."""
    for device, trace in enumerate(traces):
        replay = reader.replay_of(trace)
        count = replay.strange + len(trace)  # what is no event stays in the list
        if count:
            first = replay.first_strange or "it holds values that are no events"
            notes.append(f"GPU {device}: {count:,} {'event is' if count == 1 else 'events are'} left out: {first}")
    for what, count in reader.odd.items():
        said = f"{what} is" if count == 1 else f"{what}s are"
        notes.append(f"{count:,} {said} left out, for instance one with {reader.first_odd[what]}")


def _host(root: Any, reader: SnapshotUnpickler) -> HostMemory | None:
    """Pinned host memory, which newer versions of torch write beside the devices; None where there is none."""
    if not isinstance(root, dict):
        return None
    segments, traces = root.get("host_segments"), root.get("host_traces")
    held = [item for item in segments if isinstance(item, Segment)] if isinstance(segments, list) else []
    lists = [traces, *traces] if isinstance(traces, list) else []
    replays = [reader.replay_of(trace) for trace in lists if isinstance(trace, list)]
    recorded = sum(replay.reserved for replay in replays)
    reserved = sum(segment.size for segment in held) if held else recorded
    before = max(reserved - recorded, 0)
    peak = max(sum(replay.peak_reserved for replay in replays) + before, reserved)
    used = sum(b.size for s in held for b in s.blocks if b.state == ACTIVE)
    return HostMemory(peak, reserved, used if held else sum(r.allocated for r in replays)) if peak else None


def _rules(root: Any) -> Rules:
    settings = root.get("allocator_settings") if isinstance(root, dict) else None
    if not isinstance(settings, dict):
        return Rules()
    split, parts = settings.get("max_split_size"), settings.get("roundup_power2_divisions")
    divisions = tuple(parts.values()) if isinstance(parts, dict) else ()
    usable = all(isinstance(n, int) and n >= 0 for n in divisions) and any(divisions)
    return Rules(split if isinstance(split, int) and 0 < split < 1 << 62 else None, divisions if usable else ())


def _history(
    device: int, replay: Replay, segments: Sequence[Segment], stages: list[Any], notes: list[str]
) -> DeviceHistory:
    live_at_end = [b for s in segments for b in s.blocks if b.state == ACTIVE]
    older = [b for b in live_at_end if b.address not in replay.alive and b.address not in replay.pending]
    base = replay.freed_before + sum(b.size for b in older)
    reserved_at_end = sum(s.size for s in segments) if segments else replay.reserved
    base_reserved = max(reserved_at_end - replay.reserved, 0)
    complete = base == 0 and base_reserved == 0
    replayed = base + replay.allocated
    allocated = sum(b.size for b in live_at_end) if segments else replayed
    if not complete and replay.events:
        notes.append(
            f"GPU {device}: the history starts after {human(base)} had been allocated; "
            "figures are exact only when recording starts before the first allocation and max_entries is not reached"
        )
    elif replayed != allocated:
        notes.append(
            f"GPU {device}: the events end with {human(replayed)} allocated, the segments say {human(allocated)}"
        )
    points = tuple((x, a + base, r + base_reserved) for x, a, r in replay.points.result())
    return DeviceHistory(
        device=device,
        events=replay.events,
        complete=complete,
        points=points or ((0.0, base, base_reserved),),
        peak=_peak(replay, older, base, base_reserved, segments if not replay.events else None if complete else ()),
        peak_active_bytes=replay.peak_active + base,
        peak_reserved_bytes=replay.peak_reserved + base_reserved,
        allocated_bytes=allocated,
        reserved_bytes=reserved_at_end,
        out_of_memory=tuple(replay.refusals),
        stages=tuple(stages),
    )


def _peak(
    replay: Replay, older: Sequence[SnapshotBlock], base: int, base_reserved: int, known: Sequence[Segment] | None
) -> AllocatorMoment:
    """known: the segments then; None if the replay knows them."""
    used = list(replay.at_peak())
    groups = Counter((live[0], live[2].where) for _, live, state in used if state == ACTIVE)
    groups.update((b.size, b.frames[0].where if b.frames else NO_STACK.where) for b in older)
    ranked = sorted(((size * n, n, where) for (size, where), n in groups.items()), key=lambda g: (-g[0], g[2]))
    x, allocated, reserved = replay.peak
    by_address = sorted(used, key=lambda block: block[0])
    segments = _map(replay, by_address) if known is None else tuple(known)
    return AllocatorMoment(
        seconds=x,
        allocated_bytes=allocated + base,
        reserved_bytes=reserved + base_reserved,
        alive=tuple(AliveBlocks(nbytes, count, operation=where) for nbytes, count, where in ranked),
        segments=segments,
        holes=find_holes(segments),
    )


def _map(replay: Replay, used: Sequence[tuple[int, Live, str]]) -> tuple[Segment, ...]:
    """used: by address."""
    ranges = replay.ranges if replay.peak_ranges is None else replay.peak_ranges
    result, at = [], 0
    for start, held in sorted(ranges.items()):
        end, free, blocks = start + held.size, start, []
        while at < len(used) and used[at][0] < end:
            address, live, state = used[at]
            if address > free:
                blocks.append(SnapshotBlock(free, address - free, 0, INACTIVE))
            blocks.append(SnapshotBlock(address, live[0], live[1], state, live[2]))
            free, at = address + live[0], at + 1
        if free < end:
            blocks.append(SnapshotBlock(free, end - free, 0, INACTIVE))
        result.append(replace(held, blocks=tuple(blocks)))
    return tuple(result)


def find_holes(segments: Sequence[Segment]) -> tuple[Hole, ...]:
    """Every reserved range that no tensor uses, largest first, with the reason why it may be of no use."""
    per_stream: Counter[int] = Counter()
    for segment in segments:
        per_stream[segment.stream] += segment.size
    main = max(per_stream, key=per_stream.__getitem__, default=None)
    holes = []
    for segment in segments:
        whole = all(block.state == INACTIVE for block in segment.blocks)
        for block in segment.blocks:
            if block.state == PENDING:
                reason = "freed, but another stream may still use it"
            elif block.state == ACTIVE:
                continue
            elif whole:
                reason = "a whole free segment; torch.cuda.empty_cache() would give it back"
            elif segment.stream != main:
                reason = f"belongs to stream {segment.stream}"
            elif segment.small:
                reason = "in the small pool, which serves requests up to 1 MiB only"
            else:
                reason = BESIDE_LIVE
            holes.append(Hole(block.size, segment.address, block.address - segment.address, reason))
    return tuple(sorted(holes, key=lambda hole: -hole.bytes))


def _stages(marks: Sequence[tuple[Any, ...]], replay: Replay) -> list[tuple[str, int, float, float]]:
    """(name, depth, start, end) of what record_function marked while the history was recorded, in order of start."""
    stages: list[tuple[str, int, float, float]] = []
    opened: list[tuple[str, float]] = []
    for _, kind, name, time_us in marks:
        x = max((time_us - replay.first_us) / 1e6, 0.0)
        if kind == "START":
            opened.append((name, x))
        elif opened and opened[-1][0] == name:
            start = opened.pop()[1]
            stages.append((name, len(opened), start, x))
    while opened:
        name, start = opened.pop()
        stages.append((name, len(opened), start, max(replay.last, start)))
    return sorted(stages, key=lambda stage: (stage[2], stage[1]))


def snapshot_timeline(snapshot: Snapshot) -> TimelineRecord:
    """Of the device with the highest peak: axis in seconds, one moment (the peak)."""
    history = snapshot.main
    peak = history.peak
    depth = 2 if len(history.stages) <= MAX_STAGES else 1
    stages = [stage for stage in history.stages if stage[1] < depth][:MAX_STAGES]
    at_peak = [name for name, level, start, end in stages if level == 0 and start <= peak.seconds <= end]
    moment = TimelineMoment(
        label="peak",
        x=peak.seconds,
        allocated_bytes=peak.allocated_bytes,
        reserved_bytes=peak.reserved_bytes,
        stage=at_peak[-1] if at_peak else None,
        component=None,
        alive=largest(peak.alive, MAX_GROUPS),
        segments=tuple(TimelineSegment(s.size, tuple(_drawn(s, b) for b in s.blocks)) for s in peak.segments),
    )
    return TimelineRecord(
        axis="seconds",
        points=tuple((*point, None) for point in history.points),
        stages=tuple(
            TimelineStage(name, None, "step" if level else "stage", start, end) for name, level, start, end in stages
        ),
        weights=(),
        moments=(moment,),
    )


def _drawn(segment: Segment, block: SnapshotBlock) -> tuple[int, int, BlockState]:
    return block.address - segment.address, block.size, "active" if block.state == ACTIVE else "inactive"
