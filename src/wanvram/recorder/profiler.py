"""MemoryProfiler and MemoryTracker: the recorder's public face for anybody's PyTorch code, on CUDA and on CPU."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from wanvram.record import Memory, write_atomically
from wanvram.recorder.events import EventLog
from wanvram.recorder.meters import CpuMeter, CudaMeter
from wanvram.recorder.tracing import setup_profiler

__all__ = ["MemoryProfiler", "MemoryTracker"]


class MemoryTracker:
    """Reads memory and writes `memory_log.json`: one line per reading. CUDA if there is a GPU, else counted CPU tensors."""

    def __init__(self, output_dir: str | Path) -> None:
        self.output_dir = Path(output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.meter = CudaMeter() if torch.cuda.is_available() else CpuMeter()
        self.readings: list[dict[str, int | None]] = []

    def read(self) -> Memory:
        return self._note(self.meter.read())

    def peak(self) -> Memory:
        return self._note(self.meter.peak())

    def _note(self, memory: Memory) -> Memory:
        self.readings.append({"allocated_bytes": memory.allocated_bytes, "reserved_bytes": memory.reserved_bytes})
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
    ...     profiler.log_event("model_load", {"base_memory": base})
    ...     model(x)
    ...     profiler.log_event("forward")

    `memory_events.json` in `output_dir` is complete after every event, whatever ends the process. `trace=True` also runs
    torch.profiler (see `setup_profiler`; call `step()` once per iteration), which disturbs the memory it observes.
    """

    def __init__(self, config_name: str, output_dir: str | Path, *, trace: bool = False) -> None:
        self.config_name = config_name
        self.output_dir = Path(output_dir)
        self.memory_tracker = MemoryTracker(self.output_dir)
        self.events: list[dict[str, Any]] = []
        self.profiler: Any = None
        self._trace = trace
        self._log = EventLog(self.output_dir / "memory_events.json")
        self._running = False

    def start_profiling(self) -> None:
        meter = self.memory_tracker.meter
        if isinstance(meter, CpuMeter):
            meter.__enter__()
        meter.reset_peak()
        if self._trace:
            self.profiler = setup_profiler(str(self.output_dir))
            self.profiler.start()
        self._running = True

    def allocated_bytes(self) -> int:
        """Bytes in live tensors now: give it as `base_memory` to a later event."""
        return self.memory_tracker.read().allocated_bytes

    def log_event(self, event_name: str, metadata: dict[str, Any] | None = None) -> None:
        """With `base_memory` in the metadata: the increment of allocated memory over it. Without: the peak since the last event."""
        incremental = bool(metadata and "base_memory" in metadata)
        tracker = self.memory_tracker
        tracker.meter.synchronize()
        memory = tracker.read() if incremental else tracker.peak()
        self.events.append(self._log.log(event_name, memory, metadata))
        tracker.meter.reset_peak()

    def step(self) -> None:
        """One iteration is over: advances the trace's schedule, if there is a trace."""
        if self.profiler is not None:
            self.profiler.step()

    def stop_profiling(self) -> None:
        if not self._running:
            return
        self._running = False
        if self.profiler is not None:
            self.profiler.stop()
        meter = self.memory_tracker.meter
        if isinstance(meter, CpuMeter):
            meter.__exit__(None, None, None)
        self.memory_tracker.save_logs()
        self.save_events()

    def save_events(self) -> Path:
        """The events are on disk already; this closes the file."""
        self._log.close()
        return self._log.path

    def __enter__(self) -> MemoryProfiler:
        self.start_profiling()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop_profiling()
