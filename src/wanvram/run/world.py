"""The processes of a run on several GPUs as one of them sees it: they come together, follow the first one's decisions, and end together.

What their tensors go through is torch.distributed's group (`connect`); everything else goes through the store (`Bulletin`).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import PurePath
from typing import Any

import torch
import torch.distributed as dist

from wanvram.config import Strategy
from wanvram.engine.cuda import CudaDevice
from wanvram.engine.devices import Device
from wanvram.engine.peers import Exchanged
from wanvram.engine.symmetric import what_is_missing
from wanvram.errors import DeviceError, PeerLost, WanvramError
from wanvram.knobs import EXCHANGE, shares_weights
from wanvram.machine.launched import Launched
from wanvram.progress_stream import ProgressStream
from wanvram.record import Failure, RankRecord, RunRecord
from wanvram.recorder.interrupts import INTERRUPTED, agreed, ending_begins, hold, pending
from wanvram.run.bulletin import Bulletin, Ending, Present, store_for_tensors
from wanvram.run.watchdog import Watchdog
from wanvram.strict_json import built

__all__ = ["World", "joined", "together"]

JOIN_SECONDS = 120.0  # from the first process to the last: each imports PyTorch, from a cold network disk too
POLL_SECONDS = 0.05
TOLD_SECONDS = 2.0  # for whoever knows the cause to say it
LEAVE_SECONDS = 5.0  # for the others' records: torchrun ends all that are left when one has ended
# A collective waits for a peer that plans, reads a checkpoint or writes; who is lost the watchdog knows before.
TENSOR_TIMEOUT = timedelta(hours=2)
# NVLS reserves 2.4 GB on 8 GPUs; with 8 channels a first exchange of 2 takes 344 MiB instead of 632 (H200, NCCL 2.28.9).
# Exchanges beside an attention must not wait for its last block: hence the priority.
_NCCL = {
    **{"NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "8", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"},
    "TORCH_NCCL_HIGH_PRIORITY": "1",
}


@dataclass(eq=False)
class World:
    """This process among those of its run, while it is in `joined`. communication_bytes: that exchanges take of this rank's GPU."""

    me: Launched
    watchdog: Watchdog
    _bulletin: Bulletin
    _peers: list[Present]
    _step_ended: float = 0.0
    communication_bytes: int | None = None

    def file(self, name: str) -> str:
        """What a file of the run directory is called that every rank writes: record.json, record.rank1.json."""
        path = PurePath(name)
        return name if self.me.is_first else f"{path.stem}.rank{self.me.rank}{path.suffix}"

    def shared(self, what: str, decide: Callable[[], Any]) -> Any:
        """What the first one decides, plain data that JSON holds; the others wait for it. PeerLost: it never came."""
        if self.me.is_first:
            value = decide()
            self._bulletin.put(what, value)
            return value
        return self._awaited(what, 0)

    def connect(self, device: Device, strategy: Strategy) -> str | None:
        """Makes torch.distributed's group and a connection to every peer: what the driver then shows is not the allocator's.

        Returns a note where NCCL is used that nobody asked for. DeviceError: copies were asked for and cannot be made.
        """
        for name, value in _NCCL.items():
            os.environ.setdefault(name, value)
        asked, cuda = EXCHANGE.of(strategy), isinstance(device, CudaDevice)
        missing = self._missing_for_copies() if cuda and asked != "nccl" else None
        if asked == "copies" and missing:
            raise DeviceError(f"{EXCHANGE.asked(asked)}: {missing}; use {EXCHANGE.asked('auto')}")
        nccl = cuda and (asked == "nccl" or missing is not None)
        before = _outside(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo",
            store=store_for_tensors(TENSOR_TIMEOUT),
            rank=self.me.rank,
            world_size=self.me.size,
            timeout=TENSOR_TIMEOUT,
            device_id=device.torch_device if nccl else None,  # NCCL connects now, and by one communicator only
        )
        if isinstance(device, CudaDevice):
            device.exchanges_by_copies = not nccl
        device.connect(weights=shares_weights(strategy))
        self.communication_bytes = max(0, _outside(device) - before) if cuda else None
        return f"the GPUs exchange by NCCL, which takes more of their memory: {missing}" if missing else None

    def _missing_for_copies(self) -> str | None:
        """Why the ranks cannot copy out of each other's GPUs, as the first that cannot says it."""
        seen = all(peer.is_seen() for peer in self._peers)
        mine = what_is_missing(self.me.size) if seen else "they are of several hosts"
        self._bulletin.put("missing", {"why": mine})
        return next(filter(None, (self._awaited("missing", peer.rank)["why"] for peer in self._peers)), None)

    def step_made(self) -> None:
        """After each step: a signal to any process stops all of them here, where no GPU waits for another and the step can be kept."""
        signal = torch.tensor(pending())
        dist.all_reduce(signal, dist.ReduceOp.MAX)
        now = time.monotonic()
        hold(2 * (now - self._step_ended) if self._step_ended else 0.0)
        self._step_ended = now
        agreed(int(signal))

    def failed(self, failure: Failure, error: BaseException) -> Failure:
        """Of this process; what ended the run is returned, which may be another's."""
        ending_begins()
        ending = self._ending_of(failure, error)
        self.watchdog.told(ending)
        return ending.failure

    def _ending_of(self, failure: Failure, error: BaseException) -> Ending:
        own = isinstance(error, WanvramError) and not isinstance(error, PeerLost)
        pressed = isinstance(error, KeyboardInterrupt) and failure.message == INTERRUPTED
        if not own and not pressed:  # a signal of the launcher, or a library's error: somebody may know more
            known = self.watchdog.waits(TOLD_SECONDS)
            if known is not None:
                return known
        mine = Ending(replace(failure, rank=self.me.rank), _exit_code(error))
        said = replace(mine, failure=replace(mine.failure, message=f"rank {self.me.rank}: {failure.message}"))
        with suppress(PeerLost):
            first = built(Ending, self._bulletin.first("ending", asdict(said)))
            return mine if own or first.failure.rank == self.me.rank else first
        return mine

    def gathered(self, record: RankRecord) -> list[RankRecord]:
        """On the first rank everyone's in order, without those that are lost; on the others nothing."""
        self._bulletin.put("record", record.to_json())
        if not self.me.is_first:
            return []
        deadline = time.monotonic() + LEAVE_SECONDS if self.watchdog.ending else None
        records = []
        for peer in self._peers:
            with suppress(PeerLost):
                records.append(RankRecord.from_json(self._awaited("record", peer.rank, deadline)))
        return records

    def _awaited(self, what: str, rank: int, deadline: float | None = None) -> Any:
        """PeerLost when the run ends meanwhile, or at the deadline of a run that has ended."""
        while (value := self._bulletin.got(what, rank)) is None:
            if deadline is None and self.watchdog.ending is not None:
                raise self.watchdog.ending.error()
            if deadline is not None and (time.monotonic() > deadline or self.watchdog.is_gone(rank)):
                raise PeerLost(f"rank {rank} has left no {what}")
            time.sleep(POLL_SECONDS)
        return value

    def leave(self) -> None:
        """When this process has done everything: together with the others where the run has failed, the store's host last.

        The others go in half the time: a first rank that still waits for what one of them would have sent is let go by its end,
        and has the rest of the watchdog's grace for the record of all.
        """
        self.watchdog.stop()
        with suppress(PeerLost):
            self._bulletin.put("left", True)
            deadline = time.monotonic() + (LEAVE_SECONDS if self.me.is_first else LEAVE_SECONDS / 2)
            waits = self.watchdog.ending is not None or self.me.is_first
            while waits and time.monotonic() < deadline and any(map(self._is_awaited, self._peers)):
                time.sleep(POLL_SECONDS)
        if self.watchdog.ending is None and dist.is_initialized():
            dist.destroy_process_group()

    def _is_awaited(self, peer: Present) -> bool:
        return not self.watchdog.is_gone(peer.rank) and self._bulletin.got("left", peer.rank) is None


@contextmanager
def joined(me: Launched, join_seconds: float = JOIN_SECONDS) -> Iterator[World]:
    """Inside, all processes of the run are there, and whatever ends one ends all. DeviceError names those that did not come.

    An error inside goes on as itself on the first rank, on the others as a PeerLost, which needs no word there.
    """
    hosted = me.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        bulletin = Bulletin(me, hosted=hosted, wait_seconds=join_seconds)
        peers = _come(bulletin, join_seconds)
        watchdog = Watchdog(Bulletin(me), peers)
    except PeerLost as error:
        raise DeviceError(str(error)) from error
    watchdog.last_words = partial(_say, me)
    watchdog.start()
    world = World(me, watchdog, bulletin, peers)
    try:
        yield world
    except BaseException as error:
        if watchdog.ending is None:
            kind = "interrupted" if isinstance(error, KeyboardInterrupt) else "error"
            world.failed(Failure(kind, str(error) or INTERRUPTED), error)
        assert watchdog.ending is not None
        if me.is_first and watchdog.ending.failure.rank == me.rank:
            raise
        raise watchdog.ending.error() from error
    finally:
        world.leave()


def together(record: RunRecord, world: World, exchanged: Exchanged) -> None:
    """Gives the first rank's record everybody's figures. Of a run that has failed nobody waits for another's longer than for its own."""
    sent = exchanged.nbytes, exchanged.seconds
    mine = RankRecord.of((world.me.rank,), record, sent, world.communication_bytes)
    if record.failure is not None:
        world.watchdog.stop()
    record.ranks = world.gathered(mine)
    if len(cards := {each.device: each.ranks[0] for each in record.ranks}) > 1:
        said = ", ".join(f"{card} (rank {rank})" for card, rank in cards.items())
        record.notes.append(
            f"the ranks compute on unequal cards: {said}; every step takes what the slowest of them takes"
        )
    missing = sorted(set(range(world.me.size)) - {rank for each in record.ranks for rank in each.ranks})
    if missing and world.me.is_first:
        record.notes.append(f"no record came from rank {', '.join(map(str, missing))}")


def _say(me: Launched, ending: Ending) -> None:
    if me.is_first or ending.failure.rank == 0:
        ProgressStream(sys.stderr).write(f"wanvram: {ending.failure.message}\n")


def _come(bulletin: Bulletin, join_seconds: float) -> list[Present]:
    """Everybody, in order of the ranks."""
    bulletin.put("here", vars(Present.of_this(bulletin.me.rank)))
    deadline = time.monotonic() + join_seconds
    come: dict[int, Present] = {}
    while len(come) < bulletin.me.size:
        for rank in set(range(bulletin.me.size)) - set(come):
            if (said := bulletin.got("here", rank)) is not None:
                come[rank] = Present(**said)
        if time.monotonic() > deadline:
            missing = ", ".join(str(rank) for rank in range(bulletin.me.size) if rank not in come)
            raise PeerLost(
                f"of {bulletin.me.size} processes rank {missing} did not come within {join_seconds:.0f} s; start all of "
                "them, as torchrun or --gpus N do"
            )
        time.sleep(POLL_SECONDS)
    return [come[rank] for rank in sorted(come)]


def _outside(device: Device) -> int:
    """Device memory of this process beside the allocator's."""
    return (device.meter.device_memory() or 0) - device.meter.read().reserved_bytes


def _exit_code(error: BaseException) -> int:
    return error.exit_code if isinstance(error, WanvramError) else 1
