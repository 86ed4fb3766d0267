"""Weights stored in fp8: matrices as float8_e4m3fn with one float32 scale per output row, everything else as it is. Lossy.

The model never sees it: a unit is unpacked into a buffer of the compute dtype before it is used.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

import torch

from wanvram.engine.layout import Layout, TensorPlace
from wanvram.weights.fp8 import FP8, SCALE_SUFFIX, row_scales, to_fp8

__all__ = ["Packing"]


@dataclass(frozen=True)
class Packing:
    """How a unit of layout `plain` is stored: `stored` names each matrix, followed by its scale."""

    plain: Layout
    stored: Layout

    @classmethod
    def of(cls, plain: Layout) -> Packing:
        return cls(plain, Layout.packed(_stored(plain)))

    def pack(self, flat: torch.Tensor, target: torch.Tensor, only: Container[str] | None = None) -> None:
        """flat [plain.nbytes] -> target [stored.nbytes], both uint8, on one device. only: names of the tensors wanted."""
        stored = dict(self.stored.views(target))
        for name, view in self.plain.views(flat):
            if only is not None and name not in only:
                continue
            if name + SCALE_SUFFIX not in stored:
                stored[name].copy_(view)
                continue
            scales = row_scales(view)
            stored[name + SCALE_SUFFIX].copy_(scales)
            stored[name].copy_(to_fp8(view, scales))

    def unpack(self, packed: torch.Tensor, flat: torch.Tensor) -> None:
        """The inverse: target's values times their scales, in the plain dtypes."""
        stored = dict(self.stored.views(packed))
        for name, view in self.plain.views(flat):
            view.copy_(stored[name])
            if name + SCALE_SUFFIX in stored:
                view.mul_(stored[name + SCALE_SUFFIX])


def _stored(plain: Layout) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], tuple[int, ...]]]:
    for place in plain.places:
        if not _is_matrix(place):
            yield place.name, place.dtype, place.shape, place.stride
            continue
        yield place.name, FP8, place.shape, place.stride
        yield place.name + SCALE_SUFFIX, torch.float32, (place.shape[0], 1), (1, 1)


def _is_matrix(place: TensorPlace) -> bool:
    """Large products only: norms, biases and what is float32 because official keeps it so stay exact."""
    return len(place.shape) == 2 and place.dtype.itemsize == 2
