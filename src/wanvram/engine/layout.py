"""Many tensors in one flat byte buffer, which is one allocation, one copy and one free."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
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

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Of one index of the first axis, which is the outermost in memory, of channels_last tensors too."""
        each = self.nbytes // self.shape[0]
        assert self.shape[0] == 1 or self.stride[0] * self.dtype.itemsize == each, (
            f"rows of {self.name} are not in order"
        )
        return each

    def view(self, span: torch.Tensor) -> torch.Tensor:
        """span: uint8 [nbytes]."""
        return span.view(self.dtype).as_strided(self.shape, self.stride)

    def rows(self, span: torch.Tensor) -> torch.Tensor:
        """span: uint8, of some whole rows."""
        shape = (span.nbytes // self.row_bytes, *self.shape[1:])
        return span.view(self.dtype).as_strided(shape, self.stride)


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
            offset += -(-places[-1].nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return cls(tuple(places), offset)

    @property
    def geometry(self) -> Hashable:
        """The same for layouts whose tensors differ in their names only."""
        return tuple((place.offset, place.dtype, place.shape, place.stride) for place in self.places)

    def views(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """(parameter name, view into `flat` [nbytes] uint8) for every parameter."""
        for place in self.places:
            yield place.name, place.view(flat.narrow(0, place.offset, place.nbytes))
