"""A budget becomes a strategy that keeps it: the planner's choice, simulated whole before it is promised."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from wanvram import knobs
from wanvram.config import Measurement, Request, RunConfig, Strategy
from wanvram.errors import BudgetError, WanvramError
from wanvram.machine.garbage import settled
from wanvram.planner import Budget, Options, Plan, Refusal, StageForecast, search
from wanvram.planner.forecasts import choices, components_of, steps_of, summed
from wanvram.planner.search import planned_base
from wanvram.predict.ahead import forecasts_ahead, processes_here
from wanvram.predict.host import is_here, streaming_note
from wanvram.predict.simulate import simulate
from wanvram.predict.stage import simulate_stage
from wanvram.record import AttentionChoice, RunRecord
from wanvram.run.attention import attention_of, card_like
from wanvram.spans import Memory, Span
from wanvram.units import human

__all__ = ["Forecasts", "plan_run", "planned_config"]

Progress = Callable[[str], None]
ATTEMPTS = 3
WHOLE_RUN = 5  # forecasts that the simulation of a whole run takes as long as, roughly


@dataclass
class Forecasts:
    """Simulated stages, each made once, with progress: how many are done, and how long the rest may take."""

    show: Progress | None = None
    expected: int = 0
    _known: dict[tuple[object, ...], StageForecast] = field(default_factory=dict)
    _start: float = field(default_factory=time.monotonic)

    def __call__(self, asked: RunConfig, component: str) -> StageForecast:
        key = _key(asked, component)
        if key not in self._known:
            self._known[key] = found = simulate_stage(asked, component)
            self._say(component, found.peak_device_bytes)
        return self._known[key]

    def look_ahead(self, request: Request, budget: Budget, base: Strategy) -> None:
        """Simulates what will most likely be asked for, on all cores, unless something was simulated already."""
        if self._known:
            return
        for (asked, component), found in forecasts_ahead(request, budget, base, processes_here()):
            self._known[_key(asked, component)] = found
            self._say(component, found.peak_device_bytes)

    def _say(self, component: str, peak_bytes: int) -> None:
        if self.show is None:
            return
        done = len(self._known)
        text, more = f"forecast {done}: {component} {human(peak_bytes)}", self.expected - done
        if more > 0:
            left = (time.monotonic() - self._start) / done * (more + WHOLE_RUN)
            text += f"; about {more} more, {left:.0f} s left"
        self.show(text)


def _key(asked: RunConfig, component: str) -> tuple[object, ...]:
    """What decides a forecast: choices that are another component's may differ."""
    whole_run = (knob.of(asked.strategy) for knob in knobs.touching(knobs.RUN))
    return asked.request, asked.gpu, asked.link, asked.weights, *choices(component, asked.strategy), *whole_run


@settled()
def plan_run(
    config: RunConfig,
    budget: Budget,
    *,
    offers: bool = True,
    show: Progress | None = None,
    forecasts: Forecasts | None = None,
) -> tuple[Plan | Refusal, RunRecord | None]:
    """A lossless strategy, within 1 % the fastest, whose whole predicted run stays within the budget less its margin, and that run.

    Forecasts are shortened; where the whole run needs more than they said, the difference is kept free and the search is
    made again, at most three times, then BudgetError. WanvramError if a whole run ends early. The plan's figures are the whole
    run's. forecasts: what was simulated before counts.
    """
    base = planned_base(config.strategy)
    # The text encoder twice, the transformer and every other component three times, two lossy offers.
    expected = 3 * len(components_of(config.request)) + (1 if offers else -1)
    forecasts = Forecasts(show, expected) if forecasts is None else forecasts
    forecasts.look_ahead(config.request, budget, base)
    tried, excess, plans = budget, 0, 0
    while plans < ATTEMPTS:
        result = search(config.request, tried, Options(base, offers=False), forecasts)
        if isinstance(result, Refusal) and plans:
            break
        if isinstance(result, Refusal):
            return result, None
        plans += 1
        if show is not None:
            show("simulating the whole run")
        forecast = result.peak_device_bytes
        record = _whole_run(config, result)
        whole = _device_bytes(record)
        excess = whole - budget.device_limit
        if excess <= 0:
            if offers:  # only now: nothing else is forecast again
                result = search(config.request, tried, Options(base, offers=True), forecasts)
            assert isinstance(result, Plan)
            result = replace(result, budget=budget, whole_run_bytes=whole, attention=_attention(config, result))
            if knobs.WEIGHTS_IN.of(result.strategy) == "disk":
                note = streaming_note(planned_config(config, result), budget.card)
                result = replace(result, notes=(*result.notes, note))
            whole_seconds = record.times.in_all_seconds
            return replace(result, stages=_stages(result, record), whole_run_seconds=whole_seconds), record
        # What the forecasts said too little. They kept to the budget tried and the run did not, so that the next has a larger margin.
        tried = replace(budget, margin_bytes=budget.margin + whole - forecast)
    made = "the only plan" if plans == 1 else f"{plans} plans"
    raise BudgetError(
        f"{made} for {human(budget.usable_bytes)} needed more when simulated whole, the last {human(excess)} "
        "above what the margin allows; give that much more"
    )


def planned_config(config: RunConfig, plan: Plan) -> RunConfig:
    """The configuration that runs the plan, with the budget as a hard cap and what the plan assumed to attend with by its name."""
    budget = plan.budget
    planned = replace(config, strategy=plan.strategy, gpu=budget.gpu, memory_limit_bytes=budget.usable_bytes)
    return replace(planned, strategy=knobs.ATTENTION.set(plan.strategy, _attention(config, plan).taken))


def _attention(config: RunConfig, plan: Plan) -> AttentionChoice:
    """What the knob comes to on the card that is planned for."""
    card = plan.budget.card
    return attention_of(replace(config, strategy=plan.strategy), card_like(card, here=is_here(card.key)))


def _whole_run(config: RunConfig, plan: Plan) -> RunRecord:
    """Without spans of single blocks, which change no peak and take a second.

    Under the cap, where the allocator gives cached memory back before it goes beyond it; a run that does not fit it ends early,
    and is then simulated on a card without end, to learn what it needs.
    """
    planned = replace(planned_config(config, plan), measurement=Measurement(profile_memory=False))
    record, _ = simulate(planned, video=True)
    if record.failure is not None and record.failure.kind == "oom":
        record, _ = simulate(planned, unlimited=True, video=True)
    if record.failure is not None:
        raise WanvramError(f"the plan could not be simulated to its end: {record.failure.message}")
    return record


def _device_bytes(record: RunRecord) -> int:
    peak = record.peak()
    assert peak is not None
    assert peak.device_bytes is not None
    return peak.device_bytes


# --- the whole run in the plan's terms ---------------------------------------------------------------------------------------


def _stages(plan: Plan, record: RunRecord) -> tuple[StageForecast, ...]:
    """The plan's stages with the figures of the whole run, so that every verb says the same; what it has not stays as forecast."""
    spans: dict[str, list[Span]] = {}
    for span in record.stages:
        spans.setdefault(span.planned, []).append(span)
    peaks: dict[str, Memory] = {}
    for span in record.all_stages():
        peaks[span.planned] = span.peak.highest(peaks.get(span.planned, span.peak))
    forecast = {stage.component: stage for stage in plan.stages}
    step = record.step_seconds()
    return (
        tuple(_stage(plan.request, peaks[name], found, step, forecast.get(name)) for name, found in spans.items())
        or plan.stages
    )


def _stage(
    request: Request, peak: Memory, spans: list[Span], step: float | None, forecast: StageForecast | None
) -> StageForecast:
    """peak: on any GPU. seconds: what all denoising steps at the usual pace do not account for."""
    name, together = spans[0].planned, forecast.together if forecast else 1
    steps = steps_of(request, together) if name == "dit" else 0
    seconds = summed(span.seconds for span in spans if span.kind != "load" or span.seconds is not None)
    loads = [span.end.allocated_bytes - span.start.allocated_bytes for span in spans if span.kind == "load"]
    return StageForecast(
        component=name,
        peak_device_bytes=peak.device_bytes or 0,
        peak_reserved_bytes=peak.reserved_bytes,
        peak_allocated_bytes=peak.allocated_bytes,
        base_bytes=max(loads, default=forecast.base_bytes if forecast else 0),
        host_bytes=forecast.host_bytes if forecast else 0,
        seconds_per_step=step if name == "dit" else None,
        seconds=None if seconds is None else seconds - steps * (step or 0.0),
        together=together,
    )
