"""Files that are written whole or not at all, and the sentence for those that cannot be. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wanvram.errors import OutputError

__all__ = ["whole_file", "writing"]


@contextmanager
def writing(place: object) -> Iterator[None]:
    """An OSError inside becomes the OutputError that `place` cannot be written, and why."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {place}: {error.strerror or error}") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: it becomes `path` when the block ends, and is removed if that fails."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
