"""Paths that are no regular files, and names that are no names."""

from __future__ import annotations

import os
import random
import socket
from contextlib import suppress
from pathlib import Path

__all__ = ["ODD_NAMES", "odd_kind", "write_odd", "write_odd_places"]

ODD_NAMES = [
    "a b", "-", "--", "-o", "a\nb", "\x1b]0;t\x07", "名字", "\udcff\udcfe", "a" * 255, "a" * 300, "a'b\"c", "%s", "{0}", "a\\b", "\u202e",
    "x.safetensors", "x.pth", "x.safetensors.index.json", ".part", "a.yaml", "=", "*", "[", "~",
]  # fmt: skip
KINDS = ("directory", "pipe", "socket", "zero", "full", "loop", "nowhere", "empty")


def write_odd(path: Path, kind: str) -> None:
    """In place of what is there. Devices are reached by links, so that nothing that replaces a file replaces a device."""
    with suppress(OSError):
        path.unlink()
    if kind == "directory":
        path.mkdir(exist_ok=True)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made, suppress(OSError):  # a path of over 107 bytes
            made.bind(str(path))
    elif kind == "empty":
        path.touch()
    else:
        path.symlink_to({"zero": "/dev/zero", "full": "/dev/full", "loop": path.name, "nowhere": "nothing/here"}[kind])


def write_odd_places(folder: Path) -> list[str]:
    """One of each kind, and their names."""
    for kind in KINDS:
        write_odd(folder / kind, kind)
    return [*KINDS, "missing", "missing/deep/er", "empty/under-a-file", "loop/x", "a" * 300, "x/" * 3000, "\udcff.yaml"]


def odd_kind(rng: random.Random) -> str:
    return rng.choice(KINDS)
