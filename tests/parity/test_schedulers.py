"""Golden timesteps, noise levels and trajectories of both solvers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parity.golden import assert_close, load_case
from wanvram.errors import InputError
from wanvram.sampling import Solver, solve, timesteps_and_sigmas

CASE = load_case("schedulers")
SOLVERS: dict[str, Solver] = {"unipc": "unipc", "dpmpp": "dpm++"}
TABLES = sorted(name.removesuffix(".timesteps") for name in CASE.tensors if name.endswith(".timesteps"))
TRAJECTORIES = [t["tensor"] for t in CASE.meta["trajectories"]]


def _parse(name: str) -> tuple[Solver, float, int]:
    _, solver, rest = name.removesuffix(".latents").split(".", 2)
    shift, steps = rest.removeprefix("shift").split(".steps")
    return SOLVERS[solver], float(shift), int(steps)


def _velocity(latent: Tensor, timestep: int) -> Tensor:
    flat = CASE["weight.W"] @ latent.flatten() + (timestep / 1000) * CASE["weight.b"]
    return torch.tanh(flat).reshape(latent.shape)


@pytest.mark.parametrize("name", TABLES)
def test_timesteps_and_sigmas_are_official(name: str) -> None:
    solver, shift, steps = _parse(name)
    schedule = timesteps_and_sigmas(solver, steps, shift)
    assert schedule.timesteps == tuple(CASE[name + ".timesteps"].tolist())
    assert schedule.sigmas == tuple(CASE[name + ".sigmas"].tolist())


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_every_latent_of_a_trajectory_is_official(name: str) -> None:
    solver, shift, steps = _parse(name)
    noise = CASE["input.x_T"]
    schedule = timesteps_and_sigmas(solver, steps, shift)
    latents = [noise, *solve(solver, _velocity, noise, schedule)]
    assert len(latents) == len(CASE[name])
    for step, (latent, golden) in enumerate(zip(latents, CASE[name], strict=True)):
        assert_close(latent, golden, f"{name} after {step} steps")


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_repeated_integer_timesteps_at_high_shift_do_not_disturb_the_sampling(solver: Solver) -> None:
    schedule = timesteps_and_sigmas(solver, 100, 16.0)
    assert len(set(schedule.timesteps)) < 100
    assert all(latent.isfinite().all() for latent in solve(solver, _velocity, CASE["input.x_T"], schedule))


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_constant_clean_image_is_reached_in_very_few_steps(solver: Solver, steps: int) -> None:
    noise = CASE["input.x_T"].double()
    clean = torch.full_like(noise, 0.5)
    schedule = timesteps_and_sigmas(solver, steps, 5.0)
    sigma_of = dict(zip(schedule.timesteps, schedule.sigmas, strict=False))
    *_, result = solve(solver, lambda x, t: (x - clean) / sigma_of[t], noise, schedule)
    torch.testing.assert_close(result, clean)


def test_a_step_is_computed_when_it_is_asked_for_so_that_sampling_can_stop_early() -> None:
    timesteps: list[int] = []

    def velocity(latent: Tensor, timestep: int) -> Tensor:
        timesteps.append(timestep)
        return _velocity(latent, timestep)

    schedule = timesteps_and_sigmas("unipc", 20, 5.0)
    latents = solve("unipc", velocity, CASE["input.x_T"], schedule)
    for step in range(2):
        assert len(timesteps) == step
        assert next(latents).shape == CASE["input.x_T"].shape
    assert timesteps == list(schedule.timesteps[:2])


def test_latents_already_given_out_are_never_overwritten() -> None:
    noise = CASE["input.x_T"].clone()
    schedule = timesteps_and_sigmas("unipc", 6, 5.0)
    kept, copies = [noise], [noise.clone()]
    for latent in solve("unipc", _velocity, noise, schedule):
        kept.append(latent)
        copies.append(latent.clone())
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_an_unknown_solver_or_zero_steps_is_an_input_error() -> None:
    with pytest.raises(InputError, match="unknown solver"):
        timesteps_and_sigmas("euler", 5, 5.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least 1"):
        timesteps_and_sigmas("unipc", 0, 5.0)
