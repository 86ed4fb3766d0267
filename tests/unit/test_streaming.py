"""Streaming: two slots and two buffers carry any number of pieces, whatever order the device's queues run in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from queue_device import AT_ONCE, COMPUTE, COPIES, Mark, QueueDevice
from toy_component import reading_threads
from wanvram.engine.devices import CpuDevice
from wanvram.engine.streaming import Home, PacedHome, PinnedHome, SlotRing, StagedHome
from wanvram.errors import CheckpointError, WanvramError

pytestmark = pytest.mark.timeout(60)  # what waits for a copy or a thread that never ends must fail, not hang


@dataclass(eq=False)
class Piece:
    """Bytes of some value; two pieces are never the same one."""

    value: int
    nbytes: int = 8

    def master(self) -> Tensor:
        return torch.full((self.nbytes,), self.value, dtype=torch.uint8)


def pieces_of(*sizes: int) -> list[Piece]:
    return [Piece(number, size) for number, size in enumerate(sizes, start=1)]


def read_piece(piece: Piece, buffer: Tensor) -> None:
    assert buffer.shape == (piece.nbytes,)
    buffer.fill_(piece.value)


def failing(error: Exception) -> Callable[..., None]:
    def read(*_: object) -> None:
        raise error

    return read


def home_of(kind: str, device: CpuDevice, pieces: list[Piece], read: Callable[..., None] = read_piece) -> Home:
    if kind in ("pinned", "paced"):
        return (PinnedHome if kind == "pinned" else PacedHome)(device, {piece: piece.master() for piece in pieces})
    return StagedHome(device, max(piece.nbytes for piece in pieces), read)


def ring_of(
    kind: str,
    device: CpuDevice,
    pieces: list[Piece],
    read: Callable[..., None] = read_piece,
    lanes: dict[Piece, int] | None = None,
) -> SlotRing:
    return SlotRing(device, home_of(kind, device, pieces, read), max(piece.nbytes for piece in pieces), lanes)


class Reader:
    """Computation that reads a slot when the device gets to it, which may be long after the walk went on."""

    def __init__(self, device: QueueDevice) -> None:
        self.device = device
        self.asked = 0
        self.seen = 0

    def visit(self, piece: Piece, slot: Tensor) -> None:
        self.asked += 1
        self.device.compute(partial(self._check, piece, slot))

    def _check(self, piece: Piece, slot: Tensor) -> None:
        assert torch.equal(slot, piece.master()), f"{slot.tolist()} instead of piece {piece.value}"
        self.seen += 1


class BesideDevice(QueueDevice):
    """Computes beside the host, so that a staged home reads in a thread."""

    copies_beside = True


@pytest.fixture
def no_thread_stays() -> Iterator[None]:
    assert not reading_threads()
    yield
    assert not reading_threads()


# --- what arrives -------------------------------------------------------------------------------------------------------


@st.composite
def walks(draw: st.DrawFn) -> list[tuple[list[int], int]]:
    """(pieces in the order of the walk, how many are visited before it is broken off) of one walk after another."""
    count = draw(st.integers(1, 6))
    same = st.just(list(range(count)))
    order = st.one_of(same, same, st.lists(st.integers(0, count - 1), max_size=7))
    return draw(st.lists(st.tuples(order, st.one_of(st.just(99), st.integers(0, 6))), min_size=1, max_size=5))


@pytest.mark.usefixtures("no_thread_stays")
@given(
    plan=walks(),
    sizes=st.lists(st.integers(0, 40), min_size=6, max_size=6),
    kind=st.sampled_from(["pinned", "paced", "staged"]),
    haste=st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0])),
    broken=st.sets(st.integers(1, 25), max_size=4),
    seed=st.integers(0, 2**16),
    threaded=st.booleans(),
    lanes=st.one_of(st.none(), st.lists(st.integers(0, 1), min_size=6, max_size=6)),
)
@settings(max_examples=300)
def test_computation_sees_the_piece_it_asked_for_in_any_order_of_the_queues(
    plan: list[tuple[list[int], int]],
    sizes: list[int],
    kind: str,
    haste: tuple[float, float],
    broken: set[int],
    seed: int,
    threaded: bool,
    lanes: list[int] | None,
) -> None:
    """Also after walks broken off, walks of another order, and reads that fail (the n-th, for n in `broken`)."""
    device, reads = (BesideDevice if threaded else QueueDevice)(haste, seed), iter(range(1, 1000))

    def read(piece: Piece, buffer: Tensor) -> None:
        if next(reads) in broken:
            raise OSError("bad sector")
        read_piece(piece, buffer)

    pieces, reader = pieces_of(*sizes), Reader(device)
    ring = ring_of(kind, device, pieces, read, None if lanes is None else dict(zip(pieces, lanes, strict=False)))
    for order, limit in plan:
        walked = [pieces[index] for index in order]
        with suppress(WanvramError), closing(ring.walk(walked)) as slots:
            visited = 0
            for piece, slot in zip(walked[:limit], slots, strict=False):
                reader.visit(piece, slot)
                visited += 1
                if isinstance(ring.home, PacedHome):
                    ring.home.advance(2 + visited % 2)
            assert kind == "staged" or visited == min(limit, len(walked))
    ring.close()
    assert not device.queues[COPIES], "no copy is under way when the memory is given back"
    device.finish()
    assert reader.seen == reader.asked


@pytest.mark.parametrize("kind", ["pinned", "staged"])
def test_a_slot_is_not_overwritten_before_its_piece_is_done(kind: str) -> None:
    """The check itself must notice: with the marks taken away, the same walk reads wrong bytes."""
    for honest in (True, False):
        device, pieces = QueueDevice((0.0, 1.0)), pieces_of(8, 8, 8)
        if not honest:
            device.mark = lambda: None  # type: ignore[method-assign, assignment, return-value]
        ring, reader = ring_of(kind, device, pieces), Reader(device)
        for piece, slot in zip(pieces, ring.walk(pieces), strict=True):
            reader.visit(piece, slot)
        if honest:
            device.reader_waits(device.mark())
            assert reader.seen == 3
        else:
            with pytest.raises(AssertionError, match="instead of piece 1"):
                device.reader_waits(Mark(COMPUTE, device.queued[COMPUTE]))


def test_a_paced_home_sends_parts_as_it_is_told_and_the_rest_when_it_is_needed() -> None:
    device, pieces = QueueDevice(), pieces_of(9, 8)
    home = home_of("paced", device, pieces)
    assert isinstance(home, PacedHome)
    slots = [torch.zeros(piece.nbytes, dtype=torch.uint8) for piece in pieces]
    coming = [home.fetch(piece, slot, None) for piece, slot in zip(pieces, slots, strict=True)]
    assert device.queued[COPIES] == 0
    for _ in range(3):
        home.advance(4)  # parts of 3 bytes: the first piece is whole after three
    home.advance(4)
    device.finish()
    assert [slot.tolist() for slot in slots] == [[1] * 9, [2] * 2 + [0] * 6]
    device.reader_waits(coming[1].result())
    assert slots[1].tolist() == [2] * 8
    assert device.queued[COPIES] == 5
    home.advance(4)  # nothing is left
    assert device.queued[COPIES] == 5


def test_only_as_much_is_copied_as_the_piece_has() -> None:
    device, pieces = QueueDevice(), pieces_of(3, 8)
    assert [slot.shape for slot in ring_of("pinned", device, pieces).walk(pieces)] == [(3,), (8,)]


# --- what is under way ------------------------------------------------------------------------------------------------


class RecordedHome:
    """Pieces in the order of their copies, and the slot each went to."""

    def __init__(self) -> None:
        self.fetched: list[int] = []
        self.into: list[int] = []
        self.closed = False

    def fetch(self, piece: Piece, slot: Tensor, after: Any) -> None:
        self.fetched.append(piece.value)
        self.into.append(slot.data_ptr())

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def recorded() -> tuple[SlotRing, RecordedHome]:
    home = RecordedHome()
    return SlotRing(CpuDevice(), home, 8), home


def test_at_the_end_of_a_pass_the_first_two_of_the_next_are_under_way(recorded: tuple[SlotRing, RecordedHome]) -> None:
    ring, home = recorded
    pieces = pieces_of(8, 8, 8, 8, 8)
    for _ in ring.walk(pieces):
        pass
    assert home.fetched == [1, 2, 3, 4, 5, 1, 2]
    for _ in ring.walk(pieces):
        pass
    assert home.fetched == [1, 2, 3, 4, 5] * 2 + [1, 2]
    slots = [slot.data_ptr() for slot in ring.slots]
    assert home.into == [slots[index % 2] for index in range(12)]


def test_a_piece_is_asked_for_only_when_the_last_one_but_one_is_done(recorded: tuple[SlotRing, RecordedHome]) -> None:
    ring, home = recorded
    walk = ring.walk(pieces_of(8, 8, 8, 8))
    assert home.fetched == []
    for fetched in (2, 3, 4):
        next(walk)
        assert len(home.fetched) == fetched
    walk.close()


def test_a_single_piece_is_in_both_slots(recorded: tuple[SlotRing, RecordedHome]) -> None:
    ring, home = recorded
    (piece,) = pieces_of(8)
    starts = [slot.data_ptr() for _ in range(4) for slot in ring.walk([piece])]
    assert starts == [slot.data_ptr() for slot in ring.slots] * 2
    assert home.fetched == [1] * 6


def test_another_order_forgets_what_is_coming(recorded: tuple[SlotRing, RecordedHome]) -> None:
    ring, home = recorded
    one, two, three = pieces_of(8, 8, 8)
    for _ in ring.walk([one, two, three]):
        pass
    home.fetched.clear()
    for _ in ring.walk([three, two]):
        pass
    assert home.fetched == [3, 2, 3, 2]


def test_pieces_of_two_lanes_pass_through_slots_of_their_own_sizes() -> None:
    device, home, pieces = CpuDevice(), RecordedHome(), pieces_of(3, 2, 8, 3, 9)
    ring = SlotRing(device, home, 99, dict(zip(pieces, (0, 0, 1, 0, 1), strict=True)))
    assert [slot.nbytes for slot in ring.slots] == [3, 9]
    for _ in range(2):
        for piece, slot in zip(pieces, ring.walk(pieces), strict=True):
            assert slot.nbytes == piece.nbytes
    small, large = (slot.data_ptr() for slot in ring.slots)
    # The first of either lane; then after each piece the next of its lane, at the end of a pass that of the next.
    assert home.fetched == [1, 3, 2, 4, 5, 1, 3, 2, 4, 5, 1, 3]
    assert home.into == [small if value in (1, 2, 4) else large for value in home.fetched]


def test_a_walk_of_nothing_fetches_nothing(recorded: tuple[SlotRing, RecordedHome]) -> None:
    ring, home = recorded
    assert list(ring.walk([])) == []
    assert home.fetched == []


def test_a_closed_ring_has_no_slots_and_its_home_is_closed(recorded: tuple[SlotRing, RecordedHome]) -> None:
    ring, home = recorded
    next(ring.walk(pieces_of(8, 8)))
    ring.close()
    assert home.closed
    assert not ring.slots


def test_pinned_ram_outlives_the_copies_from_it() -> None:
    device, pieces = QueueDevice(), pieces_of(8, 8, 8)
    home = home_of("pinned", device, pieces)
    assert isinstance(home, PinnedHome)
    slots = [torch.zeros(8, dtype=torch.uint8) for _ in pieces]
    for piece, slot in zip(pieces, slots, strict=True):
        home.fetch(piece, slot, None)
    assert len(device.queues[COPIES]) == 3
    home.close()
    assert not device.queues[COPIES]
    assert not home.masters
    assert [slot.tolist() for slot in slots] == [[1] * 8, [2] * 8, [3] * 8]


# --- staged homes -------------------------------------------------------------------------------------------------------


def test_a_staged_home_has_two_buffers_of_the_largest_piece_and_takes_them_in_turn() -> None:
    device, pieces, used = QueueDevice(), pieces_of(8, 3, 20, 5), []

    def read(piece: Piece, buffer: Tensor) -> None:
        used.append(buffer.data_ptr())
        read_piece(piece, buffer)

    ring = ring_of("staged", device, pieces, read)
    for _ in range(3):
        for _ in ring.walk(pieces):
            pass
    assert device.host_buffers == [20, 20]
    assert len(set(used)) == 2
    assert used == [used[0], used[1]] * 7


def test_a_buffer_is_not_read_into_while_it_is_being_copied() -> None:
    device, pieces, waiting = QueueDevice(), pieces_of(8, 8, 8, 8), []

    def read(piece: Piece, buffer: Tensor) -> None:
        waiting.append(len(device.queues[COPIES]))
        read_piece(piece, buffer)

    home = home_of("staged", device, pieces, read)
    slots = [torch.zeros(8, dtype=torch.uint8) for _ in pieces]
    for piece, slot in zip(pieces, slots, strict=True):
        home.fetch(piece, slot, None)
    # Two buffers: from the third read on, the copy before the last has ended and the last may be under way.
    assert waiting == [0, 1, 1, 1]
    home.close()
    assert [slot.tolist() for slot in slots] == [[value] * 8 for value in (1, 2, 3, 4)]


@pytest.mark.parametrize("error", [OSError("bad sector"), CheckpointError("weights.pth became shorter")])
def test_a_read_error_is_a_failed_run_not_bad_input(error: Exception) -> None:
    home = home_of("staged", CpuDevice(), pieces_of(8), failing(error))
    with pytest.raises(WanvramError, match=f"could not be read while they were streamed: {error}") as caught:
        home.fetch(Piece(1), torch.empty(8, dtype=torch.uint8), None)
    assert type(caught.value) is WanvramError
    assert caught.value.exit_code == 1
    assert caught.value.__cause__ is error


def test_a_fault_of_the_program_is_not_called_a_read_error() -> None:
    home = home_of("staged", CpuDevice(), pieces_of(8), failing(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        home.fetch(Piece(1), torch.empty(8, dtype=torch.uint8), None)


# --- the reading thread -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_thread_stays")
def test_weights_are_read_by_one_thread_where_the_device_computes_beside_it() -> None:
    names: set[str] = set()

    def read(piece: Piece, buffer: Tensor) -> None:
        names.add(threading.current_thread().name)
        read_piece(piece, buffer)

    device, pieces = BesideDevice(AT_ONCE), pieces_of(8, 3, 8)
    ring, reader = ring_of("staged", device, pieces, read), Reader(device)
    for _ in range(20):
        for piece, slot in zip(pieces, ring.walk(pieces), strict=True):
            reader.visit(piece, slot)
    ring.close()
    assert names == {"wanvram-weights_0"}
    assert reader.seen == 60


@pytest.mark.usefixtures("no_thread_stays")
def test_the_host_goes_on_while_weights_are_read_and_waits_when_it_needs_them() -> None:
    may_read = threading.Event()

    def read(piece: Piece, buffer: Tensor) -> None:
        assert may_read.wait(30)
        read_piece(piece, buffer)

    device, pieces = BesideDevice(AT_ONCE), pieces_of(8, 8)
    home = home_of("staged", device, pieces, read)
    slot = torch.zeros(8, dtype=torch.uint8)
    future = home.fetch(pieces[0], slot, None)
    assert not future.done()
    may_read.set()
    device.reader_waits(future.result(timeout=30))
    assert slot.tolist() == [1] * 8
    home.close()


@pytest.mark.usefixtures("no_thread_stays")
@pytest.mark.parametrize("error", [OSError("bad sector"), CheckpointError("weights.pth became shorter")])
def test_a_read_error_in_the_thread_reaches_the_walk_at_its_piece(error: Exception) -> None:
    broken = False

    def read(piece: Piece, buffer: Tensor) -> None:
        if broken and piece.value == 3:
            raise error
        read_piece(piece, buffer)

    pieces = pieces_of(8, 8, 8, 8)
    ring = ring_of("staged", BesideDevice(AT_ONCE), pieces, read)
    assert len(list(ring.walk(pieces))) == 4
    broken = True
    walk = ring.walk(pieces)
    assert [slot.tolist() for slot in islice(walk, 2)] == [[1] * 8, [2] * 8]
    with pytest.raises(WanvramError, match="could not be read") as caught:
        next(walk)
    assert type(caught.value) is WanvramError
    ring.close()


@pytest.mark.usefixtures("no_thread_stays")
def test_a_read_error_of_what_nobody_asked_for_is_forgotten() -> None:
    broken = False

    def read(piece: Piece, buffer: Tensor) -> None:
        if broken:
            raise OSError("bad sector")
        read_piece(piece, buffer)

    pieces = pieces_of(8, 8, 8)
    ring = ring_of("staged", BesideDevice(AT_ONCE), pieces, read)
    walk = ring.walk(pieces)
    next(walk)
    next(walk)  # two pieces are in; from here on, what is fetched ahead fails
    broken = True
    walk.close()
    with suppress(WanvramError), closing(ring.walk(pieces)) as again:
        next(again)
    ring.close()  # the second piece's error is pending
    assert not ring.slots


@pytest.mark.usefixtures("no_thread_stays")
def test_close_waits_for_the_read_under_way() -> None:
    started, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def read(piece: Piece, buffer: Tensor) -> None:
        started.set()
        assert may_end.wait(30)
        read_piece(piece, buffer)
        ended.set()

    pieces = pieces_of(8, 8)
    home = home_of("staged", BesideDevice(AT_ONCE), pieces, read)
    home.fetch(pieces[0], torch.empty(8, dtype=torch.uint8), None)
    waiting = home.fetch(pieces[1], torch.empty(8, dtype=torch.uint8), None)
    assert started.wait(30)
    timer = threading.Timer(0.05, may_end.set)
    timer.start()
    home.close()
    assert ended.is_set()
    assert waiting.cancelled(), "what had not begun is not begun any more"
    timer.join()
