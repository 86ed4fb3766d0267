"""Residency: wherever the weights wait, the model is the same; streaming holds two units, release holds nothing."""

from __future__ import annotations

import gc
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from wanvram.engine.devices import CpuDevice
from wanvram.engine.residency import ALIGNMENT_BYTES, Component, Layout
from wanvram.errors import CheckpointError, WanvramError
from wanvram.weights.sources import MappingSource

pytestmark = pytest.mark.timeout(60)  # what waits for a copy or a thread that never ends must fail, not hang

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


# --- memory -------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("resident_groups", [0, 1])
def test_streaming_takes_the_shell_the_resident_groups_and_two_of_the_largest_unit_on_the_device(
    home: str, resident_groups: int, plain: Model, source: MappingSource
) -> None:
    device = CountingDevice()
    model, component = on_meta(device)
    component.load_streamed(source, home=home, resident_groups=resident_groups)
    resident = [padded_bytes(unit) for unit in plain.units()[6:]] if resident_groups else []
    streamed = [padded_bytes(unit) for unit in plain.units()][: 8 - len(resident)]
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


# --- the order of copies and computation --------------------------------------------------------------------------------


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
        self.wait_on_host(mark)

    def wait_on_host(self, mark: Any) -> None:
        while any(mark is copy for copy in self.pending):
            self.pending.popleft()()


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("observed", [False, True])
def test_two_units_are_always_on_their_way_and_overwrite_a_slot_only_after_its_unit(
    home: str, observed: bool, plain: Model, source: MappingSource
) -> None:
    """In the end they are the first two of the next pass."""
    device = LateDevice()
    model, component = on_meta(device)
    component.load_streamed(source, home=home)
    if observed:
        component.observe(lambda _group: torch.no_grad())
    for steps in (1, 2, 3):
        for unit, expected in zip(component.walk(model.units()), plain.units(), strict=True):
            assert torch.equal(unit.weight, expected.weight), "the copy was waited for before the unit is used"
            device.computed += 1
        # (units computed when the copy was issued, units that must be computed before it may overwrite its slot)
        assert device.starts == [(0, None), (0, None), *((done, done) for done in range(1, 8 * steps + 1))]
        assert device.waited == 8 * steps


# --- reading and copying beside the computation -------------------------------------------------------------------------


class Passed:
    """A mark; on this device computation is over when the host goes on, so that only copies are waited for."""

    def __init__(self, future: Future[None]) -> None:
        self.future = future


class BesideDevice(CpuDevice):
    """Poses as CUDA: a thread copies in order while the host goes on. `hold` stops all copies until it is set."""

    kind = "cuda"

    def __init__(self) -> None:
        super().__init__()
        self.copies = ThreadPoolExecutor(1, "toy-copies")
        self.go_on = threading.Event()
        self.go_on.set()
        self.started = self.ended = 0

    @contextmanager
    def session(self) -> Iterator[None]:
        with super().session(), self.copies:
            yield

    def prefetch(self, destination: Tensor, source: Tensor, after: Any) -> Passed:
        self.started += 1
        return Passed(self.copies.submit(self._copy, destination, source))

    def _copy(self, destination: Tensor, source: Tensor) -> None:
        assert self.go_on.wait(30)
        time.sleep(0.0005)  # s; long enough for the host to run ahead
        destination.copy_(source)
        self.ended += 1

    def wait(self, mark: Any) -> None:
        self.wait_on_host(mark)

    def wait_on_host(self, mark: Any) -> None:
        if mark is not None:
            mark.future.result(timeout=30)


@pytest.fixture
def beside() -> Iterator[BesideDevice]:
    device = BesideDevice()
    with device.session():
        yield device
    assert not reading_threads()


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("resident_groups", [0, 1])
def test_copies_beside_the_computation_change_no_result(
    home: str,
    resident_groups: int,
    plain: Model,
    source: MappingSource,
    beside: BesideDevice,
    inputs: tuple[Tensor, Tensor],
) -> None:
    model, component = on_meta(beside)
    component.load_streamed(source, home=home, resident_groups=resident_groups)
    assert_same_results(model, component, plain, inputs, passes=5)
    assert len(reading_threads()) == (0 if home == "pinned" else 1)
    component.release()


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("visited", [0, 1, 4, 8])
def test_release_in_the_middle_waits_for_copies_under_way_and_then_frees_everything(
    home: str, visited: int, source: MappingSource, beside: BesideDevice
) -> None:
    before = beside.meter.read().allocated_bytes
    model, component = on_meta(beside)
    component.load_streamed(source, home=home)
    walk = component.walk(model.units())
    for _ in range(visited):
        next(walk)
    beside.go_on.clear()
    timer = threading.Timer(0.02, beside.go_on.set)
    timer.start()
    component.release()
    timer.join()
    assert beside.started == beside.ended
    assert not reading_threads()
    assert all_on_meta(model)
    walk.close()
    assert beside.meter.read().allocated_bytes == before


def walk_twice(component: Component, model: Model) -> None:
    """The first two units were fetched in the pass before."""
    for _ in range(2):
        finish(component.walk(model.units()))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("error", [partial(OSError, 5), CheckpointError])
@pytest.mark.parametrize("key", ["blocks.0.up.weight", "blocks.2.down.bias", "blocks.3.down.weight"])
def test_a_disk_read_error_in_a_pass_is_a_failed_run_and_release_frees_everything(
    kind: str, error: Callable[[str], Exception], key: str, plain: Model, inputs: tuple[Tensor, Tensor]
) -> None:
    source = CountingSource(plain.state_dict())
    device = BesideDevice() if kind == "cuda" else CpuDevice()
    with device.session():
        before = allocated_before(device, plain, inputs)
        model, component = on_meta(device)
        component.load_streamed(source, home="disk")
        finish(component.walk(model.units()))
        source.errors[key] = error("sector 7")
        with pytest.raises(WanvramError, match=r"could not be read while they were streamed: .*sector 7") as caught:
            walk_twice(component, model)
        assert type(caught.value) is WanvramError
        assert caught.value.exit_code == 1
        assert all_on_meta(model.blocks)
        assert_same_results(model, component, plain, inputs)  # the disk can be read again
        component.release()
        del caught
        gc.collect()  # the error's traceback held the slot that was to be filled
        assert device.meter.read().allocated_bytes == before
    assert not reading_threads()


def test_a_read_error_that_nobody_met_does_not_stop_the_release(plain: Model, beside: BesideDevice) -> None:
    source = CountingSource(plain.state_dict())
    model, component = on_meta(beside)
    component.load_streamed(source, home="disk")
    source.errors["blocks.0.up.weight"] = OSError("bad sector")
    walk = component.walk(model.units())
    with pytest.raises(WanvramError, match="bad sector"):
        next(walk)
    source.errors["blocks.0.down.weight"] = OSError("bad sector")
    walk = component.walk(model.units())
    next(walk)
    walk.close()
    component.release()
    assert all_on_meta(model)


# --- any shape ----------------------------------------------------------------------------------------------------------


@given(
    hidden=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    resident_groups=st.integers(0, 6),
    how=st.sampled_from(LOADS),
    make_device=st.sampled_from([CpuDevice, LateDevice, BesideDevice]),
    broken_off=st.integers(0, 10),
)
@settings(max_examples=60)
def test_any_number_and_size_of_units_gives_the_plain_result_and_leaves_nothing(
    hidden: list[int], resident_groups: int, how: str, make_device: Callable[[], CpuDevice], broken_off: int
) -> None:
    plain = Model(hidden).requires_grad_(False)
    source = MappingSource(plain.state_dict())
    device = make_device()
    with device.session():
        inputs = torch.randn(1, 3, 1, 4, 4), torch.randn(6)
        before = allocated_before(device, plain, inputs)
        model, component = on_meta(device, hidden)
        load(component, how, source, resident_groups)
        assert_same_results(model, component, plain, inputs, passes=2)
        for _ in zip(range(broken_off), component.walk(model.units()), strict=False):
            pass
        component.release()
        assert all_on_meta(model)
        assert device.meter.read().allocated_bytes == before
    assert not reading_threads()
