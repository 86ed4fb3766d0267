"""A budget becomes a strategy that keeps it: the planner's choice, simulated whole before it is promised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from wanvram.config import RunConfig
from wanvram.errors import BudgetError, WanvramError
from wanvram.planner import Budget, Options, Plan, Refusal, StageForecast, search
from wanvram.planner.search import planned_base
from wanvram.record import RunRecord
from wanvram.run.execute import simulate
from wanvram.run.forecast import simulate_stage
from wanvram.units import human

__all__ = ["plan_run", "planned_config"]

Progress = Callable[[str], None]
ATTEMPTS = 3


def plan_run(
    config: RunConfig, budget: Budget, *, offers: bool = True, show: Progress | None = None
) -> tuple[Plan | Refusal, RunRecord | None]:
    """The fastest lossless strategy whose whole predicted run stays within the budget less its margin, and that run.

    Forecasts are shortened; where the whole run needs more than they said, the difference is kept free and the search is
    made again, at most three times, then BudgetError. WanvramError if a whole run ends early.
    """
    base = planned_base(config.strategy)
    known: dict[tuple[RunConfig, str], StageForecast] = {}

    def forecast(asked: RunConfig, component: str) -> StageForecast:
        if (asked, component) not in known:
            known[asked, component] = simulate_stage(asked, component)
            if show is not None:
                show(f"{component}: {known[asked, component].peak_device_bytes / 2**30:.2f} GiB")
        return known[asked, component]

    tried = budget
    for _ in range(ATTEMPTS):
        result = search(config.request, tried, Options(base, offers), forecast)
        if isinstance(result, Refusal):
            return result, None
        # On the card itself a run that does not fit ends early, with a peak that looks as if it did.
        record, _ = simulate(planned_config(config, result), unlimited=True, video=True)
        if record.failure is not None:
            raise WanvramError(f"the plan could not be simulated to its end: {record.failure.message}")
        peak = record.peak()
        whole = peak.device_bytes if peak is not None else None
        excess = (whole or 0) - budget.device_limit
        if excess <= 0:
            return replace(result, budget=budget, whole_run_bytes=whole), record
        tried = replace(budget, margin_bytes=tried.margin + excess)
    raise BudgetError(
        f"{ATTEMPTS} plans for {human(budget.usable_bytes)} needed more when they were simulated whole, the last {human(excess)} "
        "above what the margin allows; give that much more"
    )


def planned_config(config: RunConfig, plan: Plan) -> RunConfig:
    """The configuration that runs the plan, with the budget as a hard cap."""
    budget = plan.budget
    return replace(config, strategy=plan.strategy, gpu=budget.gpu, memory_limit_bytes=budget.usable_bytes)
