# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped, misc"
"""Triton kernel behind `kernels.channel_norm`: a tile of positions per program, float32 arithmetic, bandwidth-bound.

Imported only when the first CUDA tensor arrives.
"""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["fill_window", "rms_norm_silu", "tile_of"]

_TILE = 4096  # elements per program: 32 positions of 96 channels (padded to 128), 8 of 384 (padded to 512)


@cache  # a launch is 23 us of Python on an H200's host, and Triton's own arithmetic would be several more
def tile_of(width: int) -> tuple[int, int]:
    """Positions and channels of a program, of so many channels in all."""
    block = triton.next_power_of_2(width)
    return max(_TILE // block, 1), block


@triton.jit
def _rms_norm_silu_kernel(
    x_ptr,
    gamma_ptr,
    out_ptr,
    x_stride,
    out_stride,
    count,
    width,
    root,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < count)[:, None] & (column < width)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12)
    result = x / length[:, None] * root * gamma[None, :]
    if SILU:
        result = result / (1.0 + tl.exp(-result))
    tl.store(out_ptr + row[:, None] * out_stride + column[None, :], result.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm_silu(x: Tensor, gamma: Tensor, out: Tensor, silu: bool) -> None:
    count, width = x.shape
    rows, block = tile_of(width)
    sizes = {"SILU": silu, "ROWS": rows, "BLOCK": block, "num_warps": 4}
    _rms_norm_silu_kernel[(-(-count // rows),)](
        x, gamma, out, x.stride(0), out.stride(0), count, width, width**0.5, **sizes
    )


@triton.jit(do_not_specialize=["start", "count", "committed"])
def _fill_window_kernel(
    x_ptr,
    oldest_ptr,
    newer_ptr,
    gamma_ptr,
    window_ptr,
    start,
    count,
    committed,
    width,
    root,
    HISTORY: tl.constexpr,
    BESIDE: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < count)[:, None] & (column < width)[None, :]
    source = (row[:, None] + start.to(tl.int64)) * width + column[None, :]
    if BESIDE:  # the frames' channels beside each other, else a plane for each frame
        plane = width
        target = row[:, None] * (3 * width) + column[None, :]
    else:
        plane = count.to(tl.int64) * width
        target = row[:, None] * width + column[None, :]
    newest = tl.load(x_ptr + source, mask=inside, other=0.0)
    if NORM:
        x = newest.to(tl.float32)
        gamma = tl.load(gamma_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        length = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12)
        result = x / length[:, None] * root * gamma[None, :]
        newest = (result / (1.0 + tl.exp(-result))).to(window_ptr.dtype.element_ty)
    if HISTORY:
        tl.store(window_ptr + target, tl.load(oldest_ptr + source, mask=inside), mask=inside)
        tl.store(window_ptr + plane + target, tl.load(newer_ptr + source, mask=inside), mask=inside)
        tl.store(window_ptr + 2 * plane + target, newest, mask=inside)
        tl.debug_barrier()  # the oldest frame is read before another thread of this program writes it
        tl.store(oldest_ptr + source, newest, mask=inside & (row < committed)[:, None])
    else:
        tl.store(window_ptr + target, newest, mask=inside)


def fill_window(
    x: Tensor,
    oldest: Tensor | None,
    newer: Tensor | None,
    gamma: Tensor | None,
    window: Tensor,
    start: int,
    committed: int,
) -> None:
    width = x.shape[1]
    count = window.shape[-2] * window.shape[-1]
    rows, block = tile_of(width)
    history, norm = oldest is not None, gamma is not None
    beside = history and window.dim() == 4
    sizes = {"HISTORY": history, "BESIDE": beside, "NORM": norm, "ROWS": rows, "BLOCK": block, "num_warps": 4}
    given = (oldest if history else x, newer if history else x, gamma if norm else x)
    _fill_window_kernel[(-(-count // rows),)](x, *given, window, start, count, committed, width, width**0.5, **sizes)
