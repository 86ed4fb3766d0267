"""Forecasts of one component: what is shortened is the same as the whole, also where a source video sets the length."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from wanvram.config import Measurement, Request, RunConfig, Strategy
from wanvram.engine.conditions import Inputs
from wanvram.predict import stage
from wanvram.predict.stage import simulate_stage

FRAMES = 21


def config(task: str) -> RunConfig:
    strategy = Strategy(load_strategy="block", offload=True, vae_tile=30, expandable_segments=True)
    request = Request.for_task(task, size="832*480", frame_num=FRAMES, sample_steps=4)
    return RunConfig("x", "", "simulated", request, strategy, Measurement(profile_memory=False))


def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "SHORT_LATENTS", 1000)


@pytest.mark.parametrize("component", ["vae_encoder", "vae_decoder"])
def test_a_few_latent_frames_forecast_the_vae_of_all(component: str, monkeypatch: pytest.MonkeyPatch) -> None:
    short = simulate_stage(config("vace-1.3B"), component)
    whole(monkeypatch)
    full = simulate_stage(config("vace-1.3B"), component)
    assert short.peak_device_bytes == pytest.approx(full.peak_device_bytes, rel=0.02)
    assert short.seconds == pytest.approx(full.seconds, rel=0.05)


def test_the_length_of_a_source_video_counts_and_not_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def pieces(channels: int) -> Any:
        sizes = [1] + [4] * ((FRAMES - 1) // 4)
        return lambda: (torch.empty(channels, n, 480, 832, device="meta") for n in sizes)

    given = Inputs(FRAMES, 480, 832, source=pieces(3), mask=pieces(1))
    monkeypatch.setattr("wanvram.run.execute.prepare_inputs", lambda request, **_: (given, []))
    asked = config("vace-1.3B")
    same = simulate_stage(asked, "vae_encoder")
    other = simulate_stage(replace(asked, request=replace(asked.request, frame_num=81)), "vae_encoder")
    assert same == other
