"""fp8 storage: what is packed, how far off it is, and that unpacking undoes the layout exactly."""

from __future__ import annotations

import pytest
import torch

from wanvram.engine.layout import ALIGNMENT_BYTES, Layout
from wanvram.engine.packing import Packing
from wanvram.kernels.scaled_products import FP8

SHAPES = [
    ("q.weight", (12, 40), torch.bfloat16),
    ("q.bias", (12,), torch.bfloat16),
    ("norm.weight", (40,), torch.float32),
    ("time.weight", (8, 40), torch.float32),
]


@pytest.fixture
def packing() -> Packing:
    return Packing.of(Layout.of([(name, torch.empty(shape, dtype=dtype)) for name, shape, dtype in SHAPES]))


def filled(packing: Packing, generator: torch.Generator) -> torch.Tensor:
    flat = torch.zeros(packing.plain.nbytes, dtype=torch.uint8)
    for _, view in packing.plain.views(flat):
        view.copy_(torch.randn(view.shape, generator=generator) * torch.logspace(-3, 1, view.shape[-1]))
    return flat


def test_only_low_precision_matrices_are_packed(packing: Packing) -> None:
    stored = {place.name: place.dtype for place in packing.stored.places}
    assert stored["q.weight"] == FP8
    assert stored["q.weight.scale"] == torch.float32
    assert (stored["q.bias"], stored["norm.weight"], stored["time.weight"]) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    assert packing.stored.nbytes % ALIGNMENT_BYTES == 0


def test_a_packed_weight_is_within_half_a_step_of_its_format(packing: Packing, generator: torch.Generator) -> None:
    flat = filled(packing, generator)
    packed = torch.zeros(packing.stored.nbytes, dtype=torch.uint8)
    packing.pack(flat, packed)
    back = torch.full_like(flat, 255)
    packing.unpack(packed, back)
    before, after = dict(packing.plain.views(flat)), dict(packing.plain.views(back))
    for name in ("q.bias", "norm.weight", "time.weight"):
        assert torch.equal(before[name], after[name])
    w, u = before["q.weight"].double(), after["q.weight"].double()
    largest = w.abs().amax(1, keepdim=True)
    bound = torch.maximum(w.abs() * 2**-4, largest * 2**-10) + w.abs() * 2**-7  # the last term: bfloat16's own rounding
    assert ((w - u).abs() <= bound).all()
    assert not torch.equal(w, u)
    assert torch.allclose(u.abs().amax(1), w.abs().amax(1), rtol=2**-7)


def test_packing_what_was_unpacked_changes_nothing(packing: Packing, generator: torch.Generator) -> None:
    flat = filled(packing, generator)
    packed, again = (torch.zeros(packing.stored.nbytes, dtype=torch.uint8) for _ in range(2))
    packing.pack(flat, packed)
    packing.unpack(packed, flat)
    packing.pack(flat, again)
    first, second = dict(packing.stored.views(packed)), dict(packing.stored.views(again))
    assert torch.allclose(first["q.weight"].float(), second["q.weight"].float(), rtol=2**-3)


def test_a_row_of_zeros_stays_zero(packing: Packing) -> None:
    flat = torch.zeros(packing.plain.nbytes, dtype=torch.uint8)
    packed = torch.zeros(packing.stored.nbytes, dtype=torch.uint8)
    packing.pack(flat, packed)
    packing.unpack(packed, flat)
    assert not flat.any()
