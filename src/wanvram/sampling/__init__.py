"""UniPC and DPM++ as plain functions of (velocity, noise, schedule); no state outlives the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from wanvram.sampling.dpmpp import dpmpp
from wanvram.sampling.schedule import Schedule, Solver, timesteps_and_sigmas
from wanvram.sampling.unipc import unipc

__all__ = ["Schedule", "Solver", "sample", "solve", "timesteps_and_sigmas"]


def solve(
    solver: Solver, velocity: Callable[[Tensor, int], Tensor], noise: Tensor, schedule: Schedule
) -> Iterator[Tensor]:
    """Yields the latent after each step, computed when asked for; stop asking and nothing more is computed.

    velocity(latent, timestep) gives float32. No yielded latent, nor `noise`, is ever written to afterwards.
    """
    return (unipc if solver == "unipc" else dpmpp)(velocity, noise, schedule)


def sample(
    solver: Solver,
    velocity: Callable[[Tensor, int], Tensor],
    noise: Tensor,
    schedule: Schedule,
    *,
    on_step: Callable[[int], AbstractContextManager[object]] | None = None,
    max_steps: int | None = None,
) -> Tensor:
    """The latent after the last step, or after `max_steps`. Step i runs inside `on_step(i)`."""
    latents = solve(solver, velocity, noise, schedule)
    latent = noise
    for step in range(schedule.steps if max_steps is None else min(max_steps, schedule.steps)):
        with on_step(step) if on_step else nullcontext():
            latent = next(latents)
    return latent
