"""The VAE's two jobs in a run, whole or in tiles: frames to latents, latents to finished frames on the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol

import torch

from wanvram.engine.devices import Device
from wanvram.engine.repeats import Repeats
from wanvram.engine.residency import Component
from wanvram.engine.shared_stages import SharedStages
from wanvram.engine.stage_progress import Count
from wanvram.engine.staging import Ferry
from wanvram.models.vae import WanVAE
from wanvram.models.vae_tiles import grid
from wanvram.recorder.recorder import Recorder

__all__ = ["FrameSink", "decode", "encode"]

Counter = Callable[[int, str], Count]
_UNTOLD: Counter = partial(Count, None, "decode")


class FrameSink(Protocol):
    """Takes finished frames, uint8 [t, H, W, 3] on the host, in order, and may work on them beside the device."""

    def write(self, frames: torch.Tensor) -> None: ...

    def finish(self) -> None:
        """Returns when nothing is left to be done for the frames it got."""


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
    ranks: SharedStages,
    recorder: Recorder,
    latent: torch.Tensor,
    tile: int | None,
    counter: Counter = _UNTOLD,
) -> Iterator[torch.Tensor]:
    """Latent [16,T,h,w] -> frames for a FrameSink, each group as soon as it is complete. A step is a group or a tile.

    counter(total, unit) counts the frames that have come down, or the tiles. Of several ranks each decodes its tiles, and those
    that are not the first send them to it.
    """
    vae, device = _vae(component), ranks.device
    if tile is None:
        return _whole(vae, device, recorder, latent, counter)
    if ranks.is_first:
        return _tiled(_Tiles(vae, device, recorder, latent, tile, ranks), counter)
    return _tiles_sent(_Tiles(vae, device, recorder, latent, tile, ranks), counter)


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


class _Tiles:
    """The tiles of a latent's decoding, and the way down of those that this rank makes."""

    def __init__(
        self, vae: WanVAE, device: Device, recorder: Recorder, latent: torch.Tensor, tile: int, ranks: SharedStages
    ) -> None:
        self.device, self.recorder, self.ranks = device, recorder, ranks
        self.areas = [area.scaled(vae.scale) for area in grid(latent.shape[2], latent.shape[3], (tile, tile))]
        self.mine = ranks.my_tiles(len(self.areas))
        self.groups, self.frames = latent.shape[1], _frames(vae, latent)
        self.size = latent.shape[2] * vae.scale, latent.shape[3] * vae.scale
        # two: fetching features must not wait for the pieces on their way
        features, self.ferry = Ferry(device), Ferry(device)
        self.features, self.left_out, self.leaves_out = features, 0, False
        self.pieces = vae.decode_tiles(latent, (tile, tile), features.park, features.fetch, self.mine, self.visit)

    def visit(self, pictures: Sequence[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
        """The latent frames of a tile; a simulation leaves out those that would do what those before them did."""
        repeats, index = Repeats(self.device, ["first", *["later"] * (len(pictures) - 1)], periods=range(1, 5)), 0
        while index < len(pictures):
            self.left_out = self.leave_out(repeats, index) if self.leaves_out else 0
            index += self.left_out
            yield index, pictures[index]
            index += 1

    def leave_out(self, repeats: Repeats, index: int) -> int:
        """Latent frames from `index` on that are left out."""
        count, seconds = repeats.leave_out(index, [*self.features.marks(), *self.ferry.marks()])
        if count:
            self.features.skip(seconds)
            self.ferry.skip(seconds)
        return count

    def groups_of_tile(
        self, frames: torch.Tensor, corner: tuple[int, int], *, shown: bool = False
    ) -> Iterator[torch.Tensor]:
        """Places the pieces of the next tile one after another. shown: each of them is, so none is left out."""
        self.leaves_out, done = self.device.repeats_itself and not shown, 0
        while done < self.groups:
            group = self.place(frames, corner)
            done += 1 + self.left_out
            yield group

    def place(self, frames: torch.Tensor, corner: tuple[int, int]) -> torch.Tensor:
        """Sends the next piece down to its place in frames [t,H,W,3] on the host, whose first pixel is `corner`; returns its frames."""
        piece = next(self.pieces)
        part = _to_uint8(piece.pixels)
        count, height, width, _ = part.shape
        top, left = piece.top - corner[0], piece.left - corner[1]
        group = frames[piece.first_frame : piece.first_frame + count]
        self.ferry.down(part, group[:, top : top + height, left : left + width])
        return group

    def empty(self, size: tuple[int, int]) -> torch.Tensor:
        return self.device.host_empty((self.frames, *size, 3), torch.uint8)


def _tiled(tiles: _Tiles, counter: Counter) -> Iterator[torch.Tensor]:
    """A tile runs through all frames before the next begins, so the video is put together on the host in uint8.

    That is 3 bytes a pixel: 214 MiB for 81 frames of 1280x720. The last tile completes group after group, unless others send it.
    """
    video, count = tiles.empty(tiles.size), counter(len(tiles.mine), "tiles")
    total = len(tiles.areas)
    for number in tiles.mine:
        with tiles.recorder.span(f"tile {number}", kind="step", component="vae"):
            finished: deque[torch.Tensor] = deque()
            for group in tiles.groups_of_tile(video, (0, 0), shown=number == total - 1):
                finished.append(group)
                if number == total - 1 and len(finished) > 1:
                    tiles.ferry.land(leave=1)
                    yield finished.popleft()
            for rank, other in tiles.ranks.others_tiles(number, total):
                _receive(tiles, video, rank, other)
        count.add()
    tiles.ferry.land()
    yield from finished


def _receive(tiles: _Tiles, video: torch.Tensor, rank: int, number: int) -> None:
    area = tiles.areas[number]
    frames = tiles.empty(area.size)
    tiles.ranks.world.receive(frames, rank)
    rows, columns = area
    tiles.device.copy_on_host(video[:, rows.start : rows.stop, columns.start : columns.stop], frames)


def _tiles_sent(tiles: _Tiles, counter: Counter) -> Iterator[torch.Tensor]:
    """No frames here: each tile travels while the next one is made."""
    count, travelling = counter(len(tiles.mine), "tiles"), None
    for number in tiles.mine:
        area = tiles.areas[number]
        with tiles.recorder.span(f"tile {number}", kind="step", component="vae"):
            frames = tiles.empty(area.size)
            for _ in tiles.groups_of_tile(frames, (area.rows.start, area.columns.start)):
                """Placed, and shown by the rank that has all tiles."""
            tiles.ferry.land()
            if travelling is not None:
                tiles.ranks.world.wait(travelling)
            travelling = tiles.ranks.world.send(frames, 0)
        count.add()
    tiles.ranks.world.wait(travelling)
    yield from ()


def _to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """[3, t, H, W] float in [-1, 1], overwritten -> uint8 [t, H, W, 3]; truncating as the official video writer does."""
    frames = frames.clamp_(-1.0, 1.0).add_(1.0).mul_(127.5)
    return frames.permute(1, 2, 3, 0).to(torch.uint8, memory_format=torch.contiguous_format)
