"""`wanvram::rms_norm_silu`: the VAE's norm over channels, with its SiLU, written straight into the caller's buffer.

Rows are positions and columns are channels: a channels_last_3d frame, or rows of one, viewed as [positions, C]. PyTorch
reference on CPU (and on CUDA with WANVRAM_KERNELS=reference), Triton on CUDA, which allocates nothing.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["rms_norm_silu"]

SMALLEST_NORM = 1e-12


def rms_norm_silu(x: Tensor, gamma: Tensor, out: Tensor, silu: bool) -> None:
    """out = x / max(|x|, 1e-12) * sqrt(C) * gamma, then SiLU if asked; x and out [P,C] with unit column stride."""
    if x.is_cuda:  # a custom operation costs tens of microseconds of Python a call
        _compute(x, gamma, out, silu)
    else:
        _rms_norm_silu(x, gamma, out, silu)


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _compute(x: Tensor, gamma: Tensor, out: Tensor, silu: bool) -> None:
    if x.is_cuda and _triton_installed() and os.environ.get("WANVRAM_KERNELS") != "reference":
        from wanvram.kernels import triton_channel_norm

        triton_channel_norm.rms_norm_silu(x, gamma, out, silu)
        return
    wide = x.float()
    length = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min_(SMALLEST_NORM)
    normalised = (wide / length).mul_(x.shape[1] ** 0.5).mul_(gamma)
    out.copy_(F.silu(normalised) if silu else normalised)


@torch.library.custom_op(
    "wanvram::rms_norm_silu",
    mutates_args=("out",),
    schema="(Tensor x, Tensor gamma, Tensor(a!) out, bool silu) -> ()",
)
def _rms_norm_silu(x: Tensor, gamma: Tensor, out: Tensor, silu: bool) -> None:
    _compute(x, gamma, out, silu)


@_rms_norm_silu.register_fake
def _(x: Tensor, gamma: Tensor, out: Tensor, silu: bool) -> None:
    del x, gamma, out, silu
