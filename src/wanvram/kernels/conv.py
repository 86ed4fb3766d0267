"""Convolution and single-head attention of the VAE, with memory that does not depend on the GPU.

`wanvram::conv3d` fixes the layout: channels_last_3d in and out, where cuDNN needs neither workspace nor copies
(measured: 0 against 1463 MiB for 96 channels at 480x832). `wanvram::conv2d` is the same for pictures in channels_last, whose
kernels are faster in float32: three frames as one picture of three times the channels take 0.71 ms there instead of 1.36, and
384 channels at 120x208 0.47 instead of 0.91 (H200, TF32, the same error). `frame_attention` is plain products over row chunks,
so every buffer it takes is an ordinary allocation that a run on meta tensors sees too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wanvram.kernels.operation import operation

__all__ = ["conv2d", "conv3d", "frame_attention", "place_frame"]

QUERY_ROWS = 1024  # scores of 1024 x 14400 float32 are 56 MiB; all rows at 1280x720 would be 791 MiB


@operation("(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding) -> Tensor")
def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Cross-correlation of x [1,I,T,H,W] with weight [O,I,kT,kH,kW], both channels_last_3d -> channels_last_3d."""
    out = F.conv3d(x, weight, bias, stride=stride, padding=padding)
    return out.contiguous(memory_format=torch.channels_last_3d)  # no copy where the library kept the layout


@operation("(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding) -> Tensor")
def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Cross-correlation of x [1,I,H,W] with weight [O,I,kH,kW], both channels_last -> channels_last."""
    out = F.conv2d(x, weight, bias, stride=stride, padding=padding)
    return out.contiguous(memory_format=torch.channels_last)


@conv2d.on_meta
@conv3d.on_meta
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int]) -> Tensor:
    del bias
    size = [
        (length + 2 * pad - kernel) // step + 1
        for length, pad, kernel, step in zip(x.shape[2:], padding, weight.shape[2:], stride, strict=True)
    ]
    shape = (x.shape[0], weight.shape[0], *size)
    layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


@operation("(Tensor(a!) frame, Tensor bias, Tensor(b!) out, bool add) -> ()", triton="wanvram.kernels.triton_conv")
def place_frame(frame: Tensor, bias: Tensor, out: Tensor, add: bool) -> None:
    """out = frame + bias, or out += frame + bias: frames, or parts of some, [1,C,1,H,W] in channels_last_3d, bias [C].

    `frame` may be overwritten. A convolution's own bias is a pass over its result, 0.11 of 0.83 ms for 96 channels at 480x832
    (H200); a launch from Python costs more than it where frames are small.
    """
    frame.add_(bias.view(-1, 1, 1, 1))
    if add:
        out.add_(frame)
    else:
        out.copy_(frame)


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
