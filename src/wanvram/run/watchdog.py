"""A thread beside a run on several GPUs: whatever ends one process ends all of them within 15 seconds, and each says which and why.

The main thread may be inside a library that waits for a peer which is gone, for ever with NCCL. So it is told, given some seconds to
write its record, and if it does not come back this thread writes it and ends the process.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from wanvram.errors import PeerLost
from wanvram.record import Failure
from wanvram.recorder.interrupts import call_off
from wanvram.run.bulletin import Bulletin, Ending, Present

__all__ = ["Watchdog"]

TICK_SECONDS = 0.5
# A silent peer is lost after this; its thread stands still only with its process, or while a library holds Python's lock.
SILENT_SECONDS = 7.0
GRACE_SECONDS = 5.0  # from the news to the end: for the unit of work that is being computed, and the record

LastWords = Callable[[Ending], None]


class Watchdog:
    """Looks after the peers of a rank until `stop`. last_words: what to do in this thread before the process is ended."""

    def __init__(self, bulletin: Bulletin, peers: Sequence[Present]) -> None:
        self.last_words: LastWords = lambda ending: None
        self.ending: Ending | None = None  # what ended the run, as soon as it is known here
        self._bulletin = bulletin
        self._peers = {peer.rank: peer for peer in peers if peer.rank != bulletin.me.rank}
        self._here = {rank for rank, peer in self._peers.items() if peer.is_seen()}
        self._left: set[int] = set()
        self._heard: dict[int, tuple[int, float]] = {}
        self._beats = 0
        self._launcher = os.getppid()
        self._known = threading.Event()
        self._stopped = threading.Event()
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="wanvram-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """The process leaves in order; returns only if this thread is not ending it already."""
        if not self._stopped.is_set():
            self._writing.acquire()
        self._stopped.set()
        self._known.set()

    def told(self, ending: Ending) -> None:
        """By the main thread, which knows itself: from now on it has GRACE_SECONDS, too."""
        self.ending = self.ending or ending
        self._known.set()

    def waits(self, seconds: float) -> Ending | None:
        """What ended the run, if that becomes known in this time."""
        self._known.wait(seconds)
        return self.ending

    def is_gone(self, rank: int) -> bool:
        """A peer of this machine that has ended, in whatever way."""
        return rank in self._here and not self._peers[rank].is_seen()

    def _run(self) -> None:
        while not self._known.wait(TICK_SECONDS):
            found = self._look()
            if found is not None:
                self.ending = found
                self._known.set()
                call_off(found.error())
        if self._stopped.wait(GRACE_SECONDS) or not self._writing.acquire(blocking=False):
            return
        assert self.ending is not None
        with suppress(Exception):
            self.last_words(self.ending)
        os._exit(self.ending.exit_code)

    def _look(self) -> Ending | None:
        try:
            self._beats += 1
            self._bulletin.put("alive", self._beats)
            lost = self._lost()
            return self._bulletin.ending() or lost
        except PeerLost as error:
            return Ending(Failure("error", str(error)))

    def _lost(self) -> Ending | None:
        for rank, peer in self._peers.items():
            if rank not in self._left and (why := self._why_lost(peer)):
                return Ending(Failure("error", f"{peer} {why}", rank=rank))
        if os.name == "posix" and os.getppid() != self._launcher:
            return Ending(Failure("error", "the launcher of this run's processes has ended: killed, or crashed"))
        return None

    def _why_lost(self, peer: Present) -> str | None:
        """What it does or did, as a clause."""
        gone = self.is_gone(peer.rank)
        if self._bulletin.got("left", peer.rank):
            self._left.add(peer.rank)
            return None
        if gone:
            return "ended without a word: it was killed, or crashed"
        beats, now = self._bulletin.got("alive", peer.rank) or 0, time.monotonic()
        if beats != self._heard.get(peer.rank, (-1, now))[0]:
            self._heard[peer.rank] = (beats, now)
        silent = now - self._heard[peer.rank][1]
        if silent <= SILENT_SECONDS:
            return None
        peer.end()
        return f"has said nothing for {silent:.0f} s: it hangs, or cannot be reached"
