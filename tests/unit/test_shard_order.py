"""Shared weights arrive whole and in time, whatever order computing, copying and gathering run in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from queue_device import COMPUTE, COPIES, GATHERS, Mark, QueueDevice
from toy_component import reading_threads
from wanvram.engine.shards import Shard, ShardHome
from wanvram.engine.streaming import Home, PinnedHome, SlotRing, StagedHome

pytestmark = pytest.mark.timeout(60)  # what waits for a copy or a thread that never ends must fail, not hang
BYTES = 512  # a piece is a multiple of that: two aligned runs


@dataclass(eq=False)
class Piece:
    value: int
    nbytes: int


@dataclass
class OtherRank:
    """The first of two ranks; this one is the second. Its run of what was asked for last arrives when the device gets to it."""

    home: Home
    shard: Shard = Shard(1, 2)  # noqa: RUF009 (frozen)
    asked: dict[int, Piece] = field(default_factory=dict)  # by where this rank's run of it lies
    count, index = 2, 1

    def fetch(self, piece: Piece, mine: Tensor, after: Any) -> Any:
        self.asked[mine.data_ptr()] = piece
        return self.home.fetch(piece, mine, after)

    def close(self) -> None:
        self.home.close()

    def gathering(self, whole: Tensor) -> Any:
        theirs = whole[: whole.nbytes // 2]
        return partial(theirs.fill_, self.asked[self.shard.mine(whole).data_ptr()].value)


class ReadingDevice(QueueDevice):
    """Computes beside the host, so that a staged home reads in a thread."""

    copies_beside = True


def fill(piece: Piece, buffer: Tensor) -> None:
    assert buffer.nbytes == piece.nbytes // 2
    buffer.fill_(piece.value)


def ring_of(kind: str, device: QueueDevice, pieces: list[Piece]) -> SlotRing:
    runs = {piece: torch.full((piece.nbytes // 2,), piece.value, dtype=torch.uint8) for piece in pieces}
    largest = max(piece.nbytes for piece in pieces)
    own = PinnedHome(device, dict(runs)) if kind == "pinned" else StagedHome(device, largest // 2, fill)
    other = OtherRank(own)
    return SlotRing(device, ShardHome(device, other, other.shard, other), largest)  # type: ignore[arg-type]


def visit(device: QueueDevice, piece: Piece, slot: Tensor, seen: list[int]) -> None:
    def check() -> None:
        assert slot.unique().tolist() == [piece.value], f"{slot.unique().tolist()} instead of piece {piece.value}"
        seen.append(piece.value)

    device.compute(check)


@st.composite
def walks(draw: st.DrawFn) -> list[tuple[list[int], int]]:
    """(pieces in the order of the walk, how many are visited before it is broken off) of one walk after another."""
    same = st.just(list(range(draw(st.integers(1, 6)))))
    order = st.one_of(same, same, st.lists(st.integers(0, 5), max_size=7))
    return draw(st.lists(st.tuples(order, st.one_of(st.just(99), st.integers(0, 6))), min_size=1, max_size=5))


@pytest.fixture
def no_thread_stays() -> Iterator[None]:
    yield
    assert not reading_threads()


@pytest.mark.usefixtures("no_thread_stays")
@given(
    plan=walks(),
    sizes=st.lists(st.integers(1, 4), min_size=6, max_size=6),
    kind=st.sampled_from(["pinned", "staged"]),
    haste=st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0])),
    seed=st.integers(0, 2**16),
    threaded=st.booleans(),
)
@settings(max_examples=300)
def test_computation_sees_the_runs_of_all_ranks_in_any_order_of_the_queues(
    plan: list[tuple[list[int], int]],
    sizes: list[int],
    kind: str,
    haste: tuple[float, float],
    seed: int,
    threaded: bool,
) -> None:
    device, seen = (ReadingDevice if threaded else QueueDevice)(haste, seed), list[int]()
    pieces = [Piece(number, size * BYTES) for number, size in enumerate(sizes, start=1)]
    ring, asked = ring_of(kind, device, pieces), 0
    for order, limit in plan:
        walked = [pieces[index] for index in order]
        with closing(ring.walk(walked)) as slots:
            for piece, slot in zip(walked[:limit], slots, strict=False):
                visit(device, piece, slot, seen)
                asked += 1
    ring.close()
    assert not device.queues[COPIES], "no copy is under way when the memory is given back"
    assert not device.queues[GATHERS], "nothing is being gathered when the memory is given back"
    device.finish()
    assert len(seen) == asked


@pytest.mark.parametrize("forgotten", ["the own run", "that the slot is free"])
def test_the_check_notices_a_gather_that_does_not_wait(forgotten: str) -> None:
    """With a mark taken away, the same walk computes with bytes of another piece."""
    device, seen = QueueDevice((0.0, 1.0)), list[int]()
    pieces = [Piece(number, BYTES) for number in range(1, 6)]
    ring = ring_of("pinned", device, pieces)
    if forgotten == "the own run":
        started = device.gather_beside
        device.haste[COPIES] = 0.0
        device.gather_beside = lambda peers, whole, after: started(peers, whole, None)  # type: ignore[method-assign]
    else:
        device.mark = lambda: None  # type: ignore[method-assign, assignment, return-value]

    def walk() -> None:
        for piece, slot in zip(pieces, ring.walk(pieces), strict=True):
            visit(device, piece, slot, seen)
        device.reader_waits(Mark(COMPUTE, device.queued[COMPUTE]))

    with pytest.raises(AssertionError, match="instead of piece"):
        walk()
