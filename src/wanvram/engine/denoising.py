"""Videos denoised together: what one is between two steps, and how a step takes them through the transformer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from wanvram.config import RunConfig
from wanvram.engine.conditions import Inputs
from wanvram.engine.devices import Device
from wanvram.engine.residency import Component
from wanvram.engine.residual import PinnedRows
from wanvram.engine.shared_stages import SharedStages
from wanvram.engine.team import team_of
from wanvram.kernels.attention_backends import AUTO
from wanvram.knobs import RESIDUAL_IN, chunk_rows
from wanvram.models.dit import Attending, Prepared, Time, WanDiT
from wanvram.request import Video
from wanvram.sampling import SolverState
from wanvram.sharing import rows_at_once, travelling

__all__ = ["Guide", "Sampling", "Turn", "TurnPlan", "Velocities", "advance", "asked_of", "transformer", "velocities_of"]

HEAD_GROUPS = 4  # attention_slicing: on an H200 4 groups of 10 heads cost 2 % more time than one of 40 (h200.md)
# (latents, their time, a condition for each) -> as many velocities
Velocities = Callable[[list[torch.Tensor], Time, list[Prepared]], list[torch.Tensor]]


@dataclass(frozen=True)
class Turn:
    """Steps start..stop of those that are run, and the transformer whose they are."""

    model: str
    start: int
    stop: int
    is_last: bool


@dataclass(frozen=True)
class TurnPlan:
    """What a turn's steps need of the embeddings: one Time per step, one condition per prompt, and the negative one if any."""

    turn: Turn
    times: list[Time]
    conditions: list[Prepared]
    negative: Prepared | None


class Guide:
    """What a solver asks for its velocity, which was computed together with those of other videos."""

    velocity: torch.Tensor

    def __call__(self, _latent: torch.Tensor, _timestep: int) -> torch.Tensor:
        velocity = self.velocity
        del self.velocity
        return velocity


@dataclass
class Sampling:
    """A video between two steps: its solver, what that knows, and the latent [channels, F, h, w] float32 it has got to."""

    video: Video
    guide: Guide
    state: SolverState
    trajectory: Iterator[torch.Tensor]
    latent: torch.Tensor


@contextmanager
def velocities_of(
    config: RunConfig, device: Device, inputs: Inputs, component: Component, negative: Prepared | None
) -> Iterator[Velocities]:
    """Guided velocities v = uncond + g (cond - uncond) in float32, from one joint or two sequential forwards; without a
    negative prompt v = cond from one. The residual stream's buffers, where it waits in RAM, are there as long as these are."""
    request, strategy = config.request, config.strategy
    dit, ranks = transformer(component), SharedStages(device)
    tokens = inputs.geometry.tokens(inputs.noise_shape)
    chunk = chunk_rows(tokens, strategy.rows_per_chunk)
    rows = rows_at_once(device.place, tokens, chunk)
    heads = max(1, dit.spec.num_heads // HEAD_GROUPS) if strategy.attention_slicing else None
    team = team_of(device, tokens, dit.spec.num_heads, travelling(device.place, tokens, chunk, dit.spec.dim))
    asked: dict[str, Any] = {"rows_per_chunk": rows, "attending": Attending(heads, asked_of(device), team)}
    walk = component.walk_alike
    if RESIDUAL_IN.of(strategy) == "pinned":
        walk = component.walk  # its rows come and go by marks of their own
        asked["stream"] = PinnedRows(device, tokens, dit.spec.dim, rows, component.between_rows)

    def velocities(latents: list[torch.Tensor], time: Time, conditions: list[Prepared]) -> list[torch.Tensor]:
        groups = [conditions, [negative] * len(latents)] if negative is not None else [conditions]
        if strategy.cfg == "joint":
            groups = [[condition for group in groups for condition in group]]
        outputs: list[torch.Tensor] = []
        for group in ranks.my_guidance(groups):
            shared = latents * (len(group) // len(latents))
            outputs += dit.velocity(shared, time, group, walk=walk, **asked)
        if negative is None:
            return outputs
        outputs = ranks.with_theirs(outputs)
        pairs = zip(outputs[: len(latents)], outputs[len(latents) :], strict=True)
        return [uncond.add_(cond.sub_(uncond), alpha=request.sample_guide_scale) for cond, uncond in pairs]

    try:
        yield velocities
    finally:
        if "stream" in asked:
            asked.pop("stream").close()


def advance(batch: list[Sampling], velocities: Velocities, plan: TurnPlan, count: int) -> None:
    """One step of videos that have made as many. count: those that pass the weights together."""
    time = plan.times[batch[0].state.made - plan.turn.start]
    for start in range(0, len(batch), count):
        part = batch[start : start + count]
        found = velocities([s.latent for s in part], time, [plan.conditions[s.video.prompt] for s in part])
        for sampling in part:
            sampling.guide.velocity = found.pop(0)
            sampling.latent = next(sampling.trajectory)


def asked_of(device: Device) -> str:
    """The backend for the transformer's attention; the CPU has no choice."""
    return AUTO if device.attention is None else device.attention.taken


def transformer(component: Component) -> WanDiT:
    assert isinstance(component.module, WanDiT)
    return component.module
