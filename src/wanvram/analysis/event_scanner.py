"""A Chrome trace's JSON, event by event out of a stream of bytes. No torch."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from wanvram.errors import InputError

__all__ = ["EventScanner", "TruncatedError"]

CHUNK = 4 << 20
MAX_VALUE = 16 << 20  # characters of one event; real ones have some hundred
_SPACE = re.compile(r"[\s,]*")


class TruncatedError(Exception):
    """The file ends inside a value."""


class EventScanner:
    """The events of a trace out of a stream of bytes, holding one chunk and one event."""

    def __init__(self, read: Callable[[int], bytes], name: str) -> None:
        self._read = read
        self._name = name
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("replace").decode
        self._parse = json.JSONDecoder(strict=False).raw_decode
        self._text = ""
        self._pos = 0
        self._end = False

    def events(self) -> Iterator[Any]:
        """Raises InputError for what is no trace, TruncatedError where the file breaks off."""
        first = self._next()
        if not first:
            raise InputError(f"{self._name} is empty; expected a torch.profiler trace (JSON)")
        if first not in "{[":
            raise InputError(f"{self._name} is no torch.profiler trace: it begins with {first!r}, not with JSON")
        self._pos += 1
        if first == "[":
            yield from self._array()
            return
        found = False
        while (char := self._next()) != "}":
            key = self._value() if char == '"' else None
            if not isinstance(key, str) or self._next() != ":":
                raise TruncatedError if self._next() == "" else InputError(self._wrong("a key"))
            self._pos += 1
            if self._next() == "[" and key == "traceEvents":
                self._pos += 1
                found = True
                yield from self._array()
            else:
                self._value()
        if not found:
            raise InputError(f"{self._name} is no torch.profiler trace: it has no list of traceEvents")

    def _array(self) -> Iterator[Any]:
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
                    return
                value = self._value()
            yield value

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
        """The value here, reading on as long as it is incomplete."""
        while True:
            try:
                value, end = self._parse(self._text, self._pos)
                if end < len(self._text) or self._end:
                    self._pos = end
                    return value
                self._fill()  # a number at the end of a chunk may go on in the next
            except RecursionError as error:
                raise InputError(f"{self._name} is no torch.profiler trace: a value is nested too deeply") from error
            except json.JSONDecodeError as error:
                if len(self._text) - self._pos > MAX_VALUE:
                    raise InputError(self._wrong("a value of under 16 MiB")) from error
                if not self._fill():
                    raise TruncatedError from error
            except ValueError as error:  # a number of more than 4,300 digits
                raise InputError(self._wrong("a number")) from error

    def _fill(self) -> bool:
        """Drops what is done and appends the next chunk; False at the end of the file."""
        if self._end:
            return False
        data = self._read(CHUNK)
        self._end = not data
        self._text = self._text[self._pos :] + self._decode(data, self._end)
        self._pos = 0
        return not self._end

    def _wrong(self, expected: str) -> str:
        return f"{self._name} is not valid JSON: expected {expected} at {self._text[self._pos : self._pos + 40]!r}"
