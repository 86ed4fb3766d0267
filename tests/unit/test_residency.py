"""Residency: wherever the weights wait, the model is the same; streaming holds two units, release holds nothing."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mapping_source import MappingSource
from toy_component import (
    HOMES,
    LOADS,
    CountingDevice,
    CountingSource,
    LateDevice,
    Model,
    all_on_meta,
    assert_same_results,
    finish,
    load,
    on_meta,
    padded_bytes,
)
from wanvram.engine.devices import CpuDevice
from wanvram.engine.layout import Layout
from wanvram.errors import CheckpointError, DeviceError

pytestmark = pytest.mark.timeout(60)  # what waits for a copy or a thread that never ends must fail, not hang


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


@pytest.fixture
def inputs(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(1, 3, 2, 4, 4, generator=generator), torch.randn(6, generator=generator)


# --- the same model wherever its weights are ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", LOADS)
@pytest.mark.parametrize("resident_groups", [0, 1, 3, 4, 99])
def test_every_residency_gives_exactly_the_result_of_plain_weights(
    how: str,
    resident_groups: int,
    plain: Model,
    source: MappingSource,
    device: CpuDevice,
    inputs: tuple[Tensor, Tensor],
) -> None:
    model, component = on_meta(device)
    load(component, how, source, resident_groups)
    assert_same_results(model, component, plain, inputs)


@pytest.mark.parametrize("how", LOADS)
def test_a_component_can_be_released_and_loaded_another_way(
    how: str, plain: Model, source: MappingSource, device: CpuDevice, inputs: tuple[Tensor, Tensor]
) -> None:
    model, component = on_meta(device)
    for first in LOADS:
        load(component, first, source, 1)
        component.release()
        load(component, how, source)
        assert_same_results(model, component, plain, inputs, passes=1)
        component.release()


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("resident_groups", [0, 2])
def test_a_walk_may_visit_some_units_only_in_any_order(
    home: str, resident_groups: int, plain: Model, source: MappingSource, device: CpuDevice
) -> None:
    model, component = on_meta(device)
    component.load_streamed(source, home=home, resident_groups=resident_groups)
    units, expected = model.units(), plain.units()
    for order in (range(8), (7, 6, 5, 4), (2,), (), (1, 1, 3), (4, 0), range(8)):
        for index, unit in zip(order, component.walk([units[i] for i in order]), strict=True):
            assert unit is units[index]
            assert torch.equal(unit.weight, expected[index].weight)


@pytest.mark.parametrize("home", HOMES)
def test_a_single_streamed_unit_is_there_in_every_pass(
    home: str, plain: Model, source: MappingSource, device: CpuDevice
) -> None:
    model, component = on_meta(device)
    component.load_streamed(source, home=home)
    for _ in range(4):
        (weight,) = [unit.weight.clone() for unit in component.walk([model.blocks[2].up])]
        assert torch.equal(weight, plain.blocks[2].up.weight)


class _Views(TorchDispatchMode):
    """Counts operations that make another tensor of the same bytes."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name in ("view", "as_strided", "slice", "detach", "alias")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [8, 7])
def test_once_each_slot_has_had_every_kind_of_unit_no_view_is_made(
    count: int, source: MappingSource, device: CpuDevice
) -> None:
    """30 views of a block are 0.7 ms of the host's time, as long as an H200 computes on one of 1.3B with 5 frames."""
    model, component = on_meta(device)
    component.load_streamed(source, home="pinned")
    made = []
    for _ in range(4):
        with _Views() as views:
            for unit in component.walk(model.units()[:count]):
                assert not unit.weight.is_meta
        made.append(views.count)
    assert made[0] > 0
    assert made[2:] == [0, 0]


def test_what_a_walk_kept_of_the_slots_goes_with_them(source: MappingSource, device: CpuDevice) -> None:
    model, component = on_meta(device)
    component.load_streamed(source, home="pinned")
    weights = [weakref.ref(unit.weight) for unit in component.walk(model.units())]
    assert any(weight() is not None for weight in weights)
    component.release()
    assert [weight() for weight in weights] == [None] * len(weights)


def test_weights_that_are_not_in_the_source_are_a_checkpoint_error(device: CpuDevice) -> None:
    _, component = on_meta(device)
    with pytest.raises(CheckpointError, match=r"no tensor patch\.weight"):
        component.load_resident(MappingSource({}))


# --- layout -------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("how", LOADS)
def test_the_sizes_are_those_of_all_parameters_and_do_not_depend_on_where_they_are(
    how: str, plain: Model, source: MappingSource, device: CpuDevice
) -> None:
    _, component = on_meta(device)
    assert component.parameters == sum(p.numel() for p in plain.parameters())
    assert component.weight_bytes == padded_bytes(plain)
    load(component, how, source, 1)
    assert component.weight_bytes == padded_bytes(plain)


@pytest.mark.parametrize("how", LOADS)
def test_the_host_bytes_are_those_of_the_weights_that_wait_in_ram(
    how: str, plain: Model, source: MappingSource, device: CpuDevice
) -> None:
    waiting = padded_bytes(plain) - padded_bytes(plain.patch, plain.head)
    expected = {"resident": 0, "disk": 0, "host": padded_bytes(plain), "pinned": waiting, "pageable": waiting}
    _, component = on_meta(device)
    load(component, how, source)
    assert component.host_bytes == expected[how]
    component.release()
    assert component.host_bytes == 0


# --- memory -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("blocks", [[], [3], [1, 2, 3]])
def test_streaming_takes_the_shell_the_resident_groups_and_two_of_the_largest_unit_on_the_device(
    home: str, blocks: list[int], plain: Model, source: MappingSource
) -> None:
    """`blocks` are resident; the largest block may be among them."""
    device = CountingDevice()
    model, component = on_meta(device)
    component.load_streamed(source, home=home, resident_groups=len(blocks))
    resident = [padded_bytes(unit) for index, unit in enumerate(plain.units()) if index // 2 in blocks]
    streamed = [padded_bytes(unit) for index, unit in enumerate(plain.units()) if index // 2 not in blocks]
    embedders = [padded_bytes(embedder) for embedder in plain.embedders()]
    expected = [padded_bytes(plain.patch, plain.head), *resident, max(streamed), max(streamed)]
    assert device.on_device == expected
    finish(component.walk_embedders(model.embedders()))
    places = []
    for _ in range(3):
        places += [unit.weight.data_ptr() for unit in component.walk(model.units()[: len(streamed)])]
    assert device.on_device == [*expected, *embedders], "an embedder is there once, a walk allocates nothing"
    assert len(set(places)) == 2
    masters, buffers = [*streamed, *embedders], [max(streamed)] * 2
    on_host, pinned = {"pinned": ([], masters), "pageable": (masters, buffers), "disk": ([], buffers)}[home]
    assert device.on_host == on_host
    assert device.pinned == pinned


def test_when_every_group_is_resident_nothing_waits_elsewhere(plain: Model, source: MappingSource) -> None:
    device = CountingDevice()
    _, component = on_meta(device)
    component.load_streamed(source, home="pageable", resident_groups=4)
    assert sum(device.on_device) == component.weight_bytes - padded_bytes(*plain.embedders())
    assert device.on_host == [padded_bytes(embedder) for embedder in plain.embedders()]
    assert device.pinned == []


@pytest.mark.parametrize("home", HOMES)
def test_only_the_unit_of_the_moment_has_weights_and_none_has_them_after_the_walk(
    home: str, source: MappingSource, device: CpuDevice
) -> None:
    model, component = on_meta(device)
    component.load_streamed(source, home=home)
    assert all_on_meta(model.blocks)
    for unit in component.walk(model.units()):
        assert [u for u in model.units() if not all_on_meta(u)] == [unit]
    assert all_on_meta(model.blocks)
    assert not any(p.is_meta for p in (*model.patch.parameters(), *model.head.parameters()))


@pytest.mark.parametrize("home", HOMES)
def test_a_walk_that_is_broken_off_leaves_the_units_on_meta(
    home: str, plain: Model, source: MappingSource, device: CpuDevice, inputs: tuple[Tensor, Tensor]
) -> None:
    model, component = on_meta(device)
    component.load_streamed(source, home=home)
    for last in range(8):
        for unit in component.walk(model.units()):
            if unit is model.units()[last]:
                break
        assert all_on_meta(model.blocks)
    assert_same_results(model, component, plain, inputs)


@pytest.mark.parametrize("how", LOADS)
@pytest.mark.parametrize("visited", [0, 1, 5, 8])
def test_release_puts_everything_back_on_meta_and_frees_every_byte(
    how: str, visited: int, plain: Model, source: MappingSource, device: CpuDevice
) -> None:
    before = device.meter.read().allocated_bytes
    model, component = on_meta(device)
    shapes = [(n, p.shape, p.stride(), p.dtype) for n, p in model.named_parameters()]
    load(component, how, source)
    largest = max(padded_bytes(unit) for unit in plain.units())
    waiting = padded_bytes(plain.blocks, *plain.embedders())  # not there at all while they wait on disk
    beside = {"pinned": 2 * largest, "pageable": 4 * largest, "disk": 4 * largest - waiting}
    assert device.meter.read().allocated_bytes - before == component.weight_bytes + beside.get(how, 0)
    walk = component.walk(model.units())
    for _ in range(visited):
        next(walk)
    component.release()
    assert all_on_meta(model)
    assert device.meter.read().allocated_bytes == before
    assert [(n, p.shape, p.stride(), p.dtype) for n, p in model.named_parameters()] == shapes


def test_loading_resident_weights_peaks_at_the_weights_themselves(source: MappingSource, device: CpuDevice) -> None:
    _, component = on_meta(device)
    device.meter.reset_peak()
    before = device.meter.read().allocated_bytes
    component.load_resident(source)
    assert device.meter.peak().allocated_bytes - before == component.weight_bytes


# --- embedders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", LOADS)
def test_an_embedder_is_gone_once_it_was_visited(
    how: str, plain: Model, source: MappingSource, device: CpuDevice
) -> None:
    """Host and device are the same memory here, so that this counts its master copy, too."""
    model, component = on_meta(device)
    load(component, how, source)
    loaded = device.meter.read().allocated_bytes
    for embedder, expected in zip(component.walk_embedders(model.embedders()), plain.embedders(), strict=True):
        assert torch.equal(embedder.weight, expected.weight)
        others = [e for e in model.embedders() if e is not embedder and not all_on_meta(e)]
        assert how not in HOMES or not others, "one at a time"
    assert all_on_meta(*model.embedders())
    freed = 0 if how == "disk" else padded_bytes(*plain.embedders())
    assert loaded - device.meter.read().allocated_bytes == freed


def test_embedders_are_read_from_disk_when_they_are_visited_and_only_then(plain: Model, device: CpuDevice) -> None:
    source = CountingSource(plain.state_dict())
    model, component = on_meta(device)
    component.load_streamed(source, home="disk")
    assert source.read == ["patch.weight", "patch.bias", "head.weight", "head.bias"]
    source.read.clear()
    finish(component.walk_embedders(model.embedders()))
    assert source.read == ["time.weight", "time.bias", "text.weight", "text.bias"]


def test_an_embedder_that_could_not_be_read_is_not_left_half_filled(plain: Model, device: CpuDevice) -> None:
    source = CountingSource(plain.state_dict())
    model, component = on_meta(device)
    component.load_streamed(source, home="disk")
    source.errors["time.weight"] = CheckpointError("weights.pth became shorter")
    with pytest.raises(CheckpointError, match="became shorter"):
        finish(component.walk_embedders(model.embedders()))
    assert all_on_meta(*model.embedders())
    visit = component.walk_embedders(model.embedders())
    assert torch.equal(next(visit).weight, plain.time.weight)
    visit.close()
    assert all_on_meta(*model.embedders())


# --- groups -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, []),
        (1, [5]),
        (2, [2, 5]),
        (3, [1, 3, 5]),
        (4, [1, 2, 4, 5]),
        (5, [1, 2, 3, 4, 5]),
        (6, [0, 1, 2, 3, 4, 5]),
        (99, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_resident_groups_are_whole_blocks_spread_evenly_and_never_copied(count: int, expected: list[int]) -> None:
    hidden = (24,) * 6
    device = LateDevice()
    model, component = on_meta(device, hidden)
    component.load_streamed(MappingSource(Model(hidden).state_dict()), home="pinned", resident_groups=count)
    resident = [[not all_on_meta(block.up), not all_on_meta(block.down)] == [True, True] for block in model.blocks]
    assert [index for index, there in enumerate(resident) if there] == expected
    places = {index: model.blocks[index].up.weight.data_ptr() for index in expected}
    for _ in range(2):
        finish(component.walk(model.units()))
    assert {index: model.blocks[index].up.weight.data_ptr() for index in expected} == places
    streamed = 2 * (6 - len(expected))
    assert len(device.starts) == (2 * streamed + 2 if streamed else 0)


@pytest.mark.parametrize("how", LOADS)
@pytest.mark.parametrize("resident_groups", [0, 2])
def test_a_walk_enters_the_observer_around_every_group(
    how: str, resident_groups: int, source: MappingSource, device: CpuDevice
) -> None:
    seen: list[str] = []

    @contextmanager
    def span(group: str) -> Iterator[None]:
        seen.append(f"enter {group}")
        yield
        seen.append(f"leave {group}")

    model, component = on_meta(device)
    load(component, how, source, resident_groups)
    component.observe(span)
    for _ in range(2):
        seen.clear()
        for index, _ in enumerate(component.walk(model.units())):
            seen.append(f"compute {index}")
        expected = [
            (f"enter blocks.{n}", f"compute {2 * n}", f"compute {2 * n + 1}", f"leave blocks.{n}") for n in range(4)
        ]
        assert seen == [event for events in expected for event in events]
    component.observe(None)
    finish(component.walk(model.units()))
    assert len(seen) == 16


class SmallHost(CpuDevice):
    """A machine whose RAM does not hold the weights."""

    def host_room(self) -> int:
        return 1000


@pytest.mark.parametrize("home", ["pinned", "pageable"])
def test_too_little_ram_is_said_with_its_numbers_before_any_is_taken(home: str, source: MappingSource) -> None:
    device = SmallHost()
    with device.session():
        _, component = on_meta(device)
        with pytest.raises(
            DeviceError, match=r"toy need .* MiB of RAM and 0.0 MiB are available; use --weights_in disk"
        ):
            component.load_streamed(source, home=home)
        component.release()
        component.load_streamed(source, home="disk")
