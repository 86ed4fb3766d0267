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


def unipc(velocity: Callable[[Tensor, int], Tensor], noise: Tensor, schedule: Schedule) -> Iterator[Tensor]:
    """Yields the (predicted) latent after each step."""
    sigmas = schedule.sigmas
    latent = noise
    corrected = noise  # the latent that the last prediction started from
    clean: Tensor | None = None
    previous: Tensor | None = None
    for step, timestep in enumerate(schedule.timesteps):
        newest = torch.add(latent, velocity(latent, timestep), alpha=-sigmas[step])
        if step > 0:
            corrected = weighted_sum(_corrector_weights(sigmas, step), corrected, newest, clean, previous)
        previous, clean = clean, newest
        latent = weighted_sum(multistep_weights(sigmas, step), corrected, clean, previous)
        yield latent
