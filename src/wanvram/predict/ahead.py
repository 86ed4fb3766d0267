"""Forecasts that a search will most likely ask for, simulated beside each other in forked processes while it has not begun."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress

import torch

from wanvram import knobs
from wanvram.config import Request, RunConfig, Strategy
from wanvram.errors import WanvramError
from wanvram.planner import Budget, StageForecast
from wanvram.planner.forecasts import Trials
from wanvram.planner.search import cleared
from wanvram.planner.sizes import sizes_for
from wanvram.planner.tiles import tiles_for
from wanvram.planner.transformer import variants
from wanvram.predict.simulate import simulated_device
from wanvram.predict.stage import simulate_stage

__all__ = ["forecasts_ahead", "processes_here"]

MOST_PROCESSES = 12
LEAST_CORES = 4  # with fewer, guesses that the search does not need would cost more than those that it does

Question = tuple[RunConfig, str]  # what a forecast is of: configuration, component


def processes_here() -> int:
    """How many are worth while; 0 where processes cannot be forked, or CUDA has started and would not survive it."""
    cores = os.cpu_count() or 1
    if not hasattr(os, "fork") or cores < LEAST_CORES or torch.cuda.is_initialized():
        return 0
    return min(MOST_PROCESSES, cores)


def forecasts_ahead(
    request: Request, budget: Budget, base: Strategy, processes: int
) -> Iterator[tuple[Question, StageForecast]]:
    """As they are finished. base: what the user fixed. What fails is left to the search, which then says why."""
    if processes < 1:
        return
    questions = _likely(request, budget, base)
    # What this machine is, and whether flash-attn-4 can be imported (1 to 4 s), is found out once and not in each process.
    with suppress(WanvramError):
        simulated_device(questions[0][0], unlimited=True)
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        asked = {pool.submit(simulate_stage, *question): question for question in questions}
        try:
            for done in as_completed(asked):
                if done.exception() is None:
                    yield asked[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)  # those not begun: nobody waits for them


def _likely(request: Request, budget: Budget, base: Strategy) -> list[Question]:
    """The transformer first, which takes longest: resident, streamed in every variant, from disk; then tiles and encoders."""
    asked: dict[Question, None] = {}

    def note(config: RunConfig, component: str) -> StageForecast:
        asked[config, component] = None
        return StageForecast(component, 0, 0, 0, 0, 0, None, None)

    trials = Trials(request, budget, note)
    plain = cleared(base)
    plain = sizes_for(request, budget, plain)[0].change.on(plain)
    block, disk = knobs.FROM["pinned"].on(plain), knobs.FROM["disk"].on(plain)
    ways = [plain, *variants(request, block), disk, knobs.allowed(knobs.JOINT, block)]
    for strategy in (way for way in ways if way is not None):
        trials.of("dit", strategy)
    for part in request.facts.parts():
        if part.component == "vae":
            for tile in tiles_for(request):
                trials.of(part.name, knobs.VAE_TILE.set(plain, tile))
        elif part.component != "dit":
            for strategy in (plain, block, disk):
                trials.of(part.name, strategy)
    return list(asked)
