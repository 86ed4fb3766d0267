"""The planner's question answered by the simulated device: one component of a run, alone, from its loading to its release."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import islice

import torch

from wanvram.config import RunConfig
from wanvram.engine.components import Parts
from wanvram.engine.conditions import Frames, Inputs
from wanvram.engine.devices import SimulatedDevice
from wanvram.engine.pipeline import Pipeline
from wanvram.knobs import BATCH_SIZE, OFFLOAD
from wanvram.planner.forecasts import StageForecast, summed
from wanvram.predict.ranks import kinds_of
from wanvram.predict.simulate import simulated_device
from wanvram.recorder.recorder import Recorder
from wanvram.run.execute import assembled
from wanvram.spans import Span

__all__ = ["simulate_stage"]

# The first frame's, the second, and two that stand for all others; with one a tiled decode of 81 frames is 8.5 % too long, not 5.5.
SHORT_LATENTS = 4
_FIGURES = ("peak_device_bytes", "peak_reserved_bytes", "peak_allocated_bytes", "base_bytes")
PROMPT_TOKENS = 512  # the longest context: what a prompt can cost at most


def simulate_stage(config: RunConfig, component: str) -> StageForecast:
    """Peaks, base and host memory, and predicted seconds of `component` (planner.forecasts.components_of names it); of several GPUs
    those of the one that takes most of each, and all of the host memory.

    Shortened where a run repeats itself: two denoising steps, and for the VAE four latent frames, whose time is scaled and to
    whose memory the rest of the latent is added. What a plan settles on is simulated whole (predict.plan).
    """
    strategy = OFFLOAD.set(config.strategy, True)
    request = replace(config.request, sample_steps=min(config.request.sample_steps, 2))
    config = replace(config, device="simulated", memory_limit_bytes=None, strategy=strategy, request=request)
    kinds = kinds_of(config, component)
    found = [_of_rank(config, component, ranks[0]) for ranks in kinds]
    most = {name: max(getattr(stage, name) for stage in found) for name in _FIGURES}
    host = sum(stage.host_bytes * len(ranks) for stage, ranks in zip(found, kinds, strict=True))
    times = [[getattr(stage, name) for stage in found] for name in ("seconds_per_step", "seconds")]
    step, seconds = (None if None in known else max(known) for known in times)
    return replace(found[0], **most, host_bytes=host, seconds_per_step=step, seconds=seconds)


def _of_rank(config: RunConfig, component: str, rank: int) -> StageForecast:
    device = simulated_device(config, rank=rank, unlimited=True)
    memory = device.memory
    pipeline = assembled(device, config, Recorder(memory, None, None)).pipeline
    inputs = pipeline.inputs
    name = config.request.facts.family.component_of(component).name
    short = pipeline.inputs = _shortened(inputs) if name == "vae" else inputs
    with device.session():
        memory.load_everything()
        _run(component, pipeline, Parts(config, device, pipeline.weights), device)
    spans = pipeline.recorder.spans
    (record,) = [r for r in pipeline.records() if r.name == name]
    full, part = inputs.noise_shape[1], short.noise_shape[1]
    longer = inputs.frames / short.frames  # of the video: the first latent frame is one, each other several
    together = BATCH_SIZE.of(config.strategy)
    channels, _, rows, columns = inputs.noise_shape
    missing = (full - part) * channels * rows * columns * torch.float32.itemsize
    stages = [span for span in spans if span.part != "denoise"]
    whole_batches = [
        span for span in spans if span.part == "denoise" and span.videos == together
    ]  # the last may be smaller
    steps = [step for batch in whole_batches for step in batch.children]
    return StageForecast(
        component=component,
        peak_device_bytes=max(span.peak.device_bytes or 0 for span in spans) + missing,
        peak_reserved_bytes=max(span.peak.reserved_bytes for span in spans) + missing,
        peak_allocated_bytes=max(span.peak.allocated_bytes for span in spans) + missing,
        base_bytes=record.base_bytes,
        host_bytes=memory.host_peak_bytes,
        seconds_per_step=steps[-1].seconds if steps else None,
        seconds=_sum(stages, longer),
        together=together,
    )


def _shortened(inputs: Inputs) -> Inputs:
    """The first video frames of what is given, 13 of Wan2.1."""
    frames = inputs.geometry.video_frames(SHORT_LATENTS)
    if inputs.frames <= frames:
        return inputs

    def first(pieces: Frames | None) -> Frames | None:
        return None if pieces is None else lambda: islice(pieces(), SHORT_LATENTS)  # a piece is a latent frame's

    return replace(inputs, frames=frames, source=first(inputs.source), mask=first(inputs.mask))


def _run(component: str, pipeline: Pipeline, parts: Parts, device: SimulatedDevice) -> None:
    """The component's stages, with what earlier stages hand to it held on the device."""
    pipeline.prompts = list(pipeline.config.request.all_prompts())
    if component == "text_encoder":
        pipeline.encode_text(parts)
        return
    width = parts.specs.text_encoder.dim
    contexts = [device.empty((PROMPT_TOKENS, width), torch.bfloat16) for _ in pipeline.texts()]
    if component == "image_encoder":
        pipeline.encode_image(parts)
    elif component == "vae_encoder":
        pipeline.encode_video(parts)
    elif component == "dit":
        plan = pipeline.prepare(parts, contexts, pipeline.stand_in_pictures(parts))
        del contexts
        pipeline.denoise_all(parts, plan)
    else:
        del contexts
        latents = [device.empty(pipeline.inputs.noise_shape, torch.float32) for _ in pipeline.config.videos()]
        pipeline.decode_all(parts, latents, lambda index: nullcontext())


def _sum(spans: list[Span], factor: float) -> float | None:
    """Stages times `factor`, and loading as far as it is timed; None if the time of a stage is unknown."""
    stages = summed(span.seconds for span in spans if span.kind != "load")
    return None if stages is None else sum(s.seconds or 0.0 for s in spans if s.kind == "load") + factor * stages
