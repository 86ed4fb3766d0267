# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped, misc"
"""The Triton kernel behind `kernels.scaled_products`: one program per row. For compute capability 8.9 and newer, which convert to fp8.

Imported only when the first CUDA tensor arrives.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["quantise_rows"]


@triton.jit
def _quantise_rows_kernel(x_ptr, values_ptr, scales_ptr, x_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), axis=0)
    scale = tl.where(largest > 0.0, tl.div_rn(largest, 448.0), 1.0)
    tl.store(scales_ptr + row, scale)
    values = tl.clamp(x * tl.div_rn(1.0, scale), -448.0, 448.0)
    tl.store(values_ptr + row * width + column, values.to(tl.float8e4nv), mask=inside)


def quantise_rows(x: Tensor, values: Tensor, scales: Tensor) -> None:
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    with torch.cuda.device(x.device):
        _quantise_rows_kernel[(rows,)](
            x, values, scales, x.stride(0), width, BLOCK=block, num_warps=8 if block >= 4096 else 4
        )
