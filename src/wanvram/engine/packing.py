"""Weights stored in fp8: matrices as float8_e4m3fn with one float32 scale per output row, everything else as it is. Lossy.

The error of a weight is at most 2^-4 of itself, or 2^-10 of its row's largest below 2^-6 of that: e4m3 has three mantissa bits.
The model never sees it: a unit is unpacked into a buffer of the compute dtype before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from wanvram.engine.layout import Layout, Place

__all__ = ["FP8", "Packing"]

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # the largest finite e4m3 number


@dataclass(frozen=True)
class Packing:
    """How a unit of layout `plain` is stored: `stored` names each matrix, followed by its scale."""

    plain: Layout
    stored: Layout

    @classmethod
    def of(cls, plain: Layout) -> Packing:
        return cls(plain, Layout.packed(_stored(plain)))

    def pack(self, flat: torch.Tensor, target: torch.Tensor) -> None:
        """flat [plain.nbytes] -> target [stored.nbytes], both uint8, on one device."""
        stored = dict(self.stored.views(target))
        for name, view in self.plain.views(flat):
            if name + SCALE not in stored:
                stored[name].copy_(view)
                continue
            scale = stored[name + SCALE]
            scale.copy_(view.abs().amax(dim=1, keepdim=True)).div_(LARGEST).clamp_(min=1e-12)
            stored[name].copy_(view / scale)

    def unpack(self, packed: torch.Tensor, flat: torch.Tensor) -> None:
        """The inverse: target's values times their scales, in the plain dtypes."""
        stored = dict(self.stored.views(packed))
        for name, view in self.plain.views(flat):
            view.copy_(stored[name])
            if name + SCALE in stored:
                view.mul_(stored[name + SCALE])


SCALE = ".scale"


def _stored(plain: Layout) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], tuple[int, ...]]]:
    for place in plain.places:
        if not _is_matrix(place):
            yield place.name, place.dtype, place.shape, place.stride
            continue
        yield place.name, FP8, place.shape, place.stride
        yield place.name + SCALE, torch.float32, (place.shape[0], 1), (1, 1)


def _is_matrix(place: Place) -> bool:
    """Large products only: norms, biases and what is float32 because official keeps it so stay exact."""
    return len(place.shape) == 2 and place.dtype.itemsize == 2
