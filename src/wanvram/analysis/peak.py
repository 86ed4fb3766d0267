"""Who owns a moment's memory, and what of the reserved was of no use there: pure functions over a timeline. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from wanvram.timeline_record import OTHER, WEIGHTS, AliveBlocks, TimelineMoment, TimelineRecord
from wanvram.units import mib

__all__ = [
    "Moment",
    "OwnerShare",
    "Unusable",
    "component_of",
    "describe_moment",
    "module_of",
    "owners",
    "shape_of",
    "stage_of",
    "unusable",
    "weights_at",
]

TOP = 10  # owners of each kind that are kept


@dataclass(frozen=True)
class OwnerShare:
    """One owner at a moment: total bytes of `count` blocks, and their share of what is allocated."""

    name: str
    bytes: int
    count: int
    share: float


@dataclass(frozen=True)
class Unusable:
    """Reserved but not allocated: the holes of the allocator's segments at a moment, bytes.

    free_segment_bytes are segments without a live block (empty_cache gives them back), pinned_bytes are holes beside
    live blocks (nothing gives them back but the death of their neighbours). too_small_bytes are in holes smaller than
    the largest activation alive, largest_allocation_bytes: for it, that memory might as well not be there.
    """

    inactive_bytes: int
    holes: int
    largest_hole_bytes: int
    free_segment_bytes: int
    pinned_bytes: int
    largest_allocation_bytes: int
    too_small_bytes: int
    reason: str


@dataclass(frozen=True)
class Moment:
    """One moment of a timeline. The owners of each kind add up to allocated_bytes unless cut to the largest."""

    label: str
    x: float
    stage: str | None
    component: str | None
    allocated_bytes: int
    reserved_bytes: int
    weights_bytes: int
    by_component: tuple[OwnerShare, ...]
    by_stage: tuple[OwnerShare, ...]
    by_module: tuple[OwnerShare, ...]
    by_shape: tuple[OwnerShare, ...]
    unusable: Unusable | None


def describe_moment(moment: TimelineMoment) -> Moment:
    """The largest owners of each kind."""
    alive = moment.alive
    return Moment(
        label=moment.label,
        x=moment.x,
        stage=moment.stage,
        component=moment.component,
        allocated_bytes=moment.allocated_bytes,
        reserved_bytes=moment.reserved_bytes,
        weights_bytes=sum(g.bytes for g in alive if g.operation == WEIGHTS),
        by_component=owners(alive, component_of)[:TOP],
        by_stage=owners(alive, stage_of)[:TOP],
        by_module=owners(alive, module_of)[:TOP],
        by_shape=owners(alive, shape_of)[:TOP],
        unusable=unusable(moment),
    )


def owners(alive: Iterable[AliveBlocks], name: Callable[[AliveBlocks], str]) -> tuple[OwnerShare, ...]:
    """The alive groups added up by name, largest first."""
    sums: dict[str, tuple[int, int]] = {}
    for group in alive:
        nbytes, count = sums.get(name(group), (0, 0))
        sums[name(group)] = nbytes + group.bytes, count + group.count
    total = sum(nbytes for nbytes, _ in sums.values())
    ordered = sorted(sums.items(), key=lambda item: (-item[1][0], item[0]))
    return tuple(OwnerShare(key, nbytes, count, nbytes / total if total else 0.0) for key, (nbytes, count) in ordered)


def component_of(group: AliveBlocks) -> str:
    """`weights of dit`, `activations of vae`, `libraries`, or `(other)`."""
    if group.operation == OTHER:
        return OTHER
    if group.component is None:
        return "libraries" if group.shape is None else "outside the components"
    return f"{'weights' if group.operation == WEIGHTS else 'activations'} of {group.component}"


def stage_of(group: AliveBlocks) -> str:
    """The stage that allocated it."""
    if group.operation == OTHER:
        return OTHER
    return group.stage or "outside the stages"


def module_of(group: AliveBlocks) -> str:
    """`dit.SelfAttention.forward > Linear.forward`, whatever the line; weights and unknown places by component."""
    return component_of(group) if group.operation == OTHER or not group.place else group.place


def shape_of(group: AliveBlocks) -> str:
    """`[75600, 5120] bfloat16`; what has no shape by its operation."""
    if group.shape is None:
        return str(group.operation)
    return f"{list(group.shape)} {group.dtype}"


def weights_at(timeline: TimelineRecord, x: float) -> dict[str, int]:
    """Bytes of weights on the device at x, by component."""
    result: dict[str, int] = {}
    for weight in timeline.weights:
        if weight.start <= x < weight.end:
            result[weight.component] = result.get(weight.component, 0) + weight.bytes
    return result


def unusable(moment: TimelineMoment) -> Unusable | None:
    """None without a segment map."""
    if not moment.segments:
        return None
    free: list[int] = []
    pinned: list[int] = []
    for segment in moment.segments:
        sizes = [size for _, size, state in segment.blocks if state == "inactive"]
        (pinned if any(state == "active" for *_, state in segment.blocks) else free).extend(sizes)
    activations = [g for g in moment.alive if g.component is not None and g.operation != WEIGHTS]
    largest = max((g.bytes // max(g.count, 1) for g in activations), default=0)
    holes = free + pinned
    found = Unusable(
        inactive_bytes=sum(holes),
        holes=len(holes),
        largest_hole_bytes=max(holes, default=0),
        free_segment_bytes=sum(free),
        pinned_bytes=sum(pinned),
        largest_allocation_bytes=largest,
        too_small_bytes=sum(size for size in holes if size < largest),
        reason="",
    )
    return _with_reason(found, moment.reserved_bytes)


def _with_reason(found: Unusable, reserved: int) -> Unusable:
    if not found.holes:
        return replace(found, reason=f"All {mib(reserved)} reserved are allocated.")
    parts = []
    if found.pinned_bytes:
        parts.append(f"{mib(found.pinned_bytes)} in holes beside live blocks")
    if found.free_segment_bytes:
        parts.append(f"{mib(found.free_segment_bytes)} in free segments, which emptying the cache would give back")
    text = f"{mib(found.inactive_bytes)} of {mib(reserved)} reserved are not allocated: {' and '.join(parts)}."
    pieces = "1 piece" if found.holes == 1 else f"{found.holes:,} pieces, the largest"
    text += f" That is {pieces} of {mib(found.largest_hole_bytes)}."
    if found.largest_allocation_bytes:
        least = mib(found.largest_allocation_bytes)
        text += f" {mib(found.too_small_bytes)} are in pieces too small for the largest activation alive, {least}."
    return replace(found, reason=text)
