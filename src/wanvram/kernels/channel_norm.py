"""The VAE's norm over channels, with its SiLU, written straight into the caller's buffer: `wanvram::rms_norm_silu`, and
`wanvram::fill_window`, which puts the two frames before beside it.

Rows are positions and columns are channels: a channels_last_3d frame, or rows of one, viewed as [positions, C]. PyTorch
reference on CPU (and on CUDA with WANVRAM_KERNELS=reference), Triton on CUDA, which allocates nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wanvram.kernels.operation import operation

__all__ = ["fill_window", "rms_norm_silu"]

SMALLEST_NORM = 1e-12
_TRITON = "wanvram.kernels.triton_channel_norm"


def fill_window(
    x: Tensor, history: Sequence[Tensor], gamma: Tensor | None, window: Tensor, start: int, committed: int
) -> None:
    """A temporal convolution's input, from frames [1,C,1,H,W]: history and SiLU(norm(x)), or x itself without gamma.

    window [1,C,t,h,W] in channels_last_3d, or [1,t*C,h,W] in channels_last, t = 1 + len(history), gets as many positions of
    each frame, from `start` on: one frame after another, or the frames' channels beside each other. The oldest frame of the history
    gets the newest one's first `committed` positions. Frames lie in memory as channels_last_3d. One kernel and no view: in tiles,
    Python's time is what counts.
    """
    oldest, newer = history if history else (None, None)
    _fill_window(x, oldest, newer, gamma, window, start, committed)


@operation(
    "(Tensor x, Tensor(a!)? oldest, Tensor? newer, Tensor? gamma, Tensor(b!) window, int start, int committed) -> ()",
    triton=_TRITON,
)
def _fill_window(
    x: Tensor,
    oldest: Tensor | None,
    newer: Tensor | None,
    gamma: Tensor | None,
    window: Tensor,
    start: int,
    committed: int,
) -> None:
    count = window.shape[-2] * window.shape[-1]
    beside = window.dim() == 4
    rows = window.movedim(1, -1)
    planes = rows.view(count, -1).split(x.shape[1], dim=1) if beside else rows.view(-1, x.shape[1]).split(count)
    if oldest is not None and newer is not None:
        planes[0].copy_(_positions(oldest)[start : start + count])
        planes[1].copy_(_positions(newer)[start : start + count])
    newest = _positions(x)[start : start + count]
    if gamma is None:
        planes[-1].copy_(newest)
    else:
        rms_norm_silu.compute(newest, gamma.view(-1), planes[-1], True)
    if oldest is not None:
        _positions(oldest)[start : start + committed].copy_(planes[-1][:committed])


def _positions(x: Tensor) -> Tensor:
    """View frames [1,C,t,H,W] as [t*H*W, C]."""
    return x.permute(0, 2, 3, 4, 1).view(-1, x.shape[1])


@operation("(Tensor x, Tensor gamma, Tensor(a!) out, bool silu) -> ()", triton=_TRITON)
def rms_norm_silu(x: Tensor, gamma: Tensor, out: Tensor, silu: bool) -> None:
    """out = x / max(|x|, 1e-12) * sqrt(C) * gamma, then SiLU if asked; x and out [P,C] with unit column stride."""
    wide = x.float()
    length = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min_(SMALLEST_NORM)
    normalised = (wide / length).mul_(x.shape[1] ** 0.5).mul_(gamma)
    out.copy_(F.silu(normalised) if silu else normalised)
