"""Which optional packages could be imported here before: a plan that asks for nothing else need not do it again. No torch.

flash-attn-4 with its compiler takes 1 s, or 4 with all of its dependency. That it could be imported is kept with a fingerprint of
everything installed, which changes with each installation; that it could not is asked again each time, and the process that computes
imports it in any case. A file that cannot be read or written is no loss.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from wanvram.errors import WanvramError
from wanvram.input_files import read_text
from wanvram.machine.attention_cache import cache_file
from wanvram.record import write_json
from wanvram.strict_json import strict_json

__all__ = ["forget_imported", "imported_before", "keep_imported"]

MAX_BYTES = 64 * 1024
DRIVER = Path("/proc/driver/nvidia/version")
_LOST = (WanvramError, OSError, ValueError, RuntimeError)  # RuntimeError: nobody's home, and too many brackets


def imported_before(package: str) -> bool:
    """Whether it could be imported where exactly this was installed."""
    return _kept().get(package) == _fingerprint()


def keep_imported(package: str) -> None:
    _keep(_kept() | {package: _fingerprint()})


def forget_imported(package: str) -> None:
    """It could not be imported, whatever was kept."""
    kept = _kept()
    if kept.pop(package, None) is not None:
        _keep(kept)


def _file() -> Path:
    return cache_file().with_name("imported.json")


def _keep(kept: dict[str, object]) -> None:
    with suppress(*_LOST):
        path = _file()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, kept)


def _kept() -> dict[str, object]:
    with suppress(*_LOST):
        found = strict_json(read_text(_file(), MAX_BYTES))
        if isinstance(found, dict):
            return found
    return {}


@cache  # once a process: 5 ms
def _fingerprint() -> str:
    """Of the machine, the interpreter and its packages: their versions are in the names, when they were installed in the times."""
    about = [platform.node(), sys.version, sys.prefix, os.environ.get("LD_LIBRARY_PATH", ""), *sys.path]
    with suppress(OSError):
        about.append(DRIVER.read_text(encoding="utf-8", errors="replace"))
    return hashlib.sha256("\n".join([*about, *sorted(_installed())]).encode()).hexdigest()


def _installed() -> Iterator[str]:
    for place in dict.fromkeys(sys.path):
        with suppress(OSError), os.scandir(place or ".") as entries:
            for entry in entries:
                if entry.name.endswith((".dist-info", ".egg-info", ".pth")):
                    yield f"{place} {entry.name} {entry.stat().st_mtime_ns}"
