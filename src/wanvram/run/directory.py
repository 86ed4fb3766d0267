"""The run directory: record.json, memory_events.json, config.yaml, environment.json and the video; nothing is overwritten."""

from __future__ import annotations

from pathlib import Path

from wanvram.errors import InputError, OutputError

__all__ = ["RUN_FILES", "prepare_directory"]

RUN_FILES = ("record.json", "memory_events.json", "config.yaml", "environment.json", "video.mp4", "snapshot.pickle")


def prepare_directory(path: Path, *, force: bool) -> Path:
    """Creates the directory, or empties it of an earlier run's files when `force`. Raises InputError if it holds a run."""
    existing = [name for name in RUN_FILES if (path / name).exists()]
    if existing and not force:
        raise InputError(
            f"{path} already holds a run ({', '.join(existing)}); give --force to replace it or -o DIR for another place"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name in existing:
            (path / name).unlink()
        probe = path / ".wanvram-write-test"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OutputError(f"cannot write to {path}: {error.strerror or error}") from error
    return path
