# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped, misc"
"""The Triton kernels behind `kernels.scaled_products`: one program per row. For compute capability 8.9 and newer, which convert to fp8.

Imported only when the first CUDA tensor arrives. What is quantised is rounded to 16 bits before, as where two kernels do it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from wanvram.kernels.triton_elementwise import gelu_of, normalised_row

__all__ = ["gelu_rows", "modulated_rows", "quantise_rows"]


@triton.jit
def _store_scaled(x, values_ptr, scale_ptr, inside, BLOCK: tl.constexpr):
    """A row x in float32, 0 where not inside."""
    largest = tl.max(tl.abs(x), axis=0)
    scale = tl.where(largest > 0.0, tl.div_rn(largest, 448.0), 1.0)
    tl.store(scale_ptr, scale)
    values = tl.clamp(x * tl.div_rn(1.0, scale), -448.0, 448.0)
    tl.store(values_ptr + tl.arange(0, BLOCK), values.to(tl.float8e4nv), mask=inside)


@triton.jit
def _quantise_rows_kernel(x_ptr, values_ptr, scales_ptr, x_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    _store_scaled(x, values_ptr + row * width, scales_ptr + row, inside, BLOCK)


@triton.jit
def _gelu_rows_kernel(x_ptr, values_ptr, scales_ptr, x_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    result = gelu_of(x).to(x_ptr.dtype.element_ty).to(tl.float32)
    _store_scaled(result, values_ptr + row * width, scales_ptr + row, inside, BLOCK)


@triton.jit
def _modulated_rows_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    values_ptr,
    scales_ptr,
    x_stride,
    width,
    eps,
    scale_offset,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + column, mask=inside, other=0.0).to(tl.float32) + scale_offset
    shift = tl.load(shift_ptr + column, mask=inside, other=0.0).to(tl.float32)
    result = (normalised_row(x, inside, width, eps) * scale + shift).to(tl.bfloat16).to(tl.float32)
    _store_scaled(result, values_ptr + row * width, scales_ptr + row, inside, BLOCK)


def quantise_rows(x: Tensor, values: Tensor, scales: Tensor) -> None:
    _by_row(_quantise_rows_kernel, x, values, scales, x.stride(0), x.shape[1])


def gelu_rows(x: Tensor, values: Tensor, scales: Tensor) -> None:
    _by_row(_gelu_rows_kernel, x, values, scales, x.stride(0), x.shape[1])


def modulated_rows(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, scale_offset: float, values: Tensor, scales: Tensor
) -> None:
    _by_row(_modulated_rows_kernel, x, scale, shift, values, scales, x.stride(0), x.shape[1], eps, scale_offset)


def _by_row(kernel, x: Tensor, *arguments) -> None:
    """A program for each row: 32 elements per thread for 5120 and 13824 columns, which pad to 8192 and 16384."""
    block = triton.next_power_of_2(x.shape[1])
    warps = 16 if block >= 16384 else 8 if block >= 4096 else 4
    kernel[(x.shape[0],)](x, *arguments, BLOCK=block, num_warps=warps)
