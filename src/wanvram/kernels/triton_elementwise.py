# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped, misc"
"""Triton kernels behind `kernels.elementwise`: one program per row, float32 arithmetic, bandwidth-bound.

Imported only when the first CUDA tensor arrives; its device is the current one while they launch. Row offsets are int64:
75600 rows of 13824 bfloat16 are 2.09e9 bytes, within 3 % of 2^31, and float32 or a longer video passes it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "add_",
    "gated_add_",
    "gelu_of",
    "gelu_tanh_",
    "inverse_rms",
    "layer_norm_modulate",
    "merge_attention_",
    "normalised_row",
    "rms_norm_",
    "rms_norm_rope_",
    "scaled_rope_",
]

_FLAT_BLOCK = 4096


@triton.jit
def normalised_row(x, inside, width, eps):
    """x less its mean, over its standard deviation; x and the result are 0 where not inside."""
    mean = tl.sum(x, axis=0) / width
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / width
    return centred * (1.0 / tl.sqrt(variance + eps))


@triton.jit
def gelu_of(x):
    """In its tanh form. 0.5 x (1 + tanh u) = x / (1 + exp(-2u)): no device library, and exp overflowing gives the limit 0."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * inner))


@triton.jit
def _layer_norm_modulate_kernel(
    x_ptr, scale_ptr, shift_ptr, out_ptr, x_stride, width, eps, scale_offset, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    normalised = normalised_row(x, inside, width, eps)
    scale = tl.load(scale_ptr + column, mask=inside, other=0.0).to(tl.float32) + scale_offset
    shift = tl.load(shift_ptr + column, mask=inside, other=0.0).to(tl.float32)
    result = normalised * scale + shift
    tl.store(out_ptr + row * width + column, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, x_stride, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    pointers = x_ptr + row * x_stride + column
    x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    rounded = (x * factor).to(x_ptr.dtype.element_ty).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(pointers, (rounded * weight).to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _heads_of(group, num_heads, head_pairs, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Offsets in a row [num_heads, 2 head_pairs] and mask of a group of HEADS heads, whose columns are padded to DIM."""
    head, column = group * HEADS + tl.arange(0, HEADS)[:, None], tl.arange(0, DIM)[None, :]
    return 2 * head_pairs * head + column, (head < num_heads) & (column < 2 * head_pairs)


@triton.jit
def _in_pairs(x):
    """Even and odd columns: rows are read and written whole, where every second column would be a third of the bandwidth."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _turned(even, odd, factor, weight, cos, sin, dtype: tl.constexpr):
    """Pairs times factor, rounded to dtype, times weight, turned by cos and sin; of weight's shape, in float32."""
    even_weight, odd_weight = _in_pairs(weight)
    even = (even * factor).to(dtype).to(tl.float32) * even_weight
    odd = (odd * factor).to(dtype).to(tl.float32) * odd_weight
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), weight.shape)


@triton.jit
def _turn_row_kernel(
    row_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    factor,
    num_heads,
    head_pairs,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    """A row in place, group by group: the tables, which are the same for every head, are read once and kept in registers."""
    pair = tl.arange(0, DIM // 2)[None, :]
    cos = tl.load(cos_ptr + pair, mask=pair < head_pairs, other=0.0)
    sin = tl.load(sin_ptr + pair, mask=pair < head_pairs, other=0.0)
    for group in tl.static_range(GROUPS):
        place, inside = _heads_of(group, num_heads, head_pairs, HEADS, DIM)
        even, odd = _in_pairs(tl.load(row_ptr + place, mask=inside, other=0.0).to(tl.float32))
        weight = tl.load(weight_ptr + place, mask=inside, other=0.0).to(tl.float32)
        result = _turned(even, odd, factor, weight, cos, sin, row_ptr.dtype.element_ty)
        tl.store(row_ptr + place, result.to(row_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_rope_kernel(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    x_stride,
    table_stride,
    num_heads,
    head_pairs,
    eps,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    total = tl.zeros((HEADS, DIM), tl.float32)
    for group in tl.static_range(GROUPS):
        place, inside = _heads_of(group, num_heads, head_pairs, HEADS, DIM)
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        total += x * x
    factor = 1.0 / tl.sqrt(tl.sum(total) / (2 * num_heads * head_pairs) + eps)
    table = row * table_stride
    _turn_row_kernel(
        x_ptr, weight_ptr, cos_ptr + table, sin_ptr + table, factor, num_heads, head_pairs, GROUPS, HEADS, DIM
    )


@triton.jit
def _inverse_rms_kernel(x_ptr, out_ptr, x_stride, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps))


@triton.jit
def _scaled_rope_kernel(
    x_ptr,
    inverse_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    x_stride,
    table_stride,
    num_heads,
    head_pairs,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    table = row * table_stride
    factor = tl.load(inverse_ptr + row)
    _turn_row_kernel(
        x_ptr, weight_ptr, cos_ptr + table, sin_ptr + table, factor, num_heads, head_pairs, GROUPS, HEADS, DIM
    )


@triton.jit
def _gated_add_kernel(x_ptr, y_ptr, gate_ptr, x_stride, y_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    pointers = x_ptr + row * x_stride + column
    x = tl.load(pointers, mask=inside, other=0.0)
    y = tl.load(y_ptr + row * y_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(pointers, x + y * gate, mask=inside)


@triton.jit
def _add_kernel(x_ptr, y_ptr, x_stride, y_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    pointers = x_ptr + row * x_stride + column
    y = tl.load(y_ptr + row * y_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(pointers, tl.load(pointers, mask=inside, other=0.0) + y, mask=inside)


@triton.jit
def _gelu_tanh_kernel(x_ptr, count, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    x = tl.load(x_ptr + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(x_ptr + index, gelu_of(x).to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _merge_attention_kernel(
    out_ptr,
    sums_ptr,
    part_ptr,
    part_sums_ptr,
    out_stride,
    sums_stride,
    part_stride,
    part_sums_stride,
    heads,
    width,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    is_head = head < heads
    a = tl.load(sums_ptr + head * sums_stride + row, mask=is_head, other=0.0)
    b = tl.load(part_sums_ptr + head * part_sums_stride + row, mask=is_head, other=0.0)
    most = tl.maximum(a, b)
    kept, new = tl.exp(a - most), tl.exp(b - most)
    place = head[:, None] * width + column[None, :]
    inside = is_head[:, None] & (column < width)[None, :]
    out = tl.load(out_ptr + row * out_stride + place, mask=inside, other=0.0)
    part = tl.load(part_ptr + row * part_stride + place, mask=inside, other=0.0).to(tl.float32)
    total = kept + new
    merged = out * (kept / total)[:, None] + part * (new / total)[:, None]
    tl.store(out_ptr + row * out_stride + place, merged, mask=inside)
    tl.debug_barrier()  # every warp has read the sums that one of them overwrites
    tl.store(sums_ptr + head * sums_stride + row, most + tl.log(total), mask=is_head)


def _by_row(kernel, x: Tensor, *arguments) -> None:
    """A program for each row of x [L,D]: 5120 columns pad to 8192, 32 elements per thread at 8 warps."""
    block = triton.next_power_of_2(x.shape[1])
    kernel[(x.shape[0],)](x, *arguments, BLOCK=block, num_warps=8 if block >= 4096 else 4)


def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, scale_offset: float, dtype: torch.dtype
) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _by_row(_layer_norm_modulate_kernel, x, scale, shift, out, x.stride(0), x.shape[1], eps, scale_offset)
    return out


def rms_norm_(x: Tensor, weight: Tensor, eps: float) -> None:
    _by_row(_rms_norm_kernel, x, weight, x.stride(0), x.shape[1], eps)


def _by_head(width: int, num_heads: int) -> dict[str, int]:
    """Arguments of a row program that takes its heads in groups.

    8 heads of 128 columns on 4 warps: 50 us for 8190 rows of 40 heads on an H200, whole rows padded to 64 heads 73.
    """
    pairs = width // num_heads // 2
    heads = min(8, triton.next_power_of_2(num_heads))
    groups = {"GROUPS": triton.cdiv(num_heads, heads), "HEADS": heads, "DIM": triton.next_power_of_2(2 * pairs)}
    return {"num_heads": num_heads, "head_pairs": pairs, **groups, "num_warps": 4}


def rms_norm_rope_(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, num_heads: int, eps: float) -> None:
    rows, width = x.shape
    heads = _by_head(width, num_heads)
    _rms_norm_rope_kernel[(rows,)](x, weight, cos, sin, x.stride(0), cos.stride(0), eps=eps, **heads)


def inverse_rms(x: Tensor, out: Tensor, eps: float) -> None:
    _by_row(_inverse_rms_kernel, x, out, x.stride(0), x.shape[1], eps)


def scaled_rope_(x: Tensor, inverse: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> None:
    rows, width = x.shape
    heads = _by_head(width, num_heads)
    _scaled_rope_kernel[(rows,)](x, inverse, weight, cos, sin, x.stride(0), cos.stride(0), **heads)


def gated_add_(x: Tensor, y: Tensor, gate: Tensor) -> None:
    _by_row(_gated_add_kernel, x, y, gate, x.stride(0), y.stride(0), x.shape[1])


def add_(x: Tensor, y: Tensor) -> None:
    _by_row(_add_kernel, x, y, x.stride(0), y.stride(0), x.shape[1])


def gelu_tanh_(x: Tensor) -> None:
    count = x.numel()
    _gelu_tanh_kernel[(triton.cdiv(count, _FLAT_BLOCK),)](x, count, BLOCK=_FLAT_BLOCK, num_warps=8)


def merge_attention_(out: Tensor, sums: Tensor, part: Tensor, part_sums: Tensor) -> None:
    """Rows of out and part hold their heads one behind the other; sums have a row next to a row."""
    rows, heads, width = out.shape
    block = {"HEADS": triton.next_power_of_2(heads), "WIDTH": triton.next_power_of_2(width)}
    strides = out.stride(0), sums.stride(0), part.stride(0), part_sums.stride(0)
    _merge_attention_kernel[(rows,)](out, sums, part, part_sums, *strides, heads, width, **block, num_warps=8)
