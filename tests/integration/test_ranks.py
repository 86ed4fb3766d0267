"""Several ranks on gloo make what one process makes, and one simulated rank has the allocator events of the real one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from tests.parity.test_dit import call_of, model_of, sample_of
from tests.rank_processes import on_ranks
from torch import Tensor

from wanvram.engine.devices import CpuDevice
from wanvram.engine.team import team_of
from wanvram.models import dit
from wanvram.models.dit import Attending, Condition, WanDiT
from wanvram.models.precision import FP32
from wanvram.models.rotary import rotary_tables
from wanvram.sharing import Place
from wanvram.specs import DIT

TOLERANCE = 1e-5  # of the largest value; a rope that is off by a row on one rank is 1000 times as far


@dataclass(frozen=True)
class Case:
    """A forward of golden weights, or of a random transformer with 6 heads; how it is shared; rows of a chunk."""

    stem: str
    call: str
    ulysses: int
    ring: int
    rows: int
    displaced: bool = False  # one rank turns its rows as if they were their neighbours

    @property
    def place(self) -> Place:
        return Place(0, self.ulysses, self.ring)


SHARED = (
    Case("dit_t2v", "nopad_b1", 2, 1, 100),
    Case("dit_t2v", "nopad_b1", 2, 1, 7),
    Case("dit_t2v", "nopad_b1", 1, 2, 7),
    Case("dit_i2v", "nopad_b1", 2, 1, 4),
    Case("dit_i2v", "nopad_b1", 1, 2, 4),
    Case("dit_flf2v", "nopad_b1", 2, 1, 5),
    Case("dit_flf2v", "nopad_b1", 1, 2, 5),
    Case("dit_vace", "scale05_b1", 2, 1, 4),
    Case("dit_vace", "scale05_b1", 1, 2, 4),
    Case("six heads", "45 tokens", 2, 1, 7),
    Case("dit_t2v", "nopad_b1", 2, 2, 7),
    Case("dit_t2v", "nopad_b1", 1, 4, 7),
    Case("dit_i2v", "nopad_b1", 2, 2, 4),
    Case("dit_flf2v", "nopad_b1", 2, 2, 4),
    Case("dit_vace", "scale05_b1", 4, 1, 3),
    Case("dit_vace", "scale05_b1", 2, 2, 3),
    Case("six heads", "45 tokens", 4, 1, 5),
    Case("six heads", "45 tokens", 2, 2, 100),
)
DISPLACED = tuple(replace(case, displaced=True) for case in (SHARED[1], SHARED[2], SHARED[10], SHARED[16]))


def six_heads() -> tuple[WanDiT, tuple[Tensor, float, Condition]]:
    """45 tokens and 6 heads, with weights strong enough to matter."""
    spec = replace(DIT["tiny-t2v"], num_heads=6, dim=96)
    generator = torch.Generator().manual_seed(1)
    model = WanDiT(spec, FP32)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() > 1 else 1.0)
    latent = torch.randn((spec.in_dim, 3, 6, 10), generator=generator)
    return model, (latent, 700, Condition(torch.randn((7, spec.text_dim), generator=generator)))


def given(case: Case) -> tuple[WanDiT, tuple[Tensor, float, Condition]]:
    return six_heads() if case.stem == "six heads" else (model_of(case.stem), sample_of(case.stem, case.call, 0))


def forward(case: Case, device: CpuDevice | None) -> Tensor:
    """One velocity; with a device, by its rank."""
    model, (latent, timestep, condition) = given(case)
    (time,), prepared = model.prepare([timestep], [condition])
    _, frames, height, width = latent.shape
    team = team_of(device, frames * height * width // 4, model.spec.num_heads, case.rows) if device else None
    how = Attending(team=team)
    (velocity,) = model.velocity([latent], time, prepared, rows_per_chunk=case.rows, attending=how)
    return velocity


def displaced_tables(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(table.roll(1, 0) for table in rotary_tables(*arguments))


def forwards(rank: int, cases: tuple[Case, ...]) -> dict[Case, Tensor]:
    results = {}
    for case in cases:
        device = CpuDevice()
        device.place = replace(case.place, rank=rank)
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            if case.displaced and rank == 1:
                patch.setattr(dit, "rotary_tables", displaced_tables)
            results[case] = forward(case, device)
    return results


@cache
def shared(count: int) -> list[Mapping[Case, Tensor]]:
    """What every one of so many ranks gets."""
    return on_ranks(count, forwards, tuple(case for case in (*SHARED, *DISPLACED) if case.place.world == count))


@cache
def alone(case: Case) -> Tensor:
    with torch.no_grad():
        return forward(replace(case, ulysses=1, ring=1, displaced=False), None)


def error(case: Case, velocity: Tensor) -> float:
    one = alone(replace(case, rows=1000)) if case.displaced else alone(case)
    return float((velocity - one).abs().max() / one.abs().max())


def said(case: Any) -> str:
    return f"{case.stem} ulysses {case.ulysses} ring {case.ring} rows {case.rows}"


@pytest.mark.parametrize("case", SHARED, ids=said)
def test_every_rank_has_the_velocity_of_one_process(case: Case) -> None:
    velocities = [results[case] for results in shared(case.place.world)]
    assert all(torch.equal(velocity, velocities[0]) for velocity in velocities)
    assert error(case, velocities[0]) <= TOLERANCE


@pytest.mark.parametrize("case", DISPLACED, ids=said)
def test_a_rank_that_turns_its_rows_as_their_neighbours_would_be_seen(case: Case) -> None:
    assert error(case, shared(case.place.world)[0][case]) > 100 * TOLERANCE


def test_rows_that_are_not_cut_into_chunks_are_bit_equal_under_ulysses() -> None:
    case = SHARED[0]
    assert call_of(case.stem, case.call)["tokens"] == [60]
    assert torch.equal(shared(2)[0][case], alone(case))
