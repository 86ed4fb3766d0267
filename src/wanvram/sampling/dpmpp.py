"""DPM-Solver++ of order 2 (midpoint, multistep): x0 estimates of the last two steps, extrapolated in log-SNR.

Weights are Python floats computed from the float32 noise levels: no rounding but that of the weighted sum itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from wanvram.sampling.schedule import Schedule, log_snr, weighted_sum
from wanvram.sampling.state import SolverState

__all__ = ["dpmpp", "multistep_weights"]


def multistep_weights(sigmas: tuple[float, ...], step: int) -> tuple[float, float, float]:
    """Weights of (latent, x0 of this step, x0 of the previous step) in the latent after `step`.

    Order 1 at the first step, which has no previous x0, and at the last, whose log-SNR is infinite. Where the
    previous noise level is 1 its log-SNR is -inf, the distance is infinite and its weight comes out as 0.
    """
    now, after = sigmas[step], sigmas[step + 1]
    h = log_snr(after) - log_snr(now)
    gain = -(1.0 - after) * math.expm1(-h)
    if step == 0 or after == 0.0:
        return after / now, gain, 0.0
    distance = (log_snr(sigmas[step - 1]) - log_snr(now)) / h
    previous = 0.5 * gain / distance
    return after / now, gain - previous, previous


def dpmpp(velocity: Callable[[Tensor, int], Tensor], schedule: Schedule, state: SolverState) -> Iterator[Tensor]:
    """Yields the latent after each step."""
    for step in range(state.made, len(schedule.timesteps)):
        latent = state.latent
        clean = torch.add(latent, velocity(latent, schedule.timesteps[step]), alpha=-schedule.sigmas[step])
        state.changing = True
        state.latent = weighted_sum(multistep_weights(schedule.sigmas, step), latent, clean, state.clean)
        state.clean, state.made, state.changing = clean, step + 1, False
        del latent, clean
        yield state.latent
