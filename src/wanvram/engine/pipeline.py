"""Text to video as a sequence of stages: load, encode_text, denoise (step by step), decode. Executes a Strategy, never chooses.

A component enters the device in a `load` stage and, with `offload`, leaves it after its last use; without, all components are loaded
first and stay, as the official script does with `--offload_model False`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from wanvram.config import RunConfig
from wanvram.engine.components import Parts, Weights
from wanvram.engine.devices import Device
from wanvram.engine.residency import Component
from wanvram.models.dit import Condition
from wanvram.record import ComponentRecord
from wanvram.recorder.recorder import Recorder
from wanvram.sampling import solve, timesteps_and_sigmas
from wanvram.tasks import latent_shape

__all__ = ["FrameSink", "Pipeline", "rows_per_chunk"]

TARGET_ROWS = (
    8192  # 8192 rows x 5120 already fill an H200's matrix units: 1.93 ms for 9450 rows against 1.86 expected from 75600
)
HEAD_GROUPS = 4  # attention_slicing: on an H200 4 groups of 10 heads cost 2 % more time than one of 40 (h200.md)
SIMULATED_STEPS = 4  # first, second, one of the steady state, last: all others repeat the third


class FrameSink(Protocol):
    """Takes finished frames, uint8 [t, H, W, 3] on the host, in order."""

    def write(self, frames: torch.Tensor) -> None: ...


def rows_per_chunk(tokens: int, asked: int | None) -> int:
    """Rows of the sequence that go through a block's row-wise work at once: `asked`, or equal chunks near TARGET_ROWS."""
    if asked is not None:
        return asked
    chunks = max(1, round(tokens / TARGET_ROWS))
    return math.ceil(tokens / chunks)


@dataclass
class _Loaded:
    component: Component
    base_bytes: int
    host_bytes: int


@dataclass
class Pipeline:
    """One run of one request. `run(sink)` yields nothing; everything it learned is in the recorder and `records()`."""

    config: RunConfig
    device: Device
    recorder: Recorder
    weights: Weights
    on_step: Callable[[int, int], None] | None = None
    trace_step: Callable[[], None] | None = None
    _loaded: dict[str, _Loaded] = field(default_factory=dict)
    _finished: list[ComponentRecord] = field(default_factory=list)

    def run(self, sink: FrameSink | None) -> None:
        parts = Parts(self.config, self.device, self.weights)
        names = ["text_encoder", "vae", "dit"]
        if not self.config.strategy.offload:
            for name in names:
                self._load(name, parts)
        contexts = self._encode_text(parts)
        latent = self._denoise(parts, contexts)
        del contexts
        self._decode(parts, latent, sink)

    def records(self) -> list[ComponentRecord]:
        """One record per component: parameters, base memory at loading, activation peak over its stages."""
        activation: dict[str, int] = {}
        for span in self.recorder.spans:
            if span.component and span.kind == "stage":
                activation[span.component] = max(activation.get(span.component, 0), span.activation_bytes)
        return [replace(c, activation_bytes=activation.get(c.name, 0)) for c in self._finished]

    def resident(self) -> list[tuple[str, int]]:
        """Components on the device now, with their base memory."""
        return [(f"weights of {name}", loaded.base_bytes) for name, loaded in self._loaded.items()]

    # --- components ----------------------------------------------------------------------------------------------------------

    def _load(self, name: str, parts: Parts) -> None:
        with self.recorder.span(f"load {name}", kind="load", component=name) as span:
            component = parts.load(name)
        base = span.end.allocated_bytes - span.start.allocated_bytes
        host = component.weight_bytes - base if component.weight_bytes > base else 0
        self._loaded[name] = _Loaded(component, base, host)
        self._finished.append(ComponentRecord(name, component.parameters, base, host, 0))

    def _use(self, name: str, parts: Parts) -> Component:
        if name not in self._loaded:
            self._load(name, parts)
        return self._loaded[name].component

    def _done_with(self, name: str) -> None:
        if self.config.strategy.offload:
            self._loaded.pop(name).component.release()
            self.device.empty_cache()

    # --- stages --------------------------------------------------------------------------------------------------------------

    def _encode_text(self, parts: Parts) -> list[torch.Tensor]:
        """Prompt and negative prompt -> two contexts [L, text_dim] on the device."""
        component = self._use("text_encoder", parts)
        request = self.config.request
        with self.recorder.span("encode_text", kind="stage", component="text_encoder"):
            contexts = [parts.encode(component, text) for text in (request.prompt, request.negative_prompt)]
        self._done_with("text_encoder")
        return contexts

    def _denoise(self, parts: Parts, contexts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Noise -> latent [16, F, h, w] float32."""
        component = self._use("dit", parts)
        request = self.config.request
        steps, skipped = request.sample_steps, 0
        if self.device.kind == "simulated" and steps > SIMULATED_STEPS:
            steps, skipped = SIMULATED_STEPS, steps - SIMULATED_STEPS
        schedule = timesteps_and_sigmas(request.sample_solver, steps, request.sample_shift)
        with self.recorder.span("denoise", kind="stage", component="dit"):
            noise = self._noise()
            trajectory = solve(request.sample_solver, self._velocity(component, contexts, noise.shape), noise, schedule)
            del noise
            latent = self._steps(trajectory, component, steps, skipped)
            del trajectory  # before the weights go: close() alone keeps its tensors until later on Python 3.12
        self._done_with("dit")
        return latent

    def _noise(self) -> torch.Tensor:
        request = self.config.request
        shape = latent_shape(request.frame_num, request.height, request.width)
        generator = self.device.generator(request.base_seed)
        return torch.randn(shape, dtype=torch.float32, device=self.device.torch_device, generator=generator)

    def _velocity(
        self, component: Component, contexts: Sequence[torch.Tensor], shape: Sequence[int]
    ) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """Guided velocity v = uncond + g (cond - uncond) in float32, from one joint or two sequential forwards."""
        request, strategy = self.config.request, self.config.strategy
        dit = component.module
        rows = rows_per_chunk(shape[1] * shape[2] * shape[3] // 4, strategy.rows_per_chunk)
        heads = max(1, dit.spec.num_heads // HEAD_GROUPS) if strategy.attention_slicing else None  # type: ignore[union-attr, operator]
        conditions = [Condition(context=c) for c in contexts]
        groups = [conditions] if strategy.cfg == "joint" else [[c] for c in conditions]

        def velocity(latent: torch.Tensor, timestep: int) -> torch.Tensor:
            outputs: list[torch.Tensor] = []
            for group in groups:
                outputs += dit(latent, timestep, group, rows_per_chunk=rows, heads_per_group=heads, walk=component.walk)
            cond, uncond = outputs
            return uncond.add_(cond.sub_(uncond), alpha=request.sample_guide_scale)

        return velocity

    def _steps(
        self, trajectory: Iterator[torch.Tensor], component: Component, steps: int, skipped: int
    ) -> torch.Tensor:
        """Advances the solver `steps` times under one span each; block spans on every `log_interval`-th step."""
        interval = self.config.measurement.log_interval
        for index in range(steps):
            detailed = self.config.measurement.profile_memory and index % interval == 0
            component.observe(self._block_span if detailed else None)
            number = index if index < steps - 1 else index + skipped
            with self.recorder.span(f"step {number}", kind="step", component="dit") as span:
                latent = next(trajectory)
            if skipped and index == steps - 2:
                span.repeats = skipped + 1
            if self.on_step:
                self.on_step(number + 1, steps + skipped)
            if self.trace_step:
                self.trace_step()
        component.observe(None)
        return latent

    def _block_span(self, index: int) -> AbstractContextManager[object]:
        return self.recorder.span(f"block {index}", kind="block", component="dit")

    def _decode(self, parts: Parts, latent: torch.Tensor, sink: FrameSink | None) -> None:
        """Latent -> frames, handed to the sink as they are finished."""
        component = self._use("vae", parts)
        with self.recorder.span("decode", kind="stage", component="vae"):
            decoder = component.module.decode(latent)  # type: ignore[operator]
            for number in range(latent.shape[1]):
                with self.recorder.span(f"frames {number}", kind="step", component="vae"):
                    pixels = _to_uint8(next(decoder))
                    host = self.device.download(pixels)
                    del pixels
                if sink is not None:
                    sink.write(host)
            del decoder
        self._done_with("vae")


def _to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """[3, t, H, W] float in [-1, 1], overwritten -> uint8 [t, H, W, 3]; truncating as the official video writer does."""
    frames = frames.clamp_(-1.0, 1.0).add_(1.0).mul_(127.5)
    return frames.permute(1, 2, 3, 0).to(torch.uint8, memory_format=torch.contiguous_format)
