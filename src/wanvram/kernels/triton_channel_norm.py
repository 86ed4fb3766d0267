# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped, misc"
"""Triton kernel behind `kernels.channel_norm`: a tile of positions per program, float32 arithmetic, bandwidth-bound.

Imported only when the first CUDA tensor arrives.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, cuda

__all__ = ["rms_norm_silu"]

_TILE = 4096  # elements per program: 32 positions of 96 channels (padded to 128), 8 of 384 (padded to 512)


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
    block = triton.next_power_of_2(width)
    rows = max(_TILE // block, 1)
    sizes = {"SILU": silu, "ROWS": rows, "BLOCK": block, "num_warps": 4}
    with cuda.device(x.device):
        _rms_norm_silu_kernel[(triton.cdiv(count, rows),)](
            x, gamma, out, x.stride(0), out.stride(0), count, width, width**0.5, **sizes
        )
