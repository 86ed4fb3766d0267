"""What one run spent its memory and time on, stage by stage: pure functions over a RunRecord and its timeline. No torch.

With a timeline, fragmentation and fluctuation come from its points, every moment between two of the recorder's reads
included; without one, from the starts, peaks and ends of the spans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import linear_regression
from typing import Any

from wanvram.analysis.peak import (
    Moment,
    OwnerShare,
    component_of,
    describe_moment,
    module_of,
    owners,
    shape_of,
    weights_at,
)
from wanvram.errors import DamagedError, InputError
from wanvram.foreign_text import quoted, shown
from wanvram.record import ComponentRecord, RunRecord
from wanvram.spans import Memory, Span
from wanvram.timeline_record import WEIGHTS, AliveBlocks, TimelineMoment, TimelineRecord
from wanvram.units import mib

__all__ = ["Analysis", "SpecMoments", "Switch", "analyze_run", "steady_growth"]

SCHEMA = 1
WARM_UP_STEPS = 3  # solvers of second order keep results of two steps; libraries take their workspaces in the first
MAX_STEPS = 10_000


@dataclass(frozen=True)
class Fragmentation:
    """(reserved - allocated) / reserved of one stage: at its allocated peak, and over its time."""

    start: float
    at_peak: float
    highest: float
    end: float


@dataclass(frozen=True)
class StageUse:
    """One load or stage. time_share: of all stages' seconds, predicted ones without loading."""

    name: str
    kind: str
    component: str | None
    start: Memory
    peak: Memory
    end: Memory
    activation_bytes: int
    fluctuation_bytes: int
    fragmentation: Fragmentation
    seconds: float | None
    time_share: float | None


@dataclass(frozen=True)
class SpecMoments:
    """Memory before the first forward of the DiT, at the highest point inside one of its blocks, and after vae.decode.

    inside_blocks needs block spans (profile_memory); block_activation_bytes is what it adds to its stage's start.
    """

    before_forward: Memory | None
    inside_blocks: Memory | None
    highest_block: str | None
    block_activation_bytes: int | None
    after_decode: Memory | None


@dataclass(frozen=True)
class Loading:
    """One component enters: what it added, and what loading needed beyond that and gave back."""

    component: str | None
    added_bytes: int
    transient_bytes: int
    peak: Memory
    seconds: float | None


@dataclass(frozen=True)
class Switch:
    """From the end of one component's use to the load of the next. given_back: before minus after.

    resident: weights that stay, by component; None without a timeline.
    """

    leaving: str | None
    entering: str | None
    before: Memory
    after: Memory
    given_back_allocated_bytes: int
    given_back_reserved_bytes: int
    resident: dict[str, int] | None


@dataclass(frozen=True)
class StepGrowth:
    """Allocated at the end of every recorded step of a stage. leak None: too few steps to tell.

    bytes_per_step is the slope after the warm-up and before the last step, and 0 when there is no steady growth.
    steps: all of the stage, also those that a simulation did not run because they repeat a recorded one.
    """

    stage: str
    allocated_bytes: tuple[int, ...]
    leak: bool | None
    bytes_per_step: int
    steps: int


@dataclass(frozen=True)
class Bottleneck:
    """The stage that decides whether the run fits. top: the largest alive groups there, empty without a timeline."""

    stage: str
    component: str | None
    peak: Memory
    weights_bytes: int | None
    top: tuple[OwnerShare, ...]
    statement: str


@dataclass(frozen=True)
class Analysis:
    """Everything `wanvram analyze` says about one run. peaks: one per moment of the timeline, the global one first."""

    peak: Memory | None
    bottleneck: Bottleneck | None
    components: tuple[ComponentRecord, ...]
    stages: tuple[StageUse, ...]
    moments: SpecMoments
    loading: tuple[Loading, ...]
    inference: tuple[str, ...]
    switches: tuple[Switch, ...]
    growth: tuple[StepGrowth, ...]
    fragmentation_at_peak: float
    fragmentation_highest: float
    peaks: tuple[Moment, ...]
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def analyze_run(record: RunRecord, timeline: TimelineRecord | None) -> Analysis:
    """Raises InputError for a timeline of another run."""
    try:
        windows = [None] * len(record.stages) if timeline is None else list(_windows(record, timeline))
    except DamagedError as error:
        raise InputError(f"the timeline is damaged: {error}") from error
    total = sum(span.seconds for span in record.stages if span.seconds is not None)
    stages = tuple(_stage(*pair, total) for pair in zip(record.stages, windows, strict=True))
    where = record.peak_span()
    index = next((i for i, span in enumerate(record.stages) if span is where), 0)
    return Analysis(
        peak=record.peak(),
        bottleneck=_bottleneck(where, windows[index]) if where else None,
        components=tuple(record.components),
        stages=stages,
        moments=_spec_moments(record.stages),
        loading=tuple(_loading(span) for span in record.stages if span.kind == "load"),
        inference=tuple(span.name for span in record.stages if span.kind == "stage"),
        switches=tuple(_switches(record.stages, windows, timeline)),
        growth=tuple(_growths(record)),
        fragmentation_at_peak=stages[index].fragmentation.at_peak if stages else 0.0,
        fragmentation_highest=max((s.fragmentation.highest for s in stages), default=0.0),
        peaks=tuple(describe_moment(m) for m in timeline.moments) if timeline else (),
    )


@dataclass(frozen=True)
class _Window:
    """A stage on the timeline's axis, and the points in it."""

    start: float
    points: list[Memory]
    moment: TimelineMoment | None


def _windows(record: RunRecord, timeline: TimelineRecord) -> Iterator[_Window]:
    """One window per load or stage of the record."""
    wholes = [s for s in timeline.stages if s.kind in ("load", "stage")]
    if [s.name for s in wholes] != [s.name for s in record.stages]:
        raise DamagedError("its stages are not those of the record")
    for entry in wholes:
        inside = [p for p in timeline.points if entry.start <= p[0] <= entry.end]
        if not inside:
            raise DamagedError(f"it has no point in stage {quoted(entry.name)}")
        moments = [m for m in timeline.moments if m.label == f"peak of {entry.name}"]
        own = [m for m in moments if entry.start <= m.x <= entry.end]
        yield _Window(entry.start, [Memory(*p[1:]) for p in inside], own[0] if own else None)


def _stage(span: Span, window: _Window | None, all_seconds: float) -> StageUse:
    """A span's peak holds the highest of each figure, which need not have been at the same time; points know."""
    if window is None:
        moments = span.moments()
        start, peak, end = span.start, span.peak, span.end
    else:
        moments = window.points
        start, end = moments[0], moments[-1]
        peak = max(moments, key=lambda memory: memory.allocated_bytes)
    allocated = [memory.allocated_bytes for memory in moments]
    highest = max(memory.fragmentation for memory in moments)
    return StageUse(
        name=span.name,
        kind=span.kind,
        component=span.component,
        start=span.start,
        peak=span.peak,
        end=span.end,
        activation_bytes=span.activation_bytes,
        fluctuation_bytes=max(allocated) - min(allocated),
        fragmentation=Fragmentation(start.fragmentation, peak.fragmentation, highest, end.fragmentation),
        seconds=span.seconds,
        time_share=span.seconds / all_seconds if span.seconds is not None and all_seconds else None,
    )


def _spec_moments(stages: Sequence[Span]) -> SpecMoments:
    """With several prompts: before the first forward of all, the highest of all blocks, after the last decode."""
    denoise, decode = ([s for s in stages if s.kind == "stage" and s.part == part] for part in ("denoise", "decode"))
    blocks = [(stage, s) for stage in denoise for s in stage.walk() if s.kind == "block"]
    highest = max(blocks, key=lambda pair: pair[1].peak.allocated_bytes, default=None)
    return SpecMoments(
        before_forward=denoise[0].start if denoise else None,
        inside_blocks=highest[1].peak if highest else None,
        highest_block=highest[1].name if highest else None,
        block_activation_bytes=highest[1].peak.allocated_bytes - highest[0].start.allocated_bytes if highest else None,
        after_decode=decode[-1].end if decode else None,
    )


def _loading(span: Span) -> Loading:
    return Loading(
        component=span.component,
        added_bytes=span.end.allocated_bytes - span.start.allocated_bytes,
        transient_bytes=span.peak.allocated_bytes - max(span.start.allocated_bytes, span.end.allocated_bytes),
        peak=span.peak,
        seconds=span.seconds,
    )


def _switches(
    stages: Sequence[Span], windows: Sequence[_Window | None], timeline: TimelineRecord | None
) -> Iterator[Switch]:
    for (before, after), window in zip(pairwise(stages), windows[1:], strict=True):
        if before.kind == "stage" and after.kind == "load":
            yield Switch(
                leaving=before.component,
                entering=after.component,
                before=before.end,
                after=after.start,
                given_back_allocated_bytes=before.end.allocated_bytes - after.start.allocated_bytes,
                given_back_reserved_bytes=before.end.reserved_bytes - after.start.reserved_bytes,
                resident=weights_at(timeline, window.start) if timeline and window else None,
            )


def _growths(record: RunRecord) -> Iterator[StepGrowth]:
    for stage in record.stages:
        ends: list[int] = []
        steps = [child for child in stage.children if child.kind == "step"]
        for step in steps:
            # A simulated step that stands for many was run once: it says nothing about growth over the others.
            repeats = 1 if record.simulated else min(step.repeats, MAX_STEPS - len(ends))
            ends += [step.end.allocated_bytes] * repeats
        if len(ends) > 1:
            yield StepGrowth(stage.name, tuple(ends), *steady_growth(ends), steps=sum(step.repeats for step in steps))


def steady_growth(ends: Sequence[int]) -> tuple[bool | None, int]:
    """(is it a leak, bytes per step) of allocated bytes at the steps' ends, warm-up and last step left out.

    A leak: everything in the last third is over everything in the first third, and at least three and a quarter of the
    steps grew. One late allocation is no leak, nor is noise around a level. None with fewer than four steps to judge.
    """
    steady = list(ends[WARM_UP_STEPS:-1])
    if len(steady) < 4:
        return None, 0
    third = len(steady) // 3
    grew = sum(after > before for before, after in pairwise(steady))
    if min(steady[-third:]) <= max(steady[:third]) or grew < max(3, (len(steady) - 1) / 4):
        return False, 0
    return True, round(linear_regression(range(len(steady)), steady).slope)


def _bottleneck(span: Span, window: _Window | None) -> Bottleneck:
    where = f"{shown(span.name)} ({shown(span.component)})" if span.component else shown(span.name)
    peak = span.peak
    device = f", {mib(peak.device_bytes)} on the device" if peak.device_bytes is not None else ""
    sizes = f"{mib(peak.allocated_bytes)} allocated, {mib(peak.reserved_bytes)} reserved{device}"
    text = f"The peak is in {where}: {sizes}."
    if window is None or window.moment is None:
        there = f"{mib(span.start.allocated_bytes)} were there when it began"
        text += f" {there}, and {mib(span.activation_bytes)} came on top."
        return Bottleneck(span.name, span.component, peak, None, (), text)
    groups, weights = window.moment.alive, describe_moment(window.moment).weights_bytes
    top = owners(groups, _group_name)[:5]
    rest = owners((g for g in groups if g.operation != WEIGHTS), _group_name)[:2]
    if weights:
        text += f" {mib(weights)} are weights ({_weights_listed(groups)})."
    if rest:
        text += f" Largest of the rest: {'; '.join(map(_times, rest))}."
    return Bottleneck(span.name, span.component, peak, weights, top, text)


def _group_name(group: AliveBlocks) -> str:
    """`weights of dit`, or shape and place of an activation."""
    if group.operation == WEIGHTS:
        return component_of(group)
    if group.shape is None:
        return shape_of(group)
    return f"{shape_of(group)} of {module_of(group)}"


def _weights_listed(groups: Sequence[AliveBlocks]) -> str:
    found = owners((g for g in groups if g.operation == WEIGHTS and g.component), lambda group: str(group.component))
    return ", ".join(f"{shown(owner.name)} {mib(owner.bytes)}" for owner in found)


def _times(owner: OwnerShare) -> str:
    return f"{f'{owner.count} x ' if owner.count > 1 else ''}{shown(owner.name)}, {mib(owner.bytes)}"
