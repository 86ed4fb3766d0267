"""A small component for the tests of residency, and devices that show what becomes of its weights."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mapping_source import MappingSource
from wanvram.engine.devices import CpuDevice
from wanvram.engine.layout import ALIGNMENT_BYTES
from wanvram.engine.residency import Component

WIDTH = 16
HIDDEN = (24, 32, 40, 24)
HOMES = ("pinned", "pageable", "disk")
LOADS = ("resident", "host", *HOMES)
Walk = Callable[[Sequence[nn.Module]], Iterator[nn.Module]]


class Block(nn.Module):
    """Two units. Blocks differ in size (`hidden`) and hold two dtypes, as the transformer's do."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, hidden, dtype=torch.bfloat16)
        self.down = nn.Linear(hidden, WIDTH)


class Model(nn.Module):
    """A shell with a convolution in channels_last_3d, two embedders, and by default four blocks, the third the largest."""

    def __init__(self, hidden: Sequence[int] = HIDDEN) -> None:
        super().__init__()
        self.patch = nn.Conv3d(3, WIDTH, (1, 2, 2), stride=(1, 2, 2))
        with torch.no_grad():
            self.patch.weight = nn.Parameter(self.patch.weight.to(memory_format=torch.channels_last_3d))
        self.time = nn.Linear(6, 7)
        self.text = nn.Linear(7, WIDTH)
        self.blocks = nn.ModuleList(Block(size) for size in hidden)
        self.head = nn.Linear(WIDTH, 5)

    def embedders(self) -> list[nn.Module]:
        return [self.time, self.text]

    def units(self) -> list[nn.Module]:
        return [unit for block in self.blocks for unit in (block.up, block.down)]

    def prepare(self, condition: Tensor, walk: Walk = iter) -> Tensor:
        for embedder in walk(self.embedders()):
            condition = torch.tanh(embedder(condition))
        return condition

    def forward(self, x: Tensor, condition: Tensor, walk: Walk = iter) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2) + condition
        for index, unit in enumerate(walk(self.units())):
            if index % 2 == 0:
                inner = torch.relu(unit(h.to(torch.bfloat16)))
            else:
                h = h + unit(inner.float())
        return self.head(h)  # type: ignore[no-any-return]


def on_meta(device: CpuDevice, hidden: Sequence[int] = HIDDEN) -> tuple[Model, Component]:
    with torch.device("meta"):
        model = Model(hidden)
    return model, Component("toy", model, model.units(), device, model.embedders())


def load(component: Component, how: str, source: MappingSource, resident_groups: int = 0) -> None:
    if how in HOMES:
        component.load_streamed(source, home=how, resident_groups=resident_groups)
    else:
        getattr(component, f"load_{how}")(source)


def finish(walk: Iterator[nn.Module]) -> None:
    for _ in walk:
        pass


def all_on_meta(*modules: nn.Module) -> bool:
    return all(p.is_meta for module in modules for p in module.parameters())


def padded_bytes(*modules: nn.Module) -> int:
    parameters = [p for module in modules for p in module.parameters()]
    return sum(-(-p.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for p in parameters)


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("wanvram-weights")]


def assert_same_results(
    model: Model, component: Component, plain: Model, inputs: tuple[Tensor, Tensor], passes: int = 3
) -> None:
    """Several passes: a second step must find the slots as good as the first did."""
    x, condition = inputs
    condition, expected = model.prepare(condition, component.walk_embedders), plain.prepare(condition)
    assert torch.equal(condition, expected)
    for _ in range(passes):
        assert torch.equal(model(x, condition, component.walk), plain(x, expected))
        x = x * 1.5


def allocated_before(device: CpuDevice, plain: Model, inputs: tuple[Tensor, Tensor]) -> int:
    """Bytes allocated once the plain model has run: the meter counts what existed before at its first use."""
    plain(inputs[0], plain.prepare(inputs[1]))
    return device.meter.read().allocated_bytes


class CountingDevice(CpuDevice):
    """Keeps apart what is asked for on the device and on the host, which on a CPU are the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.on_device: list[int] = []
        self.on_host: list[int] = []
        self.pinned: list[int] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self.on_device.append(shape[0])
        return super().empty(shape, dtype)

    def host_empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool = False) -> Tensor:
        (self.pinned if pinned else self.on_host).append(shape[0])
        return super().host_empty(shape, dtype)


class CountingSource(MappingSource):
    """Keys in the order they are read. `errors`: the next read of a key raises its error."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.read: list[str] = []
        self.errors: dict[str, Exception] = {}

    def fill(self, key: str, dest: Tensor) -> None:
        self.read.append(key)
        if key in self.errors:
            raise self.errors.pop(key)
        super().fill(key, dest)


class LateDevice(CpuDevice):
    """Copies as late as a GPU might, in order: only when waited for. Other marks are the number of units computed so far."""

    def __init__(self) -> None:
        super().__init__()
        self.computed = 0
        self.starts: list[tuple[int, int | None]] = []
        self.waited = 0
        self.pending: deque[Callable[[], object]] = deque()

    def mark(self) -> int:
        return self.computed

    def prefetch(self, destination: Tensor, source: Tensor, after: Any) -> Any:
        self.starts.append((self.computed, after))
        copy = partial(destination.copy_, source)
        self.pending.append(copy)
        return copy

    def wait(self, mark: Any) -> None:
        self.waited += 1
        self.reader_waits(mark)

    def reader_waits(self, mark: Any) -> None:
        while any(mark is copy for copy in self.pending):
            self.pending.popleft()()
