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
    widths = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    if of is not None:
        return _tables_of(grid, widths, device, of)
    cos = torch.empty((*grid, pairs), dtype=torch.float32, device=device)
    sin = torch.empty((*grid, pairs), dtype=torch.float32, device=device)
    start = 0
    for axis, width in enumerate(widths):
        angles = _axis_angles(grid[axis], width, device)
        shape = [1, 1, 1, width]
        shape[axis] = grid[axis]
        cos[..., start : start + width] = angles.cos().float().view(shape)
        sin[..., start : start + width] = angles.sin().float().view(shape)
        start += width
    return cos.view(-1, pairs), sin.view(-1, pairs)


def _tables_of(
    grid: tuple[int, int, int], widths: tuple[int, ...], device: torch.device | str, of: slice
) -> tuple[Tensor, Tensor]:
    """The same numbers, looked up for each token."""
    cos = torch.empty((of.stop - of.start, sum(widths)), dtype=torch.float32, device=device)
    sin = torch.empty_like(cos)
    token = torch.arange(of.start, of.stop, device=device)
    start = 0
    for axis, width in enumerate(widths):
        angles = _axis_angles(grid[axis], width, device)
        position = token // prod(grid[axis + 1 :]) % grid[axis]
        cos[:, start : start + width] = angles.cos().float()[position]
        sin[:, start : start + width] = angles.sin().float()[position]
        start += width
    return cos, sin


def _axis_angles(length: int, width: int, device: torch.device | str) -> Tensor:
    """Float64 [length, width]: position times BASE^(-pair / width)."""
    positions = torch.arange(length, dtype=torch.float64, device=device)
    exponents = torch.arange(width, dtype=torch.float64, device=device) / width
    return torch.outer(positions, torch.pow(_BASE, exponents).reciprocal())
