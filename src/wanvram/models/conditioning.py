"""What pictures, frames and masks become before a model sees them: pure functions on host tensors.

Values are float32 in [-1, 1], pictures [3, H, W]. Reproduced against tests/golden (masks, cond_i2v, cond_flf2v, cond_vace).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from wanvram.specs import WAN21_GEOMETRY, Geometry

__all__ = ["boundary_mask", "cover", "letterbox", "mask_channels", "mask_frames", "squeeze", "unit"]


def unit(picture: Tensor) -> Tensor:
    """uint8 [H, W, 3] -> float32 [3, H, W] in [-1, 1]."""
    return picture.permute(2, 0, 1).float().div_(255.0).sub_(0.5).div_(0.5)


def squeeze(picture: Tensor, height: int, width: int) -> Tensor:
    """Resized to height x width without keeping the aspect ratio: bicubic, no antialiasing, as official does."""
    return F.interpolate(picture[None], size=(height, width), mode="bicubic")[0]


def cover(picture: Tensor, height: int, width: int) -> Tensor:
    """The centre of `picture` that fills height x width: what a last frame of another size than the first is made to.

    Official computes the scale and then crops without applying it, height and width exchanged; for equal sizes both
    return the picture itself.
    """
    if picture.shape[1:] == (height, width):
        return picture
    scale = max(height / picture.shape[1], width / picture.shape[2])
    rows, columns = max(round(picture.shape[1] * scale), height), max(round(picture.shape[2] * scale), width)
    scaled = F.interpolate(picture[None], size=(rows, columns), mode="bicubic", antialias=True)[0].clamp_(-1.0, 1.0)
    top, left = (rows - height) // 2, (columns - width) // 2
    return scaled[:, top : top + height, left : left + width]


def boundary_mask(
    frames: int, height: int, width: int, *, last: bool, group: int = WAN21_GEOMETRY.strides[0]
) -> Tensor:
    """Which of a latent's frames are given, [group, frames, height, width]: channel c is the c-th of its group of video frames.

    The first latent frame is the first video frame alone, so all its channels are 1; a given last video frame is the last
    of its latent frame.
    """
    mask = torch.zeros(group, frames, height, width)
    mask[:, 0] = 1.0
    if last:
        mask[-1, -1] = 1.0
    return mask


def letterbox(picture: Tensor, height: int, width: int) -> Tensor:
    """A reference picture, scaled to fit (bilinear, sizes truncated), centred on white."""
    if picture.shape[1:] == (height, width):
        return picture
    scale = min(height / picture.shape[1], width / picture.shape[2])
    rows, columns = (max(int(side * scale), 1) for side in picture.shape[1:])
    canvas = picture.new_ones((3, height, width))
    top, left = (height - rows) // 2, (width - columns) // 2
    canvas[:, top : top + rows, left : left + columns] = F.interpolate(
        picture[None], size=(rows, columns), mode="bilinear", align_corners=False
    )[0]
    return canvas


def mask_frames(frames: int, latents: int) -> list[int]:
    """The video frames whose mask stands for each latent frame: nearest-exact sampling of `frames` at so many."""
    return [int((index + 0.5) * frames / latents) for index in range(latents)]


def mask_channels(mask: Tensor, geometry: Geometry) -> Tensor:
    """One frame's mask [H, W] -> [64, H/8, W/8] of Wan2.1, channel = 8 * row offset + column offset, values as they are."""
    (_, high, wide), (_, *patch) = geometry.strides, geometry.patch
    rows, columns = (n // (s * p) * p for n, s, p in zip(mask.shape, (high, wide), patch, strict=True))
    cells = mask.view(rows, high, columns, wide)
    return cells.permute(1, 3, 0, 2).reshape(geometry.cell_channels, rows, columns)
