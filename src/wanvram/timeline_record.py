"""Memory over the time of a run, and who owned it: the record that timeline.json holds, with its one writer and one reader. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from wanvram.errors import DamagedError, InputError
from wanvram.foreign_text import quoted, why
from wanvram.strict_json import built

__all__ = [
    "OTHER",
    "WEIGHTS",
    "AliveBlocks",
    "BlockState",
    "MemoryOwner",
    "MemoryPoint",
    "StageKind",
    "TimelineMoment",
    "TimelineRecord",
    "TimelineSegment",
    "TimelineStage",
    "WeightsStretch",
    "largest",
    "read_timeline",
]

SCHEMA = 1
MAX_POINTS = 100_000
WEIGHTS = "weights"  # the operation of a group that holds a component's weights
OTHER = "(other)"  # the operation of the group that holds everything too small to be told apart
_AXES = ("events", "seconds")  # of a file; "order" is that of a timeline made of the stages alone

StageKind = Literal["load", "stage", "step"]
BlockState = Literal["active", "inactive"]
# x; allocated, reserved and device bytes, None where the driver's view is unknown
MemoryPoint = tuple[float, int, int, int | None]


@dataclass(frozen=True)
class TimelineStage:
    """A load, stage or step on the x axis."""

    name: str
    component: str | None
    kind: StageKind
    start: float
    end: float


@dataclass(frozen=True)
class WeightsStretch:
    """Weights of a component that are on the device where start <= x < end."""

    component: str
    bytes: int
    start: float
    end: float


@dataclass(frozen=True)
class MemoryOwner:
    """Whose an allocation of a run is. stage_kind: of the load or stage that asked for it; place: `module` without lines."""

    component: str | None
    stage: str | None
    stage_kind: str | None
    module: str | None
    place: str | None
    operation: str
    shape: tuple[int, ...] | None
    dtype: str | None


@dataclass(frozen=True)
class AliveBlocks:
    """Equal blocks of one owner, together `bytes`. shape and dtype are None for the buffer of a library."""

    bytes: int
    count: int
    component: str | None = None
    stage: str | None = None
    module: str | None = None  # `dit.SelfAttention.forward:186 > Linear.forward:77`
    operation: str | None = None
    shape: tuple[int, ...] | None = None
    dtype: str | None = None

    @property
    def place(self) -> str | None:
        """`module` without lines: an edit elsewhere in the code moves lines, not places. The file has no other name for it."""
        return self.module and re.sub(r":\d+", "", self.module)


def largest(groups: Sequence[AliveBlocks], most: int) -> tuple[AliveBlocks, ...]:
    """The groups; where they are more than `most`, largest first with the smallest as one."""
    if len(groups) <= most:
        return tuple(groups)
    ordered = sorted(groups, key=lambda group: -group.bytes)
    rest = ordered[most - 1 :]
    other = AliveBlocks(sum(g.bytes for g in rest), sum(g.count for g in rest), operation=OTHER)
    return (*ordered[: most - 1], other)


@dataclass(frozen=True)
class TimelineSegment:
    """A segment of the allocator: its blocks as (offset, bytes, state), by address."""

    bytes: int
    blocks: tuple[tuple[int, int, BlockState], ...]


@dataclass(frozen=True)
class TimelineMoment:
    """What was alive at x and where it lay; no segments where the map is unknown."""

    label: str
    x: float
    allocated_bytes: int
    reserved_bytes: int
    stage: str | None
    component: str | None
    alive: tuple[AliveBlocks, ...]
    segments: tuple[TimelineSegment, ...]


@dataclass(frozen=True)
class TimelineRecord:
    """axis says what x counts: events, seconds, or nothing but the order."""

    axis: str
    points: tuple[MemoryPoint, ...]
    stages: tuple[TimelineStage, ...]
    weights: tuple[WeightsStretch, ...]
    moments: tuple[TimelineMoment, ...]

    def to_json(self) -> dict[str, Any]:
        """timeline.json; all bytes exact."""
        return {
            "schema": SCHEMA,
            "axis": self.axis,
            "points": self.points,
            "stages": [vars(stage) for stage in self.stages],
            "weights": [vars(stretch) for stretch in self.weights],
            "moments": [
                vars(moment) | {"alive": list(map(vars, moment.alive)), "segments": list(map(vars, moment.segments))}
                for moment in self.moments
            ],
        }


def read_timeline(data: Any) -> TimelineRecord:
    """From the JSON of timeline.json, with every value of its type; unknown keys are dropped. Raises InputError."""
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise InputError(f"timeline.json is no timeline of schema {SCHEMA}")
    try:
        if len(data["points"]) > MAX_POINTS:
            raise DamagedError(f"{len(data['points'])} points; at most {MAX_POINTS}")
        if data["axis"] not in _AXES:
            raise DamagedError(f"{quoted(data['axis'])} is none of {', '.join(_AXES)}")
        return built(TimelineRecord, data)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"timeline.json is damaged: {why(error)}") from error
