"""The videos of a run that are begun, and when they are written where a later run finds them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from wanvram.engine.devices import Device
from wanvram.errors import OutputError
from wanvram.kept_state import KeptVideo
from wanvram.sampling import SolverState

__all__ = ["Keeper", "Write"]

KEEP_SECONDS = 120.0  # of work that a kill costs at most, unless a step takes longer

Write = Callable[[Sequence[KeptVideo], Sequence[str], float | None], None]


class Keeper:
    """Knows how far each video is: kept by an earlier process and not taken up yet, being denoised, or finished.

    write(videos, prompts, seconds of a step) puts them in the place of what was kept before. every: so many steps; None: about every
    two minutes; 0, or without `write`: never. Copies are made in the host's memory; the device allocates nothing for them.
    """

    def __init__(
        self,
        write: Write | None = None,
        every: int | None = None,
        kept: Sequence[KeptVideo] = (),
        prompts: Sequence[str] = (),
    ) -> None:
        self.prompts = tuple(prompts)  # as they were extended; empty before that
        self.lost: str | None = None  # why the disk did not take it: the run goes on without
        self._write = None if every == 0 else write
        self._every = every
        self._waiting = {video.number: video for video in kept}
        self._running: dict[int, SolverState] = {}
        self._finished: dict[int, KeptVideo] = {}
        self._kept_at = self._step_began = time.monotonic()
        self._step_seconds: float | None = None
        self._is_news = False  # a step since it was last kept

    def steps_kept(self, video: int) -> int:
        """Steps that an earlier process made of a video that this one has not taken up yet."""
        return self._waiting[video].steps if video in self._waiting else 0

    def take_finished(self, videos: int, steps: int) -> list[Tensor]:
        """Host latents of all videos where an earlier process made every step of them; else nothing."""
        if any(self.steps_kept(number) != steps for number in range(videos)):
            return []
        return [torch.from_numpy(self._waiting.pop(number).tensors["latent"]) for number in range(videos)]

    def finished(self, video: int) -> Tensor:
        """The host latent of one whose steps were all made by an earlier process."""
        self._finished[video] = self._waiting.pop(video)
        return torch.from_numpy(self._finished[video].tensors["latent"])

    def begin(self, video: int, noise: Tensor, device: Device) -> SolverState:
        """Where the video goes on: at its noise, or where it was kept."""
        kept = self._waiting.pop(video, None)
        state = SolverState(0, noise)
        if kept is not None:
            tensors = {name: device.upload(torch.from_numpy(array)) for name, array in kept.tensors.items()}
            state = SolverState.of(kept.steps, tensors)
        self._running[video] = state
        return state

    def begin_steps(self) -> None:
        """The next step begins now: what was before it is none of its time."""
        self._step_began = time.monotonic()

    def after_step(self, made: int, device: Device) -> None:
        """made: steps of those that are denoised now."""
        now = time.monotonic()
        self._step_seconds, self._is_news = now - self._step_began, True
        due = now - self._kept_at + self._step_seconds / 2 >= KEEP_SECONDS
        if self._write is not None and (due if self._every is None else made % self._every == 0):
            self._keep(device)
        self.begin_steps()

    def leave(self, videos: Iterable[int]) -> None:
        """The device may have their solvers' tensors back."""
        for video in videos:
            self._running.pop(video, None)

    def finish(self, latents: Mapping[int, Tensor], steps: int, device: Device) -> None:
        """All steps of these videos are made; at once, for what is not written here is lost with the process."""
        if self._write is not None:
            for video, latent in latents.items():
                self._finished[video] = KeptVideo(video, steps, {"latent": device.on_host(latent).numpy()})
            self._keep(device)

    def finish_all(self) -> None:
        """Nothing is written from now on: what was, is what decoding begins with."""
        self._finished.clear()
        self._write = None

    def interrupted(self, device: Device) -> None:
        """The run ends before its time: what is whole is kept."""
        if self._write is not None and self._is_news:
            self._keep(device)

    def _keep(self, device: Device) -> None:
        assert self._write is not None
        running = {number: state for number, state in self._running.items() if state.made}
        if any(state.changing for state in running.values()):
            return
        videos = [*self._finished.values(), *self._waiting.values()]
        for number, state in running.items():
            arrays = {name: device.on_host(tensor).numpy() for name, tensor in state.tensors().items()}
            videos.append(KeptVideo(number, state.made, arrays))
        try:
            self._write(sorted(videos, key=lambda video: video.number), self.prompts, self._step_seconds)
        except OutputError as error:
            self.lost = f"{error}; an interruption costs what was made since it last could be"
        self._kept_at, self._is_news = time.monotonic(), False
