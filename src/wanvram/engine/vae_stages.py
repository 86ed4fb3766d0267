"""The VAE's two jobs in a run, whole or in tiles: frames to latents, latents to finished frames on the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Protocol

import torch

from wanvram.engine.devices import Device
from wanvram.engine.residency import Component
from wanvram.engine.stage_progress import Count
from wanvram.engine.staging import Ferry
from wanvram.models.vae import WanVAE
from wanvram.models.vae_tiles import TilePiece, grid
from wanvram.recorder.recorder import Recorder

__all__ = ["FrameSink", "decode", "encode"]

Counter = Callable[[int, str], Count]
_UNTOLD: Counter = partial(Count, None, "decode")


class FrameSink(Protocol):
    """Takes finished frames, uint8 [t, H, W, 3] on the host, in order, and may work on them beside the device."""

    def write(self, frames: torch.Tensor) -> None: ...

    def finish(self) -> None:
        """Returns when nothing is left to be done for the frames it got."""
        ...


def encode(
    component: Component, device: Device, make_chunks: Callable[[], Iterable[torch.Tensor]], tile: int | None
) -> torch.Tensor:
    """Frames on the device, in pieces [3,t,H,W] -> latent [16,T,h,w]. tile: edge in latent pixels, None: whole frames."""
    vae = _vae(component)
    if tile is None:
        return vae.encode(make_chunks())
    ferry = Ferry(device)
    return vae.encode_tiles(make_chunks, (tile, tile), park=ferry.park, fetch=ferry.fetch)


def decode(
    component: Component,
    device: Device,
    recorder: Recorder,
    latent: torch.Tensor,
    tile: int | None,
    counter: Counter = _UNTOLD,
) -> Iterator[torch.Tensor]:
    """Latent [16,T,h,w] -> frames for a FrameSink, each group as soon as it is complete. A step is a group or a tile.

    counter(total, unit) counts the frames that have come down, or the tiles.
    """
    if tile is None:
        return _whole(_vae(component), device, recorder, latent, counter)
    return _tiled(_vae(component), device, recorder, latent, tile, counter)


def _vae(component: Component) -> WanVAE:
    assert isinstance(component.module, WanVAE)
    return component.module


def _whole(
    vae: WanVAE, device: Device, recorder: Recorder, latent: torch.Tensor, counter: Counter
) -> Iterator[torch.Tensor]:
    """A group is handed over while the next one computes."""
    ferry, decoder = Ferry(device), vae.decode(latent)
    count = counter(_frames(vae, latent), "frames")
    finished: deque[torch.Tensor] = deque()
    for number in range(latent.shape[1]):
        with recorder.span(f"frames {number}", kind="step", component="vae"):
            pixels = _to_uint8(next(decoder))
            finished.append(ferry.park(pixels))
            del pixels
        if number > 0:
            ferry.land(leave=1)
            count.add(len(finished[0]))
            yield finished.popleft()
    ferry.land()
    count.add(sum(map(len, finished)))
    yield from finished


def _frames(vae: WanVAE, latent: torch.Tensor) -> int:
    return vae.group * (latent.shape[1] - 1) + 1


def _tiled(
    vae: WanVAE, device: Device, recorder: Recorder, latent: torch.Tensor, tile: int, counter: Counter
) -> Iterator[torch.Tensor]:
    """A tile runs through all frames before the next begins, so the video is put together on the host in uint8.

    That is 3 bytes a pixel: 214 MiB for 81 frames of 1280x720. The last tile completes group after group.
    """
    groups = latent.shape[1]
    height, width = latent.shape[2] * vae.scale, latent.shape[3] * vae.scale
    video = device.host_empty((_frames(vae, latent), height, width, 3), torch.uint8)
    features, ferry = Ferry(device), Ferry(device)  # two: fetching features must not wait for the pieces on their way
    pieces = vae.decode_tiles(latent, (tile, tile), park=features.park, fetch=features.fetch)
    tiles = len(list(grid(latent.shape[2], latent.shape[3], (tile, tile))))
    count = counter(tiles, "tiles")
    for number in range(tiles):
        with recorder.span(f"tile {number}", kind="step", component="vae"):
            finished: deque[torch.Tensor] = deque()
            for _ in range(groups):
                finished.append(_place(ferry, video, next(pieces)))
                if number == tiles - 1 and len(finished) > 1:
                    ferry.land(leave=1)
                    yield finished.popleft()
        count.add()
    ferry.land()
    yield finished.popleft()


def _place(ferry: Ferry, video: torch.Tensor, piece: TilePiece) -> torch.Tensor:
    """Sends a piece down to its place in the video on the host; returns the view of its frames."""
    part = _to_uint8(piece.pixels)
    count, height, width, _ = part.shape
    frames = video[piece.first_frame : piece.first_frame + count]
    ferry.down(part, frames[:, piece.top : piece.top + height, piece.left : piece.left + width])
    return frames


def _to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """[3, t, H, W] float in [-1, 1], overwritten -> uint8 [t, H, W, 3]; truncating as the official video writer does."""
    frames = frames.clamp_(-1.0, 1.0).add_(1.0).mul_(127.5)
    return frames.permute(1, 2, 3, 0).to(torch.uint8, memory_format=torch.contiguous_format)
