"""Rounds through buffers that others read: every part arrives, whatever the shares, and each rank takes as many rounds."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from wanvram.engine import symmetric
from wanvram.engine.stream_signals import Kind
from wanvram.engine.symmetric import Room, SymmetricPeers, what_is_missing
from wanvram.errors import DeviceError
from wanvram.sharing import ULYSSES, Place, parts, size

BUFFER = 4096


class Counts:
    """StreamSignals of one rank. Ranks are threads."""

    def __init__(self, told: dict[tuple[Kind, int], int], changed: threading.Condition, index: int, count: int) -> None:
        self._told, self._changed, self._index = told, changed, index
        self._others = [n for n in range(count) if n != index]

    def stream(self) -> None:
        """Copies between threads are made at once."""

    def tell(self, kind: Kind, number: int, stream: None) -> None:
        with self._changed:
            assert number == self._told.get((kind, self._index), 0) + 1
            self._told[kind, self._index] = number
            self._changed.notify_all()

    def wait(self, kind: Kind, number: int, stream: None) -> None:
        with self._changed:
            come = self._changed.wait_for(
                lambda: all(self._told.get((kind, other), 0) >= number for other in self._others), timeout=10
            )
        assert come


class ThreadedRoom(Room):
    def __init__(self, buffers: list[torch.Tensor], index: int, signals: Any) -> None:
        self._buffers, self._index, self._round, self._signals = buffers, index, 0, signals
        self.stream, self.largest = None, None


def world(count: int) -> list[SymmetricPeers]:
    buffers = [torch.empty(BUFFER, dtype=torch.uint8) for _ in range(count)]
    told, changed, ranks = dict[tuple[Kind, int], int](), threading.Condition(), tuple(range(count))
    rooms = [ThreadedRoom(buffers, rank, Counts(told, changed, rank, count)) for rank in ranks]
    return [SymmetricPeers(Place(rank, ulysses=count), ULYSSES, rooms={(ranks, ""): rooms[rank]}) for rank in ranks]


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetric, "_HALF", BUFFER // 2)


def together(peers: list[SymmetricPeers], act: Any) -> list[Any]:
    with ThreadPoolExecutor(len(peers)) as pool:
        return list(pool.map(act, peers))


@pytest.mark.parametrize(("count", "rows", "heads"), [(2, 4, 2), (2, 301, 5), (3, 301, 5), (4, 45, 6), (5, 6, 5)])
def test_every_part_of_an_exchange_arrives_in_as_many_rounds_on_every_rank(count: int, rows: int, heads: int) -> None:
    width, shares, of_heads = 8, parts(rows, count), parts(heads, count)
    values = torch.arange(rows * heads * width, dtype=torch.float32).view(rows, heads, width)

    def to_heads(peers: SymmetricPeers) -> torch.Tensor:
        mine, my_heads = values[shares[peers.index]], of_heads[peers.index]
        sent = torch.cat([mine[:, run].reshape(-1) for run in of_heads])
        received = torch.empty(rows * size(my_heads) * width)
        sent_counts = [len(mine) * size(run) * width for run in of_heads]
        received_counts = [size(run) * size(my_heads) * width for run in shares]
        for _ in range(3):  # the halves of the buffers take turns
            received.zero_()
            peers.exchange(received, sent, received_counts, sent_counts)
            assert torch.equal(received.view(rows, size(my_heads), width), values[:, my_heads])
        return received

    peers = world(count)
    together(peers, to_heads)
    assert len({room._round for each in peers for room in each.rooms.values()}) == 1


@pytest.mark.parametrize(("count", "total"), [(2, 3), (3, 10_000)])
def test_every_share_is_gathered_in_its_place(count: int, total: int) -> None:
    values, runs = torch.arange(total, dtype=torch.float32), parts(total, count)

    def gather(peers: SymmetricPeers) -> torch.Tensor:
        whole = torch.zeros(total)
        whole[runs[peers.index]] = values[runs[peers.index]]
        peers.gather(whole, [size(run) for run in runs])
        return whole

    assert all(torch.equal(whole, values) for whole in together(world(count), gather))


def test_without_the_gpus_or_the_private_names_it_is_said_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "fewer GPUs" in (what_is_missing(99) or "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: False)
    assert "no access" in (what_is_missing(2) or "")
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    monkeypatch.setattr(symmetric, "commands_are_missing", lambda: False)
    assert what_is_missing(2) is None  # of this PyTorch
    monkeypatch.setattr(symmetric, "commands_are_missing", lambda: True)
    assert "the driver has no commands" in (what_is_missing(2) or "")
    monkeypatch.setattr(symmetric, "MODULE", "json")
    assert what_is_missing(2) == "json of this PyTorch has no empty, rendezvous, get_buffer, barrier"
    monkeypatch.setattr(symmetric, "MODULE", "torch.no_such")
    assert what_is_missing(2) == "this PyTorch has no torch.no_such"


@pytest.mark.parametrize("count", [2, 3])
def test_a_room_is_proved_before_it_is_used(count: int) -> None:
    def prove(peers: SymmetricPeers) -> None:
        (room,) = peers.rooms.values()
        room.prove()

    peers = world(count)
    together(peers, prove)
    for each in peers:
        (room,) = each.rooms.values()
        room._buffers = [
            torch.zeros_like(buffer) for buffer in room._buffers
        ]  # what the others put down is not seen here
    with pytest.raises(DeviceError, match="other bytes than were sent; use --exchange_by nccl"):
        together(peers, prove)
