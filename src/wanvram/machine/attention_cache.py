"""What `wanvram check --attention` measured here, kept in the user's cache folder: seconds of each backend by card and versions.

A file that is damaged, or of another program, is passed over with a note, and replaced by the next check.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wanvram.errors import DamagedError, InputError
from wanvram.foreign_text import shown, why
from wanvram.input_files import read_text
from wanvram.output_files import writing
from wanvram.record import write_json
from wanvram.strict_json import built, strict_json

__all__ = ["CROSS", "HEAD_DIM", "SELF", "Conditions", "Measured", "ShapeTimes", "cache_file", "found", "keep", "read"]

SCHEMA = 1
MAX_BYTES = 1024 * 1024
SELF, CROSS = "self", "cross"
HEAD_DIM = 128  # of what is measured, as of every Wan2.1 transformer


@dataclass(frozen=True)
class Conditions:
    """What a measurement holds for. card, driver: as the driver says them; flash_attn: version of flash-attn-4, None without."""

    card: str
    driver: str
    torch: str
    cudnn: int | None
    flash_attn: str | None


@dataclass(frozen=True)
class ShapeTimes:
    """use: self or cross. seconds: of one call, by backend; those that cannot compute it are missing."""

    use: str
    heads: int
    queries: int
    keys: int
    seconds: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    conditions: Conditions
    shapes: tuple[ShapeTimes, ...]

    def seconds(self, use: str) -> dict[str, float]:
        return next((dict(shape.seconds) for shape in self.shapes if shape.use == use), {})


@dataclass(frozen=True)
class _Kept:
    schema: int
    measured: tuple[Measured, ...]


def cache_file(environment: Mapping[str, str] | None = None, platform: str = sys.platform) -> Path:
    """XDG_CACHE_HOME or ~/.cache; on Windows LOCALAPPDATA."""
    environment = os.environ if environment is None else environment
    home = Path(environment.get("USERPROFILE" if platform == "win32" else "HOME") or Path.home())
    if platform == "win32":
        folder = Path(environment.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        stated = Path(environment.get("XDG_CACHE_HOME") or "")
        folder = stated if stated.is_absolute() else home / ".cache"  # as its specification says
    return folder / "wanvram" / "attention.json"


def read(path: Path) -> tuple[tuple[Measured, ...], str]:
    """What was measured here, and a note where the file is there and tells nothing."""
    try:
        if not path.exists():
            return (), ""
        kept = built(_Kept, strict_json(read_text(path, MAX_BYTES)))
        _check(kept)
    except (InputError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        said = f"is no readable cache of `wanvram check --attention` and was passed over: {why(error)}"
        return (), f"{shown(path)} {said}"
    return kept.measured, ""


def _check(kept: _Kept) -> None:
    if kept.schema != SCHEMA:
        raise DamagedError(f"its schema is {kept.schema}, not {SCHEMA}")
    for shape in (shape for measured in kept.measured for shape in measured.shapes):
        for name, value in shape.seconds.items():
            if type(value) not in (int, float) or not 0 < value < float("inf"):
                raise DamagedError(f"seconds.{shown(name, 40)} is no time")


def found(conditions: Conditions, path: Path | None = None) -> tuple[Measured | None, str]:
    """What was measured under exactly these conditions, and a note where the cache cannot be read."""
    measured, note = read(cache_file() if path is None else path)
    return next((one for one in measured if one.conditions == conditions), None), note


def keep(measured: Measured, path: Path | None = None) -> Path:
    """Adds it to the cache; what was measured with this card under other versions is dropped. Raises OutputError."""
    path = cache_file() if path is None else path
    others = [one for one in read(path)[0] if one.conditions.card != measured.conditions.card]
    kept = _Kept(SCHEMA, (*others, measured))
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(kept))
    return path
