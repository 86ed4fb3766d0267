"""A file that holds a valid JSON list after every item, so that a kill at any moment leaves what was appended. One process's own."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple

from wanvram.input_files import open_regular
from wanvram.units import KIB, MIB

__all__ = ["ListFile", "claim"]

EMPTY = b"[]\n"
BINARY = getattr(os, "O_BINARY", 0)  # Windows would write \r\n for \n, and replaces no open file
# The kernel looks for a deadly signal between the pages of one write, never within one.
PAGE = 4096
# Room kept before the closing bracket, so that the file is copied when it has grown by an eighth and not at every page.
LEAST_ROOM = 16 * KIB
# Above this a copy takes about 5 ms; an item of more than a page then goes into the room, where a kill can tear it.
LARGEST_COPY = 16 * MIB
MOST_EARLIER = 256 * MIB  # of a list that goes on; a run of hours has 1


class _Place(NamedTuple):
    """Where the next item goes. One value, so that an exception out of a signal's handler never sees half of it.

    file: descriptor, -1 when closed. inode: (device, number). end: offset behind the last item. bracket: of `]`; between them
    are blanks. items: how many.
    """

    file: int
    inode: tuple[int, int]
    end: int
    bracket: int
    items: int


_NOWHERE = _Place(-1, (0, 0), 1, 1, 0)


class ListFile:
    """Appends JSON texts to a list. Any thread may, a signal's handler and a finalizer too.

    An item is one write within one page, over blanks or over the closing bracket, `,{...}]`, which no kill tears. A bracket
    cannot move to another page in one step; then a copy, with new room before its bracket, replaces the file.

    The descriptor is used only while it is this file: a program that closes all descriptors, or removes the file, gets the
    list under its name again and keeps its own files.
    """

    def __init__(self, path: Path, *, goes_on: bool = False) -> None:
        """`path` is taken over if it exists: a list that somebody else wrote there is replaced, or goes on. ValueError if it is none."""
        self.path = path.absolute()  # the program may change its directory
        self._lock = threading.RLock()
        self._waiting: deque[bytes] = deque()
        self._writing = False
        self._torn = False
        self._place = _NOWHERE
        self._replace(*(_earlier(path) if goes_on else (b"[", 0)), room=0)

    def append(self, text: str) -> None:
        """Raises OSError when the disk does not take it; the list is then as it was."""
        self._waiting.append(text.encode())
        with self._lock:
            self._drain()

    def _drain(self) -> None:
        if self._writing:  # by this very thread, which a signal or a finalizer interrupted; it goes on with what waits
            return
        self._writing = True
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError:
            self._waiting.popleft()
            raise
        finally:
            self._writing = False

    def close(self) -> None:
        """Gives the descriptor back and the room to the disk; a later item opens the file again."""
        with self._lock:
            self._drain()
            if self._writing or self._place.file < 0:
                return
            place = self._place
            if self._is_ours():
                with suppress(OSError):  # a full disk: the list is valid with its blanks, too
                    if self._is_in_place() and (self._torn or place.bracket != place.end):
                        self._replace(self._content(), place.items, room=0)
                os.close(self._place.file)
            self._place = self._place._replace(file=-1)

    def _write(self, item: bytes) -> None:
        self._find()
        place = self._place
        data = (b",\n" if place.items else b"\n") + item
        if self._torn:
            self._replace(self._content() + data, place.items + 1)
        elif place.bracket == place.end and _one_page(place.end, len(data) + 2):
            self._write_over(place.end, data + b"]\n", b"]\n", place.end + len(data), place.end + len(data))
        elif (start := self._start_in_room(len(data))) is not None:
            self._write_over(start, data, b" " * len(data), start + len(data), place.bracket)
        else:
            self._replace(self._content() + data, place.items + 1)

    def _find(self) -> None:
        """Leaves an open descriptor of this list under a name of its own; somebody else's file under the name is left alone."""
        ours, in_place = self._is_ours(), self._is_in_place()
        if ours and in_place:
            return
        if in_place:
            self._place = self._place._replace(file=os.open(self.path, os.O_RDWR | BINARY))
            return
        self.path = claim(self.path)
        if ours:
            self._replace(self._content(), self._place.items)
        else:
            self._place = _NOWHERE
            self._replace(b"[", 0, room=0)

    def _is_ours(self) -> bool:
        """The descriptor is still this file, and not another one that got its number."""
        return self._place.file >= 0 and _inode(lambda: os.fstat(self._place.file)) == self._place.inode

    def _is_in_place(self) -> bool:
        return _inode(lambda: os.stat(self.path)) == self._place.inode

    def _start_in_room(self, length: int) -> int | None:
        """Offset in the blanks at which `length` bytes lie within a page; None if there is none."""
        start, bracket = self._place.end, self._place.bracket
        if length > PAGE and start <= LARGEST_COPY:
            return None
        if length <= PAGE and not _one_page(start, length):
            start += PAGE - start % PAGE
        return start if start + length <= bracket else None

    def _write_over(self, start: int, data: bytes, before: bytes, end: int, bracket: int) -> None:
        """Puts `before` back if the disk takes less than everything."""
        place = self._place
        self._torn = True  # until it is known to be whole: an exception out of a signal's handler may come in between
        try:
            if _write_at(place.file, data, start) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            _put(place.file, before, start)
            os.ftruncate(place.file, place.bracket + 2)
            self._torn = False
            raise
        self._place = _Place(place.file, place.inode, end, bracket, place.items + 1)
        self._torn = False

    def _content(self) -> bytes:
        """The list without its closing bracket."""
        return _read_at(self._place.file, self._place.end, 0)

    def _replace(self, content: bytes, items: int, room: int | None = None) -> None:
        """A new file under the same name; the old one stays until the new one is complete."""
        room = max(LEAST_ROOM, len(content) // 8) if room is None else room
        new = self.path.with_name(f".{self.path.name}.new")
        new.unlink(missing_ok=True)
        before, place = self._place, _NOWHERE
        old = before.file if self._is_ours() else -1
        file = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | BINARY, 0o666)
        try:
            _put(file, content + b" " * room + b"]\n", 0)
            if BINARY:
                os.close(file)
                self._give_up()
                old = -1
            status = os.stat(new)
            place = _Place(file, (status.st_dev, status.st_ino), len(content), len(content) + room, items)
            os.replace(new, self.path)
            if BINARY:
                place = place._replace(file=os.open(self.path, os.O_RDWR | BINARY))
            self._place = place
            self._torn = False
        except BaseException:
            if not BINARY and place.file >= 0 and _inode(lambda: os.stat(self.path)) == place.inode:
                # An exception out of a signal's handler, when the new file had the name already: it is the list, and what it has
                # more than the old one is written once more over itself.
                self._place = place._replace(end=before.end, items=before.items)
                self._torn = True
                if old >= 0:
                    os.close(old)
            else:
                with suppress(OSError):
                    os.close(file)
                new.unlink(missing_ok=True)
            raise
        if old >= 0:
            os.close(old)

    def _give_up(self) -> None:
        """Closes the descriptor, if it is still this file."""
        if self._is_ours():
            os.close(self._place.file)
        self._place = self._place._replace(file=-1)


def claim(path: Path, first: int = 1) -> Path:
    """`path`, or with -2, -3, ... after its stem, from `first` on: the one that did not exist; it now holds an empty list."""
    beside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    beside.unlink(missing_ok=True)
    beside.write_bytes(EMPTY)
    try:
        for number in count(first):
            candidate = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
            try:
                _link(beside, candidate)
            except FileExistsError:
                continue
            return candidate
    finally:
        beside.unlink(missing_ok=True)
    raise AssertionError("unreachable")


def _earlier(path: Path) -> tuple[bytes, int]:
    """A list without its closing bracket, and how many items it has; an empty one where nothing is. ValueError."""
    if not path.exists():
        return b"[", 0
    with open_regular(path) as file:
        data = file.read(MOST_EARLIER + 1).rstrip()
    items = json.loads(data) if len(data) <= MOST_EARLIER else None
    if not isinstance(items, list):
        raise ValueError("this is no list")
    return data[:-1].rstrip(), len(items)


def _link(source: Path, target: Path) -> None:
    """A second name; a copy where the file system has no hard links. Raises FileExistsError."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        with target.open("xb") as file:
            file.write(EMPTY)


def _inode(status: Callable[[], os.stat_result]) -> tuple[int, int] | None:
    try:
        found = status()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _one_page(start: int, length: int) -> bool:
    return start // PAGE == (start + length - 1) // PAGE


def _write_at(file: int, data: bytes, start: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(file, data, start)
    os.lseek(file, start, os.SEEK_SET)
    return os.write(file, data)


def _read_at(file: int, length: int, start: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(file, length, start)
    os.lseek(file, start, os.SEEK_SET)
    return os.read(file, length)


def _put(file: int, data: bytes, start: int) -> None:
    """All of it, however little the disk takes at once."""
    while data:
        written = _write_at(file, data, start)
        if written == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        data, start = data[written:], start + written
