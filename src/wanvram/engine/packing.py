"""Weights in fp8: matrices as float8_e4m3fn with one float32 scale per output row, everything else as it is. Lossy.

Stored so, a unit is unpacked into a buffer of the compute dtype before it is used, and the model never sees it. Or the model
multiplies them as they are, and a unit that is stored in the compute dtype is quantised into a buffer.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

import torch

from wanvram.engine.layout import Layout, TensorPlace
from wanvram.kernels.scaled_products import FP8, SCALE_SUFFIX, quantise_rows, row_scales, to_fp8

__all__ = ["NOWHERE", "Fp8", "Packing"]


@dataclass(frozen=True)
class Fp8:
    """What a component's matrices are in fp8 for: where they wait or stay, and what is multiplied."""

    stored: bool = False
    multiplied: bool = False


NOWHERE = Fp8()


@dataclass(frozen=True)
class Packing:
    """How a unit of layout `plain` is stored: `stored` names each matrix, followed by its scale; `matrices` has only these."""

    plain: Layout
    stored: Layout
    matrices: Layout

    @classmethod
    def of(cls, plain: Layout) -> Packing:
        scaled = [place for place in plain.places if _is_matrix(place)]
        return cls(plain, Layout.packed(_stored(plain.places)), Layout.packed(_stored(scaled)))

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

    def quantise(self, flat: torch.Tensor, room: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """flat [plain.nbytes] -> its matrices and their scales in room [matrices.nbytes]; views by name, the rest in flat."""
        views = dict(self.plain.views(flat)) | dict(self.matrices.views(room))
        for name, matrix in self.plain.views(flat):
            if name + SCALE_SUFFIX in views:
                quantise_rows(matrix, views[name], views[name + SCALE_SUFFIX])
        return iter(views.items())


def _stored(places: Iterable[TensorPlace]) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], tuple[int, ...]]]:
    for place in places:
        if not _is_matrix(place):
            yield place.name, place.dtype, place.shape, place.stride
            continue
        yield place.name, FP8, place.shape, place.stride
        yield place.name + SCALE_SUFFIX, torch.float32, (place.shape[0], 1), (1, 1)


def _is_matrix(place: TensorPlace) -> bool:
    """Large products only: norms, biases and what is float32 because official keeps it so stay exact."""
    return len(place.shape) == 2 and place.dtype.itemsize == 2
