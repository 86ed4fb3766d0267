"""The causal video VAE: latents [16,T,h,w] to frames and back, one frame at a time through the whole network.

A frame runs depth first: what a temporal upsampling makes of it is finished one by one, so above the mid block one
frame per resolution exists beside the convolutions' two-frame caches (`vae_blocks.Stream`). Decode in float32 peaks
at 3.76 GiB of activations at 832x480 and 8.51 GiB at 1280x720, of which the caches are 3.3 and 7.5 (official at
832x480: 8.2).

`decode_tiles` and `encode_tiles` go below the caches without blending (`vae_tiles`). What runs at the resolution of the
latents, attention among it, sees whole pictures; its side of 384 x h x w per latent frame is kept. Everything above
runs tile by tile, every tile over all frames with a stream of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from wanvram.errors import InputError
from wanvram.kernels.conv import conv3d
from wanvram.models.vae_blocks import (
    UNIT,
    AttentionBlock,
    Conv,
    Downsample,
    LastConv,
    ResidualBlock,
    Stream,
    Upsample,
    new_frames,
)
from wanvram.models.vae_tiles import Area, Halos, Move, TilePiece, as_frame, as_rows, grid, stay
from wanvram.specs import LATENT_MEAN, LATENT_STD, VAESpec

__all__ = ["LATENT_MEAN", "LATENT_STD", "WanVAE"]

Visit = Callable[[Sequence[Tensor]], Iterator[tuple[int, Tensor]]]  # in order, with their numbers


def _one_ahead(chunks: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Every frame [3,H,W] of the pieces [3,t,H,W], and whether another one follows."""
    frames = (chunk[:, index] for chunk in chunks for index in range(chunk.shape[1]))
    frame = next(frames, None)
    while frame is not None:
        following = next(frames, None)
        yield frame, following is not None
        frame = following


def _middle(channels: int, dtype: torch.dtype) -> nn.ModuleList:
    before, after = (ResidualBlock(channels, channels, dtype) for _ in range(2))
    return nn.ModuleList([before, AttentionBlock(channels, dtype), after])


class Encoder(nn.Module):
    """Frames -> latent statistics: mean and log-variance channels before the last pointwise convolution."""

    def __init__(self, spec: VAESpec, dtype: torch.dtype) -> None:
        super().__init__()
        widths = [spec.dim * multiple for multiple in (1, *spec.dim_mult)]
        self.conv1 = Conv(3, widths[0], (3, 3, 3), dtype)
        blocks: list[nn.Module] = []
        for level, outputs in enumerate(widths[1:]):
            inputs = widths[level]
            for _ in range(spec.num_res_blocks):
                blocks.append(ResidualBlock(inputs, outputs, dtype))
                inputs = outputs
            if level < len(spec.dim_mult) - 1:
                blocks.append(Downsample(outputs, spec.temporal_downsample[level], dtype))
        self.downsamples = nn.ModuleList(blocks)
        self.lowest = max((i for i, block in enumerate(blocks, 1) if isinstance(block, Downsample)), default=0)
        self.middle = _middle(widths[-1], dtype)
        self.head = LastConv(widths[-1], 2 * spec.z_dim, dtype)

    def forward(self, pixels: Tensor, stream: Stream) -> Tensor | None:
        """One frame [1,3,1,H,W] -> [1,2*z_dim,1,h,w], or None until a group of frames is complete."""
        x = self.descend(pixels, stream)
        return None if x is None else self.finish(x, stream)

    def descend(self, pixels: Tensor, stream: Stream) -> Tensor | None:
        """To the resolution of the latents: one frame [1,3,1,H,W] -> [1,C,1,h,w], or None as in forward."""
        x = self.conv1.causal(pixels, stream)
        for block in self.downsamples[: self.lowest]:
            x = block(x, stream)
            if x is None:
                return None
        return x

    def finish(self, x: Tensor, stream: Stream) -> Tensor:
        """What stays at the resolution of the latents, of which the attention needs whole frames."""
        for block in self.downsamples[self.lowest :]:
            x = block(x, stream)
        for block in self.middle:
            x = block(x, stream)
        out = new_frames(x, self.head.outputs, 1, *x.shape[3:])
        self.head(x, stream, out[0, :, 0])
        return out


class Decoder(nn.Module):
    """Latent frames -> video frames."""

    def __init__(self, spec: VAESpec, dtype: torch.dtype) -> None:
        super().__init__()
        widths = [spec.dim * multiple for multiple in (spec.dim_mult[-1], *reversed(spec.dim_mult))]
        temporal = tuple(reversed(spec.temporal_downsample))
        self.conv1 = Conv(spec.z_dim, widths[0], (3, 3, 3), dtype)
        self.middle = _middle(widths[0], dtype)
        blocks: list[nn.Module] = []
        for level, outputs in enumerate(widths[1:]):
            inputs = widths[level] if level == 0 else widths[level] // 2  # every upsampling halves the channels
            for _ in range(spec.num_res_blocks + 1):
                blocks.append(ResidualBlock(inputs, outputs, dtype))
                inputs = outputs
            if level < len(spec.dim_mult) - 1:
                blocks.append(Upsample(outputs, temporal[level], dtype))
        self.upsamples = nn.ModuleList(blocks)
        self.lowest = next((i for i, block in enumerate(blocks) if isinstance(block, Upsample)), len(blocks))
        self.head = LastConv(widths[-1], 3, dtype)

    def features(self, latent: Tensor, stream: Stream) -> Iterator[Tensor]:
        """Last features [1,C,1,H,W] of every video frame of one latent frame [1,z_dim,1,h,w], in order."""
        return self.rise(self.start(latent, stream), stream)

    def start(self, latent: Tensor, stream: Stream) -> Tensor:
        """What stays at the resolution of the latents, of which the attention needs whole frames: [1,C,1,h,w]."""
        x = self.conv1.causal(latent, stream)
        for block in (*self.middle, *self.upsamples[: self.lowest]):
            x = block(x, stream)
        return x

    def rise(self, x: Tensor, stream: Stream) -> Iterator[Tensor]:
        """From there to the last features of every video frame; x is overwritten unless upsampling comes first."""
        # A stack, not recursion: callers' variables would keep one frame of every level alive.
        pending: list[tuple[int, int | None, Tensor]] = [(self.lowest, None, x)]
        while pending:
            index, part, x = pending.pop()
            for number, block in enumerate(self.upsamples[index:], start=index):
                if not isinstance(block, Upsample):
                    x = block(x, stream)
                    continue
                if part is None:
                    part, *later = block.parts(stream)
                    pending.extend((number, other, x) for other in later)
                x, part = block(x, stream, part), None
            yield x


class WanVAE(nn.Module):
    """Keys and shapes of the official checkpoint. `encoder` and `conv1`, or `decoder` and `conv2`, may be deleted.

    The tiled forms keep one tensor [h,w,C] per latent frame between their two phases: 384 channels, 464 MiB in all for
    81 frames of 1280x720 in float32. `park` says where (it gets a device tensor), `fetch` brings a part of it back.
    """

    def __init__(self, spec: VAESpec, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec, dtype)
        self.conv1 = Conv(2 * spec.z_dim, 2 * spec.z_dim, (1, 1, 1), dtype)
        self.conv2 = Conv(spec.z_dim, spec.z_dim, (1, 1, 1), dtype)
        self.decoder = Decoder(spec, dtype)
        self.group, self.scale, _ = spec.strides
        # 1/std rounded to float32, as official holds it. Numbers, not a tensor: no copy from host to device.
        inverse = [float(np.float32(1.0) / np.float32(value)) for value in spec.latent_std]
        self._statistics = list(zip(spec.latent_mean, inverse, strict=True))

    def decode(self, z: Tensor) -> Iterator[Tensor]:
        """Latents z [16,T,h,w] -> frames [3,t,H,W], not clamped: t is 1 for the first latent frame, then 4."""
        self._check_latents(z)
        stream = Stream(remember=z.shape[1] > 1)
        height, width = z.shape[2] * self.scale, z.shape[3] * self.scale
        for index in range(z.shape[1]):
            latent = self._decoder_input(z[:, index])
            frames = latent.new_empty((3, self.group if index else 1, height, width))
            self._write(frames, self.decoder.features(latent, stream), stream)
            yield frames
            del frames  # the caller's alone while the next group is computed

    def decode_tiles(
        self,
        z: Tensor,
        tile: tuple[int, int],
        park: Move = stay,
        fetch: Move = stay,
        of: Sequence[int] | None = None,
        visit: Visit = enumerate,
    ) -> Iterator[TilePiece]:
        """What `decode` gives, in parts of at most tile = (rows, columns) latent pixels: every tile from first frame to last.

        Equal to `decode` but for the order of additions (1e-5); needs the temporal caches of one tile only. of: these tiles only.
        visit: goes through the latent frames of a tile.
        """
        self._check_latents(z)
        kept = self._start_all(z, park)
        areas = list(grid(z.shape[2], z.shape[3], tile))
        for area in areas if of is None else [areas[number] for number in of]:
            yield from self._decode_tile(visit(kept), len(kept) > 1, area.scaled(self.scale), fetch)

    def _start_all(self, z: Tensor, park: Move) -> list[Tensor]:
        stream = Stream(remember=z.shape[1] > 1)
        latents = (self._decoder_input(z[:, index]) for index in range(z.shape[1]))
        return [park(as_rows(self.decoder.start(latent, stream))) for latent in latents]

    def _decode_tile(
        self, visited: Iterable[tuple[int, Tensor]], remember: bool, wanted: Area, fetch: Move
    ) -> Iterator[TilePiece]:
        halos = Halos(wanted).back((*self.decoder.upsamples[self.decoder.lowest :], self.decoder.head))
        rows, columns = halos.area
        stream = Stream(remember, halos.cuts)
        for index, picture in visited:
            part = picture[rows.start : rows.stop, columns.start : columns.stop]
            pixels = self.conv2.weight.new_empty((3, self.group if index else 1, *wanted.size))
            self._write(pixels, self.decoder.rise(as_frame(fetch(part).contiguous()), stream), stream)
            first = 1 + self.group * (index - 1) if index else 0
            yield TilePiece(first, wanted.rows.start, wanted.columns.start, pixels)
            del pixels

    def encode(self, chunks: Iterable[Tensor]) -> Tensor:
        """Frames in [-1,1], in pieces [3,t,H,W] of any length -> normalised latent means [16,T,h,w] in float32.

        1 + 4k frames give T = 1 + k; up to three frames more change nothing. Pieces are taken one by one.
        """
        stream: Stream | None = None
        latents: list[Tensor] = []
        for frame, more in _one_ahead(chunks):
            stream = stream or Stream(remember=more)
            statistics = self._encode_frame(frame, stream)
            if statistics is not None:
                latents.append(self._normalised(statistics))
        if not latents:
            raise InputError("there is no frame to encode")
        return torch.stack(latents, dim=1)

    def encode_tiles(
        self, make_chunks: Callable[[], Iterable[Tensor]], tile: tuple[int, int], park: Move = stay, fetch: Move = stay
    ) -> Tensor:
        """What `encode` gives (to 1e-5), with the caches of one tile of at most (rows, columns) latent pixels at a time.

        make_chunks: every call starts the same frames from the beginning; there is one call for each tile, and one more.
        """
        size = next((chunk.shape[2:] for chunk in make_chunks()), None)
        if size is None:
            raise InputError("there is no frame to encode")
        self._check_size(*size)
        height, width = (length // self.scale for length in size)
        areas = list(grid(height, width, tile))
        kept = [[park(as_rows(x)) for x in self._descend_tile(make_chunks(), area)] for area in areas]
        if len({len(parts) for parts in kept}) != 1:
            raise InputError("the frames to encode differ from one reading to the next: every tile reads all of them")
        stream = Stream(remember=len(kept[0]) > 1)
        latents = []
        for parts in zip(*kept, strict=True):
            x = new_frames(self.conv1.weight, parts[0].shape[2], 1, height, width)
            for area, part in zip(areas, parts, strict=True):
                area.of(x).copy_(as_frame(fetch(part)))
            latents.append(self._normalised(self._means(self.encoder.finish(x, stream))))
        return torch.stack(latents, dim=1)

    def _encode_frame(self, frame: Tensor, stream: Stream) -> Tensor | None:
        """[3,H,W] -> latent means [1,16,1,h,w] if a group of frames is complete."""
        pixels = self._encoder_input(frame, None)
        encoded = self.encoder(pixels, stream)
        return None if encoded is None else self._means(encoded)

    def _descend_tile(self, chunks: Iterable[Tensor], wanted: Area) -> Iterator[Tensor]:
        halos = Halos(wanted).back((self.encoder.conv1, *self.encoder.downsamples[: self.encoder.lowest]))
        stream: Stream | None = None
        for frame, more in _one_ahead(chunks):
            stream = stream or Stream(more, halos.cuts)
            x = self.encoder.descend(self._encoder_input(frame, halos.area), stream)
            if x is not None:
                yield x

    def _encoder_input(self, frame: Tensor, area: Area | None) -> Tensor:
        """[3,H,W], or an area of it, as one frame of the weights' type."""
        self._check_size(*frame.shape[1:])
        part = frame if area is None else area.of(frame)
        pixels = new_frames(self.conv1.weight, 3, 1, *part.shape[1:])
        pixels[0, :, 0].copy_(part)
        return pixels

    def _means(self, encoded: Tensor) -> Tensor:
        """Encoder output -> latent means [1,16,1,h,w]."""
        means = slice(self.spec.z_dim)
        return conv3d(encoded, self.conv1.weight[means], self.conv1.bias[means], UNIT, (0, 0, 0))

    def _check_size(self, height: int, width: int) -> None:
        if height % self.scale or width % self.scale:
            raise InputError(f"frames of {width}x{height} cannot be encoded: use multiples of {self.scale}")

    def _check_latents(self, z: Tensor) -> None:
        if z.dim() != 4 or z.shape[0] != self.spec.z_dim:
            raise InputError(
                f"latents have shape {tuple(z.shape)} instead of [{self.spec.z_dim}, frames, height, width]"
            )

    def _decoder_input(self, latent: Tensor) -> Tensor:
        """One latent frame [16,h,w] in DiT scale -> [1,16,1,h,w] behind the pointwise convolution."""
        scaled = new_frames(self.conv2.weight, self.spec.z_dim, 1, *latent.shape[1:])
        for channel, (mean, factor) in enumerate(self._statistics):
            scaled[0, channel, 0].copy_(latent[channel]).div_(factor).add_(mean)
        return self.conv2.pointwise(scaled)

    def _write(self, frames: Tensor, features: Iterator[Tensor], stream: Stream) -> None:
        for number in range(frames.shape[1]):
            # No loop over features: its variable would keep a frame of them alive, 146 MiB at 832x480.
            self.decoder.head(next(features), stream, frames[:, number])

    def _normalised(self, means: Tensor) -> Tensor:
        """[1,16,1,h,w] -> float32 [16,h,w] in DiT scale."""
        latent = means.new_empty((means.shape[1], *means.shape[3:]), dtype=torch.float32)
        for channel, (mean, factor) in enumerate(self._statistics):
            latent[channel].copy_(means[0, channel, 0]).sub_(mean).mul_(factor)
        return latent
