"""Seeded mutations of small files: bytes anywhere, and values of JSON and of plain pickles."""

from __future__ import annotations

import copy
import json
import pickle
import random
from collections.abc import Iterator
from typing import Any

__all__ = ["mutated"]

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 1 << 40, 1 << 63, 10**30, 10**400, 0.5, -0.0, 1e300, float("nan"), float("inf"), "", "x",
    "5", "-7.5", "1e9", "a" * 5000, "\x1b]0;title\x07", "\x00", "\ud800", "\u202e", "a\r\r<img src=x>", "`x`|*_", "名字", [], {}, [1],
    {"a": 1}, [[]], [{}], [None] * 50, {"name": None}, "dit", "load", "stage", "weights", "(other)",
]  # fmt: skip
BYTES = (
    b"",
    b"\x00",
    b"\xff",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"9" * 300,
    b"1e999",
    b"NaN",
    b"\\u",
    b"\\ud800",
    b"\n",
    b"e",
)


def mutated(name: str, whole: bytes, rng: random.Random) -> bytes:
    """One to four changes; how, depends on what the file is."""
    if rng.random() < 0.35:
        return _bytes(whole, rng)
    if name.endswith(".pickle"):
        return pickle.dumps(_values(pickle.loads(whole), rng, plain=False), rng.choice([2, 4, 5]))
    if name.endswith(".json"):
        try:
            return json.dumps(_values(json.loads(whole), rng, plain=True)).encode()
        except ValueError:  # a field file that is no JSON, on purpose
            return _bytes(whole, rng)
    return _bytes(whole, rng)


def _bytes(whole: bytes, rng: random.Random) -> bytes:
    data = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        what = rng.random()
        if what < 0.3 and at < len(data):
            data[at] = rng.randrange(256)
        elif what < 0.6:
            data[at : at + rng.choice([0, 0, 1, 8])] = rng.choice(BYTES)
        elif what < 0.75:
            del data[at : at + rng.randint(1, 40)]
        elif what < 0.9:
            start = rng.randrange(len(data) + 1)
            data[at:at] = data[start : start + rng.randint(1, 200)]
        else:
            del data[at:]
        if not data:
            break
    return bytes(data)


def _values(content: Any, rng: random.Random, *, plain: bool) -> Any:
    for _ in range(rng.randint(1, 4)):
        places = list(_places(content))
        holder, key = rng.choice(places) if places else (None, None)
        value = copy.deepcopy(rng.choice(VALUES))
        if not plain and rng.random() < 0.2:
            value = rng.choice([b"bytes", (1, 2), ((1,), 2), {1, 2}, 10**80, (), frozenset()])
        if holder is None:
            return value
        what = rng.random()
        if what < 0.7:
            holder[key] = value
        elif what < 0.8:
            del holder[key]
        elif isinstance(holder, dict):
            holder[rng.choice(["x", "name", "\x1b[31m", "a\r\r<b>", "", "name.a"])] = value
        else:
            holder.insert(key, value)
    return content


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _places(item)
