"""Videos denoised together are those that are made one after the other, bit for bit; the memory they take is the predicted one."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.integration.test_strategies import FRAMES, inputs_of
from wanvram.config import Request, RunConfig, Strategy
from wanvram.engine.pipeline import Pipeline
from wanvram.engine.residency import Component
from wanvram.recorder.recorder import Recorder
from wanvram.run.execute import make_device
from wanvram.run.weights import choose_weights

# t2i is t2v with one frame; the others have conditions that all videos of a run share.
TASKS = ("t2v-1.3B", "t2i-14B", "i2v-14B", "flf2v-14B", "vace-1.3B")
PROMPTS = ("a cat", "two dogs on a boat", "", "rain")
Named = tuple[tuple[str, Any], ...]


class _Latents(Pipeline):
    """Keeps every latent that the VAE is given, in order."""

    latents: tuple[torch.Tensor, ...] = ()

    def _decode(self, component: Component, latent: torch.Tensor, sink: Any, stage: str) -> None:
        self.latents += (latent.clone(),)


def latents_of(task: str, strategy: Named, request: Named) -> tuple[torch.Tensor, ...]:
    frames = 1 if task.startswith("t2i") else FRAMES
    asked = Request.for_task(task, frame_num=frames, **({"sample_steps": 3, "base_seed": 3} | dict(request)))
    how = Strategy(**({"precision": "fp32"} | dict(strategy)))
    config = RunConfig(name="x", description="", device="cpu", request=asked, strategy=how, weights="tiny")
    device = make_device(config)
    weights = choose_weights("tiny", simulated=False, task=task, seed=3)
    pipeline = _Latents(config, device, Recorder(device.meter, None, None), weights, inputs_of(task, frames))
    with device.session():
        pipeline.run(lambda index: nullcontext())
    return pipeline.latents


@cache
def alone(task: str, prompt: str, seed: int, strategy: Named, request: Named) -> torch.Tensor:
    """The latent of a run of its own."""
    (latent,) = latents_of(task, strategy, (("prompt", prompt), ("base_seed", seed), *request))
    return latent


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, dict[str, Any], Named]:
    """How many videos, batch_size and micro_batch_size, and what else changes the order of the computation."""
    videos = draw(st.integers(1, len(PROMPTS)))
    together = draw(st.integers(1, videos))
    sizes = {"batch_size": together, "micro_batch_size": draw(st.sampled_from((None, *range(1, together + 1))))}
    chosen: dict[str, Any] = {
        "load_strategy": draw(st.sampled_from(("full", "block"))),
        "cfg": draw(st.sampled_from(("sequential", "joint"))),
        "offload": draw(st.booleans()),
        "attention_slicing": draw(st.booleans()),
    }
    if chosen["load_strategy"] == "block":
        chosen |= {"weights_in": draw(st.sampled_from(("pinned", "disk"))), "resident_blocks": draw(st.integers(0, 3))}
    return videos, sizes, tuple(chosen.items())


REQUESTS = st.fixed_dictionaries(
    {"sample_guide_scale": st.sampled_from((1.0, 5.0)), "sample_solver": st.sampled_from(("unipc", "dpm++"))}
).map(lambda given: tuple(given.items()))


@settings(max_examples=12)
@given(task=st.sampled_from(TASKS), batch=batches(), request=REQUESTS)
def test_prompts_denoised_together_give_the_latents_of_runs_of_their_own(
    task: str, batch: tuple[int, dict[str, Any], Named], request: Named
) -> None:
    videos, sizes, strategy = batch
    prompts = PROMPTS[:videos] if videos > 1 else ()
    sizes = sizes if prompts else {}  # of one prompt, videos differ by their seed
    together = latents_of(task, (*strategy, *sizes.items()), (("prompts", prompts), ("base_seed", 5), *request))
    assert len(together) == videos
    for prompt, latent in zip(prompts or ("",), together, strict=True):
        assert torch.equal(latent, alone(task, prompt, 5, strategy, request))


@settings(max_examples=8)
@given(task=st.sampled_from(TASKS), batch=batches(), request=REQUESTS)
def test_seeds_of_one_prompt_give_the_latents_of_runs_with_the_seeds_that_follow(
    task: str, batch: tuple[int, dict[str, Any], Named], request: Named
) -> None:
    _, sizes, strategy = batch
    together = latents_of(task, (*strategy, *sizes.items()), (("prompt", PROMPTS[0]), ("base_seed", 3), *request))
    assert len(together) == sizes["batch_size"]
    for number, latent in enumerate(together):
        assert torch.equal(latent, alone(task, PROMPTS[0], 3 + number, strategy, request))


def test_videos_of_one_batch_differ() -> None:
    first, second = latents_of("t2v-1.3B", (("batch_size", 2),), (("prompt", "a cat"),))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("together", "at_once", "passes"), [(1, 1, 8), (4, None, 8), (4, 2, 4), (4, 3, 4), (4, 4, 2)])
def test_weights_are_walked_once_for_as_many_videos_as_pass_together(
    together: int, at_once: int | None, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two forwards (guidance) of four videos in one step."""
    walks: list[str] = []
    walk = Component.walk

    def counted(self: Component, units: Any) -> Any:
        walks.append(self.name)
        return walk(self, units)

    monkeypatch.setattr(Component, "walk", counted)
    sizes = (("load_strategy", "block"), ("batch_size", together), ("micro_batch_size", at_once))
    latents_of("t2v-1.3B", sizes, (("prompts", PROMPTS), ("sample_steps", 1)))
    assert walks.count("dit") == passes
