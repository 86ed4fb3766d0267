"""Run directories for the tests of reports: a record and a timeline that agree with each other, without any pipeline."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wanvram.record import ComponentRecord, RunRecord
from wanvram.spans import Memory, Span
from wanvram.units import MIB

OUTSIDE = 600 * MIB  # CUDA context and libraries
WEIGHTS = {"text_encoder": 736 * MIB, "dit": 260 * MIB, "vae": 280 * MIB}
STAGES = (
    ("load text_encoder", "load", "text_encoder", 0),
    ("load vae", "load", "vae", 0),
    ("load dit", "load", "dit", 0),
    ("encode_text", "stage", "text_encoder", 80 * MIB),
    ("denoise", "stage", "dit", 500 * MIB),
    ("decode", "stage", "vae", 3858 * MIB),
)


@dataclass
class Recipe:
    """What may differ between two runs."""

    name: str = "baseline"
    simulated: bool = True
    offload: bool = False
    budget_bytes: int | None = None
    prompt: str = "Two cats."
    steps: int = 4
    events: int = 20  # allocator events per step
    factor: float = 1.0  # of every activation
    timeline: bool = True


@dataclass
class _Builder:
    recipe: Recipe
    x: int = 0
    reserved: int = 0
    base: dict[str, tuple[int, int]] = field(default_factory=dict)  # component: (bytes, since)
    points: list[list[Any]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    weights: list[dict[str, Any]] = field(default_factory=list)
    moments: list[dict[str, Any]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    def weight_bytes(self) -> int:
        return sum(size for size, _ in self.base.values())

    def point(self, activation: int) -> Memory:
        allocated = self.weight_bytes() + activation
        self.reserved = max(self.reserved, -(-(allocated + allocated // 12) // (2 * MIB)) * 2 * MIB)
        self.points.append([self.x, allocated, self.reserved, self.reserved + OUTSIDE])
        self.x += 1
        return Memory(allocated, self.reserved, self.reserved + OUTSIDE)

    def stage(self, name: str, kind: str, component: str, activation: int) -> None:
        first, start = self.x, self.point(0)
        if kind == "load":
            self.base[component] = (WEIGHTS[component], self.x)
            activation = 0
        top = int(activation * self.recipe.factor) // 512 * 512
        steps = self.recipe.steps if name == "denoise" else 1
        peak, at = start, first
        for step in range(steps):
            begin = self.x
            for i in range(self.recipe.events):
                # A sawtooth whose highest tooth is the last but one of the last step.
                share = 1.0 if (i, step) == (self.recipe.events - 2, steps - 1) else 0.45 + 0.5 * ((i * 7) % 11) / 11
                memory = self.point(int(top * share) // 512 * 512)
                if memory.allocated_bytes > peak.allocated_bytes:
                    peak, at = memory, self.x - 1
            if steps > 1:
                self.stages.append(_stage(f"step {step}", component, "step", begin, self.x))
        end = self.point(0)
        self.stages.append(_stage(name, component, kind, first, self.x))
        self.moments.append(self.moment(f"peak of {name}", at, peak, name, component))
        self.spans.append(Span(name, kind, component, start, peak, end, seconds=1.5))
        if self.recipe.offload and kind == "stage":
            self.unload(component)

    def unload(self, component: str) -> None:
        if component in self.base:
            size, since = self.base.pop(component)
            self.weights.append({"component": component, "bytes": size, "start": since, "end": self.x})

    def moment(self, label: str, x: int, memory: Memory, stage: str, component: str) -> dict[str, Any]:
        alive = [
            _group(size, 100, name, f"load {name}", "blocks", "weights", [1536, 1536], "float16")
            for name, (size, _) in self.base.items()
        ]
        rest = memory.allocated_bytes - self.weight_bytes()
        for i, operation in enumerate(("conv3d", "cat", "silu", "rms_norm", "clone", "add")):
            size = rest if i == 5 else rest // 2 // 512 * 512
            if size:
                shape = [1, 96 * (i + 1), 4, 480, 832]
                alive.append(_group(size, i + 1, component, stage, f"decoder.up.{i}", operation, shape, "float16"))
            rest -= size
        alive.sort(key=lambda group: -int(group["bytes"]))
        return {
            "label": label,
            "x": x,
            "allocated_bytes": memory.allocated_bytes,
            "reserved_bytes": memory.reserved_bytes,
            "stage": stage,
            "component": component,
            "alive": alive,
            "segments": _segments(memory.allocated_bytes, memory.reserved_bytes),
        }


def _stage(name: str, component: str, kind: str, start: int, end: int) -> dict[str, Any]:
    return {"name": name, "component": component, "kind": kind, "start": start, "end": end}


def _group(
    size: int, count: int, component: str, stage: str, module: str, operation: str, shape: list[int], dtype: str
) -> dict[str, Any]:
    return {
        "bytes": size,
        "count": count,
        "component": component,
        "stage": stage,
        "module": module,
        "operation": operation,
        "shape": shape,
        "dtype": dtype,
    }


def _segments(allocated: int, reserved: int) -> list[dict[str, Any]]:
    """Segments of growing size that sum to `reserved`, with holes that sum to reserved - allocated."""
    sizes, left, size = [], reserved, 2 * MIB
    while left > 0:
        size = min(size * 2, left)
        sizes.append(size)
        left -= size
    free, result = reserved - allocated, []
    for i, size in enumerate(sizes):
        hole = free if i == len(sizes) - 1 else min(free, size // 6 // 512 * 512)
        hole = min(hole, size)
        free -= hole
        half = (size - hole) // 2 // 512 * 512
        blocks: list[list[Any]] = [
            [0, half, "active"],
            [half, hole, "inactive"],
            [half + hole, size - half - hole, "active"],
        ]
        result.append({"bytes": size, "blocks": [block for block in blocks if block[1] > 0]})
    return result


def write_run(directory: Path, recipe: Recipe | None = None) -> Path:
    """record.json and timeline.json of a made-up run; returns the directory."""
    recipe = recipe or Recipe()
    builder = _Builder(recipe)
    order: tuple[tuple[str, str, str, int], ...] = STAGES
    if recipe.offload:
        order = tuple(STAGES[i] for i in (0, 3, 2, 4, 1, 5))
    for stage in order:
        builder.stage(*stage)
    for component in list(builder.base):
        builder.unload(component)
    highest = max(builder.moments, key=lambda moment: int(moment["allocated_bytes"]))
    builder.moments.insert(0, highest | {"label": "peak"})
    timeline = {"schema": 1, "axis": "events" if recipe.simulated else "seconds"}
    timeline |= {key: getattr(builder, key) for key in ("points", "stages", "weights", "moments")}
    directory.mkdir(parents=True, exist_ok=True)
    _record(recipe, builder).write(directory / "record.json")
    if recipe.timeline:
        (directory / "timeline.json").write_text(json.dumps(timeline), encoding="utf-8")
    return directory


def _record(recipe: Recipe, builder: _Builder) -> RunRecord:
    highest = max(memory.device_bytes or 0 for memory in (span.peak for span in builder.spans))
    activation = {span.component: span.activation_bytes for span in builder.spans if span.kind == "stage"}
    return RunRecord(
        device="simulated:h200" if recipe.simulated else "cuda:NVIDIA H200",
        simulated=recipe.simulated,
        config={
            "name": recipe.name,
            "model_config": {
                "load_strategy": "block",
                "precision": "fp16",
                "offload": recipe.offload,
                "t5_cpu": False,
                "device": "simulated" if recipe.simulated else "cuda",
            },
            "optimization": {"attention_slicing": False, "expandable_segments": False},
            "request": {"task": "t2v-1.3B", "size": "832*480", "frame_num": 81, "prompt": recipe.prompt},
        },
        fits=None if recipe.budget_bytes is None else highest <= recipe.budget_bytes,
        budget_bytes=recipe.budget_bytes,
        components=[
            ComponentRecord(name, size // 2, size, 0, activation.get(name, 0)) for name, size in WEIGHTS.items()
        ],
        stages=builder.spans,
        environment={"wanvram": "0.1.0"},
        host={},
        notes=["made for a test"],
    )
