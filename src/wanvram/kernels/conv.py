"""Convolution and single-head attention of the VAE, with memory that does not depend on the GPU.

`wanvram::conv3d` fixes the layout: channels_last_3d in and out, where cuDNN needs neither workspace nor copies
(measured: 0 against 1463 MiB for 96 channels at 480x832). `frame_attention` is plain products over row chunks, so
every buffer it takes is an ordinary allocation that a run on meta tensors sees too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wanvram.kernels.operation import operation

__all__ = ["conv3d", "frame_attention"]

QUERY_ROWS = 1024  # scores of 1024 x 14400 float32 are 56 MiB; all rows at 1280x720 would be 791 MiB


@operation("(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding) -> Tensor")
def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Cross-correlation of x [1,I,T,H,W] with weight [O,I,kT,kH,kW], both channels_last_3d -> channels_last_3d."""
    out = F.conv3d(x, weight, bias, stride=stride, padding=padding)
    return out.contiguous(memory_format=torch.channels_last_3d)  # no copy where the library kept the layout


@conv3d.on_meta
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int]) -> Tensor:
    del bias
    size = [
        (length + 2 * pad - kernel) // step + 1
        for length, pad, kernel, step in zip(x.shape[2:], padding, weight.shape[2:], stride, strict=True)
    ]
    shape = (x.shape[0], weight.shape[0], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)


def frame_attention(qkv: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v for qkv [N, 3C] -> [N, C], one head; the q third of qkv is overwritten."""
    count, width = qkv.shape[0], qkv.shape[1] // 3
    q, k, v = qkv.split(width, dim=1)
    q.mul_(width**-0.5)
    out = qkv.new_empty((count, width))
    scores = qkv.new_empty((min(QUERY_ROWS, count), count))
    for start in range(0, count, QUERY_ROWS):
        stop = min(start + QUERY_ROWS, count)
        chunk = scores[: stop - start]
        torch.mm(q[start:stop], k.t(), out=chunk)
        chunk.sub_(chunk.amax(dim=1, keepdim=True)).exp_()
        torch.mm(chunk, v, out=out[start:stop])
        out[start:stop].div_(chunk.sum(dim=1, keepdim=True))
    return out
