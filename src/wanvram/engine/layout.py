"""Many tensors in one flat byte buffer, which is one allocation, one copy and one free."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

__all__ = ["ALIGNMENT_BYTES", "Layout", "TensorPlace"]

ALIGNMENT_BYTES = 256  # cuBLAS and cuDNN pick their fastest kernels for operands aligned to 16 bytes; 256 is CUDA's own


@dataclass(frozen=True)
class TensorPlace:
    name: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Offsets of a module's parameters in one flat byte buffer of `nbytes`."""

    places: tuple[TensorPlace, ...]
    nbytes: int

    @classmethod
    def of(cls, parameters: Sequence[tuple[str, torch.Tensor]]) -> Layout:
        return cls.packed((name, p.dtype, tuple(p.shape), tuple(p.stride())) for name, p in parameters)

    @classmethod
    def packed(cls, tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...], tuple[int, ...]]]) -> Layout:
        """Each tensor (name, dtype, shape, stride) behind the one before, aligned."""
        places, offset = [], 0
        for name, dtype, shape, stride in tensors:
            places.append(TensorPlace(name, offset, dtype, shape, stride))
            size = math.prod(shape) * dtype.itemsize
            offset += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return cls(tuple(places), offset)

    def views(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """(parameter name, view into `flat` [nbytes] uint8) for every parameter."""
        for place in self.places:
            count = math.prod(place.shape)
            span = flat.narrow(0, place.offset, count * place.dtype.itemsize).view(place.dtype)
            yield place.name, span.as_strided(place.shape, place.stride)
