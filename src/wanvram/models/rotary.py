"""Rotary tables of the three token axes (frame, row, column), as float32 cos and sin per token and pair."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

__all__ = ["rotary_tables"]

_BASE = 10000.0


def rotary_tables(
    grid: tuple[int, int, int], head_dim: int, device: torch.device | str, of: slice | None = None
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each float32 [frames * rows * columns, head_dim / 2], columns fastest. of: these tokens only.

    Of the c = head_dim / 2 pairs, c - 2 * (c // 3) turn with the frame, c // 3 with the row, c // 3 with the column.
    Angles are float64 on the short axes only; the long tables hold their rounded cosines (19 MB each at 75600 tokens).
    """
    pairs = head_dim // 2
    rows = grid if of is None else (of.stop - of.start,)
    cos = torch.empty((*rows, pairs), dtype=torch.float32, device=device)
    sin = torch.empty_like(cos)
    token = None if of is None else torch.arange(of.start, of.stop, device=device)
    start = 0
    for axis, width in enumerate((pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)):
        angles = _axis_angles(grid[axis], width, device)
        place = None if token is None else token // prod(grid[axis + 1 :]) % grid[axis]
        shape = [grid[axis] if other == axis else 1 for other in range(3)] + [width]
        for table, values in ((cos, angles.cos), (sin, angles.sin)):
            own = values().float().view(shape) if place is None else values().float()[place]
            table[..., start : start + width] = own
            del own
        start += width
    return cos.flatten(0, -2), sin.flatten(0, -2)


def _axis_angles(length: int, width: int, device: torch.device | str) -> Tensor:
    """Float64 [length, width]: position times BASE^(-pair / width)."""
    positions = torch.arange(length, dtype=torch.float64, device=device)
    exponents = torch.arange(width, dtype=torch.float64, device=device) / width
    return torch.outer(positions, torch.pow(_BASE, exponents).reciprocal())
