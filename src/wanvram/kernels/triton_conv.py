# mypy: disable-error-code="untyped-decorator, no-untyped-def, import-not-found, import-untyped, misc"
"""Triton kernel behind `kernels.conv.place_frame`: a tile of positions per program, bandwidth-bound.

Imported only when the first CUDA tensor arrives.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from wanvram.kernels.triton_channel_norm import tile_of

__all__ = ["place_frame"]


@triton.jit(do_not_specialize=["count", "columns"])
def _place_frame_kernel(
    frame_ptr,
    bias_ptr,
    out_ptr,
    frame_row,
    out_row,
    count,
    columns,
    width,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, column = (position // columns).to(tl.int64), position % columns
    channel = tl.arange(0, BLOCK)
    inside = (position < count)[:, None] & (channel < width)[None, :]
    source = (row * frame_row + column * width)[:, None] + channel[None, :]
    target = (row * out_row + column * width)[:, None] + channel[None, :]
    bias = tl.load(bias_ptr + channel, mask=channel < width, other=0.0).to(tl.float32)
    value = tl.load(frame_ptr + source, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
    if ADD:  # rounded in between, as an addition of its own would
        value = value.to(out_ptr.dtype.element_ty).to(tl.float32)
        value += tl.load(out_ptr + target, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + target, value.to(out_ptr.dtype.element_ty), mask=inside)


def place_frame(frame: Tensor, bias: Tensor, out: Tensor, add: bool) -> None:
    width, columns = frame.shape[1], frame.shape[4]
    count = frame.shape[3] * columns
    rows, block = tile_of(width)
    sizes = {"ADD": add, "ROWS": rows, "BLOCK": block, "num_warps": 4}
    _place_frame_kernel[(-(-count // rows),)](
        frame, bias, out, frame.stride(3), out.stride(3), count, columns, width, **sizes
    )
