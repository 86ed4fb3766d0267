"""Residency beside the computation: the order of copies, reading threads, errors and releases in the middle."""

from __future__ import annotations

import gc
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mapping_source import MappingSource
from toy_component import (
    HOMES,
    LOADS,
    CountingSource,
    LateDevice,
    Model,
    all_on_meta,
    allocated_before,
    assert_same_results,
    finish,
    load,
    on_meta,
    reading_threads,
)
from wanvram.engine.devices import CpuDevice
from wanvram.engine.residency import Component
from wanvram.errors import CheckpointError, WanvramError

pytestmark = pytest.mark.timeout(60)  # what waits for a copy or a thread that never ends must fail, not hang


@pytest.fixture
def plain() -> Model:
    return Model().requires_grad_(False)


@pytest.fixture
def source(plain: Model) -> MappingSource:
    return MappingSource(plain.state_dict())


@pytest.fixture
def inputs(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(1, 3, 2, 4, 4, generator=generator), torch.randn(6, generator=generator)


# --- the order of copies and computation --------------------------------------------------------------------------------


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

    copies_beside = True

    def __init__(self) -> None:
        super().__init__()
        self.copies = ThreadPoolExecutor(1, "toy-copies")
        self.go_on = threading.Event()
        self.go_on.set()
        self.started = self.ended = 0
        self.pending: deque[tuple[Tensor, Tensor]] = deque()

    @contextmanager
    def session(self) -> Iterator[None]:
        with super().session(), self.copies:
            yield

    def prefetch(self, destination: Tensor, source: Tensor, after: Any) -> Passed:
        self.started += 1
        self.pending.append((destination, source))
        return Passed(self.copies.submit(self._copy))

    def _copy(self) -> None:
        """Its tensors are no arguments: the executor would keep them for a moment after the copy is known to be over."""
        destination, source = self.pending.popleft()
        assert self.go_on.wait(30)
        time.sleep(0.0005)  # s; long enough for the host to run ahead
        destination.copy_(source)
        self.ended += 1

    def wait(self, mark: Any) -> None:
        self.reader_waits(mark)

    def reader_waits(self, mark: Any) -> None:
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
