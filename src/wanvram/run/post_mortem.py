"""What was on the device when a run failed, named as a reader knows it."""

from __future__ import annotations

import re

from wanvram.engine.devices import SimulatedDevice
from wanvram.engine.pipeline import Pipeline
from wanvram.simulate.timeline import Timeline

__all__ = ["largest_alive"]

_LINE = re.compile(r":\d+")  # of the source, in the name of a place


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
    """By the allocator's handle what its last allocation there was: weights, which are what a load leaves alive, or a shape and
    the code that asked for it."""
    groups = [group for moment in timeline.to_json()["moments"] for group in moment["alive"] if group["shape"]]
    shapes = {
        (g["operation"], g["module"], g["stage"], g["bytes"] // g["count"]): f"{g['shape']} {g['dtype']}"
        for g in groups
    }
    names = {}
    for action, handle, nbytes, who in timeline.history():
        if action != "alloc":
            continue
        operation, *where = who
        module = next((w for w in where if _LINE.search(w)), None)
        stage = next((w for w in where if w != module), None)
        what = shapes.get((operation, module, stage, nbytes), operation)
        if stage and stage.startswith("load ") and not operation.endswith(" workspace"):
            what = f"weights of {stage.removeprefix('load ')}"
        elif module:
            what += f" of {_LINE.sub('', module)}"
        names[handle] = what
    return names
