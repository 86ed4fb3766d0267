"""torch.profiler traces and allocator snapshots: they disturb what they measure, so a run makes them in a pass of its own."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from wanvram.output_files import whole_file

__all__ = ["CYCLE_STEPS", "allocator_snapshot", "setup_profiler", "trace_settings"]

WAIT, WARMUP, ACTIVE = 1, 1, 3
CYCLE_STEPS = WAIT + WARMUP + ACTIVE  # after which a trace is written


def setup_profiler(log_dir: str) -> torch.profiler.profile:
    """Waits one step, warms up one, records three with shapes, memory and stacks; for TensorBoard, into `log_dir`."""
    return torch.profiler.profile(**trace_settings(log_dir))


def trace_settings(log_dir: str) -> dict[str, Any]:
    """Arguments of torch.profiler.profile: the specification's, with traces that are written whole or not at all."""
    activities, cuda = [torch.profiler.ProfilerActivity.CPU], torch.profiler.ProfilerActivity.CUDA
    # Not where a card is simulated on a machine without one: a warning of 40 lines for every operation.
    if torch.cuda.is_available() and cuda in torch.profiler.supported_activities():
        activities.append(cuda)
    return {
        "activities": activities,
        "schedule": torch.profiler.schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE),
        "on_trace_ready": _whole_trace_handler(Path(log_dir)),
        "record_shapes": True,
        "profile_memory": True,
        "with_stack": True,
    }


def _whole_trace_handler(folder: Path) -> Callable[[torch.profiler.profile], None]:
    """torch.profiler.tensorboard_trace_handler writes for seconds under the name that TensorBoard looks for; this one renames.

    Raises OSError, after which there is no file.
    """

    def ready(profile: torch.profiler.profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".trace-", dir=folder) as beside:
            torch.profiler.tensorboard_trace_handler(beside)(profile)
            written = list(Path(beside).iterdir())
            if not written or not all(map(_ends_as_json, written)):  # torch says so on stderr alone
                raise OSError("torch.profiler could not write it whole; is the disk full?")
            for path in written:
                os.replace(path, folder / path.name)

    return ready


def _ends_as_json(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64))
        return file.read().rstrip().endswith(b"}")


@contextmanager
def allocator_snapshot(path: Path) -> Iterator[None]:
    """Records the CUDA allocator's full history inside and writes it for PyTorch's memory_viz (pickle protocol 4).

    Raises OSError when it cannot be written; there is then no file.
    """
    torch.cuda.memory._record_memory_history(max_entries=1_000_000, stacks="python")
    try:
        yield
    finally:
        snapshot = torch.cuda.memory._snapshot()
        torch.cuda.memory._record_memory_history(None)
        with whole_file(path) as beside, beside.open("wb") as file:
            pickle.dump(snapshot, file, protocol=4)
