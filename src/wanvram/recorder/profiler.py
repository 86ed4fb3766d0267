"""MemoryProfiler and MemoryTracker: the recorder's public face for anybody's PyTorch code, on CUDA and on CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from wanvram.errors import OutputError
from wanvram.record import Memory, Span, write_atomically
from wanvram.recorder.events import EventLog
from wanvram.recorder.meters import CpuMeter, CudaMeter
from wanvram.recorder.recorder import Recorder
from wanvram.recorder.tracing import setup_profiler

__all__ = ["MemoryProfiler", "MemoryTracker"]


class MemoryTracker:
    """Reads memory and keeps the readings; `save_logs` writes them to `memory_log.json`.

    The current CUDA device if there is a GPU, else counted CPU tensors.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.output_dir = Path(output_dir)
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {self.output_dir}: {error.strerror or error}") from error
        self.meter: CudaMeter | CpuMeter
        if torch.cuda.is_available():
            self.meter = CudaMeter(torch.cuda.current_device())
        else:
            self.meter = CpuMeter(count_existing=True)
        self.readings: list[dict[str, int | None]] = []

    def read(self) -> Memory:
        """Now: allocated, reserved and what the driver says."""
        return self._note(self.meter.read())

    def peak(self) -> Memory:
        """Highest allocated and reserved since the meter's peak was last reset; the driver's figure is of now."""
        return self._note(self.meter.peak())

    def _note(self, memory: Memory) -> Memory:
        memory = replace(memory, device_bytes=self.meter.device_memory())
        self.readings.append(
            {
                "allocated_bytes": memory.allocated_bytes,
                "reserved_bytes": memory.reserved_bytes,
                "device_bytes": memory.device_bytes,
            }
        )
        return memory

    def save_logs(self) -> Path:
        path = self.output_dir / "memory_log.json"
        write_atomically(path, json.dumps(self.readings, indent=1) + "\n")
        return path


class MemoryProfiler:
    """Logs memory events of any PyTorch program.

    >>> with MemoryProfiler("my-model", "profiler_logs/my-model") as profiler:
    ...     base = profiler.allocated_bytes()
    ...     model = load()
    ...     profiler.log_event("model_load", {"base_memory": base})  # base memory: what the weights occupy
    ...     with profiler.stage("forward"):                          # activation memory: peak over the stage's start
    ...         model(x)
    ...     profiler.log_event("done")                               # peak since the profiling began

    `memory_events.json` in `output_dir` is complete after every event, whatever ends the process. `trace=True` runs
    torch.profiler too (see `setup_profiler`; call `step()` once per iteration), which disturbs the memory it observes.
    """

    def __init__(self, config_name: str, output_dir: str | Path, *, trace: bool = False) -> None:
        self.config_name = config_name
        self.output_dir = Path(output_dir)
        self.memory_tracker = MemoryTracker(self.output_dir)
        self.events: list[dict[str, Any]] = []
        self.profiler: torch.profiler.profile | None = None
        self._trace = trace
        self._log = EventLog(self.output_dir / "memory_events.json")
        self._recorder = Recorder(self.memory_tracker.meter, None, None)
        self._highest = Memory(0, 0, None)
        self._running = False

    @property
    def stages(self) -> list[Span]:
        """The finished stages, nested ones as children."""
        return self._recorder.spans

    def start_profiling(self) -> None:
        if self._running:
            return
        meter = self.memory_tracker.meter
        if isinstance(meter, CpuMeter):
            meter.__enter__()
        meter.reset_peak()
        self._highest = Memory(0, 0, None)
        if self._trace:
            self.profiler = setup_profiler(str(self.output_dir))
            self.profiler.start()
        self._running = True

    def allocated_bytes(self) -> int:
        """Bytes in live tensors now: give it as `base_memory` to a later event."""
        return self.memory_tracker.read().allocated_bytes

    def log_event(self, event_name: str, metadata: dict[str, Any] | None = None) -> None:
        """With `base_memory` in the metadata: allocated memory over it. Without: the peak since `start_profiling`."""
        tracker = self.memory_tracker
        tracker.meter.synchronize()
        if metadata and "base_memory" in metadata:
            memory = tracker.read()
        else:
            memory = self._highest = self._highest.highest(tracker.peak())
        self.events.append(self._log.log(event_name, memory, metadata))

    @contextmanager
    def stage(self, name: str, metadata: dict[str, Any] | None = None) -> Iterator[Span]:
        """Logs the stage's own peak with start and activation memory in the metadata. Stages may be nested.

        On CUDA this resets PyTorch's peak counter at both ends; `log_event` alone never does.
        """
        self._highest = self._highest.highest(self.memory_tracker.meter.peak())
        recording = self._recorder.span(name, kind="stage")
        span = recording.__enter__()
        try:
            yield span
        finally:  # the exception of a failed stage passes the recorder by, which would keep the span open
            recording.__exit__(None, None, None)
            self._note_stage(span, metadata)

    def _note_stage(self, span: Span, metadata: dict[str, Any] | None) -> None:
        self._highest = self._highest.highest(span.peak)
        figures = {"start_bytes": span.start.allocated_bytes, "activation_bytes": span.activation_bytes}
        self.events.append(self._log.log(span.name, span.peak, {**(metadata or {}), **figures}))

    def step(self) -> None:
        """One iteration is over: advances the trace's schedule, if there is a trace."""
        if self.profiler is not None:
            self.profiler.step()

    def stop_profiling(self) -> None:
        if not self._running:
            return
        self._running = False
        try:
            if self.profiler is not None:
                self.profiler.stop()
        finally:
            self.profiler = None
            meter = self.memory_tracker.meter
            if isinstance(meter, CpuMeter):
                meter.__exit__(None, None, None)
        self.memory_tracker.save_logs()
        self.save_events()

    def save_events(self) -> Path:
        """The events are on disk already; this gives the file back."""
        self._log.close()
        return self._log.path

    def __enter__(self) -> MemoryProfiler:
        self.start_profiling()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_profiling()
