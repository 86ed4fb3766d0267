"""Golden text-to-video sampling: transformer, guidance, solver and VAE together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from parity.golden import assert_close, load_case
from wanvram.models.dit import Condition, WanDiT
from wanvram.models.precision import FP32
from wanvram.models.vae import WanVAE
from wanvram.sampling import solve, timesteps_and_sigmas
from wanvram.specs import DiTSpec, VAESpec

CASE = load_case("pipeline_t2v")
DIT_CASE = load_case(CASE.meta["weights_from"]["dit"])
VAE_CASE = load_case(CASE.meta["weights_from"]["vae"])
CALLS = {call["name"]: call for call in CASE.calls()}


@pytest.fixture(scope="module")
def dit() -> WanDiT:
    config = DIT_CASE.config
    names = ("model_type", "text_len", "in_dim", "dim", "ffn_dim", "freq_dim", "text_dim", "out_dim", "num_heads")
    spec = DiTSpec(
        **{name: config[name] for name in (*names, "num_layers", "eps")},
        patch_size=tuple(config["patch_size"]),
        clip_dim=1280,
        vace_layers=(),
        vace_in_dim=96,
    )
    model = WanDiT(spec, FP32)
    model.load_state_dict(DIT_CASE.weights(), strict=True)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    config = VAE_CASE.config
    spec = VAESpec(
        dim=config["dim"],
        z_dim=config["z_dim"],
        dim_mult=tuple(config["dim_mult"]),
        num_res_blocks=config["num_res_blocks"],
        temporal_downsample=tuple(config["temperal_downsample"]),  # official spelling
    )
    model = WanVAE(spec)
    model.load_state_dict(VAE_CASE.weights(), strict=True)
    return model.requires_grad_(False)


def _sample(dit: WanDiT, call: dict[str, Any], forwards: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Latents from the noise to the end; the two forwards of every step are appended to `forwards`."""
    conditions = [Condition(context=CASE["input.context"]), Condition(context=CASE["input.context_null"])]

    def velocity(latent: Tensor, timestep: int) -> Tensor:
        cond, uncond = dit(latent, timestep, conditions)
        forwards.append((cond, uncond))
        return uncond + call["guide_scale"] * (cond - uncond)

    schedule = timesteps_and_sigmas(call["solver"], call["steps"], call["shift"])
    assert schedule.timesteps == tuple(CASE[f"output.{call['name']}.timesteps"].tolist())
    noise = CASE["input.noise"]
    return [noise, *solve(call["solver"], velocity, noise, schedule)]


@pytest.mark.parametrize("name", CALLS)
def test_every_latent_and_the_video_are_official(dit: WanDiT, vae: WanVAE, name: str) -> None:
    forwards: list[tuple[Tensor, Tensor]] = []
    latents = _sample(dit, CALLS[name], forwards)
    for step, (cond, uncond) in enumerate(forwards):
        assert_close(cond, CASE[f"mid.{name}.cond"][step], f"{name} cond {step}")
        assert_close(uncond, CASE[f"mid.{name}.uncond"][step], f"{name} uncond {step}")
    assert_close(torch.stack(latents), CASE[f"output.{name}.latents"], f"{name} latents")
    video = torch.cat(list(vae.decode(latents[-1])), dim=1).clamp(-1, 1)
    assert_close(video, CASE[f"output.{name}.video"], f"{name} video")
