"""What one run of the pipeline used: memory by span, component and stage. Plain data, JSON in and out, no torch.

Prediction and measurement are the same RunRecord. Bytes are integers, seconds floats.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wanvram.errors import InputError, OutputError

__all__ = ["ComponentRecord", "Failure", "Memory", "RunRecord", "Span", "write_atomically"]

SCHEMA = 1


@dataclass(frozen=True)
class Memory:
    """allocated: live tensors' blocks. reserved: what the allocator holds. device: what the driver says the process uses."""

    allocated_bytes: int
    reserved_bytes: int
    device_bytes: int | None

    def highest(self, other: Memory) -> Memory:
        """The larger of each figure."""
        device = max((d for d in (self.device_bytes, other.device_bytes) if d is not None), default=None)
        return Memory(
            max(self.allocated_bytes, other.allocated_bytes), max(self.reserved_bytes, other.reserved_bytes), device
        )


@dataclass
class Span:
    """A stretch of the run. kind: load, stage, step or block. `repeats` > 1 stands for that many identical spans."""

    name: str
    kind: str
    component: str | None
    start: Memory
    peak: Memory
    end: Memory
    seconds: float | None = None
    host_rss_bytes: int | None = None
    pinned_bytes: int = 0
    children: list[Span] = field(default_factory=list)
    repeats: int = 1

    @property
    def activation_bytes(self) -> int:
        return self.peak.allocated_bytes - self.start.allocated_bytes

    @property
    def fluctuation_bytes(self) -> int:
        """Spread of allocated memory over the starts, peaks and ends of this span and everything inside it."""
        values = [v for span in self.walk() for m in (span.start, span.peak, span.end) for v in (m.allocated_bytes,)]
        return max(values) - min(values)

    def walk(self) -> Iterator[Span]:
        yield self
        for child in self.children:
            yield from child.walk()

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "component": self.component,
            "start_allocated_bytes": self.start.allocated_bytes,
            "start_reserved_bytes": self.start.reserved_bytes,
            "start_device_bytes": self.start.device_bytes,
            "peak_allocated_bytes": self.peak.allocated_bytes,
            "peak_reserved_bytes": self.peak.reserved_bytes,
            "peak_device_bytes": self.peak.device_bytes,
            "end_allocated_bytes": self.end.allocated_bytes,
            "end_reserved_bytes": self.end.reserved_bytes,
            "end_device_bytes": self.end.device_bytes,
            "activation_bytes": self.activation_bytes,
            "seconds": self.seconds,
            "host_rss_bytes": self.host_rss_bytes,
            "pinned_bytes": self.pinned_bytes,
            "repeats": self.repeats,
            "children": [child.to_json() for child in self.children],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Span:
        memories = [
            Memory(data[f"{p}_allocated_bytes"], data[f"{p}_reserved_bytes"], data[f"{p}_device_bytes"])
            for p in ("start", "peak", "end")
        ]
        return cls(
            data["name"],
            data["kind"],
            data["component"],
            *memories,
            seconds=data["seconds"],
            host_rss_bytes=data["host_rss_bytes"],
            pinned_bytes=data["pinned_bytes"],
            children=[cls.from_json(child) for child in data["children"]],
            repeats=data["repeats"],
        )


@dataclass(frozen=True)
class ComponentRecord:
    """base_bytes: on the device once loaded. host_bytes: weights kept in host RAM. activation_bytes: highest of its stages."""

    name: str
    parameters: int
    base_bytes: int
    host_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class Failure:
    """What ended a run early. kind: oom, error or interrupted. alive: the largest live allocations (what, bytes)."""

    kind: str
    message: str
    stage: str | None = None
    component: str | None = None
    requested_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    alive: tuple[tuple[str, int], ...] = ()


@dataclass
class RunRecord:
    """One run, measured or simulated."""

    device: str
    simulated: bool
    config: dict[str, Any]
    fits: bool | None
    budget_bytes: int | None
    components: list[ComponentRecord]
    stages: list[Span]
    environment: dict[str, Any]
    host: dict[str, int]
    failure: Failure | None = None
    notes: list[str] = field(default_factory=list)
    schema: int = SCHEMA

    def peak_span(self) -> Span | None:
        """The stage with the highest device (else allocated) peak; the first of equals."""
        return max(self.stages, key=lambda s: (s.peak.device_bytes or 0, s.peak.allocated_bytes), default=None)

    def peak(self) -> Memory | None:
        """The highest of each figure over the whole run."""
        result: Memory | None = None
        for span in self.stages:
            result = span.peak if result is None else result.highest(span.peak)
        return result

    def to_json(self) -> dict[str, Any]:
        peak, where = self.peak(), self.peak_span()
        return {
            "schema": self.schema,
            "device": self.device,
            "simulated": self.simulated,
            "config": self.config,
            "fits": self.fits,
            "budget_bytes": self.budget_bytes,
            "peak": {
                "allocated_bytes": peak.allocated_bytes if peak else 0,
                "reserved_bytes": peak.reserved_bytes if peak else 0,
                "device_bytes": peak.device_bytes if peak else None,
                "stage": where.name if where else None,
                "component": where.component if where else None,
            },
            "components": [asdict(c) for c in self.components],
            "stages": [s.to_json() for s in self.stages],
            "fragmentation": _fragmentation(self.stages, where),
            "fluctuation": {s.name: s.fluctuation_bytes for s in self.stages},
            "host": self.host,
            "environment": self.environment,
            "failure": asdict(self.failure) if self.failure else None,
            "notes": self.notes,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RunRecord:
        """Raises InputError for another schema or a damaged record."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise InputError(f"this is no wanvram record of schema {SCHEMA}")
        try:
            failure = dict(data["failure"]) if data["failure"] else None
            if failure:
                failure["alive"] = tuple((str(n), int(b)) for n, b in failure["alive"])
            return cls(
                device=data["device"],
                simulated=data["simulated"],
                config=data["config"],
                fits=data["fits"],
                budget_bytes=data["budget_bytes"],
                components=[ComponentRecord(**c) for c in data["components"]],
                stages=[Span.from_json(s) for s in data["stages"]],
                environment=data["environment"],
                host=data["host"],
                failure=Failure(**failure) if failure else None,
                notes=data["notes"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the record is damaged: {error!r}") from error

    def write(self, path: Path) -> None:
        write_atomically(path, json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is not a readable record: {error}") from error


def _fragmentation(stages: Sequence[Span], where: Span | None) -> dict[str, Any]:
    """(reserved - allocated) / reserved at the peak and per stage, from the peaks of both."""
    return {
        "at_peak": _share(where.peak) if where else 0.0,
        "stages": {s.name: _share(s.peak) for s in stages},
    }


def _share(memory: Memory) -> float:
    if memory.reserved_bytes <= 0:
        return 0.0
    return (memory.reserved_bytes - memory.allocated_bytes) / memory.reserved_bytes


def write_atomically(path: Path, text: str) -> None:
    """The whole file or none of it. Raises OutputError naming the path."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
