"""UniPC and DPM++ as plain functions of (velocity, noise, schedule); what outlives a step is one SolverState."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from wanvram.sampling.dpmpp import dpmpp
from wanvram.sampling.schedule import Schedule, Solver, timesteps_and_sigmas
from wanvram.sampling.state import SolverState, held_after
from wanvram.sampling.unipc import unipc

__all__ = ["Schedule", "Solver", "SolverState", "held_after", "solve", "timesteps_and_sigmas"]


def solve(
    solver: Solver,
    velocity: Callable[[Tensor, int], Tensor],
    noise: Tensor,
    schedule: Schedule,
    state: SolverState | None = None,
) -> Iterator[Tensor]:
    """Yields the latent after each step, computed when asked for; stop asking and nothing more is computed.

    velocity(latent, timestep) gives float32. No yielded latent, nor `noise`, is ever written to afterwards. state: after how many
    steps to go on, by default none; it is whole whenever a latent has been yielded.
    """
    yield from (unipc if solver == "unipc" else dpmpp)(velocity, schedule, state or SolverState(0, noise))
