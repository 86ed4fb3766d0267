"""One separately placed piece of a component: where its parameters lie in a flat buffer, and how its modules come to have them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from wanvram.engine.layout import Layout
from wanvram.engine.packing import NOWHERE, Fp8, Packing
from wanvram.kernels.scaled_products import SCALE_SUFFIX

__all__ = ["Piece", "parameter_of", "piece_of"]

_SCALE = ".weight" + SCALE_SUFFIX  # how a layout ends the name of what the module calls its scale
_Owned = tuple[dict[str, nn.Parameter | None], str]  # a module's parameters, and the name of one there


def _owned(module: nn.Module, name: str) -> _Owned:
    path, _, leaf = name.replace(_SCALE, SCALE_SUFFIX).rpartition(".")
    return (module.get_submodule(path) if path else module)._parameters, leaf


def parameter_of(view: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(view, requires_grad=False)


@dataclass(eq=False)
class Piece:
    """One separately placed piece: the shell, one unit or one embedder, whose parameters are named as in the `root`.

    packing: how it is in fp8, where `fp8` is for anything. meta: what its parameters are without weights. stays: on the device.
    """

    module: nn.Module
    root: nn.Module
    layout: Layout
    meta: tuple[tuple[str, nn.Parameter | None], ...]
    packing: Packing | None = None
    fp8: Fp8 = NOWHERE
    stays: bool = False
    flat: torch.Tensor | None = None

    @cached_property
    def owned(self) -> dict[str, _Owned]:
        """By name in `meta`: finding them costs as much of the host's time as a block's arithmetic does of an H200's."""
        return {name: _owned(self.root, name) for name, _ in self.meta}

    @property
    def packed(self) -> Packing | None:
        """How it is stored. What stays on the device and is multiplied in fp8 is quantised once."""
        return self.packing if self.fp8.stored or (self.fp8.multiplied and self.stays) else None

    @property
    def nbytes(self) -> int:
        """As stored, on the device or at its home."""
        return self.layout.nbytes if self.packed is None else self.packed.stored.nbytes

    @property
    def is_bound(self) -> bool:
        """For good: it stays, and is stored as it is used."""
        return self.stays and (self.packed is None or self.fp8.multiplied)

    @property
    def room_bytes(self) -> int:
        """Of the buffer that it is unpacked or quantised into."""
        if self.packing is None or self.is_bound:
            return 0
        if self.fp8.multiplied:
            return 0 if self.packed else self.packing.matrices.nbytes
        return self.layout.nbytes

    @property
    def group(self) -> str:
        """`blocks.3.self_attn.q.bias` -> `blocks.3`: what belongs together in a record, and becomes resident together."""
        name = self.meta[0][0]
        found = re.match(r"(.*?\.\d+)\.", name)
        return found.group(1) if found else name.rpartition(".")[0]

    @property
    def work(self) -> tuple[object, ...]:
        """The same for parts that do the same: which one of a block, of what sizes, from where."""
        kind = self.group.rpartition(".")[0] if self.group[-1].isdigit() else self.group
        return kind, type(self.module), self.nbytes, self.room_bytes, self.flat is None

    def bind(self, flat: torch.Tensor, room: torch.Tensor | None = None) -> None:
        """flat [nbytes], as it is stored. room: see `room_bytes`."""
        for name, view in self._views(flat, room):
            owner, leaf = self.owned[name]
            owner[leaf] = parameter_of(view)

    def bind_all(self, parameters: Iterable[nn.Parameter | None]) -> None:
        """One for each that `meta` has, in its order."""
        for (owner, leaf), parameter in zip(self.owned.values(), parameters, strict=True):
            owner[leaf] = parameter

    def _views(self, flat: torch.Tensor, room: torch.Tensor | None) -> Iterator[tuple[str, torch.Tensor]]:
        if self.packing is None:
            return self.layout.views(flat)
        if self.packed and self.fp8.multiplied:
            return self.packed.stored.views(flat)
        assert room is not None
        room = room.narrow(0, 0, self.room_bytes)
        if self.packed is None:
            return self.packing.quantise(flat, room)
        self.packed.unpack(flat, room)
        return self.layout.views(room)

    def unbind(self) -> None:
        self.bind_all(parameter for _, parameter in self.meta)

    def clear(self) -> None:
        self.unbind()
        self.flat, self.stays = None, False


def piece_of(module: nn.Module, root: nn.Module, names: Mapping[int, str], fp8: Fp8 = NOWHERE) -> Piece:
    """names: of the root's parameters, by identity; a unit may gather modules from several places of it."""
    named = [(names[id(p)], p) for p in module.parameters()]
    layout = Layout.of(named)
    if not (fp8.stored or fp8.multiplied):
        return Piece(module, root, layout, tuple(named))
    packing = Packing.of(layout)
    scales = [(place.name, None) for place in packing.matrices.places if place.name.endswith(SCALE_SUFFIX)]
    return Piece(module, root, layout, (*named, *scales), packing, fp8)
