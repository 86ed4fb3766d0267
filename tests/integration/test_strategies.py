"""Every lossless strategy gives the plain resident run's latent bit for bit, and its frames within one grey level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from wanvram.config import Request, RunConfig, Strategy
from wanvram.engine.components import Parts
from wanvram.engine.pipeline import Pipeline
from wanvram.recorder.recorder import Recorder
from wanvram.run.execute import make_device
from wanvram.run.weights import choose_weights

PLAIN: dict[str, Any] = {"load_strategy": "full", "offload": False}
LOSSLESS: list[dict[str, Any]] = [
    {"load_strategy": "block", "offload": True},
    {"load_strategy": "full", "offload": True},
    {"load_strategy": "block", "offload": False, "cfg": "joint"},
    {"load_strategy": "full", "offload": True, "t5_cpu": True},
    {"load_strategy": "full", "rows_per_chunk": 100},
    {"load_strategy": "full", "attention_slicing": True},
    {"load_strategy": "block", "offload": True, "attention_slicing": True, "rows_per_chunk": 37, "cfg": "joint"},
]


class _Latent(Pipeline):
    """Keeps the latent that the VAE is given."""

    latent: torch.Tensor

    def _decode(self, parts: Parts, latent: torch.Tensor, sink: Any) -> None:
        self.latent = latent.clone()


class _Frames:
    def __init__(self) -> None:
        self.frames: list[torch.Tensor] = []

    def write(self, frames: torch.Tensor) -> None:
        self.frames.append(frames.clone())


def build(kind: type[Pipeline], frames: int, strategy: dict[str, Any]) -> Pipeline:
    request = Request.for_task("t2v-1.3B", frame_num=frames, sample_steps=2, base_seed=3, prompt="a cat")
    how = Strategy(precision="fp32", **strategy)
    config = RunConfig(name="x", description="", device="cpu", request=request, strategy=how, weights="tiny")
    device = make_device(config)
    return kind(config, device, Recorder(device.meter, None, None), choose_weights("tiny", simulated=False, seed=3))


def latent_of(strategy: dict[str, Any]) -> torch.Tensor:
    pipeline = build(_Latent, 5, strategy)
    assert isinstance(pipeline, _Latent)
    with pipeline.device.session():
        pipeline.run(None)
    return pipeline.latent


@pytest.fixture(scope="module")
def plain_latent() -> torch.Tensor:
    return latent_of(PLAIN)


@pytest.mark.parametrize("strategy", LOSSLESS, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()))
def test_a_lossless_strategy_gives_the_latent_of_the_resident_run(
    strategy: dict[str, Any], plain_latent: torch.Tensor
) -> None:
    latent = latent_of(strategy)
    error = ((latent - plain_latent).abs().max() / plain_latent.abs().max()).item()
    # Chunks and head groups let the CPU library choose other product kernels; everything else is bit for bit.
    reordered = "rows_per_chunk" in strategy or "attention_slicing" in strategy
    assert error <= (1e-5 if reordered else 0.0)


def frames_of(strategy: dict[str, Any]) -> Sequence[torch.Tensor]:
    pipeline = build(Pipeline, 1, strategy)
    sink = _Frames()
    with pipeline.device.session():
        pipeline.run(sink)
    return sink.frames


def test_streaming_and_offload_give_the_frames_of_the_resident_run() -> None:
    plain, streamed = frames_of(PLAIN), frames_of({"load_strategy": "block", "offload": True})
    assert [f.shape for f in plain] == [(1, 480, 832, 3)]
    for a, b in zip(plain, streamed, strict=True):
        assert (a.int() - b.int()).abs().max() <= 1
