"""UniPC and DPM++ as plain functions of (velocity, noise, schedule); no state outlives the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from wanvram.sampling.dpmpp import dpmpp
from wanvram.sampling.schedule import Schedule, Solver, timesteps_and_sigmas
from wanvram.sampling.unipc import unipc

__all__ = ["Schedule", "Solver", "solve", "timesteps_and_sigmas"]


def solve(
    solver: Solver, velocity: Callable[[Tensor, int], Tensor], noise: Tensor, schedule: Schedule
) -> Iterator[Tensor]:
    """Yields the latent after each step, computed when asked for; stop asking and nothing more is computed.

    velocity(latent, timestep) gives float32. No yielded latent, nor `noise`, is ever written to afterwards.
    """
    return (unipc if solver == "unipc" else dpmpp)(velocity, noise, schedule)
