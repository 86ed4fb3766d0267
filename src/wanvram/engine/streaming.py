"""Weights on their way to the device: two reused slots, filled while earlier units compute.

Where the weights wait is their home: pinned RAM (copied from directly), pageable RAM or the checkpoint's files (both read by a
thread into two pinned buffers first, because a copy from anything else would stop the host).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Protocol

import torch

from wanvram.engine.devices import Device
from wanvram.errors import WanvramError

__all__ = ["Home", "Later", "PacedHome", "PinnedHome", "SlotRing", "StagedHome"]


class Home(Protocol):
    """Where weights wait. marks: those that are waited for before a later fetch."""

    @property
    def marks(self) -> list[Any]: ...

    def fetch(self, piece: Any, slot: torch.Tensor, after: Any) -> Any:
        """Starts filling `slot` [nbytes] once the mark `after` has passed; returns the mark of its completion."""

    def close(self) -> None:
        """Returns when no copy is under way any more."""


@dataclass(frozen=True)
class Later:
    """A mark that there is once a thread has read; `then` starts something more, in the thread that walks."""

    read: Future[Any]
    then: Callable[[Any], Any]

    def result(self) -> Any:
        return self.then(self.read.result())


@dataclass(eq=False)
class PinnedHome:
    """Every piece has a master copy in pinned RAM, or on the device. `masters`: piece -> uint8 [the slot's nbytes]."""

    device: Device
    masters: dict[Any, torch.Tensor]
    marks: list[Any] = field(default_factory=list)  # the last copy's is waited for at the end only
    _last: Any = None

    def fetch(self, piece: Any, slot: torch.Tensor, after: Any) -> Any:
        self._last = self.device.prefetch(slot, self.masters[piece], after)
        return self._last

    def close(self) -> None:
        self.device.reader_waits(self._last)  # copies end in order; RAM must stay pinned until the last has
        self.masters.clear()


@dataclass(eq=False)
class PacedHome(PinnedHome):
    """Its pieces go part by part, so that other copies find their way between: 570 MiB at once are 11 ms in which no row comes."""

    _going: deque[_Going] = field(default_factory=deque)

    def fetch(self, piece: Any, slot: torch.Tensor, after: Any) -> Any:
        self._going.append(_Going(self, self.masters[piece], slot, after))
        return self._going[-1]

    def advance(self, share: int) -> None:
        """One of so many parts of what is fetched next."""
        if self._going:
            self._send(math.ceil(self._going[0].slot.nbytes / share))

    def _send(self, nbytes: int) -> None:
        going = self._going[0]
        part = slice(going.sent, going.sent + nbytes)
        self._last = self.device.prefetch(going.slot[part], going.master[part], going.after)
        going.mark, going.sent = self._last, part.stop
        if going.sent >= going.slot.nbytes:
            self._going.popleft()

    def rest_of(self, going: _Going) -> Any:
        """It is needed now: the mark of its last part, and nothing that was asked for before it is left."""
        while going in self._going:
            self._send(self._going[0].slot.nbytes)
        return going.mark

    def close(self) -> None:
        self._going.clear()
        super().close()


@dataclass(eq=False)
class _Going:
    """A piece on its way, `sent` bytes of it so far."""

    home: PacedHome
    master: torch.Tensor
    slot: torch.Tensor
    after: Any
    sent: int = 0
    mark: Any = None

    def result(self) -> Any:
        return self.home.rest_of(self)


class StagedHome:
    """`read(piece, buffer)` writes a piece into a pinned buffer; it runs in a thread where the device computes beside it."""

    def __init__(self, device: Device, largest: int, read: Callable[[Any, torch.Tensor], None]) -> None:
        self.device = device
        self.read = read
        self._buffers = [device.host_empty((largest,), torch.uint8, pinned=True) for _ in range(2)]
        self.marks: list[Any] = [None, None]
        self._turn = 0
        self._thread = ThreadPoolExecutor(1, "wanvram-weights") if device.copies_beside else None

    def fetch(self, piece: Any, slot: torch.Tensor, after: Any) -> Any:
        turn = self._turn % 2
        self._turn += 1
        if self._thread is None:
            return self._read_and_copy(piece, slot, after, turn)
        return self._thread.submit(self._read_and_copy, piece, slot, after, turn)

    def _read_and_copy(self, piece: Any, slot: torch.Tensor, after: Any, turn: int) -> Any:
        buffer = self._buffers[turn].narrow(0, 0, slot.nbytes)
        self.device.reader_waits(self.marks[turn])
        try:
            self.read(piece, buffer)
        except (OSError, WanvramError) as error:
            # Not the user's input: the file was good when the run began.
            raise WanvramError(f"weights could not be read while they were streamed: {error}") from error
        self.marks[turn] = self.device.prefetch(slot, buffer, after)
        return self.marks[turn]

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        for mark in self.marks:
            self.device.reader_waits(mark)
        self._buffers.clear()


@dataclass(frozen=True)
class _Coming:
    piece: Any
    mark: Any


PENDING = (Future, Later, _Going)  # marks to come: what they are of is started, or goes on, when they are asked for


class SlotRing:
    """Two device buffers that pieces pass through. What comes next is known, so both are always being filled.

    Pieces are asked for in a cyclic order, pass after pass: the first of the next pass are on their way while the last of this
    one computes. They take the slots in turn, both as large as `largest`; with `lanes`, the slot of every piece is given, and
    a slot is as large as the largest of its own. nbytes: of a piece in its slot.
    """

    def __init__(
        self,
        device: Device,
        home: Home,
        largest: int,
        lanes: Mapping[Any, int] | None = None,
        nbytes: Callable[[Any], int] = attrgetter("nbytes"),
    ) -> None:
        self.device = device
        self.home = home
        self.nbytes = nbytes
        self._lanes = lanes or {}
        own = [[nbytes(piece) for piece, lane in self._lanes.items() if lane == slot] for slot in range(2)]
        self.slots = [device.empty((max(sizes, default=largest),), torch.uint8) for sizes in own]
        self._spans: dict[tuple[int, int], torch.Tensor] = {}  # by slot and bytes, for pieces of one size
        self._free: list[Any] = [None, None]  # marks after which a slot may be overwritten
        self._coming: dict[int, _Coming] = {}  # by slot
        self._walked = 0  # pieces of whole passes: whose turn the first of the next is
        self._skipped = 0  # pieces that a simulation leaves out next

    def walk(self, pieces: Sequence[Any]) -> Generator[torch.Tensor, None, None]:
        """Yields each piece's bytes on the device, [nbytes]; valid until the next is asked for. What has the same place and size
        is the same tensor, until `close`."""
        if not pieces:
            return
        first = {slot: index for slot in range(2) if (index := self._following(pieces, -1, slot)) is not None}
        if any(
            slot not in first or c.piece is not pieces[first[slot] % len(pieces)] for slot, c in self._coming.items()
        ):
            self._forget()  # another order, or the last walk was broken off
        for slot in sorted(first.keys() - self._coming.keys(), key=lambda slot: first[slot]):
            self._start(pieces[first[slot] % len(pieces)], slot)
        index = 0
        while index < len(pieces):
            slot = self._slot(pieces, index)
            coming = self._coming.pop(slot)
            self.device.wait(coming.mark.result() if isinstance(coming.mark, PENDING) else coming.mark)
            try:
                yield self._span(coming.piece, slot)
            finally:
                self._free[slot] = self.device.mark()
            index += self._left_out(pieces, index)
            following = self._following(pieces, index, slot)
            assert following is not None
            self._start(pieces[following % len(pieces)], slot)
            index += 1
        self._walked += len(pieces)

    def marks(self) -> Sequence[Any]:
        """Whatever is waited for before a piece is used, a slot filled or a buffer read into; None: nothing was there yet."""
        coming = [self._coming[slot].mark if slot in self._coming else None for slot in range(2)]
        return *coming, *self._free, *self.home.marks

    def skip(self, count: int, seconds: float) -> None:
        """After the piece that is in use the walk goes on `count` pieces, an even number, and so many seconds later.

        Where none is left out, what was started before is there when it would have been.
        """
        if not count:
            return
        later, self._skipped = self.device.later, count
        self._coming = {slot: _Coming(c.piece, later(c.mark, seconds)) for slot, c in self._coming.items()}
        self._free = [mark and later(mark, seconds) for mark in self._free]
        self.home.marks[:] = [mark and later(mark, seconds) for mark in self.home.marks]

    def _left_out(self, pieces: Sequence[Any], index: int) -> int:
        """What was coming behind the piece at `index` is what comes behind those that are left out."""
        count, self._skipped = self._skipped, 0
        for slot, coming in self._coming.items() if count else ():
            place = self._following(pieces, index, slot)
            assert place is not None
            self._coming[slot] = _Coming(pieces[(place + count) % len(pieces)], coming.mark)
        return count

    def _slot(self, pieces: Sequence[Any], index: int) -> int:
        """Of the piece at `index` of this pass, or of the next where that is beyond its end."""
        return self._lanes.get(pieces[index % len(pieces)], (self._walked + index) % 2)

    def _following(self, pieces: Sequence[Any], index: int, slot: int) -> int | None:
        """What passes through a slot next after the piece at `index`; None: nothing does."""
        ahead = range(index + 1, index + 2 + 2 * len(pieces))
        return next((other for other in ahead if self._slot(pieces, other) == slot), None)

    def _forget(self) -> None:
        """What is coming is overwritten, once it is there: copies keep their order, but what ranks gather is no copy."""
        for slot, coming in self._coming.items():
            if not isinstance(coming.mark, PENDING):
                self.device.wait(coming.mark)
                self._free[slot] = self.device.mark()
        self._coming.clear()

    def _start(self, piece: Any, slot: int) -> None:
        self._coming[slot] = _Coming(piece, self.home.fetch(piece, self._span(piece, slot), self._free[slot]))

    def _span(self, piece: Any, slot: int) -> torch.Tensor:
        key = slot, self.nbytes(piece)
        if key not in self._spans:
            self._spans[key] = self.slots[slot].narrow(0, 0, key[1])
        return self._spans[key]

    def close(self) -> None:
        """Copies under way end before the slots' memory is given back."""
        self._coming.clear()
        try:
            self.home.close()
        finally:
            self._spans.clear()
            self.slots.clear()
