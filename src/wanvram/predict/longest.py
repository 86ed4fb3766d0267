"""The most frames that fit a budget, planned and simulated whole like any other request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from wanvram.config import RunConfig
from wanvram.errors import BudgetError, InputError
from wanvram.planner import Budget, Plan, StageForecast
from wanvram.planner.fleet import leanest
from wanvram.planner.forecasts import Trials
from wanvram.planner.longest import most_frames
from wanvram.planner.search import cleared, planned_base
from wanvram.predict.plan import Forecasts, plan_run
from wanvram.units import human

__all__ = ["plan_longest"]

# Numbers of frames below the forecast one that are tried where the whole run needs more than its forecasts said.
FEWER = 4


def plan_longest(config: RunConfig, budget: Budget, show: Callable[[str], None] | None = None) -> Plan | None:
    """The plan with the most frames, 4n+1; None if not even the fewest fit. InputError where the frames are not free."""
    request = config.request
    if request.facts.makes_picture:
        raise InputError(f"--longest: {request.task} makes one picture")
    if request.src_video is not None:
        raise InputError(f"--longest: the frames are those of --src_video {request.src_video}")
    said = None if show is None else lambda text: show(f"{request.size}: {text}")
    forecasts = Forecasts(None)

    def forecast(asked: RunConfig, component: str) -> StageForecast:
        found = forecasts(asked, component)
        if said is not None:
            said(f"{asked.request.frame_num} frames: {component} {human(found.peak_device_bytes)}")
        return found

    trials = Trials(request, budget, forecast)
    frames = most_frames(trials, leanest(trials, cleared(planned_base(config.strategy))))
    for fewer in range(FEWER if frames is not None else 0):
        count = (frames or 0) - request.geometry.strides[0] * fewer
        if count < 1:
            break
        asked = replace(config, request=replace(request, frame_num=count))
        try:
            result, _ = plan_run(asked, budget, offers=False, show=said, forecasts=forecasts)
        except BudgetError:
            continue
        if isinstance(result, Plan):
            return result
    return None
