"""What the transformer is conditioned on besides text: CLIP features, image latents with their mask, VACE context.

Pictures and source frames stay on the host; a piece of one latent frame goes up at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from wanvram.engine.devices import Device
from wanvram.models.clip import CLIPVision
from wanvram.models.conditioning import boundary_mask, cover, letterbox, mask_channels, mask_frames, squeeze, unit
from wanvram.specs import WAN21_GEOMETRY, Geometry

__all__ = ["Frames", "Inputs", "clip_features", "image_condition", "vace_context"]

Frames = Callable[[], Iterator[Tensor]]
Encode = Callable[[Frames], Tensor]


@dataclass(frozen=True)
class Inputs:
    """The files of a request, read and measured; host tensors (on the simulated device without values).

    frames, height, width: of the video that is made. pictures: uint8 [H,W,3], one for i2v, first and last for flf2v.
    source: float32 [3,t,height,width] in pieces of 1, 4, 4, ... frames; mask: [1,t,height,width] likewise, None: all of
    it is to be made. Without source, VACE starts from nothing. references: uint8 [H,W,3].
    """

    frames: int
    height: int
    width: int
    pictures: tuple[Tensor, ...] = ()
    source: Frames | None = None
    mask: Frames | None = None
    references: tuple[Tensor, ...] = ()
    geometry: Geometry = WAN21_GEOMETRY

    @property
    def noise_shape(self) -> tuple[int, int, int, int]:
        """Latent frames of the references come before those of the video."""
        channels, frames, height, width = self.geometry.latent_shape(self.frames, self.height, self.width)
        return channels, frames + len(self.references), height, width

    def boundary_pictures(self) -> list[Tensor]:
        """float32 [3,H,W]; the last one in the size of the first, as both models see it."""
        first, *last = [unit(picture) for picture in self.pictures]
        return [first, *(cover(picture, *first.shape[1:]) for picture in last)]


def clip_features(
    clip: CLIPVision, device: Device, inputs: Inputs, walk: Callable[..., Iterator[torch.nn.Module]]
) -> Tensor:
    """[1 or 2, 257, clip_dim]. The pictures shrink to CLIP's square on the host."""
    with device.computing_on_host():
        pixels = clip.preprocess([picture[:, None] for picture in inputs.boundary_pictures()])
    return clip.forward(device.upload(pixels), walk=walk)


def image_condition(encode: Encode, device: Device, inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """y [20,T,h,w] of Wan2.1: 4 mask channels, 16 latent channels of a video that is grey except for the given frames."""
    with device.computing_on_host():
        given = [squeeze(p, inputs.height, inputs.width) for p in inputs.boundary_pictures()]
    latent = encode(lambda: _boundary_frames(device, given, inputs))
    y = latent.new_empty((inputs.geometry.image_channels, *latent.shape[1:]), dtype=dtype)
    group = inputs.geometry.strides[0]
    with device.computing_on_host():
        mask = boundary_mask(*latent.shape[1:], last=len(given) > 1, group=group)
    y[:group].copy_(device.upload(mask))
    y[group:].copy_(latent)
    return y


def _boundary_frames(device: Device, given: list[Tensor], inputs: Inputs) -> Iterator[Tensor]:
    """The first frame, as many zero frames as it takes (views of one), and perhaps the last."""
    first, *last = given
    yield device.upload(first[:, None])
    zero = device.empty((3, 1, *first.shape[1:]), torch.float32).zero_()
    group, between = inputs.geometry.strides[0], inputs.frames - 1 - len(last)
    for start in range(0, between, group):
        yield zero.expand(-1, min(group, between - start), -1, -1)
    del zero
    for picture in last:
        yield device.upload(picture[:, None])


def vace_context(encode: Encode, device: Device, inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """[96, references + T, h, w] of Wan2.1: 16 latent channels of what is kept, 16 of what is remade, 64 of the mask.

    A reference picture fills the first channels of a latent frame of its own; its mask is zero.
    """
    channels, frames, height, width = inputs.noise_shape
    context = device.empty((inputs.geometry.source_channels, frames, height, width), dtype).zero_()
    start = len(inputs.references)
    for index, reference in enumerate(inputs.references):
        with device.computing_on_host():
            canvas = letterbox(unit(reference), inputs.height, inputs.width)[:, None]
        context[:channels, index : index + 1].copy_(encode(partial(_alone, device, canvas)))
    kept = encode(lambda: _part(device, inputs, remade=False))
    context[:channels, start:].copy_(kept)
    if inputs.source is not None:  # without a source both parts are the same zeros
        del kept
        kept = encode(lambda: _part(device, inputs, remade=True))
    context[channels : 2 * channels, start:].copy_(kept)
    del kept
    _write_mask(context[2 * channels :, start:], device, inputs)
    return context


def _alone(device: Device, frame: Tensor) -> Iterator[Tensor]:
    return iter([device.upload(frame)])


def _part(device: Device, inputs: Inputs, *, remade: bool) -> Iterator[Tensor]:
    """Source frames on the device with zero where the mask says the other part is."""
    if inputs.source is None or (inputs.mask is None and not remade):
        zero = device.empty((3, 1, inputs.height, inputs.width), torch.float32).zero_()
        yield from (zero for _ in range(inputs.frames))
        return
    if inputs.mask is None:
        yield from (device.upload(piece) for piece in inputs.source())
        return
    for piece, mask in zip(inputs.source(), inputs.mask(), strict=True):
        frames = device.upload(piece)
        chosen = device.upload(mask) > 0.5
        yield frames.masked_fill_(chosen.logical_not_() if remade else chosen, 0.0)
        del frames, chosen


def _write_mask(channels: Tensor, device: Device, inputs: Inputs) -> None:
    """The raw mask values into channels [64,T,h,w] of Wan2.1, from those frames that stand for a latent frame."""
    if inputs.mask is None:
        channels.fill_(1.0)
        return
    wanted = mask_frames(inputs.frames, channels.shape[1])
    frame, latent = 0, 0
    for piece in inputs.mask():
        while latent < len(wanted) and wanted[latent] < frame + piece.shape[1]:
            with device.computing_on_host():
                cells = mask_channels(piece[0, wanted[latent] - frame], inputs.geometry)
            channels[:, latent].copy_(device.upload(cells))
            latent += 1
        frame += piece.shape[1]
