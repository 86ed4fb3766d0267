"""Residency: resident, streamed and on the host are the same model; streaming holds two blocks, release holds nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wanvram.engine.devices import CpuDevice
from wanvram.engine.residency import ALIGNMENT_BYTES, Component, Layout
from wanvram.errors import CheckpointError
from wanvram.weights.sources import MappingSource

WIDTH = 16
LOADS = ("resident", "streamed", "host")


class Block(nn.Module):
    """Blocks differ in size (`hidden`) and hold two dtypes, as the transformer's do."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, hidden, dtype=torch.bfloat16)
        self.down = nn.Linear(hidden, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x.to(torch.bfloat16)))
        return x + self.down(hidden.float())


class Model(nn.Module):
    """A shell with a convolution in channels_last_3d, and four blocks of which the third is the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv3d(3, WIDTH, (1, 2, 2), stride=(1, 2, 2))
        with torch.no_grad():
            self.patch.weight = nn.Parameter(self.patch.weight.to(memory_format=torch.channels_last_3d))
        self.blocks = nn.ModuleList(Block(hidden) for hidden in (24, 32, 40, 24))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, component: Component | None = None) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2)
        for block in component.walk(list(self.blocks)) if component else self.blocks:
            h = block(h)
        return self.head(h)  # type: ignore[no-any-return]


def on_meta(device: CpuDevice) -> tuple[Model, Component]:
    with torch.device("meta"):
        model = Model()
    return model, Component("toy", model, list(model.blocks), device)


def load(component: Component, how: str, source: MappingSource) -> None:
    if how == "streamed":
        component.load_streamed(source, pinned=False)
    else:
        getattr(component, f"load_{how}")(source)


def all_on_meta(module: nn.Module) -> bool:
    return all(p.is_meta for p in module.parameters())


def padded_bytes(parameters: Iterator[nn.Parameter]) -> int:
    return sum(-(-p.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for p in parameters)


@pytest.fixture
def plain() -> Model:
    return Model().requires_grad_(False)


@pytest.fixture
def source(plain: Model) -> MappingSource:
    return MappingSource(plain.state_dict())


@pytest.fixture
def device() -> Iterator[CpuDevice]:
    device = CpuDevice()
    with device.session():
        yield device


# --- the same model wherever its weights are --------------------------------------------------------------------------


@pytest.mark.parametrize("how", LOADS)
def test_every_residency_gives_exactly_the_result_of_plain_weights(
    how: str, plain: Model, source: MappingSource, device: CpuDevice, generator: torch.Generator
) -> None:
    x = torch.randn(1, 3, 2, 4, 4, generator=generator)
    model, component = on_meta(device)
    load(component, how, source)
    expected = plain(x)
    for _ in range(3):  # a second step must find the slots as good as the first did
        assert torch.equal(model(x, component), expected)


@pytest.mark.parametrize("how", LOADS)
def test_a_component_can_be_released_and_loaded_another_way(
    how: str, plain: Model, source: MappingSource, device: CpuDevice, generator: torch.Generator
) -> None:
    x = torch.randn(1, 3, 2, 4, 4, generator=generator)
    model, component = on_meta(device)
    for first in LOADS:
        load(component, first, source)
        component.release()
        load(component, how, source)
        assert torch.equal(model(x, component), plain(x))
        component.release()


def test_a_walk_may_visit_some_blocks_only_in_any_order(plain: Model, source: MappingSource, device: CpuDevice) -> None:
    model, component = on_meta(device)
    component.load_streamed(source, pinned=False)
    for order in ((3, 2, 1, 0), (2,), (1, 1, 3)):
        for index, block in zip(order, component.walk([model.blocks[i] for i in order]), strict=True):
            assert block is model.blocks[index]
            assert torch.equal(block.down.weight, plain.blocks[index].down.weight)


def test_weights_that_are_not_in_the_source_are_a_checkpoint_error(device: CpuDevice) -> None:
    _, component = on_meta(device)
    with pytest.raises(CheckpointError, match=r"no tensor patch\.weight"):
        component.load_resident(MappingSource({}))


# --- layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", LOADS)
def test_the_strides_of_a_channels_last_parameter_survive(how: str, source: MappingSource, device: CpuDevice) -> None:
    model, component = on_meta(device)
    strides = model.patch.weight.stride()
    assert strides != tuple(torch.empty(model.patch.weight.shape).stride())
    load(component, how, source)
    assert model.patch.weight.stride() == strides
    assert model.patch.weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_parameters_start_at_aligned_offsets_and_never_overlap() -> None:
    parameters = [("a", torch.empty(3)), ("b", torch.empty(0)), ("c", torch.empty(65, dtype=torch.float32))]
    layout = Layout.of(parameters)
    assert [place.offset for place in layout.places] == [0, 256, 256]
    assert layout.nbytes == 256 + 512
    flat = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for value, (_, view) in enumerate(layout.views(flat), start=1):
        view.fill_(value)
    assert [view.unique().tolist() for _, view in layout.views(flat)] == [[1.0], [], [3.0]]


def test_the_sizes_are_those_of_all_parameters_and_do_not_depend_on_where_they_are(
    plain: Model, source: MappingSource, device: CpuDevice
) -> None:
    _, component = on_meta(device)
    assert component.parameters == sum(p.numel() for p in plain.parameters())
    assert component.weight_bytes == padded_bytes(plain.parameters())
    component.load_streamed(source, pinned=False)
    assert component.weight_bytes == padded_bytes(plain.parameters())


# --- memory -----------------------------------------------------------------------------------------------------------


class CountingDevice(CpuDevice):
    """Keeps apart what is asked for on the device and on the host, which on a CPU are the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.on_device: list[int] = []
        self.on_host: list[int] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self.on_device.append(shape[0])
        return super().empty(shape, dtype)

    def host_empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool = False) -> Tensor:
        self.on_host.append(shape[0])
        return super().host_empty(shape, dtype)


def test_streaming_takes_the_shell_and_two_of_the_largest_block_on_the_device(
    plain: Model, source: MappingSource
) -> None:
    device = CountingDevice()
    model, component = on_meta(device)
    sizes = [padded_bytes(block.parameters()) for block in plain.blocks]
    shell = component.weight_bytes - sum(sizes)
    component.load_streamed(source, pinned=False)
    for _ in range(2):
        storages = {
            p.untyped_storage().data_ptr() for block in component.walk(list(model.blocks)) for p in block.parameters()
        }
        assert len(storages) == 2
    assert device.on_device == [shell, max(sizes), max(sizes)]
    assert device.on_host == sizes


def test_only_the_block_of_the_moment_has_weights_and_none_has_them_after_the_walk(
    source: MappingSource, device: CpuDevice
) -> None:
    model, component = on_meta(device)
    component.load_streamed(source, pinned=False)
    assert all_on_meta(model.blocks)
    for block in component.walk(list(model.blocks)):
        assert [b for b in model.blocks if not all_on_meta(b)] == [block]
    assert all_on_meta(model.blocks)
    assert not any(p.is_meta for p in (*model.patch.parameters(), *model.head.parameters()))


def test_a_walk_that_is_broken_off_leaves_the_blocks_on_meta(source: MappingSource, device: CpuDevice) -> None:
    model, component = on_meta(device)
    component.load_streamed(source, pinned=False)
    for _ in component.walk(list(model.blocks)):
        break
    assert all_on_meta(model.blocks)


@pytest.mark.parametrize("how", LOADS)
def test_release_puts_everything_back_on_meta_and_frees_every_byte(
    how: str, source: MappingSource, device: CpuDevice
) -> None:
    before = device.meter.read().allocated_bytes
    model, component = on_meta(device)
    shapes = [(n, p.shape, p.stride(), p.dtype) for n, p in model.named_parameters()]
    load(component, how, source)
    blocks = [part.layout.nbytes for part in component._blocks.values()]
    slots = 2 * max(blocks) if how == "streamed" else 0
    assert device.meter.read().allocated_bytes - before == component.weight_bytes + slots
    for _ in component.walk(list(model.blocks)):
        pass
    component.release()
    assert device.meter.read().allocated_bytes == before
    assert all_on_meta(model)
    assert [(n, p.shape, p.stride(), p.dtype) for n, p in model.named_parameters()] == shapes


def test_loading_resident_weights_peaks_at_the_weights_themselves(source: MappingSource, device: CpuDevice) -> None:
    _, component = on_meta(device)
    device.meter.reset_peak()
    before = device.meter.read().allocated_bytes
    component.load_resident(source)
    assert device.meter.peak().allocated_bytes - before == component.weight_bytes


# --- the order of copies and computation --------------------------------------------------------------------------------


class LateDevice(CpuDevice):
    """Copies as late as a GPU might: only when waited for. Marks are the number of blocks computed so far."""

    def __init__(self) -> None:
        super().__init__()
        self.computed = 0
        self.starts: list[tuple[int, int]] = []
        self.waited = 0

    def mark(self) -> int:
        return self.computed

    def prefetch(self, destination: Tensor, source: Tensor, after: Any) -> Any:
        self.starts.append((self.computed, after))
        return destination, source

    def wait(self, mark: Any) -> None:
        self.waited += 1
        destination, source = mark
        destination.copy_(source)


def test_a_block_s_copy_starts_one_block_ahead_and_only_after_its_slot_is_free(
    plain: Model, source: MappingSource
) -> None:
    device = LateDevice()
    model, component = on_meta(device)
    component.load_streamed(source, pinned=False)
    for block, expected in zip(component.walk(list(model.blocks)), plain.blocks, strict=True):
        assert torch.equal(block.up.weight, expected.up.weight), "the copy was waited for before the block is used"
        device.computed += 1
    # (blocks computed when the copy was issued, blocks that must be computed before it may overwrite its slot)
    assert device.starts == [(0, 0), (0, 0), (1, 1), (2, 2)]
    assert device.waited == 4


# --- observing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", LOADS)
def test_a_walk_enters_the_observer_around_every_block(how: str, source: MappingSource, device: CpuDevice) -> None:
    seen: list[str] = []

    @contextmanager
    def span(index: int) -> Iterator[None]:
        seen.append(f"enter {index}")
        yield
        seen.append(f"leave {index}")

    model, component = on_meta(device)
    load(component, how, source)
    component.observe(span)
    for index, _ in enumerate(component.walk(list(model.blocks))):
        seen.append(f"compute {index}")
    assert seen == [f"{what} {index}" for index in range(4) for what in ("enter", "compute", "leave")]
    component.observe(None)
    for _ in component.walk(list(model.blocks)):
        pass
    assert len(seen) == 12
