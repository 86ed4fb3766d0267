"""MemoryProfiler and MemoryTracker: the recorder's public face for anybody's PyTorch code, on CUDA and on CPU."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from wanvram.output_files import writing
from wanvram.record import write_atomically
from wanvram.recorder.event_file import claim
from wanvram.recorder.events import EventLog, ProcessLock, base_memory, warn
from wanvram.recorder.guest_profile import GuestProfile
from wanvram.recorder.meters import CpuMeter, CudaMeter, Meter
from wanvram.recorder.stages import OpenStage, Stages
from wanvram.spans import Memory, Span

__all__ = ["MemoryProfiler", "MemoryTracker"]


class MemoryTracker:
    """Reads memory and keeps the readings; `save_logs` writes them to `memory_log.json`, or the next number that is free.

    The current CUDA device if there is a GPU, else counted CPU tensors. A process forked from this one keeps readings and
    a file of its own; it cannot use CUDA, so there its memory is 0.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.output_dir = Path(output_dir).absolute()  # the program may change its directory
        with writing(self.output_dir):
            self.output_dir.mkdir(parents=True, exist_ok=True)
        self.meter: CudaMeter | CpuMeter
        if torch.cuda.is_available():
            self.meter = CudaMeter(torch.cuda.current_device(), poll=False)
        else:
            self.meter = CpuMeter(count_existing=True)
        self.readings: list[dict[str, int | None]] = []
        self._pid = self._readings_pid = os.getpid()
        self._paths: dict[int, Path] = {}
        self._lock = ProcessLock()

    def meter_here(self) -> Meter:
        """The meter, or in a forked process one that reads 0 where the meter would touch the parent's CUDA context."""
        if self._pid == os.getpid() or isinstance(self.meter, CpuMeter):
            return self.meter
        return _ForkedMeter()

    def read(self) -> Memory:
        """Now: allocated, reserved and what the driver says."""
        return self._note(self.meter_here().read())

    def peak(self) -> Memory:
        """Highest allocated and reserved since the meter's peak was last reset; the driver's figure is of now."""
        return self._note(self.meter_here().peak())

    def _note(self, memory: Memory) -> Memory:
        if memory.device_bytes is None:
            memory = replace(memory, device_bytes=self.meter_here().device_memory())
        with self._lock.here():
            if self._readings_pid != os.getpid():
                self.readings, self._readings_pid = [], os.getpid()
            self.readings.append(asdict(memory))
        return memory

    def save_logs(self) -> Path:
        """Raises OutputError. A forked process that read nothing writes nothing."""
        first = self.output_dir / "memory_log.json"
        with self._lock.here():
            pid = os.getpid()
            if self._readings_pid != pid:
                return self._paths.get(self._pid, first)
            with writing(first):
                path = self._paths[pid] = self._paths.get(pid) or claim(first, 1 if pid == self._pid else 2)
            write_atomically(path, json.dumps(self.readings, indent=1) + "\n")
            return path


class _ForkedMeter:
    """Of a process forked from one that uses CUDA: PyTorch refuses it the GPU, so it has no memory there."""

    device_name = "cuda"
    caches = False

    def read(self) -> Memory:
        return Memory(0, 0, None)

    peak = read

    def reset_peak(self) -> None:
        """There is no peak."""

    def device_memory(self) -> int | None:
        return None

    def synchronize(self) -> None:
        """Nothing runs."""

    def now(self, kind: str) -> float | None:
        return None

    def host(self) -> tuple[int, int]:
        return 0, 0


class MemoryProfiler:
    """Logs memory events of any PyTorch program.

    >>> with MemoryProfiler("my-model", "profiler_logs/my-model") as profiler:
    ...     base = profiler.allocated_bytes()
    ...     model = load()
    ...     profiler.log_event("model_load", {"base_memory": base})  # base memory: what the weights occupy
    ...     with profiler.stage("forward"):                          # activation memory: peak over the stage's start
    ...         model(x)
    ...     profiler.log_event("done")                               # peak since the profiling began

    `memory_events.json` in `output_dir` is complete after every event, whatever ends the process. Files that are there stay:
    a second profiler writes `memory_events-2.json`, and so does a process forked from this one that logs events.

    torch.profiler is started, too, with the schedule of `setup_profiler`: a program that calls `step()` once per iteration finds
    a trace of its third to fifth in `output_dir`, and then it is over; `trace=False` leaves it out. Cost: none until `step()` is
    called. Then about 2 s and 100 MiB of host RAM once, and for each 1,000 calls of a layer in the traced steps 0.05 s while they run,
    0.7 s when the trace is written, 150 MiB of host RAM meanwhile and 24 MiB of disk (2 cores, torch 2.13). Allocated and
    reserved bytes stay what they were; on CUDA `device_bytes` holds torch.profiler's own buffers from the first `step()` until the
    process ends, and events logged since have `"traced": true`. What goes wrong with it is a warning, and there is no trace: a
    torch.profiler of the program's own comes first, but should not begin while this one records. A process forked later has to end
    with `os._exit`, as those of multiprocessing do: PyTorch's own profiler hangs in another end.

    Any thread, asyncio task or generator may log events and be in stages. On the CPU, memory is counted in the thread that
    called `start_profiling`, because PyTorch's dispatch modes are per thread. An exception of the program always passes:
    what cannot be written while one is under way is a warning.
    """

    def __init__(self, config_name: str, output_dir: str | Path, *, trace: bool = True) -> None:
        self.config_name = config_name
        self.memory_tracker = MemoryTracker(output_dir)
        self.output_dir = self.memory_tracker.output_dir
        self.events: list[dict[str, Any]] = []
        self.profiler: GuestProfile | None = None
        self._trace = trace
        self._latest_trace: GuestProfile | None = None
        self._log = EventLog(self.output_dir / "memory_events.json", keep_existing=True)
        self._stages = Stages(self.memory_tracker.meter_here)
        self._lock = ProcessLock()
        self._running = False

    @property
    def stages(self) -> list[Span]:
        """The finished stages, nested ones as children."""
        return self._stages.spans

    def start_profiling(self) -> None:
        if self._running:
            return
        if self._trace:
            self.profiler = GuestProfile(str(self.output_dir))
            self.profiler.start()
            self._latest_trace = self.profiler
        if isinstance(self.memory_tracker.meter, CpuMeter):
            self.memory_tracker.meter.__enter__()
        self._stages.restart()
        self._running = True

    def allocated_bytes(self) -> int:
        """Bytes in live tensors now: give it as `base_memory` to a later event."""
        return self.memory_tracker.read().allocated_bytes

    def log_event(self, event_name: str, metadata: Any = None) -> None:
        """With `base_memory` in the metadata: allocated memory over it. Without: the peak since `start_profiling`.

        Raises OutputError if it cannot be written; while an exception is handled that is a warning.
        """
        with _passing(sys.exc_info()[1]):
            tracker = self.memory_tracker
            tracker.meter_here().synchronize()
            with self._lock.here():
                over_base = base_memory(metadata) is not None
                memory = tracker.read() if over_base else self._stages.seen(tracker.peak())
                self.events.append(self._log.log(event_name, memory, metadata, traced=self._traced))

    @contextmanager
    def stage(self, name: str, metadata: Any = None) -> Iterator[Span]:
        """Logs the stage's own peak with start and activation memory in the metadata. Stages may be nested.

        On CUDA this resets PyTorch's peak counter at both ends; `log_event` alone never does.
        """
        stage = self._stages.begin(name)
        try:
            yield stage.span
        except BaseException as error:
            with _passing(error):
                self._finish(stage, metadata)
            raise
        with _passing(sys.exc_info()[1]):
            self._finish(stage, metadata)

    def _finish(self, stage: OpenStage, metadata: Any) -> None:
        span = self._stages.end(stage)
        figures = {"start_bytes": span.start.allocated_bytes, "activation_bytes": span.activation_bytes}
        with self._lock.here():
            given = {**_as_mapping(metadata), **figures}
            self.events.append(self._log.log(span.name, span.peak, given, traced=self._traced))

    @property
    def _traced(self) -> bool:
        return self._latest_trace is not None and self._latest_trace.prepared

    def step(self) -> None:
        """One iteration is over: the second call begins the trace, the fifth writes it."""
        if self.profiler is not None:
            self.profiler.step()

    def stop_profiling(self) -> None:
        """Writes `memory_log.json`. Raises OutputError; while an exception is handled that is a warning."""
        if not self._running:
            return
        self._running = False
        with _passing(sys.exc_info()[1]):
            if self.profiler is not None:
                self.profiler.stop()
                self.profiler = None
            if isinstance(self.memory_tracker.meter, CpuMeter):
                self.memory_tracker.meter.__exit__(None, None, None)
            try:
                self.save_events()
            finally:
                self.memory_tracker.save_logs()

    def save_events(self) -> Path:
        """The events are on disk already; this gives the file back."""
        self._log.close()
        return self._log.path

    def __enter__(self) -> MemoryProfiler:
        self.start_profiling()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with _passing(error):
            self.stop_profiling()


@contextmanager
def _passing(under_way: BaseException | None) -> Iterator[None]:
    """What fails inside is a warning while the program's own exception is under way, which must not be replaced."""
    try:
        yield
    except Exception as error:
        if under_way is None:
            raise
        warn(f"wanvram's MemoryProfiler: {error}")


def _as_mapping(metadata: Any) -> Mapping[Any, Any]:
    if metadata is None:
        return {}
    try:
        return dict(metadata) if isinstance(metadata, Mapping) else {"metadata": metadata}
    except Exception:  # a class whose items raise
        return {"metadata": metadata}
