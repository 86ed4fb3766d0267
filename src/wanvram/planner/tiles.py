"""The VAE's part of the search: whole frames, or the largest tiles that fit. One knob for encoder and decoder. No torch."""

from __future__ import annotations

from dataclasses import replace

from wanvram.config import Request, Strategy
from wanvram.planner.forecasts import Trials

__all__ = ["largest_tile", "tiles_for"]

TILES = (
    80,
    52,
    40,
    30,
    20,
)  # latent pixels, those whose cuDNN workspaces were measured; smaller tiles have larger halos in proportion: less memory, more time


def tiles_for(request: Request) -> list[int | None]:
    """Whole frames first, then what is smaller than a frame, the fastest first."""
    longest = max(request.width, request.height) // request.geometry.strides[1]
    return [None, *(tile for tile in TILES if tile < longest)]


def largest_tile(trials: Trials, base: Strategy) -> Strategy | None:
    """`base` with the largest tiles with which both halves of the VAE fit; None: even the smallest do not.

    By bisection after whole frames and the largest tiles, which most cards hold: small tiles are many, and slow to simulate.
    """
    tiles = tiles_for(trials.request)
    parts = [part.name for part in trials.request.facts.parts() if part.component == "vae"]
    too_large, fitting = -1, len(tiles)
    while fitting - too_large > 1:
        middle = too_large + 1 if too_large < 1 else (too_large + fitting) // 2
        strategy = replace(base, vae_tile=tiles[middle])
        if all(trials.fits(part, strategy) for part in parts):
            fitting = middle
        else:
            too_large = middle
    return None if fitting == len(tiles) else replace(base, vae_tile=tiles[fitting])
