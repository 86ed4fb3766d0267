"""Among ways that are equally fast within 1 %: the one with less host RAM, then with less device memory. No torch.

A few per cent of speed are worth a card that stays free for a desktop, and gigabytes of RAM are not worth two seconds in two hours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from wanvram import knobs
from wanvram.config import Strategy
from wanvram.knobs import RESIDENT_BLOCKS, VAE_TILE, WEIGHTS_IN
from wanvram.planner.forecasts import Trials, components_of, seconds_gained, vae_halves
from wanvram.planner.placement import TIE, Placements
from wanvram.planner.result import Trade, changed_knobs
from wanvram.planner.tiles import tiles_for
from wanvram.planner.transformer import most_resident
from wanvram.units import MIB

__all__ = ["thriftiest", "trades"]

SAME_RAM = 256 * MIB  # staging buffers and frames: less is not worth a choice
LEAST_SAVED = 64 * MIB  # of device memory: the least margin of a budget


def thriftiest(trials: Trials, placed: Placements) -> Strategy:
    """Of what was found, then with smaller tiles and fewer resident blocks. Unknown times: the first, as it is."""
    if placed.fastest is None:
        return placed.found[0]
    limit = placed.fastest * (1 + TIE)
    near = [way for way in placed.found if _seconds(trials, way) <= limit]
    chosen = near[0]
    for way in near[1:]:
        chosen = way if _is_thriftier(trials, way, chosen) else chosen
    lean = _with_fewer_blocks(trials, _with_smaller_tiles(trials, chosen, limit), limit)
    return lean if _is_thriftier(trials, lean, chosen) or _seconds(trials, lean) < _seconds(trials, chosen) else chosen


def _seconds(trials: Trials, strategy: Strategy) -> float:
    """Known for all, or the search would have ended before."""
    seconds = trials.seconds(strategy)
    return math.inf if seconds is None else seconds


def _is_thriftier(trials: Trials, one: Strategy, other: Strategy) -> bool:
    ram = trials.host(one) - trials.host(other)
    if abs(ram) > SAME_RAM:
        return ram < 0
    return trials.peak(one) < trials.peak(other) - LEAST_SAVED


def _peak_beside(trials: Trials, strategy: Strategy, *names: str) -> int:
    """Device memory of the stages of all other components."""
    return max(
        trials.of(name, strategy).peak_device_bytes for name in components_of(trials.request) if name not in names
    )


def _with_smaller_tiles(trials: Trials, chosen: Strategy, limit: float) -> Strategy:
    """As long as the VAE needs more than anything else would with as few blocks as possible on the device."""
    vae = vae_halves(trials.request)
    rest = max(_peak_beside(trials, chosen, "dit", *vae), _reachable(trials, chosen, limit))
    tiles = tiles_for(trials.request)
    for tile in tiles[tiles.index(VAE_TILE.of(chosen)) + 1 :]:
        smaller = VAE_TILE.set(chosen, tile)
        peak = max(trials.of(name, chosen).peak_device_bytes for name in vae)
        if peak <= rest + LEAST_SAVED or _seconds(trials, smaller) > limit or not trials.fits(smaller, *vae):
            break
        chosen = smaller
    return chosen


def _reachable(trials: Trials, chosen: Strategy, limit: float) -> int:
    """Device memory of the transformer with the fewest resident blocks that keep time and RAM; linear in them."""
    most, blocks = trials.of("dit", chosen).peak_device_bytes, RESIDENT_BLOCKS.of(chosen)
    empty = _emptied(trials, chosen)
    if empty == chosen:
        return most
    least = trials.of("dit", empty).peak_device_bytes
    return least + (most - least) * min(blocks, _needed_blocks(trials, chosen, empty, limit)) // blocks


def _emptied(trials: Trials, chosen: Strategy) -> Strategy:
    """Without resident blocks, if that was forecast."""
    empty = RESIDENT_BLOCKS.set(chosen, 0)
    return empty if trials.known("dit", empty) else chosen


def _with_fewer_blocks(trials: Trials, chosen: Strategy, limit: float) -> Strategy:
    """As few resident blocks as keep time and RAM, but as many as stay below the peak of other stages, where they cost nothing."""
    empty = _emptied(trials, chosen)
    now = RESIDENT_BLOCKS.of(chosen)
    if not knobs.is_streamed(chosen) or (empty == chosen and now):
        return chosen
    other = _peak_beside(trials, chosen, "dit")
    least = trials.of("dit", empty).peak_device_bytes
    free = most_resident(trials, empty, min(other, trials.budget.device_limit)) if least < other else empty
    if now <= RESIDENT_BLOCKS.of(free):
        return free
    count = max(RESIDENT_BLOCKS.of(free), _needed_blocks(trials, chosen, empty, limit))
    fewer = RESIDENT_BLOCKS.set(chosen, min(count, now))
    kept = _seconds(trials, fewer) <= limit and trials.fits(fewer, "dit")
    return fewer if kept else chosen


def _needed_blocks(trials: Trials, chosen: Strategy, empty: Strategy, limit: float) -> int:
    """Resident blocks that the time limit and the RAM of `chosen` ask for; both are linear in them."""
    blocks = RESIDENT_BLOCKS.of(chosen)
    slow, fast = _seconds(trials, empty), _seconds(trials, chosen)
    for_time = 0 if slow <= limit else math.ceil(blocks * (slow - limit) / (slow - fast))
    most, least = trials.of("dit", empty).host_bytes, trials.of("dit", chosen).host_bytes
    allowed = trials.host(chosen)
    for_ram = 0 if most <= allowed else math.ceil(blocks * (most - allowed) / (most - least))
    return max(for_time, for_ram)


def trades(trials: Trials, found: Iterable[Strategy], chosen: Strategy, *, offers: bool) -> list[Trade]:
    """What fits, too, and is faster, the largest gain first. offers: also forecast blocks in RAM instead of on disk."""
    others = [*found]
    pinned = WEIGHTS_IN.set(chosen, "pinned") if WEIGHTS_IN.of(chosen) == "disk" else chosen
    vae = vae_halves(trials.request)
    streamed = [name for name in components_of(trials.request) if name not in vae]
    if offers and pinned != chosen and trials.seconds(chosen) is not None and trials.fits(pinned, *streamed):
        others.append(pinned)
    result: dict[tuple[object, ...], Trade] = {}
    for other in others:
        trade = _trade(trials, chosen, other)
        if trade is not None:
            result[tuple(trade.change.items())] = trade
    return sorted(result.values(), key=lambda trade: -trade.seconds_gained)


def _trade(trials: Trials, chosen: Strategy, other: Strategy) -> Trade | None:
    """None: not faster. A component that was not forecast as `other` has it counts as it is."""
    now = trials.stages(chosen)
    then = [trials.known(stage.component, other) or stage for stage in now]
    gained = seconds_gained(trials.request, now, then)
    change = dict(sorted(changed_knobs(other, chosen).items()))
    if gained is None or gained <= 0 or not change:
        return None
    return Trade(
        change,
        gained,
        max(stage.host_bytes for stage in then) - max(stage.host_bytes for stage in now),
        max(stage.peak_device_bytes for stage in then) - max(stage.peak_device_bytes for stage in now),
    )
