"""The VAE's part of the search: whole frames, or the largest tiles that fit. One knob for encoder and decoder. No torch."""

from __future__ import annotations

from wanvram.config import Request, Strategy
from wanvram.knobs import VAE_TILE
from wanvram.planner.forecasts import Trials, situation, summed, vae_halves

__all__ = ["largest_tile", "tiles_for"]


def tiles_for(request: Request) -> list[int | None]:
    """Whole frames first, then what is smaller than a frame, the fastest first."""
    return [None, *VAE_TILE.smaller(None, situation(request))]


def largest_tile(trials: Trials, base: Strategy) -> Strategy | None:
    """`base` with the largest tiles with which both halves of the VAE fit; None: even the smallest do not.

    By bisection after whole frames and the largest tiles, which most cards hold: small tiles are many, and slow to simulate.
    """
    tiles = tiles_for(trials.request)
    halves = vae_halves(trials.request)
    too_large, fitting = -1, len(tiles)
    while fitting - too_large > 1:
        middle = too_large + 1 if too_large < 1 else (too_large + fitting) // 2
        strategy = VAE_TILE.set(base, tiles[middle])
        if trials.fits(strategy, *halves):
            fitting = middle
        else:
            too_large = middle
    if fitting == len(tiles):
        return None
    return _shared(trials, base, tiles[fitting:]) if trials.budget.gpus > 1 else VAE_TILE.set(base, tiles[fitting])


def _shared(trials: Trials, base: Strategy, tiles: list[int | None]) -> Strategy:
    """Several GPUs decode tiles beside each other, so that smaller ones are faster as long as there are more to share."""
    best = VAE_TILE.set(base, tiles[0])
    for tile in tiles[1:]:
        smaller = VAE_TILE.set(base, tile)
        before, after = _seconds(trials, best), _seconds(trials, smaller)
        if before is None or after is None or after >= before:
            break
        best = smaller
    return best


def _seconds(trials: Trials, strategy: Strategy) -> float | None:
    """Of encoder and decoder; None: not known."""
    return summed(trials.of(half, strategy).seconds for half in vae_halves(trials.request))
