"""Over the ways in which several GPUs can share a video: which are searched, which is taken, and why not the others. No torch.

Whole weights on every GPU come first; shared ones where the transformer is streamed or does not fit, since they save
host RAM and copies but never a step that waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from wanvram.config import Strategy
from wanvram.errors import InputError
from wanvram.knobs import DIT_FSDP, is_streamed
from wanvram.planner.economy import SAME_RAM
from wanvram.planner.forecasts import Trials
from wanvram.planner.placement import TIE, Placements
from wanvram.planner.result import GpuLayout
from wanvram.planner.sizes import SAME, Sizes, leanest_sizes, sizes_for, sizes_of
from wanvram.planner.transformer import whole_transformer

__all__ = ["Found", "best_of", "leanest"]


@dataclass(frozen=True)
class Found:
    """What fits of one way of sharing, and the one of it that is taken."""

    placed: Placements
    chosen: Strategy


@dataclass(frozen=True)
class _Tried:
    """found None: nothing fits; base None: not searched."""

    sizes: Sizes
    base: Strategy | None
    found: Found | None = None


# A strategy with sizes -> what fits of it.
Search = Callable[[Strategy], Found | None]


def best_of(trials: Trials, base: Strategy, search: Search) -> tuple[Found | None, tuple[GpuLayout, ...]]:
    """The fastest, of those within 1 % the one with less host RAM; and of several GPUs every way with what it would take."""
    tried: list[_Tried] = []
    best: _Tried | None = None
    for sizes in sizes_for(trials.request, trials.budget, base):
        if best is not None and best.found is not None and _cannot_win(trials, sizes, best.sizes, best.found):
            tried.append(_Tried(sizes, None))
            continue
        for way in _searched(sizes, base, search):
            tried.append(way)
            best = way if _is_better(trials, way, best) else best
    layouts = tuple(_layout(trials, way, way is best) for way in tried) if trials.budget.gpus > 1 else ()
    return (None if best is None else best.found), layouts


def leanest(trials: Trials, base: Strategy) -> Strategy:
    """What needs least of every GPU and of the host's RAM: what a refusal speaks of."""
    if trials.budget.gpus == 1:
        return base
    lean = leanest_sizes(sizes_for(trials.request, trials.budget, base)).change.on(base)
    return _sharing_weights(lean) or lean


def _searched(sizes: Sizes, base: Strategy, search: Search) -> list[_Tried]:
    """With whole weights; with shared ones too, unless all of them are on the device already."""
    way = sizes.change.on(base)
    ways = [_Tried(sizes, way, search(way))]
    found = ways[0].found
    shared = None if sizes.count == 1 or DIT_FSDP.of(way) else _sharing_weights(way)
    if shared is not None and (found is None or is_streamed(found.chosen)):
        ways.append(_Tried(sizes, shared, search(shared)))
    return ways


def _sharing_weights(base: Strategy) -> Strategy | None:
    try:
        return DIT_FSDP.set(base, True)
    except InputError:
        return None


def _cannot_win(trials: Trials, sizes: Sizes, best: Sizes, found: Found) -> bool:
    """Not by more than expected times can tell, even with every weight on the device, relative to the best so far."""
    now = trials.of("dit", found.chosen).seconds_per_step
    resident = whole_transformer(trials, found.chosen).seconds_per_step
    if now is None or resident is None:
        return True
    return resident * sizes.expected_seconds / best.expected_seconds * (1 + SAME) >= now


def _is_better(trials: Trials, way: _Tried, best: _Tried | None) -> bool:
    if way.found is None:
        return False
    if best is None or best.found is None:
        return True
    now, then = trials.seconds(best.found.chosen), trials.seconds(way.found.chosen)
    if now is None or then is None or then > now * (1 + TIE):
        return False
    return then < now * (1 - TIE) or trials.host(way.found.chosen) < trials.host(best.found.chosen) - SAME_RAM


def _layout(trials: Trials, way: _Tried, is_best: bool) -> GpuLayout:
    found = way.found
    shared = way.base is not None and DIT_FSDP.of(way.base)
    sizes = {knob.name: value for knob, value in way.sizes.change.values.items()} | {DIT_FSDP.name: shared}
    if way.base is None:
        return GpuLayout(sizes, "slower by estimate", None, None, None)
    if found is None:
        looked = [t for t in trials.failed if t.memory == "device" and sizes_of(t.strategy) == way.sizes]
        needed = [t.needed for t in looked if DIT_FSDP.of(t.strategy) == shared]
        return GpuLayout(sizes, "too large", None, min(needed, default=None), None)
    dit, verdict = trials.of("dit", found.chosen), "chosen" if is_best else "fits"
    return GpuLayout(sizes, verdict, dit.seconds_per_step, dit.peak_device_bytes, dit.host_bytes)
