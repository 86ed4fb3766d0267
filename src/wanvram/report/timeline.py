"""Memory over time for a report: rebuilt from a record's stages, or thinned out. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace
from itertools import pairwise
from typing import cast

from wanvram.record import RunRecord
from wanvram.spans import Span
from wanvram.timeline_record import MemoryPoint, StageKind, TimelineMoment, TimelineRecord, TimelineStage, largest

__all__ = ["coarse_timeline", "peak_moment", "thinned"]

MAX_COARSE_REPEATS = 200  # 1000 equal steps need no more dots than that


def coarse_timeline(record: RunRecord) -> TimelineRecord:
    """From the recorded stages and steps alone: start, peak and end of each, in order; nothing about what was alive."""
    points: list[MemoryPoint] = []
    stages: list[TimelineStage] = []
    x = 0
    for stage in record.stages:
        first = x
        parts = stage.children if stage.children and stage.children[0].kind == "step" else [stage]
        for part in parts:
            for _ in range(min(part.repeats, MAX_COARSE_REPEATS)):
                begin = x
                for memory in (part.start, part.peak, part.end):
                    points.append((x, *astuple(memory)))
                    x += 1
                if part is not stage:
                    stages.append(_coarse_stage(part, begin, x))
        if not any(point[1] == stage.peak.allocated_bytes for point in points[first:]):
            points.append((x, *astuple(stage.peak)))  # a peak between the steps
            x += 1
        stages.append(_coarse_stage(stage, first, x))
    return TimelineRecord("order", tuple(points), tuple(stages), (), ())


def _coarse_stage(span: Span, start: int, end: int) -> TimelineStage:
    return TimelineStage(span.name, span.component, cast(StageKind, span.kind), start, end)


def peak_moment(timeline: TimelineRecord) -> TimelineMoment | None:
    """The moment of the global peak; None in a coarse timeline."""
    return max(timeline.moments, key=lambda moment: moment.allocated_bytes, default=None)


def thinned(timeline: TimelineRecord, *, points: int, groups: int, blocks: int) -> TimelineRecord:
    """At most so many points, alive groups per moment and segment blocks per moment.

    Points keep the highest allocated of each stretch; the smallest groups become one "(other)"; a segment map that is
    too large is dropped, since a part of it would show holes that are none.
    """
    moments = tuple(_thinned_moment(moment, groups, blocks) for moment in timeline.moments)
    wholes = tuple(stage for stage in timeline.stages if stage.kind != "step")
    stages = timeline.stages if len(timeline.stages) - len(wholes) <= points // 4 else wholes
    return replace(timeline, points=tuple(_highest(timeline.points, points)), stages=stages, moments=moments)


def _highest(points: Sequence[MemoryPoint], count: int) -> Iterator[MemoryPoint]:
    """One point per stretch, each with the highest of every figure there, so that no peak is lost."""
    if len(points) <= count:
        yield from points
        return
    edges = [round(i * len(points) / count) for i in range(count + 1)]
    for low, high in pairwise(edges):
        part = points[low:high]
        top = max(part, key=lambda point: point[1])
        device = max((p[3] for p in part if p[3] is not None), default=None)
        yield top[0], top[1], max(p[2] for p in part), device


def _thinned_moment(moment: TimelineMoment, groups: int, blocks: int) -> TimelineMoment:
    few = sum(len(segment.blocks) for segment in moment.segments) <= blocks
    return replace(moment, alive=largest(moment.alive, groups), segments=moment.segments if few else ())
