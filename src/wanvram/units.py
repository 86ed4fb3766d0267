"""Bytes for people and back: 1024-based, and `8GB` means `8GiB` because cards are sold that way."""

from __future__ import annotations

import re

from wanvram.errors import InputError

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_FACTORS = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 1024 * GIB}
_PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """`8GiB`, `8 GB`, `512M`, `1073741824` -> bytes. Raises InputError on anything else."""
    match = _PATTERN.fullmatch(text)
    if not match:
        raise InputError(f"'{text}' is not an amount of memory; write for example 8GiB, 8GB or 512MiB")
    amount = float(match.group(1)) * _FACTORS[match.group(2).upper()]
    if amount >= 2**63:
        raise InputError(f"'{text[:40]}' is more memory than there is")
    return int(amount)


def parse_memory(text: str) -> int:
    """Memory of a card or a host that somebody states, at least 1 MiB. Raises InputError, also on a bare `8`."""
    count = parse_bytes(text)
    bare = text.strip()
    if count < MIB and bare[-1:].isdigit() and float(bare) > 0:
        raise InputError(f"{bare} what? write {bare}GiB")
    if count < MIB:
        raise InputError(f"'{bare}' is not an amount of memory; write for example 8GiB, 8GB or 512MiB")
    return count


def exact(count: int) -> str:
    """Bytes -> the shortest text that parse_bytes reads as exactly that: `8GiB`, `8028MiB` or `8418135736`."""
    for unit, size in (("GiB", GIB), ("MiB", MIB)):
        if count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


def mib(count: int) -> str:
    """Bytes -> `1,234.5 MiB`."""
    return f"{count / MIB:,.1f} MiB"


def mib_cell(count: int | None) -> str:
    """Bytes -> `1,234.5`, for a column in MiB; `-` where nothing is known."""
    return "-" if count is None else f"{count / MIB:,.1f}"


def gib(count: int) -> str:
    """Bytes -> `1.23 GiB`."""
    return f"{count / GIB:,.2f} GiB"


def human(count: int) -> str:
    """Bytes -> MiB under 10 GiB, GiB above and for whole ones and quarters from 1 GiB on, as they are typed; a sign is kept."""
    typed = abs(count) >= GIB and count % (GIB // 4) == 0
    return gib(count) if typed or abs(count) >= 10 * GIB else mib(count)


def seconds(value: float) -> str:
    """Seconds -> `0.42 s`, `12.3 s`, `3 min 05 s` or, from 120 minutes on, `2 h 05 min`."""
    if value < 10:
        return f"{value:.2f} s"
    if value < 120:
        return f"{value:.1f} s"
    minutes = int(value // 60)
    if minutes < 120:
        return f"{minutes} min {int(value % 60):02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def seconds_cell(value: float | None) -> str:
    """As `seconds`, for a column; `-` where nothing is known."""
    return "-" if value is None else seconds(value)
