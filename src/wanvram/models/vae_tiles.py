"""Exact spatial tiles of the VAE: which part of the picture a tile must know, layer by layer, and what it then drops.

A tile is worked out backwards from what is wanted of it: a convolution needs one pixel more on every side, an upsampling
half of that, a convolution with stride 2 twice of that and one. Forwards every convolution leaves out the outermost
row or column where its zero padding stood for a neighbour (`vae_blocks.Cut`), so halos shrink as they are used up and
nothing is blended: at the picture's border, and only there, padding is what the whole picture has too.

Halo of the full model on an inner side: decoding, 7 latent pixels, then 12, 10 and 7 behind the three upsamplings, 1 at
the head; encoding, 29 pixels of video at the top and left, 36 at the bottom and right. Activation peak and additional
multiplications for 81 frames in float32, simulated, with the features between the phases on the host (192 and 443 MiB
there; on the device they come on top):

    video      tiles  latent rows x columns   decode             encode
    832x480    1      whole, without tiles    3.79 GiB           2.61 GiB
               2      60 x 52                 1.95 GiB   2.8 %   1.40 GiB   4.8 %
               4      30 x 52                 1.11 GiB   9.0 %   0.80 GiB  14.5 %
               6      30 x 35                 0.80 GiB  12.4 %   0.68 GiB  19.9 %
    1280x720   1      whole, without tiles    8.55 GiB           5.82 GiB
               2      90 x 80                 4.24 GiB   1.2 %   2.94 GiB   2.4 %
               4      45 x 80                 2.29 GiB   4.8 %   1.68 GiB   8.3 %
               8      45 x 40                 1.25 GiB   9.0 %   1.01 GiB  15.1 %

On an H200 the result is the same to the bit without TF32; with it, which is PyTorch's choice for convolutions, cuDNN takes
other kernels for other shapes: up to 1e-3 of the largest value. Time of a decode of 81 frames, warm, against the whole
picture's (benchmarks/2026-11-30_h200_tiled_vae_2.json): 1.16 in 2 tiles, 1.13 in 4, 1.75 in 8 at 832x480; 1.13 in 4, 1.31 in 8,
1.51 in 18 at 1280x720.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn

from wanvram.errors import InputError
from wanvram.models.vae_blocks import Conv, Cut, Downsample, LastConv, ResidualBlock, Upsample

__all__ = ["Area", "Halos", "Move", "TilePiece", "as_frame", "as_rows", "grid", "stay"]

Move = Callable[[Tensor], Tensor]  # one tensor from the device to where it is kept, or back


def stay(x: Tensor) -> Tensor:
    """The move that leaves a tensor where it is."""
    return x


class TilePiece(NamedTuple):
    """A finished part of the video: pixels [3,t,H_tile,W_tile] from frame `first_frame`, row `top`, column `left` on."""

    first_frame: int
    top: int
    left: int
    pixels: Tensor


class Stretch(NamedTuple):
    """Positions start..stop of `extent`, in one direction."""

    start: int
    stop: int
    extent: int

    def grown(self) -> Stretch:
        """What a convolution of 3 reads."""
        return Stretch(max(self.start - 1, 0), min(self.stop + 1, self.extent), self.extent)

    def halved(self) -> Stretch:
        """Of the picture with half the extent, what covers this when doubled."""
        return Stretch(self.start // 2, -(-self.stop // 2), self.extent // 2)

    def scaled(self, factor: int) -> Stretch:
        return Stretch(self.start * factor, self.stop * factor, self.extent * factor)

    def strided(self) -> Stretch:
        """What a convolution of 3 with stride 2 reads, padded at the end."""
        start, stop, extent = self.scaled(2)
        return Stretch(start, min(stop + 1, extent), extent)


class Area(NamedTuple):
    """A rectangle of the picture at one resolution."""

    rows: Stretch
    columns: Stretch

    def each(self, change: Callable[[Stretch], Stretch]) -> Area:
        return Area(change(self.rows), change(self.columns))

    def scaled(self, factor: int) -> Area:
        return self.each(lambda span: span.scaled(factor))

    @property
    def size(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    def of(self, picture: Tensor) -> Tensor:
        """View of this part of a picture [...,H,W]."""
        return picture[..., self.rows.start : self.rows.stop, self.columns.start : self.columns.stop]

    def within(self, outer: Area) -> Cut:
        """What to leave out of `outer` to get this."""
        above, left = self.rows.start - outer.rows.start, self.columns.start - outer.columns.start
        return Cut(above, outer.rows.stop - self.rows.stop, left, outer.columns.stop - self.columns.stop)


def grid(height: int, width: int, tile: tuple[int, int]) -> Iterator[Area]:
    """Areas of at most tile = (rows, columns) that cover a picture, of sizes as equal as can be. Raises InputError."""
    if min(tile) < 1:
        raise InputError(f"a tile of {tile[0]}x{tile[1]} latent pixels is empty: use 1x1 or more")
    for rows in _spans(height, tile[0]):
        for columns in _spans(width, tile[1]):
            yield Area(rows, columns)


def _spans(extent: int, longest: int) -> list[Stretch]:
    count = -(-extent // longest)
    edges = [extent * number // count for number in range(count + 1)]
    return [Stretch(start, stop, extent) for start, stop in pairwise(edges)]


@dataclass
class Halos:
    """Walks from the wanted part of an output back to the part of the input that decides it.

    `area` is the part needed at the point reached; `cuts` is what a `Stream` has to be given for the way forwards.
    """

    area: Area
    cuts: dict[nn.Module, Cut] = field(default_factory=dict)

    def back(self, modules: Iterable[nn.Module]) -> Halos:
        """Through modules that run in this order."""
        for module in reversed(list(modules)):
            wanted = self.area
            if isinstance(module, ResidualBlock):
                self.back((module.residual["2"], module.residual["6"]))
                self.cuts[module] = wanted.within(self.area)
            elif isinstance(module, Upsample):
                self.area = wanted.each(lambda span: span.grown().halved())
                self.cuts[module.resample["1"]] = wanted.within(self.area.scaled(2))
            elif isinstance(module, Downsample):
                self.area = wanted.each(Stretch.strided)
            elif isinstance(module, (Conv, LastConv)):
                self.area = wanted.each(Stretch.grown)
                self.cuts[module] = wanted.within(self.area)
            else:
                raise TypeError(f"{type(module).__name__} needs the whole picture")
        return self


def as_rows(frame: Tensor) -> Tensor:
    """One frame [1,C,1,H,W] in channels_last_3d as [H,W,C], the order it has in memory."""
    return frame[0, :, 0].permute(1, 2, 0)


def as_frame(rows: Tensor) -> Tensor:
    """[H,W,C] as one frame [1,C,1,H,W]."""
    return rows.permute(2, 0, 1)[None, :, None]
