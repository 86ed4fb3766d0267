"""What the planner answers: a Plan that fits, or a Refusal that says what would. Plain data with JSON, no torch."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import asdict, dataclass
from typing import Any

from wanvram import knobs
from wanvram.config import Request, Strategy
from wanvram.planner.budget import Budget
from wanvram.planner.forecasts import StageForecast, stage_seconds, total_seconds
from wanvram.record import AttentionChoice

__all__ = ["Alternative", "GpuLayout", "Offer", "Plan", "Refusal", "Rejected", "Trade", "changed_knobs"]

SCHEMA = 1


def changed_knobs(
    strategy: Strategy, from_: Strategy | None = None, among: Container[knobs.Knob[Any]] | None = None
) -> dict[str, Any]:
    """The knobs (`among`: of these) in which `strategy` differs from another one, by default the plain resident run."""
    before = Strategy() if from_ is None else from_
    return {
        knob.name: knob.of(strategy)
        for knob in knobs.TABLE
        if (among is None or knob in among) and knob.of(strategy) != knob.of(before)
    }


@dataclass(frozen=True)
class Rejected:
    """A faster choice for one component that does not fit: memory (device or host) needed against its limit, margin taken off.

    change: the knobs that differ from the plan. seconds_gained: of the whole run; None when unknown.
    """

    component: str
    change: dict[str, Any]
    memory: str
    needed_bytes: int
    limit_bytes: int
    seconds_gained: float | None


@dataclass(frozen=True)
class Trade:
    """A faster choice that fits and was not taken, because it gains less than 1 % of the time: what it gains and takes more.

    change: the knobs that differ from the plan.
    """

    change: dict[str, Any]
    seconds_gained: float
    host_more_bytes: int
    device_more_bytes: int


@dataclass(frozen=True)
class Offer:
    """One lossy knob on top of the plan, never chosen by the planner. Savings of the component it acts on; negative: costs.

    peak_saved_bytes: of the whole run's device memory, whose peak may be another component's.
    """

    component: str
    change: dict[str, Any]
    device_saved_bytes: int
    peak_saved_bytes: int
    host_saved_bytes: int
    seconds_saved: float | None

    @property
    def is_felt(self) -> bool:
        """In memory or time: resident matrices that are multiplied in 8 bits are not stored otherwise by weight_storage."""
        return bool(self.device_saved_bytes or self.host_saved_bytes or self.seconds_saved)


@dataclass(frozen=True)
class GpuLayout:
    """A way in which several GPUs can share the video. sizes: of every axis, and whether weights are shared.

    verdict: chosen, fits (but is no better), too large, or slower by estimate. The figures are the transformer's, device bytes of a
    GPU and host bytes of all: of the fastest that fits; of one that is too large the least that was looked at. None: not known.
    """

    sizes: dict[str, Any]
    verdict: str
    seconds_per_step: float | None
    peak_device_bytes: int | None
    host_bytes: int | None


@dataclass(frozen=True)
class Plan:
    """A lossless strategy within 1 % of the fastest found whose predicted device memory and margin fit the budget."""

    request: Request
    budget: Budget
    strategy: Strategy
    stages: tuple[StageForecast, ...]
    rejected: tuple[Rejected, ...] = ()
    trades: tuple[Trade, ...] = ()
    offers: tuple[Offer, ...] = ()
    notes: tuple[str, ...] = ()
    # Device peak and seconds of the whole command once the run has been simulated whole; stages are then its own.
    whole_run_bytes: int | None = None
    whole_run_seconds: float | None = None
    attention: AttentionChoice | None = None  # what the whole run attended with
    layouts: tuple[GpuLayout, ...] = ()  # of several GPUs, the most promising first

    @property
    def peak_device_bytes(self) -> int:
        """Components come one after the other, so before the whole run is known its peak is the highest of theirs."""
        return self.whole_run_bytes or max(stage.peak_device_bytes for stage in self.stages)

    @property
    def host_bytes(self) -> int:
        """RAM of all processes: the largest component's weights and the processes themselves."""
        return self.budget.process_bytes + max(stage.host_bytes for stage in self.stages)

    @property
    def seconds_per_step(self) -> float | None:
        return next(stage.seconds_per_step for stage in self.stages if stage.component == "dit")

    @property
    def seconds(self) -> float | None:
        """Of the whole command once that is known, else of its stages."""
        return self.whole_run_seconds or total_seconds(self.request, self.stages)

    def to_json(self) -> dict[str, Any]:
        """Bytes are integers, seconds floats or null."""
        stages = [asdict(s) | {"total_seconds": stage_seconds(self.request, s)} for s in self.stages]
        return {
            "schema": SCHEMA,
            "fits": True,
            "request": asdict(self.request),
            "budget": _budget_json(self.budget),
            "strategy": asdict(self.strategy),
            "changed": changed_knobs(self.strategy),
            "peak_device_bytes": self.peak_device_bytes,
            "host_bytes": self.host_bytes,
            "seconds_per_step": self.seconds_per_step,
            "seconds": self.seconds,
            "attention": asdict(self.attention) if self.attention else None,
            "stages": stages,
            "rejected": [asdict(r) for r in self.rejected],
            "trades": [asdict(t) for t in self.trades],
            "lossy": [asdict(o) for o in self.offers],
            "layouts": [asdict(layout) for layout in self.layouts],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Alternative:
    """Another size or number of frames, forecast to fit the budget."""

    size: str
    frame_num: int
    peak_device_bytes: int


@dataclass(frozen=True)
class Refusal:
    """Nothing fits. component: the one that needs the most. smallest_bytes: the smallest budget of that memory that would do."""

    request: Request
    budget: Budget
    memory: str
    component: str
    smallest_bytes: int
    alternatives: tuple[Alternative, ...]
    message: str
    commands: tuple[str, ...] = ()  # the same request with each of the alternatives

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "fits": False,
            "request": asdict(self.request),
            "budget": _budget_json(self.budget),
            "memory": self.memory,
            "component": self.component,
            "smallest_bytes": self.smallest_bytes,
            "alternatives": [asdict(a) for a in self.alternatives],
            "message": self.message,
            "commands": list(self.commands),
        }


def _budget_json(budget: Budget) -> dict[str, Any]:
    return {
        "vram_bytes": budget.vram_bytes,
        "usable_bytes": budget.usable_bytes,
        "margin_bytes": budget.margin,
        "ram_bytes": budget.ram_bytes,
        "ram_kept_bytes": budget.system if budget.ram_bytes is not None else None,
        "gpu": budget.card.key,
        "gpu_measured": budget.card.measured,
        "gpus": budget.gpus,
        "link": budget.link,
    }
