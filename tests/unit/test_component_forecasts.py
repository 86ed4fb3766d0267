"""Forecasts of tiny components beside the whole run and beside each other: what is shortened, scaled, added and left out."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from wanvram.config import Measurement, Request, RunConfig, Strategy
from wanvram.engine.conditions import Inputs
from wanvram.planner.forecasts import StageForecast
from wanvram.predict import stage as module
from wanvram.predict.simulate import simulate
from wanvram.predict.stage import PROMPT_TOKENS, _shortened, _sum, simulate_stage
from wanvram.record import RunRecord
from wanvram.spans import Memory, Span
from wanvram.specs import DIT
from wanvram.units import MIB


def config(task: str = "t2v-1.3B", strategy: Strategy | None = None, **given: Any) -> RunConfig:
    size = "832*480" if task == "i2v-14B" else "64*48"
    request = Request.for_task(task, size=size, **({"frame_num": 9, "sample_steps": 2} | given))
    return RunConfig(
        "x", "", "simulated", request, strategy or Strategy(), Measurement(profile_memory=False), weights="tiny"
    )


@cache
def forecast(component: str, task: str = "t2v-1.3B", strategy: Strategy | None = None, **given: Any) -> StageForecast:
    return simulate_stage(config(task, strategy, **given), component)


@cache
def whole(task: str) -> RunRecord:
    record, _ = simulate(config(task, Strategy(offload=True), sample_steps=4), unlimited=True, video=True)
    assert record.failure is None
    return record


@pytest.mark.parametrize("task", ["t2v-1.3B", "vace-1.3B"])
def test_the_weights_and_tensors_of_a_component_are_those_of_the_whole_run(task: str) -> None:
    record = whole(task)
    bases = {c.name: c.base_bytes for c in record.components}
    for component in ("text_encoder", "dit") if task == "t2v-1.3B" else ("dit",):
        found = forecast(component, task)
        peak = max(span.peak.allocated_bytes for span in record.stages if span.planned == component)
        assert found.base_bytes == bases[component]
        assert abs(found.peak_allocated_bytes - peak) < MIB
        assert found.peak_allocated_bytes < found.peak_reserved_bytes < found.peak_device_bytes
        assert found.component == component


def test_a_step_takes_as_long_as_in_the_whole_run_and_is_not_in_the_rest() -> None:
    dit = forecast("dit")
    assert dit.seconds_per_step == pytest.approx(whole("t2v-1.3B").step_seconds(), rel=0.01)
    assert dit.seconds is not None
    assert dit.seconds_per_step is not None
    assert dit.seconds < dit.seconds_per_step, "loading and preparing alone; first uses of libraries are left out"
    text = forecast("text_encoder")
    assert text.seconds_per_step is None
    assert text.seconds == pytest.approx(0.0059, abs=0.0005)


def test_libraries_that_any_stage_loads_are_there_from_the_start() -> None:
    """So that a component alone needs no less outside the allocator than in a whole run."""
    for component in ("text_encoder", "dit"):
        spans = [span.peak for span in whole("t2v-1.3B").stages if span.planned == component]
        outside = max((peak.device_bytes or 0) - peak.reserved_bytes for peak in spans)
        found = forecast(component)
        assert found.peak_device_bytes - found.peak_reserved_bytes >= outside


@pytest.mark.parametrize("component", ["vae_decoder", "vae_encoder"])
def test_of_five_latent_frames_four_are_simulated_the_fifth_is_added_and_their_time_scaled(component: str) -> None:
    task = "t2v-1.3B" if component == "vae_decoder" else "vace-1.3B"
    four, five = (forecast(component, task, frame_num=frames) for frames in (13, 17))
    frame = 16 * (48 // 8) * (64 // 8) * 4
    for name in ("peak_device_bytes", "peak_reserved_bytes", "peak_allocated_bytes"):
        assert getattr(five, name) == getattr(four, name) + frame, name
    assert (five.base_bytes, five.host_bytes) == (four.base_bytes, four.host_bytes)
    assert four.seconds is not None
    assert five.seconds is not None
    load = (17 * four.seconds - 13 * five.seconds) / 4  # frames of the video: 1 + 4 + 4 + 4, and 4 more
    assert 0 < load < 0.003, "loading is not scaled"


def test_the_halves_of_the_vae_are_loaded_one_at_a_time() -> None:
    encoder, decoder = forecast("vae_encoder", "vace-1.3B"), forecast("vae_decoder")
    assert encoder.base_bytes < decoder.base_bytes
    assert (encoder.component, decoder.component) == ("vae_encoder", "vae_decoder")
    assert encoder.seconds_per_step is decoder.seconds_per_step is None


def test_clip_is_a_component_of_its_own() -> None:
    found = forecast("image_encoder", "i2v-14B")
    assert found.base_bytes > 0
    assert found.peak_allocated_bytes >= found.base_bytes
    assert found.seconds is not None
    assert 0 < found.seconds < 1


def test_blocks_that_wait_in_ram_are_counted_there() -> None:
    streamed = forecast("dit", strategy=Strategy(load_strategy="block"))
    assert forecast("dit").host_bytes < streamed.host_bytes
    assert streamed.base_bytes < forecast("dit").base_bytes


def test_a_step_is_one_of_as_many_videos_as_are_made_together() -> None:
    """Of three prompts two by two, the last batch is of one."""
    two = Strategy(batch_size=2)
    three, both = (forecast("dit", strategy=two, prompts=prompts) for prompts in (("a", "b", "c"), ("a", "b")))
    assert three.together == both.together == 2
    assert three.seconds_per_step == both.seconds_per_step
    assert three.seconds_per_step != forecast("dit").seconds_per_step
    assert forecast("dit").together == 1


def test_offload_and_a_cap_are_no_question_of_one_component() -> None:
    capped = replace(config(strategy=Strategy(offload=True)), memory_limit_bytes=MIB, device="cuda")
    assert simulate_stage(capped, "dit") == forecast("dit")


def test_two_steps_stand_for_all_and_one_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[RunConfig] = []

    def of_rank(found: RunConfig, component: str, _: int) -> StageForecast:
        asked.append(found)
        return StageForecast(component, 1, 1, 1, 1, 1, None, None)

    monkeypatch.setattr(module, "_of_rank", of_rank)
    for steps in (1, 2, 50):
        simulate_stage(config(sample_steps=steps), "dit")
    assert [found.request.sample_steps for found in asked] == [1, 2, 2]
    assert {found.strategy.offload for found in asked} == {True}
    assert {(found.device, found.memory_limit_bytes) for found in asked} == {("simulated", None)}


def test_of_several_gpus_the_most_of_each_figure_counts_and_all_of_the_hosts_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times: dict[int, tuple[float | None, float | None]] = {0: (1.0, 5.0), 1: (2.0, 4.0)}

    def of_rank(_: RunConfig, component: str, rank: int) -> StageForecast:
        return StageForecast(component, 10 + rank, 20 - rank, 30 + rank, 40 - rank, 100 + rank, *times[rank])

    monkeypatch.setattr(module, "kinds_of", lambda config, component: [(0,), (1, 2)])
    monkeypatch.setattr(module, "_of_rank", of_rank)
    assert simulate_stage(config(), "dit") == StageForecast("dit", 11, 20, 31, 40, 100 + 2 * 101, 2.0, 5.0)
    times[1] = None, 4.0
    found = simulate_stage(config(), "dit")
    assert (found.seconds_per_step, found.seconds) == (None, 5.0)


# --- the pieces --------------------------------------------------------------------------------------------------------------


def test_videos_are_shortened_to_thirteen_frames_with_their_source_and_mask() -> None:
    def pieces(channels: int) -> Any:
        return lambda: (torch.empty(channels, 1 if n == 0 else 4, 48, 64, device="meta") for n in range(6))

    given = Inputs(21, 48, 64, source=pieces(3), mask=pieces(1))
    short = _shortened(given)
    assert short.frames == 13
    assert short.source is not None
    assert short.mask is not None
    assert ([len(p[0]) for p in short.source()], [len(p[0]) for p in short.mask()]) == ([1, 4, 4, 4], [1, 4, 4, 4])
    bare = _shortened(Inputs(17, 48, 64))
    assert (bare.frames, bare.source, bare.mask) == (13, None, None)
    thirteen = Inputs(13, 48, 64, source=pieces(3))
    assert _shortened(thirteen) is thirteen


def span(kind: str, seconds: float | None) -> Span:
    none = Memory(0, 0, 0)
    return Span("x", kind, "vae", none, none, none, seconds=seconds)


def test_loading_counts_as_far_as_it_is_timed_and_stages_by_their_factor() -> None:
    assert _sum([span("load", 1.0), span("stage", 2.0), span("stage", 3.0)], 2.5) == 13.5
    assert _sum([span("load", None), span("stage", 2.0)], 1.0) == 2.0
    assert _sum([span("load", 1.0), span("stage", None)], 1.0) is None


def test_a_prompt_is_taken_to_be_as_long_as_any_can_be() -> None:
    assert {spec.text_len for spec in DIT.values()} == {PROMPT_TOKENS}
