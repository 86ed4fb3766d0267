"""The ranks that share a sequence, as models.team.Team has them: exchanges over Peers, shares from sharing.Sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wanvram.engine.devices import Device
from wanvram.engine.peers import Peers
from wanvram.models.team import Team
from wanvram.sharing import RING, SEQUENCE, ULYSSES, Sequence, size

__all__ = ["SharedSequence", "team_of"]


def team_of(device: Device, tokens: int, heads: int, chunk_rows: int) -> Team | None:
    """Those that share the sequence with this device, None where it has all of it. InputError: too many for it."""
    place = device.place
    if place.ulysses * place.ring == 1:
        return None
    sequence = Sequence(place, tokens, heads, chunk_rows)
    return SharedSequence(sequence, *(device.peers(axis) for axis in (ULYSSES, RING, SEQUENCE)))


@dataclass(frozen=True)
class SharedSequence:
    """A Team. ulysses, ring, all_rows: the peers of sharing's axes ULYSSES, RING and SEQUENCE."""

    sequence: Sequence
    ulysses: Peers
    ring: Peers
    all_rows: Peers

    @property
    def rows(self) -> slice:
        return self.sequence.rows

    @property
    def my_heads(self) -> slice:
        return self.sequence.my_heads

    @property
    def station_rows(self) -> int:
        return self.sequence.stations[self.sequence.place.index(RING)]

    @property
    def is_ring(self) -> bool:
        return self.sequence.place.ring > 1

    def chunks(self) -> Iterator[tuple[int, slice, slice]]:
        pairs = zip(self.sequence.chunks, self.sequence.pieces, strict=True)
        return ((number, mine, piece) for number, (mine, piece) in enumerate(pairs))

    def to_heads(self, rows: Tensor, target: Tensor, chunk: int) -> Any:
        if self.ulysses.count == 1:
            target.copy_(rows)
            return None
        width = rows.shape[2]
        sent_counts = self._rows_counts(chunk, width)
        sent = torch.empty(rows.numel(), dtype=rows.dtype, device=rows.device)
        for part, of_rank in self._by_rank(sent, rows):
            part.copy_(of_rank)
        return self.ulysses.exchange(target.view(-1), sent, self._counts(chunk, width), sent_counts)

    def wait(self, mark: Any) -> None:
        self.ulysses.wait(mark)

    def to_rows(self, attended: Tensor, chunk: int) -> Any:
        """(received, mark); of one rank (attended, None)."""
        if self.ulysses.count == 1:
            return attended, None
        counts = self._rows_counts(chunk, attended.shape[2])
        received = torch.empty(sum(counts), dtype=attended.dtype, device=attended.device)
        mark = self.ulysses.exchange(received, attended.view(-1), counts, self._counts(chunk, attended.shape[2]))
        return received, mark

    def arrived(self, coming: Any, chunk: int) -> Tensor:
        received: Tensor = coming[0]
        if self.ulysses.count == 1:
            return received.flatten(1)
        self.ulysses.wait(coming[1])
        length, heads = size(self.sequence.chunks[chunk]), self.sequence.heads
        shape = (length, heads, received.numel() // (length * heads))
        rows = torch.empty(shape, dtype=received.dtype, device=received.device)
        for part, of_rank in self._by_rank(received, rows):
            of_rank.copy_(part)
        return rows.flatten(1)

    def _by_rank(self, flat: Tensor, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Views of the same shape: each rank's part of `flat`, its heads of rows [n,H,D]; one for all where they have as many."""
        length, _, width = rows.shape
        shares = self.sequence.heads_by_rank
        if size(shares[0]) == size(shares[-1]):
            apart = (length, len(shares), size(shares[0]), width)
            return [(flat.view(len(shares), length, size(shares[0]), width), rows.view(apart).transpose(0, 1))]
        parts = flat.split([length * size(heads) * width for heads in shares])
        return [
            (part.view(length, size(heads), width), rows[:, heads]) for heads, part in zip(shares, parts, strict=True)
        ]

    def _rows_counts(self, chunk: int, width: int) -> list[int]:
        """Numbers of every rank's heads in my rows of a chunk."""
        length = size(self.sequence.chunks[chunk])
        return [length * size(heads) * width for heads in self.sequence.heads_by_rank]

    def _counts(self, chunk: int, width: int) -> list[int]:
        """Numbers of my heads in the chunk's rows of every rank that exchanges heads with me."""
        mine = size(self.my_heads) * width
        return [size(chunks[chunk]) * mine for chunks in self.sequence.chunks_by_rank]

    def stations(self, pair: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        v, k = pair.pop(), pair.pop()
        rows, here, count = self.sequence.stations, self.ring.index, self.ring.count
        for step in range(1, count + 1):
            if step == count:
                yield k, v
                return
            shape = (rows[(here - step) % count], *k.shape[1:])
            coming = tuple(torch.empty(shape, dtype=k.dtype, device=k.device) for _ in range(2))
            mark = self.ring.pass_on(coming, (k, v))
            yield k, v
            self.ring.wait(mark)
            k, v = coming
            del coming

    def whole(self, tokens: Tensor) -> Tensor:
        width, runs = tokens.shape[1], self.sequence.rows_by_rank
        gathered = torch.empty((self.sequence.tokens, width), dtype=tokens.dtype, device=tokens.device)
        gathered[self.rows].copy_(tokens)
        self.all_rows.gather(gathered.view(-1), [size(run) * width for run in runs])
        return gathered
