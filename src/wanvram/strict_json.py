"""JSON from outside as plain values that nothing overflows with, and as dataclasses that it fits. No torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from itertools import cycle
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from wanvram.errors import DamagedError
from wanvram.foreign_text import quoted, shown

__all__ = ["built", "strict_json"]


def strict_json(text: str) -> Any:
    """Plain values with which nothing overflows and that can be written: ValueError for a number of 2^63 or more and for lone
    surrogates (foreign_text.why says it in words). NaN becomes None.
    """
    value = json.loads(text, parse_int=_whole, parse_float=_real, parse_constant=lambda _: None)
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()
    return value


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _whole(text: str) -> int:
    if len(text) > 20 or abs(int(text)) >= 1 << 63:
        raise DamagedError(f"the number {text:.20} is too large")
    return int(text)


def _real(text: str) -> float:
    if not abs(value := float(text)) < 1 << 63:
        raise DamagedError(f"the number {text:.20} is too large")
    return value


def _misfit(value: Any, kind: Any) -> str | None:
    """What is wrong with the value itself, whatever is inside it."""
    plain = get_origin(kind) or kind
    if plain is Any:
        return None
    if plain is Literal:
        allowed = get_args(kind)
        return None if value in allowed else f"is {quoted(value)}; expected one of {', '.join(allowed)}"
    wanted = (int, float) if plain is float else plain
    if not isinstance(value, wanted) or (isinstance(value, bool) and plain is not bool):
        return f"is {quoted(value)}; expected {_KINDS.get(plain, 'something else')}"
    return "is no finite number" if isinstance(value, float) and not math.isfinite(value) else None


_T = TypeVar("_T")


def built(kind: type[_T], data: Any, where: str = "") -> _T:
    """The dataclass from JSON's plain values, with those inside it; unknown keys are dropped. where: the data are in the file.

    KeyError for a value that is missing, ValueError naming the place of one that is not what the annotation says.
    """
    try:
        return _reader(kind)(data)  # type: ignore[no-any-return, arg-type]
    except _Unfit as error:
        place = ".".join([where, *reversed(error.place)]).strip(".")
        raise DamagedError(f"{shown(place or 'it', 100)} {error.said}") from error


class _Unfit(Exception):
    """place grows on the way out, innermost first: names are put together for what is wrong only, a timeline has 200,000 values."""

    def __init__(self, said: str) -> None:
        self.said = said
        self.place: list[str] = []


Reader = Callable[[Any], Any]


@cache
def _reader(kind: Any) -> Reader:
    """What makes a value of this annotation out of JSON's. Of dicts the keys are text."""
    plain, inside = get_origin(kind) or kind, get_args(kind)
    if type(None) in inside:
        (some,) = (option for option in inside if option is not type(None))
        read = _reader(some)
        return lambda value: None if value is None else read(value)
    if is_dataclass(plain):
        return _section_reader(plain)
    if plain in (list, tuple):
        return _list_reader(plain, inside)
    if plain is dict and inside[1] is not Any:
        of_each = _reader(inside[1])
        return lambda data: {key: _inside(key, of_each, value) for key, value in _section(data).items()}

    def checked(value: Any) -> Any:
        if (type(value) is not plain or plain is float) and (said := _misfit(value, kind)):
            raise _Unfit(said)
        return value

    return checked


def _section_reader(kind: Any) -> Reader:
    @cache
    def known() -> list[tuple[str, Reader, bool]]:  # once one is read: an annotation may hold itself
        hints = get_type_hints(kind)
        return [(f.name, _reader(hints[f.name]), f.default is f.default_factory is MISSING) for f in fields(kind)]

    def read(data: Any) -> Any:
        section, values = _section(data), {}
        for name, inner, needed in known():
            if name in section:
                values[name] = _inside(name, inner, section[name])
            elif needed:
                raise KeyError(name)
        return kind(**values)

    return read


def _section(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise _Unfit(f"is {quoted(data)}; expected a section")
    return data


def _inside(name: str, inner: Reader, value: Any) -> Any:
    try:
        return inner(value)
    except _Unfit as error:
        error.place.append(name)
        raise


def _list_reader(kind: Any, inside: tuple[Any, ...]) -> Reader:
    same = kind is list or inside[-1] is ...
    readers = [_reader(item) for item in (inside[:1] if same else inside)]

    def read(data: Any) -> Any:
        if not isinstance(data, (list, tuple)):  # a tuple: of `to_json`, never written
            raise _Unfit(f"is {quoted(data)}; expected a list")
        if not same and len(data) != len(readers):
            raise _Unfit(f"is a group of {len(data)} values, expected {len(readers)}")
        values: list[Any] = []
        try:
            for item, inner in zip(data, cycle(readers) if same else readers, strict=False):
                values.append(inner(item))
        except _Unfit as error:
            error.place.append(str(len(values)))
            raise
        return kind(values)

    return read


_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list",
    tuple: "a list",
    dict: "a section",
}
