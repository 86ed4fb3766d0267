"""The residual stream in pinned RAM: every pass sees what the one before wrote, whatever order the device's queues run in."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from queue_device import COMPUTE, Mark, QueueDevice
from wanvram.engine.cuda import CudaDevice
from wanvram.engine.devices import CpuDevice
from wanvram.engine.residual import SLOTS, PinnedRows
from wanvram.errors import DeviceError
from wanvram.simulate.clock import Clock
from wanvram.simulate.gpus import find_gpu
from wanvram.units import GIB

pytestmark = pytest.mark.timeout(60)
DIM = 3


class Stream:
    """What the rows ought to be, and computation that looks at them and changes them when the device gets to it."""

    def __init__(self, device: QueueDevice, length: int, rows: int | None) -> None:
        self.device, self.pinned = device, PinnedRows(device, length, DIM, rows)
        self.expected = torch.zeros(length, DIM)
        self.passes = self.seen = 0

    def take_through(self, *, reads: bool = True, writes: bool = True) -> None:
        self.passes += 1
        for c, x in self.pinned.rows(reads=reads, writes=writes):
            before = self.expected[c].clone() if reads else None
            self.expected[c] = torch.full_like(x, 100 * self.passes) + torch.arange(c.start, c.stop).unsqueeze(1)
            self.device.compute(partial(self._change, x, before, self.expected[c].clone()))

    def _change(self, x: Tensor, before: Tensor | None, after: Tensor) -> None:
        assert before is None or torch.equal(x, before), f"{x[:, 0].tolist()} instead of {before[:, 0].tolist()}"
        x.copy_(after)
        self.seen += x.shape[0]


@given(
    length=st.integers(1, 12),
    rows=st.one_of(st.none(), st.integers(1, 12)),
    forwards=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    haste=st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0])),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=200)
def test_every_pass_sees_what_the_one_before_wrote_in_any_order_of_the_queues(
    length: int, rows: int | None, forwards: list[int], haste: tuple[float, float], seed: int
) -> None:
    device = QueueDevice(haste, seed)
    stream = Stream(device, length, rows)
    for middle in forwards:
        stream.take_through(reads=False)
        for _ in range(middle):
            stream.take_through()
        stream.take_through(writes=False)
    assert len(stream.pinned._slots) <= SLOTS
    stream.pinned.close()
    assert not device.queues["copies"]
    assert not device.queues["returns"], "no copy is under way when the memory is given back"
    device.finish()
    assert stream.seen == stream.passes * length


@pytest.mark.parametrize("forgotten", ["mark", "write_back"])
def test_a_forgotten_mark_would_be_noticed(forgotten: str) -> None:
    device = QueueDevice((0.0, 1.0))
    method = getattr(device, forgotten)

    def without_mark(*args: Tensor) -> None:
        method(*args)

    setattr(device, forgotten, without_mark)
    stream = Stream(device, 8, 2)

    def three_passes() -> None:
        for reads, writes in ((False, True), (True, True), (True, False)):
            stream.take_through(reads=reads, writes=writes)
        device.reader_waits(Mark(COMPUTE, device.queued[COMPUTE]))

    with pytest.raises(AssertionError, match="instead of"):
        three_passes()


def test_chunks_pass_through_three_slots_and_the_next_pass_begins_while_this_one_computes() -> None:
    device = QueueDevice()
    rows = PinnedRows(device, 8, DIM, 2)
    places = [x.data_ptr() for _, x in rows.rows(reads=False)]
    assert len(set(places)) == SLOTS
    assert sorted(rows._coming) == [4, 5, 6]  # of the next pass: its first three chunks
    assert [c for c, _ in rows.rows(writes=False)] == [slice(n, n + 2) for n in (0, 2, 4, 6)]
    assert rows._coming == {}
    assert device.queued[COMPUTE] > 0


def test_a_stream_that_ram_does_not_hold_is_refused_before_it_is_taken() -> None:
    class Small(CpuDevice):
        def host_room(self) -> int:
            return 1000

    with pytest.raises(DeviceError, match=r"the residual stream needs .* use --residual_in device"):
        PinnedRows(Small(), 1000, DIM, 10)


# --- the clock ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock() -> Clock:
    return Clock(find_gpu("h200"))


def test_the_link_carries_both_directions_at_once(clock: Clock) -> None:
    second = int(clock.gpu.pcie_bytes)
    there, back = clock.prefetch(second), clock.write_back(second, None)
    assert (there, back) == (pytest.approx(1.0), pytest.approx(1.0))
    assert clock.write_back(second, 3.0) == pytest.approx(4.0)
    clock.synchronize()
    assert clock.now() == pytest.approx(4.0)
    assert clock.copied.nbytes == 3 * second


def test_a_copy_waits_for_all_its_marks_and_for_earlier_ones(clock: Clock) -> None:
    second = int(clock.gpu.pcie_bytes)
    assert clock.prefetch(second, 0.5, None, 2.0) == pytest.approx(3.0)
    assert clock.prefetch(second, 1.0) == pytest.approx(4.0)


def test_rows_pass_weights_that_are_still_being_read(clock: Clock) -> None:
    """The reading thread queues its copy when it has read: until then the link is free for what is ready."""
    second = int(clock.gpu.pcie_bytes)
    clock.read_from_ram(int(5 * clock.machine.copy_bytes))
    weights = clock.prefetch(second)
    assert weights == pytest.approx(6.0)
    assert [clock.prefetch(second, 1.0) for _ in range(3)] == [pytest.approx(t) for t in (2.0, 3.0, 4.0)]
    assert clock.prefetch(2 * second) == pytest.approx(8.0), "too long for what is left before the weights"


# --- a GPU -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu() -> Iterator[CudaDevice]:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device = CudaDevice()
    with device.session():
        yield device


@pytest.mark.gpu
def test_on_a_gpu_every_pass_sees_what_the_one_before_wrote_and_no_more_is_allocated(gpu: CudaDevice) -> None:
    rows = PinnedRows(gpu, 4096, 1024, 1000)
    before = torch.cuda.memory_allocated()
    for number in range(1, 40):
        for _, x in rows.rows(reads=number > 1, writes=number < 39):
            x.copy_(x + 1 if number > 1 else torch.ones_like(x))
            if number == 39:
                assert bool((x == 39).all())
    assert torch.cuda.memory_allocated() == before
    rows.close()
    assert gpu.copies().nbytes == 2 * 38 * 4096 * 1024 * 4
    assert torch.cuda.memory_allocated() < GIB
