"""JSON from outside as plain values that nothing overflows with, checked against the annotations of dataclasses. No torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from wanvram.errors import DamagedError
from wanvram.foreign_text import quoted, shown

__all__ = ["built", "check_types", "strict_json"]


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


def check_types(value: Any, kind: Any, where: str) -> None:
    """ValueError naming the place where a value read from JSON is not what the annotation of its dataclass says."""
    options = get_args(kind)
    if type(None) in options:
        if value is None:
            return
        (kind,) = (option for option in options if option is not type(None))
    plain = get_origin(kind) or kind
    if plain is Any:
        return
    if plain is Literal:
        if value not in options:
            raise DamagedError(f"{shown(where or 'it', 100)} is {quoted(value)}; expected one of {', '.join(options)}")
        return
    wanted = (int, float) if plain is float else plain
    if not isinstance(value, wanted) or (isinstance(value, bool) and plain is not bool):
        raise DamagedError(
            f"{shown(where or 'it', 100)} is {quoted(value)}; expected {_KINDS.get(plain, 'something else')}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise DamagedError(f"{shown(where, 100)} is no finite number")
    for name, item, inside in _parts(value, kind):
        check_types(item, inside, f"{where}.{name}".lstrip("."))


_T = TypeVar("_T")


def built(kind: type[_T], data: Any, where: str) -> _T:
    """The dataclass from JSON's plain values, with those inside it; unknown keys are dropped.

    KeyError for a value that is missing, ValueError naming the place of one that is not what the annotation says.
    """
    value = _built(kind, data, where)
    check_types(value, kind, where)
    return value  # type: ignore[no-any-return]


def _built(kind: Any, data: Any, where: str) -> Any:
    """Objects made, values not yet checked."""
    options = [option for option in get_args(kind) if option is not type(None)]
    if data is not None and len(options) == 1 and get_origin(kind) not in (list, tuple):
        kind = options[0]  # of `kind | None`
    if isinstance(kind, type) and is_dataclass(kind):
        if not isinstance(data, dict):
            raise DamagedError(f"{shown(where or 'it', 100)} is {quoted(data)}; expected a section")
        missing = [f.name for f in fields(kind) if f.name not in data and f.default is f.default_factory is MISSING]
        if missing:
            raise KeyError(missing[0])
        known = {f.name: data[f.name] for f in fields(kind) if f.name in data}
        hints = _hints(kind)
        return kind(**{name: _built(hints[name], item, f"{where}.{name}".lstrip(".")) for name, item in known.items()})
    if isinstance(data, list) and get_origin(kind) is list:
        return [_built(get_args(kind)[0], item, f"{where}.{index}") for index, item in enumerate(data)]
    if isinstance(data, list) and get_origin(kind) is tuple:
        inside = get_args(kind)
        kinds = [inside[0]] * len(data) if inside[-1] is ... else list(inside)
        if len(kinds) != len(data):
            raise DamagedError(f"{shown(where, 100)} is a group of {len(data)} values, expected {len(kinds)}")
        return tuple(_built(k, item, f"{where}.{i}") for i, (k, item) in enumerate(zip(kinds, data, strict=True)))
    return data


_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list",
    tuple: "a list",
    dict: "a section",
}


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _parts(value: Any, kind: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, annotation) of what is inside."""
    inside = get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        yield from ((name, getattr(value, name), hint) for name, hint in _hints(kind).items())
    elif isinstance(value, dict):
        yield from ((str(key), item, inside[1]) for key, item in value.items())
    elif isinstance(value, list) or inside[-1:] == (...,):
        yield from ((str(index), item, inside[0]) for index, item in enumerate(value))
    elif isinstance(value, tuple):
        if len(value) != len(inside):
            raise DamagedError(f"a group of {len(value)} values, expected {len(inside)}")
        yield from ((str(index), item, inside[index]) for index, item in enumerate(value))
