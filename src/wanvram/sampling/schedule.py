"""What both solvers share: timesteps, noise levels, log signal-to-noise ratio, and the weighted sum that a step is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from wanvram.errors import InputError

__all__ = ["Schedule", "Solver", "log_snr", "timesteps_and_sigmas", "weighted_sum"]

Solver = Literal["unipc", "dpm++"]

TRAIN_TIMESTEPS = 1000
# UniPC starts at the noisiest level of the training table, 1 - 1/1000, which official keeps in float32.
FIRST_SIGMA = {"unipc": float(np.float32(1.0 - 1.0 / TRAIN_TIMESTEPS)), "dpm++": 1.0}


@dataclass(frozen=True)
class Schedule:
    """timesteps: one integer per step, what the model is told. sigmas: one more, float32 values, the last is 0."""

    timesteps: tuple[int, ...]
    sigmas: tuple[float, ...]


def timesteps_and_sigmas(solver: Solver, steps: int, shift: float) -> Schedule:
    """Linear noise levels pushed towards the noisy end by `shift`.

    Timesteps are truncated from the float64 levels, before these are rounded to float32: the order decides which
    integer comes out.
    """
    if solver not in FIRST_SIGMA:
        raise InputError(f"unknown solver '{solver}'; choose unipc or dpm++")
    if steps < 1 or not 0 < shift < math.inf:
        raise InputError(f"steps must be at least 1 and shift positive, not {steps} and {shift}")
    levels = np.linspace(FIRST_SIGMA[solver], 0.0, steps + 1)[:-1]
    levels = shift * levels / (1 + (shift - 1) * levels)
    timesteps = (levels * TRAIN_TIMESTEPS).astype(np.int64)
    return Schedule(
        timesteps=tuple(int(t) for t in timesteps),
        sigmas=(*(float(s) for s in levels.astype(np.float32)), 0.0),
    )


def log_snr(sigma: float) -> float:
    """log((1 - sigma) / sigma): -inf for pure noise, +inf for none."""
    if sigma <= 0.0:
        return math.inf
    if sigma >= 1.0:
        return -math.inf
    return math.log(1.0 - sigma) - math.log(sigma)


def weighted_sum(weights: tuple[float, ...], *latents: Tensor | None) -> Tensor:
    """One new latent. A latent that does not exist yet is None and must have weight 0."""
    total: Tensor | None = None
    for weight, latent in zip(weights, latents, strict=True):
        if weight == 0.0:
            continue
        if latent is None:
            raise ValueError("a latent with a weight other than 0 is missing")
        total = latent * weight if total is None else total.add_(latent, alpha=weight)
    if total is None:
        raise ValueError("all weights are 0")
    return total
