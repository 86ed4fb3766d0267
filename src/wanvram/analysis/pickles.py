"""A pickle interpreter for plain data, in bounded memory: containers, numbers and text; nothing is imported or executed. No torch.

A subclass turns dicts and lists into something smaller as they complete, so that a file of a GiB is never held whole.
What the opcodes mean is documented in the standard library's pickletools.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from io import BufferedIOBase
from typing import Any

from wanvram.errors import DamagedError, InputError
from wanvram.foreign_text import why

__all__ = ["ODD", "PlainUnpickler"]

CHUNK = 1 << 20
MARGIN = 1 << 18  # read on when less than this is left: no single opcode of plain data is longer
MAX_STACK = 1 << 20  # values waiting for their container; a pickler puts 1,000 at a time
MAX_KEPT = 1 << 21  # values kept in containers; a snapshot keeps some 100,000 (blocks and segments)
MAX_MEMO = 1 << 26  # 512 MiB of references; a GiB of trace entries has 20 million
MAX_TEXT = 1 << 26  # characters of different strings; what comes after them is dropped
DROPPED = "(dropped)"


class Odd:
    """What stands for a value that no snapshot has: bytes, sets, numbers of over 72 bits, tuples of containers."""


ODD = Odd()

_GET = re.compile(rb"h(.)|j(....)", re.DOTALL)  # BINGET and LONG_BINGET
_GETS = re.compile(rb"(?:h.|j....)*e", re.DOTALL)  # a list of nothing but values seen before, to its end
_SIZED = {
    0x43: ("<B", ODD), 0x42: ("<I", ODD), 0x8E: ("<Q", ODD), 0x96: ("<Q", ODD), 0x8B: ("<i", ODD), 0x8D: ("<Q", DROPPED),
}  # fmt: skip
_REFUSED = {
    ord(code): name
    for code, name in {
        "c": "GLOBAL", "\x93": "STACK_GLOBAL", "R": "REDUCE", "b": "BUILD", "i": "INST", "o": "OBJ", "\x81": "NEWOBJ",
        "\x92": "NEWOBJ_EX", "\x82": "EXT1", "\x83": "EXT2", "\x84": "EXT4", "P": "PERSID", "Q": "BINPERSID",
    }.items()
}  # fmt: skip


class PlainUnpickler:
    """Interprets one pickle of protocol 2 to 5. Raises InputError for anything but plain data, and for a damaged file.

    finish_dict and finish_list are called when a container got its (first 1,000) items and may return what takes its place.
    """

    def __init__(self, file: BufferedIOBase, name: str) -> None:
        self._file = file
        self._name = name
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: list[Any] = []
        self._slots: dict[int, int] = {}  # id of a kept container -> its place in the memo
        self._texts: dict[bytes, str] = {}
        self._tuples: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self._lists: dict[bytes, Any] = {}  # what finish_list made of a run of GETs
        self._text_size = self._kept = 0
        self._read = self._skip = 0  # _skip: bytes to pass over when reading on
        self._plain: dict[int, Callable[[], None]] = {
            ord("u"): lambda: self._set_from(self._marks.pop()), ord("s"): lambda: self._set_from(len(self._stack) - 2),
            ord("e"): lambda: self._append_from(self._marks.pop()), ord("a"): lambda: self._append_from(len(self._stack) - 1),
            ord("t"): lambda: self._tuple(len(self._stack) - self._marks.pop()), 0x85: lambda: self._tuple(1),
            0x86: lambda: self._tuple(2), 0x87: lambda: self._tuple(3), ord(")"): lambda: self._stack.append(()),
            0x8F: lambda: self._stack.append(ODD), 0x90: lambda: self._odd_from_mark(1), 0x91: lambda: self._odd_from_mark(0),
            ord("N"): lambda: self._stack.append(None), 0x88: lambda: self._stack.append(True),
            0x89: lambda: self._stack.append(False),
        }  # fmt: skip

    def finish_dict(self, value: dict[Any, Any]) -> Any:
        return value

    def finish_list(self, target: Any, items: list[Any]) -> Any:
        """Appends `items` to `target`, which is a list or what finish_list returned for it; returns what takes its place."""
        target.extend(items)
        self._keep(len(items))
        return target

    def load(self) -> Any:
        try:
            return self._run()
        except (IndexError, KeyError, struct.error) as error:
            said = f"truncated or damaged near byte {self._read:,}: not a whole pickle"
            raise InputError(f"{self._name} is {said}") from error
        except (TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise InputError(f"{self._name} is damaged near byte {self._read:,}: {why(error)}") from error

    def _run(self) -> Any:
        stack, memo, slots, texts, plain = self._stack, self._memo, self._slots, self._texts, self._plain
        push, unsigned, signed = stack.append, struct.Struct("<I").unpack_from, struct.Struct("<i").unpack_from
        data, pos, safe = b"", 0, -1
        while True:
            if pos > safe:
                data, pos, safe = self._refill(data, pos)
            op = data[pos]
            if op == 0x68:  # BINGET
                push(memo[data[pos + 1]])
                pos += 2
            elif op == 0x8A:  # LONG1
                end = pos + 2 + data[pos + 1]
                push(int.from_bytes(data[pos + 2 : end], "little", signed=True) if end <= pos + 11 else ODD)
                pos = end
            elif op == 0x94:  # MEMOIZE
                memo.append(stack[-1])
                pos += 1
            elif op == 0x6A:  # LONG_BINGET
                push(memo[unsigned(data, pos + 1)[0]])
                pos += 5
            elif op == 0x4B:  # BININT1
                push(data[pos + 1])
                pos += 2
            elif op == 0x4A:  # BININT
                push(signed(data, pos + 1)[0])
                pos += 5
            elif op == 0x28:  # MARK
                pos = self._mark(data, pos + 1)
            elif op == 0x7D or op == 0x5D:  # EMPTY_DICT, EMPTY_LIST
                value: Any = {} if op == 0x7D else []
                push(value)
                pos += 1
                if data[pos] == 0x94:
                    slots[id(value)] = len(memo)
                    memo.append(value)
                    pos += 1
            elif op == 0x8C:  # SHORT_BINUNICODE
                end = pos + 2 + data[pos + 1]
                text = data[pos + 2 : end]
                push(texts[text] if text in texts else self._text(text))
                pos = end
            elif op in plain:
                plain[op]()
                pos += 1
            elif op == 0x2E:  # STOP
                return stack[0] if len(stack) == 1 and not self._marks else self._rare(op, data, pos)
            else:
                pos = self._rare(op, data, pos)

    def _refill(self, data: bytes, pos: int) -> tuple[bytes, int, int]:
        """The bytes not yet interpreted and more: (data, 0, last position up to which nothing has to be read)."""
        while self._skip:
            passed = len(self._file.read(min(self._skip, CHUNK)))
            self._read += passed
            self._skip = self._skip - passed if passed else 0
        more = self._file.read(CHUNK)
        self._read += len(more)
        if self._read == len(more) and not more:
            raise InputError(f"{self._name} is empty; expected a pickle")
        if len(self._stack) > MAX_STACK or len(self._memo) > MAX_MEMO or len(self._slots) > MAX_KEPT:
            raise InputError(f"{self._name} is no snapshot: it holds millions of values outside of any event")
        data = data[pos:] + more
        return data, 0, len(data) - MARGIN if more else len(data) - 1

    def _rare(self, op: int, data: bytes, pos: int) -> int:
        """Opcodes that are not worth a branch in the loop."""
        if op == 0x4D:  # BININT2
            self._stack.append(data[pos + 1] | data[pos + 2] << 8)
            return pos + 3
        if op == 0x58:  # BINUNICODE
            size = struct.unpack_from("<I", data, pos + 1)[0]
            if size > MARGIN - 5:
                return self._pass_over(data, pos + 5, size, DROPPED)
            self._stack.append(self._text(data[pos + 5 : pos + 5 + size]))
            return pos + 5 + int(size)
        if op == 0x47:  # BINFLOAT
            self._stack.append(struct.unpack_from(">d", data, pos + 1)[0])
            return pos + 9
        if op == 0x95:  # FRAME
            return pos + 9
        if op == 0x80 and 2 <= data[pos + 1] <= 5:  # PROTO
            return pos + 2
        if op in (0x71, 0x72):  # BINPUT, LONG_BINPUT
            self._put(data[pos + 1] if op == 0x71 else struct.unpack_from("<I", data, pos + 1)[0])
            return pos + (2 if op == 0x71 else 5)
        if op in _SIZED:  # what no snapshot has, but a value may be
            layout, instead = _SIZED[op]
            size = struct.unpack_from(layout, data, pos + 1)[0]
            return self._pass_over(data, pos + 1 + struct.calcsize(layout), size, instead)
        if op in _REFUSED:
            raise InputError(
                f"{self._name} was refused: its pickle opcode {_REFUSED[op]} would import or run code; "
                "a snapshot consists of lists, dicts, numbers and text only"
            )
        raise InputError(f"{self._name} is not a pickle of plain data: opcode 0x{op:02x} has no place in a snapshot")

    def _pass_over(self, data: bytes, pos: int, size: int, instead: Any) -> int:
        """Past a value that is not kept, however long."""
        if size < 0:
            raise DamagedError("a value of less than no bytes")
        self._stack.append(instead)
        self._skip = max(pos + size - len(data), 0)
        return min(pos + size, len(data))

    def _put(self, index: int) -> None:
        if index != len(self._memo):  # a pickler counts up; a place written twice would make `_lists` stale
            raise DamagedError(f"memo place {index} is out of order")
        value = self._stack[-1]
        if value.__class__ in (dict, list):
            self._slots[id(value)] = index
        self._memo.append(value)

    def _mark(self, data: bytes, pos: int) -> int:
        """Opens a container. A list of known values (a stack's frames) is built at once, equal ones only once."""
        stack = self._stack
        if data[pos] in b"hj" and stack and stack[-1].__class__ is list:
            run = _GETS.match(data, pos)
            if run:
                found = run[0]
                if found in self._lists and not stack[-1]:
                    self._replace(self._lists[found])
                elif len(found) > 1:
                    known = [self._memo[int.from_bytes(a or b, "little")] for a, b in _GET.findall(found)]
                    self._replace(self.finish_list(stack[-1], known))
                    if stack[-1].__class__ is not list and len(self._lists) < 1 << 16:
                        self._lists[found] = stack[-1]
                return run.end()
        self._marks.append(len(stack))
        return pos

    def _text(self, data: bytes) -> str:
        """The same object for the same text; past MAX_TEXT of different ones, a placeholder."""
        text = self._texts.get(data)
        if text is None:
            if self._text_size > MAX_TEXT:
                return DROPPED
            text = data.decode("utf-8", "replace")
            self._text_size += len(text) + 100
            self._texts[data] = text
        return text

    def _keep(self, count: int) -> None:
        self._kept += count
        if self._kept > MAX_KEPT:
            raise InputError(f"{self._name} is no snapshot: it holds over {MAX_KEPT:,} values outside of any event")

    def forget(self, container: Any, instead: Any) -> None:
        """Lets go of a container that is not kept; whatever refers to it later gets `instead`."""
        slot = self._slots.pop(id(container), None)
        if slot is not None:
            self._memo[slot] = instead

    def _replace(self, value: Any) -> None:
        """Puts `value` where the container on top of the stack was, in the memo as well."""
        old = self._stack[-1]
        if value is not old:
            self._stack[-1] = value
            self.forget(old, value)

    def _set_from(self, start: int) -> None:
        """Keys and values go from the stack into the dict below them."""
        stack = self._stack
        items = stack[start:]
        del stack[start:]
        target = stack[-1]
        target.update(zip(items[::2], items[1::2], strict=True))
        value = self.finish_dict(target)
        if value is target:
            self._keep(len(target))
        else:
            self._replace(value)

    def _append_from(self, start: int) -> None:
        """Items go from the stack into the list below them."""
        items = self._stack[start:]
        del self._stack[start:]
        if items:
            self._replace(self.finish_list(self._stack[-1], items))

    def _odd_from_mark(self, below: int) -> None:
        """A set: its items go, and with `below` the set that stood under them."""
        del self._stack[self._marks.pop() - below :]
        self._stack.append(ODD)

    def _tuple(self, count: int) -> None:
        stack = self._stack
        start = len(stack) - count
        if start < 0:
            raise IndexError("a tuple of more values than there are")
        items = tuple(stack[start:])
        if any(item.__class__ in (tuple, list, dict) for item in items):
            stack[start:] = [ODD]  # nested without end, hashing it would overflow the C stack
            return
        known = self._tuples.get(items)
        if known is None:
            self._keep(count)
            known = self._tuples[items] = items
        stack[start:] = [known]
