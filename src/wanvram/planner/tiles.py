"""The VAE's part of the search: whole frames, or the largest tiles that fit. One knob for encoder and decoder. No torch."""

from __future__ import annotations

from wanvram.config import Request, Strategy
from wanvram.knobs import VAE_TILE
from wanvram.planner.forecasts import Trials, situation

__all__ = ["largest_tile", "tiles_for"]


def tiles_for(request: Request) -> list[int | None]:
    """Whole frames first, then what is smaller than a frame, the fastest first."""
    return [None, *VAE_TILE.smaller(None, situation(request))]


def largest_tile(trials: Trials, base: Strategy) -> Strategy | None:
    """`base` with the largest tiles with which both halves of the VAE fit; None: even the smallest do not.

    By bisection after whole frames and the largest tiles, which most cards hold: small tiles are many, and slow to simulate.
    """
    tiles = tiles_for(trials.request)
    parts = [part.name for part in trials.request.facts.parts() if part.component == "vae"]
    too_large, fitting = -1, len(tiles)
    while fitting - too_large > 1:
        middle = too_large + 1 if too_large < 1 else (too_large + fitting) // 2
        strategy = VAE_TILE.set(base, tiles[middle])
        if all(trials.fits(part, strategy) for part in parts):
            fitting = middle
        else:
            too_large = middle
    return None if fitting == len(tiles) else VAE_TILE.set(base, tiles[fitting])
