"""How tensors lie in memory, as libraries and copies ask."""

from __future__ import annotations

import torch

__all__ = ["alike", "as_channels_last", "layout_of", "suggests_channels_last"]

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def layout_of(tensor: torch.Tensor) -> str:
    """contiguous, channels_last, or strided, which libraries copy first."""
    if tensor.is_contiguous():
        return "contiguous"
    return "channels_last" if tensor.dim() in _LAST and as_channels_last(tensor) else "strided"


def as_channels_last(tensor: torch.Tensor) -> bool:
    """Whether its memory is that of channels_last; of 4 or 5 dimensions."""
    return tensor.is_contiguous(memory_format=_LAST[tensor.dim()])


def suggests_channels_last(tensor: torch.Tensor) -> bool:
    """As Tensor::suggest_memory_format, by which cuDNN's layout is chosen: by strides alone, those of dimensions of size 1 too."""
    if tensor.dim() not in _LAST or tensor.stride(1) == 0:
        return False
    sizes, strides, least = tensor.shape, tensor.stride(), 0
    for d in (1, *range(tensor.dim() - 1, 1, -1), 0):
        if not sizes[d] or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * sizes[d] if sizes[d] > 1 else strides[d]
    return True


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether one memcpy copies between them."""
    return a.shape == b.shape and a.stride() == b.stride() and (a.is_contiguous() or _dense(a))


def _dense(tensor: torch.Tensor) -> bool:
    extent = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size == 1:
            continue
        if stride != extent:
            return False
        extent *= size
    return True
