"""What the processes of a run on several GPUs tell each other beside their tensors, in the store that torchrun keeps for them."""

from __future__ import annotations

import base64
import json
import os
import socket
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import psutil
from torch.distributed import PrefixStore, TCPStore

from wanvram.errors import PeerLost
from wanvram.machine.launched import Launched
from wanvram.record import Failure
from wanvram.strict_json import built

__all__ = ["Bulletin", "Ending", "Present", "store_for_tensors"]

T = TypeVar("T")
ANSWER_SECONDS = 10.0  # of the store; torchrun's answers in less than a millisecond
_SAME_START = 0.05  # seconds between two readings of when a process began


@dataclass(frozen=True)
class Present:
    """A process that has come. created: when it began, seconds since the epoch."""

    rank: int
    pid: int
    host: str
    created: float

    @classmethod
    def of_this(cls, rank: int) -> Present:
        process = psutil.Process()
        return cls(rank, process.pid, socket.gethostname(), process.create_time())

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} of {self.host})"

    def is_seen(self) -> bool:
        """Whether it runs where this process can see it: on this machine, and in no other container."""
        return self._process() is not None

    def end(self) -> None:
        """By force, where it is seen: a process that stands still hears nothing else."""
        process = self._process()
        if process is not None:
            with suppress(psutil.Error):
                process.kill()

    def _process(self) -> psutil.Process | None:
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < _SAME_START
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.Error:
            return None


@dataclass(frozen=True)
class Ending:
    """Why a run ends before its time, as the rank says it that was first to know. exit_code: of every process's command."""

    failure: Failure
    exit_code: int = 1

    def error(self) -> PeerLost:
        """For where no record tells of it."""
        lost = PeerLost(self.failure.message)
        lost.exit_code = self.exit_code
        return lost


class Bulletin:
    """Values by name and rank, plain data that JSON holds. Raises PeerLost where the store does not answer any more.

    One for each thread: a client that waits for an answer holds its connection.
    """

    def __init__(self, me: Launched, *, hosted: bool = False, wait_seconds: float = ANSWER_SECONDS) -> None:
        """hosted: the store lives in this process. wait_seconds: until it is there."""
        self.me = me
        store = _asked(lambda: _client(timedelta(seconds=wait_seconds), hosted=hosted))
        store.set_timeout(timedelta(seconds=ANSWER_SECONDS))
        self._store = PrefixStore("wanvram", store)

    def put(self, what: str, value: object) -> None:
        """As this rank's."""
        _asked(lambda: self._store.set(f"{what}/{self.me.rank}", _packed(value)))

    def got(self, what: str, rank: int) -> Any:
        """That rank's value; None: it has put none yet."""
        return self.first_of(f"{what}/{rank}")

    def first(self, what: str, value: object) -> Any:
        """The value that was put there first by any rank: this one if none was."""
        return _unpacked(_asked(lambda: self._store.compare_set(what, "", _packed(value))))

    def first_of(self, what: str) -> Any:
        """As `first`, but puts nothing; None: there is none."""
        there: bool = _asked(lambda: self._store.check([what]))
        return _unpacked(_asked(lambda: self._store.get(what))) if there else None

    def ending(self) -> Ending | None:
        found = self.first_of("ending")
        return None if found is None else built(Ending, found)


def store_for_tensors(timeout: timedelta) -> PrefixStore:
    """Where torch.distributed's groups find each other, under a name of their own."""
    return PrefixStore("tensors", _client(timeout))


def _client(timeout: timedelta, *, hosted: bool = False) -> TCPStore:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=hosted, wait_for_workers=False, timeout=timeout)


def _asked(ask: Callable[[], T]) -> T:
    try:
        return ask()
    except RuntimeError as error:  # DistNetworkError, DistStoreError
        raise PeerLost(
            "the launcher's store does not answer: torchrun, or the process of rank 0, has ended or cannot be reached"
        ) from error


def _packed(value: object) -> str:
    """A record of every block of 50 steps has 2 MB as JSON, and the store takes 8."""
    return base64.b64encode(zlib.compress(json.dumps(value).encode())).decode()


def _unpacked(text: bytes) -> Any:
    return json.loads(zlib.decompress(base64.b64decode(text)))
