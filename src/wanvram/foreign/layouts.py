"""How tensors lie in memory, as libraries and copies ask."""

from __future__ import annotations

import torch

__all__ = ["alike", "layout_of"]


def layout_of(tensor: torch.Tensor) -> str:
    """contiguous, channels_last, or strided, which libraries copy first."""
    if tensor.is_contiguous():
        return "contiguous"
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(tensor.dim())
    return "channels_last" if last is not None and tensor.is_contiguous(memory_format=last) else "strided"


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
