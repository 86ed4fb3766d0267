"""What one run of the pipeline used: memory by span, component and stage. Plain data, JSON in and out, no torch.

Prediction and measurement are the same RunRecord. Bytes are integers, seconds floats.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from wanvram.errors import DamagedError, InputError, OutputError
from wanvram.foreign_text import quoted, why
from wanvram.input_files import read_text
from wanvram.output_files import whole_file, writing
from wanvram.spans import MAX_REPEATS, Memory, Span, with_moments
from wanvram.strict_json import built, strict_json

__all__ = [
    "BASES",
    "MAX_RECORD_BYTES",
    "WHOLE_RUN",
    "AttentionChoice",
    "AttentionUse",
    "ComponentRecord",
    "Failure",
    "Predicted",
    "RankRecord",
    "Resumed",
    "RunRecord",
    "Times",
    "dotted",
    "write_atomically",
    "write_json",
]

SCHEMA = 1
WHOLE_RUN = "run"  # the stage that stands for everything, where a program's own are not known
MAX_RECORD_BYTES = 64 * 1024 * 1024  # one of 50 fully recorded 14B steps has 2 MB
BASES = ("asked", "table", "check")  # of what attends
FAILURES = ("oom", "error", "interrupted")
_ALWAYS = ("fits", "budget_bytes", "components", "environment", "host", "failure", "notes")  # others came later
_SECTIONS = ("model_config", "optimization", "logging", "request")


@dataclass(frozen=True)
class ComponentRecord:
    """base_bytes: on the device once loaded. host_bytes: weights in RAM. activation_bytes: its highest stage.

    streamed_bytes: copied to the device beside the computation, in copy_seconds; hidden_share: the part of that time that the
    computation did not wait for (None: nothing was streamed).
    """

    name: str
    parameters: int
    base_bytes: int
    host_bytes: int
    activation_bytes: int
    streamed_bytes: int = 0
    copy_seconds: float = 0.0
    hidden_share: float | None = None


@dataclass(frozen=True)
class Failure:
    """What ended a run early. kind: oom, error or interrupted. alive: the largest live allocations (what, bytes).

    rank: of several GPUs' processes the one that ended the run, where it is known.
    """

    kind: str
    message: str
    stage: str | None = None
    component: str | None = None
    requested_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    alive: tuple[tuple[str, int], ...] = ()
    rank: int | None = None


@dataclass(frozen=True)
class Times:
    """Seconds of the whole command. start: from the process's beginning to the first stage, planning included. in_all: until the
    results are written; of a prediction until the process has ended. after_plan: of a prediction, from a finished plan to that end.
    None: unknown.
    """

    start_seconds: float | None = None
    in_all_seconds: float | None = None
    after_plan_seconds: float | None = None


@dataclass(frozen=True)
class Predicted:
    """What a plan said before the run: memory at peak, and seconds of the whole command, planning included, until its process ends."""

    device_bytes: int
    reserved_bytes: int
    allocated_bytes: int
    pinned_bytes: int
    seconds: float | None


@dataclass(frozen=True)
class AttentionUse:
    """backend: of the registry (kernels.attention_backends). rate_source: what its predicted time rests on."""

    backend: str
    rate_source: str


@dataclass(frozen=True)
class AttentionChoice:
    """What computes the transformer's attention. asked: the knob's value; taken: what it came to, a backend of the registry.

    basis: asked (by the knob), table (of the registry) or check (measured here by `wanvram check --attention`). self_attention:
    among the video's tokens, cross_attention: to those of prompt and picture. note: what was passed over on the way.
    """

    asked: str
    taken: str
    basis: str
    self_attention: AttentionUse
    cross_attention: AttentionUse
    note: str = ""


@dataclass(frozen=True)
class Resumed:
    """What earlier processes had made of a run that went on: steps of each video, and the numbers of the videos that were whole,
    from 0. Everything else in the record is of the last process.
    """

    steps: tuple[int, ...]
    whole: tuple[int, ...]


@dataclass
class RankRecord:
    """What one of several GPUs' processes took, or each of those that are alike. exchanged_bytes: sent to others; exchange_seconds:
    that computation stood still for it. failure: what ended this one. communication_bytes: of the device memory, what talking to
    the others takes; None: not known apart.
    """

    ranks: tuple[int, ...]
    device: str
    stages: list[Span]
    host: dict[str, int]
    exchanged_bytes: int = 0
    exchange_seconds: float = 0.0
    failure: Failure | None = None
    communication_bytes: int | None = None

    @classmethod
    def of(
        cls, ranks: tuple[int, ...], record: RunRecord, exchanged: tuple[int, float], communication: int | None
    ) -> RankRecord:
        """From the record of one of these. exchanged: bytes sent, and seconds stood still."""
        return cls(ranks, record.device, record.stages, record.host, *exchanged, record.failure, communication)

    @property
    def name(self) -> str:
        """`0`, `1-3` or `1, 3`."""
        first, last = self.ranks[0], self.ranks[-1]
        together = len(self.ranks) > 1 and last - first == len(self.ranks) - 1
        return f"{first}-{last}" if together else ", ".join(map(str, self.ranks))

    def peak(self) -> Memory | None:
        return _peak(self.stages)

    def to_json(self) -> dict[str, Any]:
        peak = self.peak()
        return asdict(replace(self, stages=[])) | {
            "peak": None if peak is None else asdict(peak),
            "stages": [span.to_json() for span in self.stages],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RankRecord:
        """Raises KeyError, TypeError or ValueError for a damaged one."""
        return built(cls, _with_moments(data))


@dataclass
class RunRecord:
    """One run, measured or simulated. ranks: of several GPUs' processes every one; stages and host are then those of the first."""

    device: str
    simulated: bool
    config: dict[str, Any]
    fits: bool | None = None
    budget_bytes: int | None = None
    components: list[ComponentRecord] = field(default_factory=list)
    stages: list[Span] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    failure: Failure | None = None
    notes: list[str] = field(default_factory=list)
    times: Times = field(default_factory=Times)
    predicted: Predicted | None = None
    attention: AttentionChoice | None = None
    resumed: Resumed | None = None
    ranks: list[RankRecord] = field(default_factory=list)
    schema: int = SCHEMA

    @property
    def cached(self) -> bool:
        """Whether a caching allocator holds the memory. On the CPU none does: reserved is allocated, and nothing fragments."""
        return self.device != "cpu"

    @property
    def gpus(self) -> int:
        return sum(len(rank.ranks) for rank in self.ranks) or 1

    @property
    def foreign(self) -> bool:
        """Of other people's code: there is no configuration that could be run again, changed."""
        return self.config.get("foreign") is True

    def peak_span(self) -> Span | None:
        """The stage that owns the peak."""
        return highest_stage(self.all_stages(), cached=self.cached)

    def peak(self) -> Memory | None:
        """The highest of each figure over the whole run, on any of its GPUs."""
        return _peak(self.all_stages())

    def all_stages(self) -> list[Span]:
        """Of this process and, of a run on several GPUs, of every rank; those of the first may come twice."""
        return [*self.stages, *(span for rank in self.ranks for span in rank.stages)]

    def step_seconds(self) -> float | None:
        """A denoising step of as many videos as are made together, the median: the first ones also load kernels and tune.

        None: unknown.
        """
        denoising = [stage for stage in self.stages if stage.part == "denoise"]
        steps = [step for stage in denoising if stage.videos == self.together for step in stage.children]
        times = [step.seconds for step in steps if step.seconds is not None for _ in range(step.repeats)]
        return median(times) if times else None

    def video_seconds(self) -> list[float | None]:
        """Of every finished video its own time, in order: its share of the steps, decoding and saving. None: unknown.

        Text, pictures and loading are for all videos of a run and in none of them.
        """
        columns: dict[tuple[str, str | None], list[float | None]] = {}
        for stage in self.stages:
            if stage.part in ("denoise", "decode", "save"):  # denoising once for each transformer that takes a turn
                share = None if stage.seconds is None else stage.seconds / stage.videos
                columns.setdefault((stage.part, stage.component), []).extend([share] * stage.videos)
        times = zip(*columns.values(), strict=False)  # as many as have been through all of it
        return [None if None in own else sum(time for time in own if time is not None) for own in times]

    def seconds_each(self) -> float | None:
        """A video of the whole command's time, with everything that they share; None: unknown, or not all were made."""
        count, whole = len(self.video_seconds()), self.times.in_all_seconds
        return None if whole is None or not count or self.failure is not None else whole / count

    @property
    def together(self) -> int:
        """Videos that a denoising step advances."""
        return max((stage.videos for stage in self.stages if stage.part == "denoise"), default=1)

    def prediction(self, elapsed_seconds: float) -> Predicted | None:
        """Of a simulated run that ends well, to stand beside what is measured. elapsed_seconds: what the process has taken until now."""
        peak, left = self.peak(), self.times.after_plan_seconds
        if peak is None or peak.device_bytes is None or self.failure is not None:
            return None
        return Predicted(
            peak.device_bytes,
            peak.reserved_bytes,
            peak.allocated_bytes,
            self.host["pinned_bytes"],
            None if left is None else elapsed_seconds + left,
        )

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
            "fragmentation": {
                "at_peak": where.peak.fragmentation if where else 0.0,
                "stages": _highest((s.name, s.peak.fragmentation) for s in self.stages),
            },
            "fluctuation": _highest((s.name, s.fluctuation_bytes) for s in self.stages),
            "host": self.host,
            "times": asdict(self.times),
            "videos": {
                "together": self.together,
                "own_seconds": self.video_seconds(),
                "seconds_each": self.seconds_each(),
            },
            "predicted": asdict(self.predicted) if self.predicted else None,
            "attention": asdict(self.attention) if self.attention else None,
            "resumed": asdict(self.resumed) if self.resumed else None,
            "ranks": [rank.to_json() for rank in self.ranks],
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
            ranks = [_with_moments(rank) for rank in data.get("ranks", [])]
            record = built(cls, _with_moments(data) | {"ranks": ranks} | {name: data[name] for name in _ALWAYS})
            record._check()
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the record is damaged: {why(error)}") from error
        return record

    def _check(self) -> None:
        for section in _SECTIONS:
            if not isinstance(self.config.get(section, {}), dict):
                raise DamagedError(f"config.{section} is no section")
        for failure in (self.failure, *(rank.failure for rank in self.ranks)):
            if failure is not None and failure.kind not in FAILURES:
                raise DamagedError(f"failure.kind is none of {', '.join(FAILURES)}")
        if self.attention is not None and self.attention.basis not in BASES:
            raise DamagedError(f"attention.basis is none of {', '.join(BASES)}")
        if not all(rank.ranks for rank in self.ranks):
            raise DamagedError("ranks has an entry of no rank")
        for span in (span for stage in self.all_stages() for span in stage.walk()):
            if not 1 <= span.repeats <= MAX_REPEATS:
                raise DamagedError(f"repeats of {quoted(span.name)} is outside 1..{MAX_REPEATS}")
            if not 1 <= span.videos <= MAX_REPEATS:
                raise DamagedError(f"videos of {quoted(span.name)} is outside 1..{MAX_REPEATS}")

    def write(self, path: Path) -> None:
        write_json(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Raises InputError naming the path."""
        try:
            return cls.from_json(strict_json(read_text(path, MAX_RECORD_BYTES)))
        except (ValueError, RecursionError, InputError) as error:
            raise InputError(f"{path} is not a readable record: {why(error)}") from error


def highest_stage(stages: Iterable[Span], *, cached: bool) -> Span | None:
    """The one with the highest device (else allocated) peak; the first of equals.

    On the CPU (not cached) what tensors take decides: the process's memory hardly falls again, so its last stage is the highest.
    """
    return max(
        stages,
        key=lambda span: ((span.peak.device_bytes or 0) if cached else 0, span.peak.allocated_bytes),
        default=None,
    )


def _peak(stages: Iterable[Span]) -> Memory | None:
    """The highest of each figure."""
    result: Memory | None = None
    for span in stages:
        result = span.peak if result is None else result.highest(span.peak)
    return result


def _with_moments(section: dict[str, Any]) -> dict[str, Any]:
    return section | {"stages": with_moments(section["stages"])}


_Number = TypeVar("_Number", int, float)


def _highest(pairs: Iterable[tuple[str, _Number]]) -> dict[str, _Number]:
    """By name; a stage that ran twice keeps its higher figure."""
    result: dict[str, _Number] = {}
    for name, value in pairs:
        result[name] = max(value, result.get(name, value))
    return result


def dotted(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as dotted keys."""
    return dict(_flattened(config, ""))


def _flattened(section: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def write_json(path: Path, value: object) -> None:
    """For people, too. Raises OutputError naming the path."""
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """The whole file or none of it. Raises OutputError naming the path."""
    try:
        # Not mkstemp: its files are readable by their owner only, also after the rename.
        with writing(path), whole_file(path) as beside, beside.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except UnicodeEncodeError as error:
        raise OutputError(
            f"cannot write {str(path)!a}: what belongs there holds a name that is not UTF-8 text"
        ) from error
