"""Memory at a moment, and spans of a run with what they took, JSON in and out. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from operator import add, sub
from typing import Any

from wanvram.errors import DamagedError

__all__ = ["MAX_REPEATS", "Copies", "Memory", "Span", "folded", "with_moments"]

MAX_DEPTH = 20  # of spans in spans; ours are four deep
MAX_REPEATS = 1_000_000
_MOMENTS = ("start", "peak", "end")  # of a span; a file has `start_allocated_bytes` and so on beside the rest
_FIGURES = ("allocated_bytes", "reserved_bytes", "device_bytes")


@dataclass(frozen=True)
class Memory:
    """allocated: live tensors' blocks. reserved: what the allocator holds. device: the driver's view."""

    allocated_bytes: int
    reserved_bytes: int
    device_bytes: int | None

    @property
    def fragmentation(self) -> float:
        """(reserved - allocated) / reserved; 0 where nothing is reserved."""
        return (self.reserved_bytes - self.allocated_bytes) / self.reserved_bytes if self.reserved_bytes > 0 else 0.0

    @property
    def deciding_bytes(self) -> int:
        """What decides whether a run fits: device bytes, where they are unknown reserved bytes."""
        return self.device_bytes if self.device_bytes is not None else self.reserved_bytes

    def highest(self, other: Memory) -> Memory:
        """The larger of each figure."""
        device = max((d for d in (self.device_bytes, other.device_bytes) if d is not None), default=None)
        return Memory(
            max(self.allocated_bytes, other.allocated_bytes), max(self.reserved_bytes, other.reserved_bytes), device
        )


@dataclass(frozen=True)
class Copies:
    """Copies that run beside the computation. stalled_seconds: how long the computation waited for them."""

    nbytes: int = 0
    seconds: float = 0.0
    stalled_seconds: float = 0.0

    def __add__(self, other: Copies) -> Copies:
        return Copies(*map(add, astuple(self), astuple(other)))

    def __sub__(self, earlier: Copies) -> Copies:
        """What was copied since."""
        return Copies(*map(sub, astuple(self), astuple(earlier)))

    @property
    def hidden_share(self) -> float | None:
        """The part of the copying that cost no time, 0 to 1; None if nothing was copied."""
        return max(0.0, 1.0 - self.stalled_seconds / self.seconds) if self.seconds else None


@dataclass
class Span:
    """A stretch of the run. kind: load, stage, step or block.

    part: the stage's name whatever the number of the prompt, `denoise` of `denoise 2`; of a load what is loaded, the halves of
    the VAE apart; the name where nothing else is given. `repeats` > 1: this span stands for that many with the same memory;
    `seconds` is then the mean of one. videos: how many a denoising stage makes together; of other stages 1.
    """

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
    notes: list[str] = field(default_factory=list)
    part: str = ""
    videos: int = 1

    def __post_init__(self) -> None:
        self.part = self.part or self.name

    @property
    def planned(self) -> str:
        """The component as a plan names it: the halves of the VAE apart; loaded as one, both count as the first that is used."""
        if self.component != "vae":
            return self.component or self.name
        return "vae_encoder" if self.part in ("encode_video", "vae", "vae_encoder") else "vae_decoder"

    @property
    def activation_bytes(self) -> int:
        return self.peak.allocated_bytes - self.start.allocated_bytes

    @property
    def fluctuation_bytes(self) -> int:
        """Spread of allocated memory over its moments."""
        values = [moment.allocated_bytes for moment in self.moments()]
        return max(values) - min(values)

    def moments(self) -> list[Memory]:
        """Starts, peaks and ends of this span and everything inside it."""
        return [moment for span in self.walk() for moment in (span.start, span.peak, span.end)]

    def walk(self) -> Iterator[Span]:
        yield self
        for child in self.children:
            yield from child.walk()

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "part": self.part,
            "kind": self.kind,
            "component": self.component,
            **{
                f"{moment}_{figure}": getattr(getattr(self, moment), figure)
                for moment in _MOMENTS
                for figure in _FIGURES
            },
            "activation_bytes": self.activation_bytes,
            "seconds": self.seconds,
            "host_rss_bytes": self.host_rss_bytes,
            "pinned_bytes": self.pinned_bytes,
            "repeats": self.repeats,
            "videos": self.videos,
            "notes": self.notes,
            "children": [child.to_json() for child in folded(self.children)],
        }


def with_moments(spans: Sequence[dict[str, Any]], depth: int = 0) -> list[dict[str, Any]]:
    """What `to_json` gave of spans, as `strict_json.built` takes it: the figures of each moment as a section."""
    if depth > MAX_DEPTH:
        raise DamagedError(f"stages are nested more than {MAX_DEPTH} deep")
    return [
        span
        | {moment: {figure: span[f"{moment}_{figure}"] for figure in _FIGURES} for moment in _MOMENTS}
        | {"children": with_moments(span["children"], depth + 1)}
        for span in spans
    ]


def folded(spans: Sequence[Span]) -> list[Span]:
    """Neighbours with the same memory, all the way down, as one span with `repeats`: 50 steps are stored as about 4."""
    result: list[Span] = []
    last: object = None
    for span in spans:
        shape = _shape(span)
        if result and shape == last:
            result[-1] = _joined(result[-1], span)
        else:
            result.append(replace(span, notes=list(span.notes)))
        last = shape
    return result


def _shape(span: Span) -> tuple[object, ...]:
    """What makes two spans the same: everything but name, time, host memory and how often they happened."""
    inside = tuple((_shape(child), child.repeats) for child in span.children)
    return span.kind, span.component, span.start, span.peak, span.end, span.pinned_bytes, inside


def _joined(first: Span, second: Span) -> Span:
    repeats = first.repeats + second.repeats
    seconds = None
    if first.seconds is not None and second.seconds is not None:
        seconds = (first.seconds * first.repeats + second.seconds * second.repeats) / repeats
    known = [b for b in (first.host_rss_bytes, second.host_rss_bytes) if b is not None]
    notes = [n for n in first.notes if not n.startswith(_THROUGH)] + [_THROUGH + second.name]
    return replace(first, repeats=repeats, seconds=seconds, host_rss_bytes=max(known, default=None), notes=notes)


_THROUGH = "the same memory through "
