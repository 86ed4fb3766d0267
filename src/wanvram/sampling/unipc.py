"""UniPC of order 2 (bh2, predicting x0): each prediction is corrected once the velocity at it is known.

Its predictor is the DPM-Solver++ multistep formula; the corrector below is what it adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from wanvram.sampling.dpmpp import multistep_weights
from wanvram.sampling.schedule import Schedule, log_snr, weighted_sum
from wanvram.sampling.state import SolverState

__all__ = ["unipc"]


def _corrector_weights(sigmas: tuple[float, ...], step: int) -> tuple[float, float, float, float]:
    """Weights of (latent at step - 1, x0 at step, x0 at step - 1, x0 at step - 2) in the corrected latent at `step`.

    The order is that of the prediction it corrects: 1 for the first, 2 afterwards.
    """
    before, now = sigmas[step - 1], sigmas[step]
    h = log_snr(now) - log_snr(before)
    phi = math.expm1(-h)
    gain = -(1.0 - now) * phi
    if step == 1:
        return now / before, 0.5 * gain, 0.5 * gain, 0.0
    distance = (log_snr(sigmas[step - 2]) - log_snr(before)) / h
    # rho solves [[1, 1], [distance, 1]] rho = b, the order conditions of bh2.
    phi_2 = -phi / h - 1.0
    b_0 = phi_2 / phi
    b_1 = 2.0 * (-phi_2 / h - 0.5) / phi
    rho_oldest = (b_0 - b_1) / (1.0 - distance)
    newest = gain * (b_0 - rho_oldest)
    oldest = gain * rho_oldest / distance
    return now / before, newest, gain - newest - oldest, oldest


def unipc(velocity: Callable[[Tensor, int], Tensor], schedule: Schedule, state: SolverState) -> Iterator[Tensor]:
    """Yields the (predicted) latent after each step."""
    sigmas = schedule.sigmas
    for step in range(state.made, len(schedule.timesteps)):
        newest = torch.add(state.latent, velocity(state.latent, schedule.timesteps[step]), alpha=-sigmas[step])
        state.changing = True
        if step == 0:
            state.corrected = state.latent
        else:
            correction = _corrector_weights(sigmas, step)
            state.corrected = weighted_sum(correction, state.corrected, newest, state.clean, state.previous)
        state.previous, state.clean = state.clean, newest
        del newest
        weights = multistep_weights(sigmas, step)
        state.latent = weighted_sum(weights, state.corrected, state.clean, state.previous)
        state.made, state.changing = step + 1, False
        yield state.latent
