"""The run directory: record.json, memory_events.json, config.yaml, environment.json and what was made; nothing is overwritten."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from wanvram.errors import InputError
from wanvram.folder_lock import alone_in
from wanvram.kept_state import KEPT_NAME
from wanvram.output_files import writing

__all__ = ["RUN_FILES", "TRACE_NAME", "left_half_written", "prove_writable", "run_directory", "unused_directory"]

TRACE_NAME = "trace.json"  # where spec.md 5.2 looks for a run's trace
RUN_FILES = (
    "record.json",  # run.log is not among them: a series writes a run's output to it while the run prepares the directory
    "memory_events.json",
    *("record.rank*.json", "memory_events.rank*.json", "snapshot.rank*.pickle"),  # of the others of several GPUs
    KEPT_NAME,
    "config.yaml",
    "environment.json",
    "timeline.json",
    "advice.json",
    "report.html",
    "snapshot.pickle",
    TRACE_NAME,
    "trace/*.pt.trace.json",
    "video*.mp4",
    "video*.json",
    "image*.png",
    "image*.json",
)


def unused_directory(path: Path) -> Path:
    """`path`, or with -2, -3, ... after its name: the first that holds no run."""
    candidate, number = path, 1
    while _files_of_a_run(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _files_of_a_run(path: Path) -> list[Path]:
    return [file for pattern in RUN_FILES for file in sorted(path.glob(pattern))]


def left_half_written(path: Path) -> list[Path]:
    """Files of a run that a killed process was writing: each has the name of the whole one and the process's number."""
    hidden = [file for file in sorted(path.glob(".*")) if re.fullmatch(r"\..+\.\d+", file.name)]
    named = [(file, file.name[1:].rpartition(".")[0]) for file in hidden]
    return [file for file, name in named if any(fnmatch(name, pattern) for pattern in RUN_FILES)]


@contextmanager
def run_directory(path: Path, *, force: bool) -> Iterator[Path]:
    """Creates the directory, or empties it of an earlier run's files when `force`; inside, no other run may write to it.

    Raises InputError if it holds a run, or another process is writing to it.
    """
    if os.path.isfile(path):
        raise InputError(f"-o {path} is a file; name a directory")
    with writing(f"to {path}"):
        path.mkdir(parents=True, exist_ok=True)
    with alone_in(path):
        existing = _files_of_a_run(path)
        if existing and not force:
            names = ", ".join(file.name for file in existing)
            resume = f", --resume {path} to go on with it" if (path / KEPT_NAME).exists() else ""
            raise InputError(
                f"{path} already holds a run ({names}); give --force to replace it{resume} or -o DIR for another place"
            )
        with writing(f"to {path}"):
            for file in [*existing, *left_half_written(path)]:
                file.unlink()
        prove_writable(path)
        yield path


def prove_writable(folder: Path) -> None:
    """Makes the folder where it is not there. Raises OutputError."""
    probe = folder / ".wanvram-write-test"
    with writing(f"to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
