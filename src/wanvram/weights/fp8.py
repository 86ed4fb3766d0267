"""Numbers in float8_e4m3fn with one scale per row: what `wanvram convert` writes and what the engine packs. Lossy.

Three mantissa bits: an error of at most 2^-4 of a value, or 2^-10 of its row's largest for values under 2^-6 of that.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FP8", "LARGEST", "SCALE_SUFFIX", "row_scales", "to_fp8"]

SCALE_SUFFIX = ".scale"  # of a matrix's name: what the scales of its rows are called
FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # the largest finite e4m3 number


def row_scales(matrix: Tensor) -> Tensor:
    """[rows, columns] -> float32 [rows, 1]: what brings each row's largest value to LARGEST; 1 for a row of zeros."""
    largest = matrix.abs().amax(dim=1, keepdim=True).float()
    return torch.where(largest > 0, largest / LARGEST, 1.0)


def to_fp8(matrix: Tensor, scales: Tensor) -> Tensor:
    """[rows, columns] divided by its scales, in fp8. Division can round above LARGEST, which fp8 would store as NaN."""
    return (matrix / scales).clamp_(-LARGEST, LARGEST).to(FP8)
