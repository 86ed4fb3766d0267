"""What a configuration asks to be recorded beside the record: torch.profiler's trace, the allocator's history."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from wanvram.config import Measurement
from wanvram.engine.pipeline import Pipeline
from wanvram.recorder.tracing import allocator_snapshot, setup_profiler
from wanvram.run.directory import TRACE_NAME

__all__ = ["observed"]


@contextmanager
def observed(measurement: Measurement, pipeline: Pipeline, directory: Path | None) -> Iterator[list[str]]:
    """Inside, the pipeline is traced and the allocator recorded, into the run directory, as far as asked for.

    Yields a list that holds afterwards a sentence on each file that could not be written: the run's own record, which
    may have taken hours, must not be lost for it.
    """
    lost: list[str] = []
    if directory is None:
        yield lost
        return
    snapshot = allocator_snapshot(directory / "snapshot.pickle") if measurement.snapshot else nullcontext()
    tracer = _Tracer(directory, measurement.trace_directory, lost) if measurement.trace else None
    snapshot.__enter__()
    try:
        if tracer is None:
            yield lost
        else:
            pipeline.trace_step = tracer.step
            with tracer:
                yield lost
    finally:
        try:
            snapshot.__exit__(None, None, None)
        except OSError as error:
            lost.append(f"snapshot.pickle could not be written: {error.strerror or error}")


class _Tracer:
    """torch.profiler over the denoising steps. Its first trace is also found as `trace.json` in the run directory."""

    def __init__(self, directory: Path, traces: str, lost: list[str]) -> None:
        self._directory = directory
        self._traces = directory / traces
        self._earlier = set(self._found())
        self._lost = lost
        self._profiler: torch.profiler.profile | None = setup_profiler(str(self._traces))

    def __enter__(self) -> None:
        assert self._profiler is not None
        self._profiler.start()

    def __exit__(self, *_: object) -> None:
        self._guarded("stop")
        written = [path for path in self._found() if path not in self._earlier]
        if not written:
            if not self._lost:
                self._lost.append("no trace was written: it begins after the second step, which the run did not reach")
            return
        try:
            _same_file(written[0], self._directory / TRACE_NAME)
        except OSError as error:
            self._lost.append(f"{TRACE_NAME} could not be written: {error.strerror or error}")

    def _found(self) -> list[Path]:
        return sorted(self._traces.glob("*.pt.trace.json"), key=lambda path: path.stat().st_mtime_ns)

    def step(self) -> None:
        """To be called after each denoising step. A trace that cannot be written ends the tracing, not the run."""
        self._guarded("step")

    def _guarded(self, call: str) -> None:
        if self._profiler is None:
            return
        try:
            getattr(self._profiler, call)()
        except (OSError, RuntimeError) as error:  # RuntimeError: torch's own, when it cannot make the directory
            self._profiler = None
            self._lost.append(f"the trace could not be written: {error}")


def _same_file(source: Path, target: Path) -> None:
    """A second name for a trace of perhaps gigabytes; a copy where the file system has no hard links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
