"""Memory over time for a report: timeline.json checked, rebuilt from a record's stages, or thinned out. No torch.

A timeline here is the JSON of timeline.json: points [x, allocated, reserved, device|None], stages, weights and moments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from wanvram.errors import DamagedError, InputError
from wanvram.foreign_text import quoted, why
from wanvram.record import Memory, RunRecord, Span

__all__ = ["checked_timeline", "coarse_timeline", "peak_moment", "thinned"]

SCHEMA = 1
MAX_POINTS = 100_000
MAX_COARSE_REPEATS = 200  # 1000 equal steps need no more dots than that


def checked_timeline(data: Any) -> dict[str, Any]:
    """The timeline with every value of its type; unknown keys are dropped. Raises InputError."""
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise InputError(f"timeline.json is no timeline of schema {SCHEMA}")
    try:
        if len(data["points"]) > MAX_POINTS:
            raise DamagedError(f"{len(data['points'])} points; at most {MAX_POINTS}")
        return {
            "axis": _one_of(data["axis"], ("events", "seconds")),
            "points": [_point(point) for point in data["points"]],
            "stages": [_stage(stage) for stage in data["stages"]],
            "weights": [
                {"component": _text(w["component"]), "bytes": _whole(w["bytes"])} | _range(w) for w in data["weights"]
            ],
            "moments": [_moment(moment) for moment in data["moments"]],
        }
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"timeline.json is damaged: {why(error)}") from error


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise DamagedError(f"{quoted(value)} is no whole number")
    return value


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DamagedError(f"{quoted(value)} is no number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise DamagedError(f"{quoted(value)} is no text")
    return value


def _maybe_text(value: Any) -> str | None:
    return None if value is None else _text(value)


def _one_of(value: Any, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise DamagedError(f"{quoted(value)} is none of {', '.join(allowed)}")
    return str(value)


def _range(data: Any) -> dict[str, Any]:
    return {"start": _number(data["start"]), "end": _number(data["end"])}


def _point(point: Any) -> list[int | float | None]:
    x, allocated, reserved, device = point
    return [_number(x), _whole(allocated), _whole(reserved), None if device is None else _whole(device)]


def _stage(data: Any) -> dict[str, Any]:
    kind = _one_of(data["kind"], ("load", "stage", "step"))
    return {"name": _text(data["name"]), "component": _maybe_text(data["component"]), "kind": kind} | _range(data)


def _moment(data: Any) -> dict[str, Any]:
    return {
        "label": _text(data["label"]),
        "x": _number(data["x"]),
        "allocated_bytes": _whole(data["allocated_bytes"]),
        "reserved_bytes": _whole(data["reserved_bytes"]),
        "stage": _maybe_text(data["stage"]),
        "component": _maybe_text(data["component"]),
        "alive": [_group(group) for group in data["alive"]],
        "segments": [_segment(segment) for segment in data["segments"]],
    }


def _group(data: Any) -> dict[str, Any]:
    shape = data["shape"]
    return {
        "bytes": _whole(data["bytes"]),
        "count": _whole(data["count"]),
        "component": _maybe_text(data["component"]),
        "stage": _maybe_text(data["stage"]),
        "module": _maybe_text(data["module"]),
        "operation": _maybe_text(data["operation"]),
        "shape": None if shape is None else [_whole(size) for size in shape],
        "dtype": _maybe_text(data["dtype"]),
    }


def _segment(data: Any) -> dict[str, Any]:
    blocks = [[_whole(o), _whole(size), _one_of(state, ("active", "inactive"))] for o, size, state in data["blocks"]]
    return {"bytes": _whole(data["bytes"]), "blocks": blocks}


def coarse_timeline(record: RunRecord) -> dict[str, Any]:
    """From the recorded stages and steps alone: start, peak and end of each, in order; nothing about what was alive."""
    points: list[list[int | float | None]] = []
    stages: list[dict[str, Any]] = []
    x = 0
    for stage in record.stages:
        first = x
        parts = stage.children if stage.children and stage.children[0].kind == "step" else [stage]
        for part in parts:
            for _ in range(min(part.repeats, MAX_COARSE_REPEATS)):
                begin = x
                for memory in (part.start, part.peak, part.end):
                    points.append([x, *_figures(memory)])
                    x += 1
                if part is not stage:
                    stages.append(_coarse_stage(part, begin, x))
        if not any(point[1] == stage.peak.allocated_bytes for point in points[first:]):
            points.append([x, *_figures(stage.peak)])  # a peak between the steps
            x += 1
        stages.append(_coarse_stage(stage, first, x))
    return {"axis": "order", "points": points, "stages": stages, "weights": [], "moments": []}


def _coarse_stage(span: Span, start: int, end: int) -> dict[str, Any]:
    return {"name": span.name, "component": span.component, "kind": span.kind, "start": start, "end": end}


def _figures(memory: Memory) -> tuple[int, int, int | None]:
    return memory.allocated_bytes, memory.reserved_bytes, memory.device_bytes


def peak_moment(timeline: dict[str, Any]) -> dict[str, Any] | None:
    """The moment of the global peak; None in a coarse timeline."""
    return max(timeline["moments"], key=lambda moment: int(moment["allocated_bytes"]), default=None)


def thinned(timeline: dict[str, Any], *, points: int, groups: int, blocks: int) -> dict[str, Any]:
    """At most so many points, alive groups per moment and segment blocks per moment.

    Points keep the highest allocated of each stretch; the smallest groups become one "(other)"; a segment map that is
    too large is dropped, since a part of it would show holes that are none.
    """
    moments = [_thinned_moment(moment, groups, blocks) for moment in timeline["moments"]]
    steps = [stage for stage in timeline["stages"] if stage["kind"] == "step"]
    kept = timeline["stages"] if len(steps) <= points // 4 else [s for s in timeline["stages"] if s["kind"] != "step"]
    return timeline | {"points": list(_highest(timeline["points"], points)), "stages": kept, "moments": moments}


def _highest(points: Sequence[list[Any]], count: int) -> Iterator[list[Any]]:
    """One point per stretch, each with the highest of every figure there, so that no peak is lost."""
    if len(points) <= count:
        yield from points
        return
    edges = [round(i * len(points) / count) for i in range(count + 1)]
    for low, high in pairwise(edges):
        part = points[low:high]
        top = max(part, key=lambda point: int(point[1]))
        device = max((p[3] for p in part if p[3] is not None), default=None)
        yield [top[0], top[1], max(p[2] for p in part), device]


def _thinned_moment(moment: dict[str, Any], groups: int, blocks: int) -> dict[str, Any]:
    alive = moment["alive"]
    if len(alive) > groups:
        ordered = sorted(alive, key=lambda group: -int(group["bytes"]))
        rest = ordered[groups - 1 :]
        other = dict.fromkeys(rest[0]) | {
            "bytes": sum(g["bytes"] for g in rest),
            "count": sum(g["count"] for g in rest),
            "operation": "(other)",
        }
        alive = [*ordered[: groups - 1], other]
    segments = moment["segments"]
    if sum(len(segment["blocks"]) for segment in segments) > blocks:
        segments = []
    return moment | {"alive": alive, "segments": segments}
