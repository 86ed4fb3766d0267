"""What was on the device when a run failed, named as a reader knows it."""

from __future__ import annotations

from wanvram.engine.devices import SimulatedDevice
from wanvram.engine.pipeline import Pipeline
from wanvram.simulate.timeline import Timeline
from wanvram.timeline_record import MemoryOwner

__all__ = ["largest_alive"]


def largest_alive(pipeline: Pipeline, count: int = 10) -> tuple[tuple[str, int], ...]:
    """What was on the device at the failure: components, on the simulated device every allocation, equal ones together."""
    device = pipeline.device
    alive = dict(pipeline.resident())
    if isinstance(device, SimulatedDevice):
        observer = device.memory.observer
        names = _names(observer) if isinstance(observer, Timeline) else {}
        if names:
            alive = {}  # its weights are among the allocations
        equal: dict[str, list[int]] = {}
        for handle, (nbytes, operation) in device.memory.live.items():
            equal.setdefault(names.get(handle, operation), []).append(nbytes)
        for name, sizes in equal.items():
            alive[f"{len(sizes)} x {name}" if len(sizes) > 1 else name] = sum(sizes)
    return tuple(sorted(alive.items(), key=lambda item: -item[1])[:count])


def _names(timeline: Timeline) -> dict[int, str]:
    """By the allocator's handle what its last allocation there was."""
    return {handle: _name(owner) for action, handle, _, owner in timeline.history() if owner is not None}


def _name(owner: MemoryOwner) -> str:
    """Weights, which are what a load leaves alive, or a shape and the code that asked for it."""
    if owner.stage_kind == "load" and owner.component and owner.shape is not None:
        return f"weights of {owner.component}"
    what = f"{list(owner.shape)} {owner.dtype}" if owner.shape else owner.operation
    return f"{what} of {owner.place}" if owner.place else what
