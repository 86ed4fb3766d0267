"""The fastest lossless Strategy that fits a budget; within 1 % of its time, the one that needs less. No torch.

The simulation is injected as `forecast`.

Components come one after the other (offload), so each is searched alone and the run's peak is the highest of theirs. Keeping
all of them on the device would save no time: each is loaded once per run either way. What couples them is whether and from where
they are streamed, one knob each for all. Orders that the search relies on: resident blocks are never slower than streamed ones,
larger tiles never slower than smaller ones, pinned RAM never slower than pageable, that never slower than disk.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from wanvram import knobs
from wanvram.config import Request, Strategy
from wanvram.planner.budget import Budget, beyond_card
from wanvram.planner.economy import thriftiest, trades
from wanvram.planner.fleet import Found, best_of, leanest
from wanvram.planner.forecasts import Forecast, StageForecast, Trial, Trials, seconds_gained, situation
from wanvram.planner.placement import placements
from wanvram.planner.refusal import refuse
from wanvram.planner.result import Offer, Plan, Refusal, Rejected, changed_knobs
from wanvram.planner.tiles import largest_tile
from wanvram.units import human

__all__ = ["Options", "cleared", "planned_base", "search"]


@dataclass(frozen=True)
class Options:
    """base: what the user fixed; the planner overwrites only knobs that lose nothing. offers: also forecast lossy ones."""

    base: Strategy = field(default_factory=Strategy)
    offers: bool = True


def search(request: Request, budget: Budget, options: Options, forecast: Forecast) -> Plan | Refusal:
    """A Plan whose peak plus margin is within the budget, every stage of it forecast as it will run; or why there is none."""
    trials = Trials(request, budget, forecast)
    base = cleared(options.base)
    found, layouts = best_of(trials, base, partial(_fitting, trials))
    if found is None:
        return refuse(trials, leanest(trials, base))
    chosen = found.chosen
    traded = trades(trials, found.placed.found, chosen, offers=options.offers)
    return Plan(
        request,
        budget,
        chosen,
        trials.stages(chosen),
        rejected=tuple(_rejected(trials, chosen)),
        trades=tuple(traded),
        offers=tuple(_offers(trials, chosen)) if options.offers else (),
        notes=(*budget.notes, *_notes(trials, chosen)),
        layouts=layouts,
    )


def _fitting(trials: Trials, base: Strategy) -> Found | None:
    """Of one number of GPUs along every axis."""
    tiled = largest_tile(trials, base)
    placed = None if tiled is None else placements(trials, tiled)
    return None if placed is None else Found(placed, thriftiest(trials, placed))


def planned_base(strategy: Strategy) -> Strategy:
    """With the allocator's expandable segments where PyTorch has them, which is on Linux: they cost nothing and leave no holes."""
    return knobs.EXPANDABLE_SEGMENTS.set(strategy, sys.platform == "linux")


def cleared(base: Strategy) -> Strategy:
    """Every knob that the planner decides at the value of the plain run; offload costs nothing."""
    return knobs.Change({knob: knob.default for knob in knobs.planned()} | {knobs.OFFLOAD: True}).on(base)


# --- explanations ------------------------------------------------------------------------------------------------------------


def _rejected(trials: Trials, chosen: Strategy) -> list[Rejected]:
    """What did not fit and is faster than what was chosen, or of unknown time; each change once, the largest gain first."""
    result: dict[tuple[object, ...], Rejected] = {}
    for trial in trials.failed:
        change = _change(trial, chosen)
        gained = _gained(trials, trial, chosen)
        if not change or (gained is not None and gained <= 0):
            continue
        key = trial.component, trial.memory, tuple(change.items())
        result[key] = Rejected(trial.component, change, trial.memory, trial.needed, trial.limit, gained)
    return sorted(result.values(), key=lambda r: -(r.seconds_gained or 0.0))


def _change(trial: Trial, chosen: Strategy) -> dict[str, object]:
    """Knobs of the component that differ from the plan. The number of resident blocks is no choice of its own."""
    if trial.forecast is None:
        return {knobs.WEIGHTS_IN.name: knobs.WEIGHTS_IN.of(trial.strategy)}
    own = {*knobs.touching(trial.component)} - {knobs.RESIDENT_BLOCKS}
    if not knobs.is_streamed(trial.strategy):
        own -= {knobs.WEIGHTS_IN}
    return changed_knobs(trial.strategy, chosen, own)


def _gained(trials: Trials, trial: Trial, chosen: Strategy) -> float | None:
    """Of the whole run. A component not forecast streamed, or from the other home, counts with the time it has."""
    if trial.forecast is None:
        return None
    other = chosen
    if trial.component not in ("vae_encoder", "vae_decoder"):
        moved = (knobs.LOAD_STRATEGY, knobs.WEIGHTS_IN, knobs.RESIDENT_BLOCKS)
        other = knobs.Change({knob: knob.of(trial.strategy) for knob in moved}).on(chosen)
    stages = trials.stages(chosen)
    changed = [
        trial.forecast if stage.component == trial.component else trials.known(stage.component, other) or stage
        for stage in stages
    ]
    return seconds_gained(trials.request, stages, changed)


def _offers(trials: Trials, chosen: Strategy) -> list[Offer]:
    """Every lossy change that makes a difference, none of which the planner makes."""
    around = situation(trials.request, trials.budget.card.half)
    changes = (change for change in knobs.smaller_values(chosen, around) if not change[0].lossless)
    return [offer for change in changes if (offer := _offer(trials, chosen, *change)).is_felt]


def _offer(trials: Trials, chosen: Strategy, knob: knobs.Knob[Any], value: Any) -> Offer:
    now, then = trials.stages(chosen), trials.stages(knob.set(chosen, value))
    pairs = [(a, b) for a, b in zip(now, then, strict=True) if a.component in knob.touches]
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    return Offer(
        trials.request.facts.family.component_of(knob.touches[-1]).name,
        {knob.name: value},
        _peak(before) - _peak(after),
        _peak(now) - _peak(then),
        max(s.host_bytes for s in before) - max(s.host_bytes for s in after),
        seconds_gained(trials.request, now, then),
    )


def _peak(stages: Iterable[StageForecast]) -> int:
    return max(stage.peak_device_bytes for stage in stages)


def _notes(trials: Trials, chosen: Strategy) -> list[str]:
    budget, card = trials.budget, trials.budget.card
    notes = []
    if not card.measured:
        notes.append(f"{card.name}: {card.note}; memory and time were not measured on this card")
    if budget.usable_bytes < budget.vram_bytes:
        notes.append(f"the {card.name} offers a process {human(budget.usable_bytes)}, so that is the budget")
    beyond = beyond_card(budget.vram_bytes, card)
    if beyond is not None:
        notes.append(beyond)
    if trials.seconds(chosen) is None:
        notes.append("times are unknown: choices were ordered by how much they usually cost, not by prediction")
    if budget.ram_bytes is None:
        notes.append("host RAM was not limited; --ram 16GiB makes the plan respect it")
    notes += knobs.lossy_notes(chosen)
    return notes
