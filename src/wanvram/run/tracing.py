"""What a configuration asks to be recorded beside the record: torch.profiler's trace, the allocator's history."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from wanvram.config import Measurement, RunConfig
from wanvram.engine.pipeline import Pipeline
from wanvram.record import Failure
from wanvram.recorder.tracing import CYCLE_STEPS, allocator_snapshot, setup_profiler
from wanvram.run.directory import TRACE_NAME
from wanvram.run_events import StageAdvanced, TellRun

__all__ = ["observed", "traced_config", "traced_pass"]


@contextmanager
def observed(measurement: Measurement, file: Path | None) -> Iterator[list[str]]:
    """Inside, the allocator's history is recorded into a file of the run directory, if asked for.

    Yields a list that holds afterwards a sentence on what could not be written: the run's own record, which
    may have taken hours, must not be lost for it.
    """
    lost: list[str] = []
    snapshot = allocator_snapshot(file) if measurement.snapshot and file is not None else nullcontext()
    snapshot.__enter__()
    try:
        yield lost
    finally:
        try:
            snapshot.__exit__(None, None, None)
        except OSError as error:
            lost.append(f"{file.name if file else None} could not be written: {error.strerror or error}")


def traced_config(config: RunConfig) -> RunConfig:
    """Of the pass that is traced: the steps of one trace of the first prompt, as it was given; nothing else differs."""
    first = config.request.all_prompts()[0]
    request = replace(config.request, prompt=first, prompts=(), sample_steps=CYCLE_STEPS, use_prompt_extend=False)
    return replace(config, request=request, measurement=Measurement(profile_memory=False))


def traced_pass(
    config: RunConfig,
    pipeline: Pipeline,
    directory: Path,
    tell: TellRun | None,
    play: Callable[[Pipeline], Failure | None],
) -> str:
    """Plays a pipeline of `traced_config` until torch.profiler has written its trace into the run directory; nothing is decoded.

    A sentence on what became of it: the measured run stays what it was.
    """
    try:
        tracer = _Tracer(directory / config.measurement.trace_directory, tell)
        pipeline.trace_step = tracer.step
        try:
            failure = play(pipeline)
        except _TraceWritten:
            failure = None
        finally:
            tracer.end()
        if failure is not None:
            return f"no trace was written: {failure.message}"
        _same_file(tracer.written(), directory / TRACE_NAME)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return f"no trace was written: {reason}"
    return f"{TRACE_NAME} is of a pass of its own after the measured one, its third to fifth step: torch.profiler disturbs times and memory"


class _TraceWritten(BaseException):
    """Ends the traced pass: no failure, so no Exception."""


class _Tracer:
    """torch.profiler over the denoising steps, into a folder that belongs to this run: earlier traces in it are removed."""

    def __init__(self, traces: Path, tell: TellRun | None) -> None:
        self._traces = traces
        self._tell = tell
        self._steps = 0
        for earlier in self._found():
            earlier.unlink()
        self._profiler = setup_profiler(str(traces))
        self._profiler.start()

    def step(self) -> None:
        """To be called after each denoising step."""
        self._steps += 1
        if self._tell:
            self._tell(StageAdvanced("trace", self._steps, CYCLE_STEPS, "steps"))
        self._profiler.step()
        if self._steps == CYCLE_STEPS:
            raise _TraceWritten

    def end(self) -> None:
        self._profiler.stop()

    def written(self) -> Path:
        """Raises OSError if there is none."""
        found = self._found()
        if not found:
            raise OSError("torch.profiler wrote no trace")
        return found[-1]

    def _found(self) -> list[Path]:
        return sorted(self._traces.glob("*.pt.trace.json"), key=lambda path: path.stat().st_mtime_ns)


def _same_file(source: Path, target: Path) -> None:
    """A second name for a trace of perhaps gigabytes; a copy where the file system has no hard links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
