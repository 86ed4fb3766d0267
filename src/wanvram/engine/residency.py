"""Where a component's weights live and when they move: resident, streamed block by block, or on the host.

A component's parameters are laid out in flat byte buffers, one for the shell (everything outside the blocks) and one per block.
A flat buffer is one allocation, one copy and one free, so streaming a block is a single transfer into one of two reused slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from wanvram.engine.devices import Device
from wanvram.weights.sources import TensorSource

__all__ = ["Component", "Layout"]

ALIGNMENT_BYTES = 256  # cuBLAS and cuDNN pick their fastest kernels for operands aligned to 16 bytes; 256 is CUDA's own


@dataclass(frozen=True)
class _Place:
    name: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Offsets of a module's parameters in one flat byte buffer of `nbytes`."""

    places: tuple[_Place, ...]
    nbytes: int

    @classmethod
    def of(cls, parameters: Sequence[tuple[str, torch.Tensor]]) -> Layout:
        places, offset = [], 0
        for name, p in parameters:
            places.append(_Place(name, offset, p.dtype, tuple(p.shape), tuple(p.stride())))
            size = p.numel() * p.element_size()
            offset += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return cls(tuple(places), offset)

    def views(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """(parameter name, view into `flat` [nbytes] uint8) for every parameter."""
        for place in self.places:
            count = 1
            for size in place.shape:
                count *= size
            span = flat.narrow(0, place.offset, count * place.dtype.itemsize).view(place.dtype)
            yield place.name, span.as_strided(place.shape, place.stride)


def _bind(module: nn.Module, views: Iterator[tuple[str, torch.Tensor]]) -> None:
    for name, view in views:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path) if path else module
        owner._parameters[leaf] = nn.Parameter(view, requires_grad=False)


@dataclass
class _Part:
    """One separately placed piece: the shell, or one block. `prefix` makes its parameter names checkpoint keys."""

    module: nn.Module
    prefix: str
    layout: Layout
    master: torch.Tensor | None = None
    flat: torch.Tensor | None = None
    meta: tuple[tuple[str, nn.Parameter], ...] = ()

    def bind(self, flat: torch.Tensor) -> None:
        _bind(self.module, self.layout.views(flat))

    def unbind(self) -> None:
        _bind(self.module, iter(self.meta))


class Component:
    """A model whose parameters were built on `meta`, and the buffers that hold them.

    `blocks` are visited through `walk`; the rest is the shell. Call exactly one of the `load_*` methods, then use the module
    through `walk`, then `release`.
    """

    def __init__(self, name: str, module: nn.Module, blocks: Sequence[nn.Module], device: Device) -> None:
        self.name = name
        self.module = module
        self.device = device
        self.parameters = sum(p.numel() for p in module.parameters())
        prefixes = {id(m): prefix for prefix, m in module.named_modules()}
        in_blocks = {id(p) for block in blocks for p in block.parameters()}
        shell = [(n, p) for n, p in module.named_parameters() if id(p) not in in_blocks]
        self._shell = _Part(module, "", Layout.of(shell), meta=tuple(shell))
        self._blocks = {id(b): _block_part(b, prefixes[id(b)]) for b in blocks}
        self._slots: list[torch.Tensor] = []
        self._observe: Callable[[int], object] | None = None

    # --- loading -----------------------------------------------------------------------------------------------------------

    def load_resident(self, source: TensorSource | None) -> None:
        """Every parameter on the device, written there tensor by tensor: peaks at base memory plus nothing."""
        for part in self._parts():
            part.flat = self.device.empty((part.layout.nbytes,), torch.uint8)
            part.bind(part.flat)
            self._fill(part, part.flat, source)

    def load_streamed(self, source: TensorSource | None, *, pinned: bool) -> None:
        """The shell and two block slots on the device, all blocks in host RAM."""
        self._load_shell(source)
        largest = max(part.layout.nbytes for part in self._blocks.values())
        self._slots = [self.device.empty((largest,), torch.uint8) for _ in range(2)]
        for part in self._blocks.values():
            part.master = self.device.host_empty((part.layout.nbytes,), torch.uint8, pinned=pinned)
            staging = self._slots[0].narrow(0, 0, part.layout.nbytes)
            self._fill(part, staging, source)
            self.device.copy(part.master, staging)

    def load_host(self, source: TensorSource | None) -> None:
        """Every parameter in host RAM; the module then computes on the CPU."""
        for part in self._parts():
            part.flat = self.device.host_empty((part.layout.nbytes,), torch.uint8)
            part.bind(part.flat)
            if source is not None:
                self._fill(part, part.flat, source)

    def release(self) -> None:
        """Drops every buffer; the module is back on meta and may be loaded again."""
        for part in self._parts():
            part.unbind()
            part.flat = part.master = None
        self._slots = []

    def _load_shell(self, source: TensorSource | None) -> None:
        if self._shell.layout.nbytes == 0:
            return
        self._shell.flat = self.device.empty((self._shell.layout.nbytes,), torch.uint8)
        self._shell.bind(self._shell.flat)
        self._fill(self._shell, self._shell.flat, source)

    def _fill(self, part: _Part, flat: torch.Tensor, source: TensorSource | None) -> None:
        if source is None:
            self.device.generated_weights()
            return
        for name, view in part.layout.views(flat):
            source.fill(part.prefix + name, view)

    def _parts(self) -> list[_Part]:
        shell = [self._shell] if self._shell.layout.nbytes else []
        return shell + list(self._blocks.values())

    # --- visiting the blocks -------------------------------------------------------------------------------------------------

    def observe(self, per_block: Callable[[int], object] | None) -> None:
        """`per_block(i)` is a context manager entered around every block (the recorder's span)."""
        self._observe = per_block

    def walk(self, blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
        """Yields each block with its weights in place; valid until the next is asked for."""
        visit = self._stream(blocks) if self._slots else iter(blocks)
        for index, block in enumerate(visit):
            if self._observe is None:
                yield block
            else:
                with self._observe(index):  # type: ignore[attr-defined]
                    yield block

    def _stream(self, blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
        """Copies block i+1 into the other slot while block i computes; a slot is overwritten only after its block is done."""
        parts = [self._blocks[id(block)] for block in blocks]
        done = [self.device.mark(), self.device.mark()]
        ready = [self._fetch(parts[0], 0, done[0])]
        for i, part in enumerate(parts):
            if i + 1 < len(parts):
                ready.append(self._fetch(parts[i + 1], (i + 1) % 2, done[(i + 1) % 2]))
            self.device.wait(ready[i])
            part.bind(self._slots[i % 2])
            try:
                yield part.module
            finally:
                part.unbind()
            done[i % 2] = self.device.mark()

    def _fetch(self, part: _Part, slot: int, after: object) -> object:
        assert part.master is not None
        return self.device.prefetch(self._slots[slot].narrow(0, 0, part.layout.nbytes), part.master, after)

    # --- sizes ---------------------------------------------------------------------------------------------------------------

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters in their storage dtypes, wherever they are."""
        return sum(part.layout.nbytes for part in self._parts())


def _block_part(block: nn.Module, prefix: str) -> _Part:
    named = list(block.named_parameters())
    return _Part(block, prefix + ".", Layout.of(named), meta=tuple(named))
