"""A Chrome trace's JSON, event by event out of a stream of bytes. No torch.

Traces in the field hold events that are no JSON (a Windows path, a quote in a name): one of these is left out, as `Invalid`,
and reading goes on at the next event.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

from wanvram.errors import InputError
from wanvram.foreign_text import quoted, shown

__all__ = ["EventScanner", "Invalid", "TruncatedError"]

CHUNK = 4 << 20
MAX_VALUE = 16 << 20  # characters of one event; real ones have some hundred
MAX_FRUITLESS = 256 << 20  # characters parsed in vain, after which a file is too damaged: some 5 s
LEAST_COST = 1000  # characters that an attempt counts for, however early it ends
_NEAR_END = 16  # characters: what is cut off there may be half a literal or half an escape
_OVERLAP = 256  # characters kept while searching, in which the beginning of an event may lie
_SPACE = re.compile(r"[\s,]*")
_EVENT = re.compile(r'\{\s*"(?:ph|cat|name|pid|tid|ts|dur|id|s|bp|args)"\s*:')  # how an event may begin
_LIST_ENDS = re.compile(r'\}\s*\]\s*(?:\}|,\s*")')
_EVENTS_BEGIN = re.compile(r'"traceEvents"\s*:\s*\[')
_LITERAL_BEGINS = re.compile(r"-?[A-Za-z]*\s*")
_TIMELINE = re.compile(r"\[\s*-?[0-9]")


class TruncatedError(Exception):
    """The file ends inside a value."""


@dataclass(frozen=True)
class Invalid:
    """Yielded in the place of an event that is no JSON. where: the byte near which it begins, of the unpacked file."""

    where: int
    reason: str


class _IncompleteError(Exception):
    """The value goes on in the next chunk."""


class _InvalidError(Exception):
    """The value is no JSON, whatever follows."""


class EventScanner:
    """The events of a trace out of a stream of bytes, holding one chunk and one event.

    distributed: what the file says about its rank. notes: one sentence each on what besides the events could not be read.
    """

    def __init__(self, read: Callable[[int], bytes], name: str) -> None:
        self._read = read
        self._name = name
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("replace").decode
        self._parse = json.JSONDecoder(strict=False).raw_decode
        self._text = ""
        self._pos = 0
        self._end = False
        self._bytes = 0
        self._fruitless = 0
        self.distributed: dict[str, Any] = {}
        self.notes: list[str] = []

    def events(self) -> Iterator[Any]:
        """Raises InputError for what is no trace, TruncatedError where the file breaks off."""
        first = self._next()
        if not first:
            raise InputError(f"{self._name} is empty; expected a torch.profiler trace (JSON)")
        if first not in "{[":
            raise InputError(f"{self._name} is no torch.profiler trace: it begins with {quoted(first)}, not with JSON")
        self._pos += 1
        if first == "[":
            self._refuse_timeline()
            yield from self._array()
            return
        found = False
        while (char := self._next()) != "}":
            try:
                is_list = self._key_of_list(char)
            except _InvalidError as error:
                if found:
                    self.notes.append("what follows the list of events is no valid JSON and is left out")
                    return
                self._search_events(str(error))
                is_list = True
            if is_list:
                found = True
                if not (yield from self._array()):
                    return
        if not found:
            raise InputError(f"{self._name} is no torch.profiler trace: it has no list of traceEvents")

    def _refuse_timeline(self) -> None:
        if self._next() == "[" and _TIMELINE.match(self._text, self._pos):
            raise InputError(
                f"{self._name} is a memory timeline (torch.profiler's export_memory_timeline: bytes by category, without "
                "operators), which is not read; write a trace with export_chrome_trace and give that"
            )

    def _key_of_list(self, char: str) -> bool:
        """Reads a key; whether the list of events begins behind it. Any other value is read as well."""
        key = self._value() if char == '"' else None
        if not isinstance(key, str) or self._next() != ":":
            if self._next() == "":
                raise TruncatedError
            raise _InvalidError(self._wrong("a key"))
        self._pos += 1
        if self._next() == "[" and key == "traceEvents":
            self._pos += 1
            return True
        value = self._value()
        if key == "distributedInfo" and isinstance(value, dict):
            self.distributed = value
        return False

    def _search_events(self, reason: str) -> None:
        """From a damaged value before the events to the first of these."""
        self.notes.append("what precedes the list of events is no valid JSON and is left out")
        while (found := _EVENTS_BEGIN.search(self._text, self._pos)) is None:
            self._pos = max(self._pos, len(self._text) - _OVERLAP)
            if not self._fill():
                raise InputError(f"{self._name} is no torch.profiler trace: {reason}")
        self._pos = found.end()

    def _array(self) -> Generator[Any, None, bool]:
        """Returns whether the list's end was reached value by value, so that what follows it can be read."""
        skip, parse = _SPACE.match, self._parse
        while True:
            found = skip(self._text, self._pos)
            assert found is not None
            self._pos = found.end()
            try:
                value, self._pos = parse(self._text, self._pos)
            except (ValueError, RecursionError):  # the event goes on in the next chunk, the list ends, or damage
                if self._next() == "]":
                    self._pos += 1
                    return True
                try:
                    value = self._value()
                except _InvalidError as error:
                    yield Invalid(self._place(), str(error))
                    if self._next_event():
                        continue
                    return False
                except TruncatedError:
                    where = self._place()
                    if not self._next_event():
                        raise
                    yield Invalid(where, "a text in it has no end")
                    continue
            yield value

    def _place(self) -> int:
        """The byte of the unpacked file that is looked at; near it where characters are none of UTF-8."""
        return self._bytes - len(self._text[self._pos :].encode("utf-8", "replace"))

    def _next_event(self) -> bool:
        """From a damaged event to the next one; False if there is none and the list ends. Raises TruncatedError."""
        since, ended = self._pos, False
        self._pos += 1
        while True:
            if self._found_event():
                return True
            ended = ended or _LIST_ENDS.search(self._text, since) is not None
            if self._end:
                if ended or self._text[-_OVERLAP:].rstrip().endswith("]"):
                    return False
                raise TruncatedError
            self._fill()
            since = 0

    def _found_event(self) -> bool:
        """Goes to the next event that the text holds, else to where one that goes on in the next chunk may begin."""
        while (found := _EVENT.search(self._text, self._pos)) is not None:
            self._pos = found.start()
            try:
                value, _ = self._complete()
            except _InvalidError:
                value = None
            except _IncompleteError:
                if not self._end:
                    return False
                value = None
            if isinstance(value, dict) and "ph" in value:
                return True
            self._pos += 1
        self._pos = max(self._pos, len(self._text) - _OVERLAP)
        return False

    def _next(self) -> str:
        """The next character that is neither space nor comma; empty at the end."""
        while True:
            found = _SPACE.match(self._text, self._pos)
            assert found is not None
            self._pos = found.end()
            if self._pos < len(self._text):
                return self._text[self._pos]
            if not self._fill():
                return ""

    def _value(self) -> Any:
        """The value here, reading on as long as it is incomplete. Raises _InvalidError without moving on."""
        while True:
            try:
                value, end = self._complete()
            except _IncompleteError:
                if self._end:
                    raise TruncatedError from None
                self._fill()  # at the end of the file, what looked cut off may turn out to be damage
                continue
            if end < len(self._text) or self._end:
                self._pos = end
                return value
            self._fill()  # a number at the end of a chunk may go on in the next

    def _complete(self) -> tuple[Any, int]:
        """(value, its end). Raises _IncompleteError or _InvalidError, and InputError when too much was parsed in vain."""
        try:
            return self._parse(self._text, self._pos)
        except RecursionError as error:
            self._charge(LEAST_COST)
            raise _InvalidError("it is nested too deeply") from error
        except json.JSONDecodeError as error:
            cut = self._is_cut(error)
            self._charge(len(self._text) - self._pos if cut else error.pos - self._pos)
            if not cut:
                at = max(error.pos - 10, self._pos)
                raise _InvalidError(f"it breaks at '{shown(self._text[at : at + 40], 60)}'") from error
            if len(self._text) - self._pos > MAX_VALUE:
                raise _InvalidError(self._wrong("a value of under 16 MiB")) from error
            raise _IncompleteError from error
        except ValueError as error:  # a number of more than 4,300 digits
            self._charge(LEAST_COST)
            raise _InvalidError(self._wrong("a number")) from error

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        """Whether more text could make the value here whole."""
        if error.msg.startswith("Unterminated string"):
            return True
        tail = self._text[error.pos :]
        if not self._end or len(tail) > _NEAR_END:
            return len(tail) < _NEAR_END
        return '"' not in tail if "escape" in error.msg else _LITERAL_BEGINS.fullmatch(tail) is not None

    def _charge(self, characters: int) -> None:
        self._fruitless += max(characters, LEAST_COST)
        if self._fruitless > MAX_FRUITLESS:
            raise InputError(f"{self._name} is too damaged: hundreds of thousands of its events are no valid JSON")

    def _fill(self) -> bool:
        """Drops what is done and appends the next chunk; False at the end of the file."""
        if self._end:
            return False
        data = self._read(CHUNK)
        self._end = not data
        self._bytes += len(data)
        self._text = self._text[self._pos :] + self._decode(data, self._end)
        self._pos = 0
        return not self._end

    def _wrong(self, expected: str) -> str:
        return f"not valid JSON: expected {expected} at '{shown(self._text[self._pos : self._pos + 40], 60)}'"
