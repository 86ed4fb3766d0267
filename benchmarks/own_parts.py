"""wanvram's own transformer and VAE to be measured beside others': loaded and called by a run's own functions, so that what is
measured is what a user gets. Attention is what a run on this card would choose; weights are random, on the CPU those of a tiny model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from wanvram.config import RunConfig, Strategy
from wanvram.engine.components import Parts
from wanvram.engine.denoising import transformer, velocities_of
from wanvram.engine.shared_stages import SharedStages
from wanvram.engine.vae_stages import decode
from wanvram.media.inputs import prepare_inputs
from wanvram.models.dit import Condition
from wanvram.recorder.recorder import Recorder
from wanvram.request import Request
from wanvram.run.execute import make_device
from wanvram.run.weights import GeneratedWeights
from wanvram.spans import Memory, Span

__all__ = ["Call", "OwnParts", "Unrecorded"]

Call = Callable[[int], None]  # on the first so many latent frames
PROMPT_TOKENS = 512


class Unrecorded(Recorder):
    """Asks the device nothing: no synchronisation, no clock, and PyTorch's peak counters are not reset."""

    @contextmanager
    def span(self, name: str, *, kind: str, component: str | None = None, part: str = "") -> Iterator[Span]:
        nothing = Memory(0, 0, None)
        yield Span(name, kind, component, nothing, nothing, nothing, part=part)


class OwnParts:
    """The components of a text-to-video task whose latent has this shape: frames, rows, columns. where: cuda or cpu."""

    def __init__(self, task: str, shape: tuple[int, int, int], strategy: Strategy, where: str) -> None:
        frames, rows, columns = shape
        request = Request.for_task(task, size=f"{8 * columns}*{8 * rows}", frame_num=4 * frames - 3, base_seed=1)
        weights = "tiny" if where == "cpu" else "random"
        self.config = RunConfig("own parts", "", where, request, strategy, weights=weights)
        self.device = make_device(self.config)
        self.inputs, _ = prepare_inputs(request, simulated=False, real_weights=False)
        self.parts = Parts(self.config, self.device, GeneratedWeights(1, tiny=where == "cpu"))

    def noise(self) -> torch.Tensor:
        return torch.randn(self.inputs.noise_shape, device=self.device.torch_device)

    def denoiser(self, timestep: int, *, guided: bool = True) -> Call:
        """Both passes of a step, and guided: their combination."""
        component = self.parts.load("dit")
        place, latent = self.device.torch_device, self.noise()
        shape = PROMPT_TOKENS, self.parts.specs.dit.text_dim
        texts = [torch.randn(shape, device=place, dtype=torch.bfloat16) for _ in ("positive", "negative")]
        conditions = [Condition(text) for text in texts]
        (time,), prepared = transformer(component).prepare([timestep], conditions, walk=component.walk_embedders)
        negative = prepared.pop() if guided else None

        def step(frames: int) -> None:
            with velocities_of(self.config, self.device, self.inputs, component, negative) as velocities:
                for condition in prepared:
                    velocities([latent[:, :frames]], time, [condition])

        return step

    def decoder(self) -> Call:
        """Latents to uint8 frames on the host, whole or in tiles as the strategy says."""
        component, latent = self.parts.load("vae_decoder"), self.noise()
        ranks, recorder = SharedStages(self.device), Unrecorded(self.device.meter, None, None)

        def run(frames: int) -> None:
            for _ in decode(component, ranks, recorder, latent[:, :frames], self.config.strategy.vae_tile):
                """Frames arrive."""

        return run
