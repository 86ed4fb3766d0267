"""torch.profiler traces and allocator snapshots: off by default, because they disturb what they measure."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from wanvram.output_files import whole_file

__all__ = ["allocator_snapshot", "setup_profiler"]


def setup_profiler(log_dir: str) -> torch.profiler.profile:
    """Waits one step, warms up one, records three with shapes, memory and stacks; for TensorBoard, into `log_dir`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=3),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(log_dir),
        record_shapes=True,
        profile_memory=True,
        with_stack=True,
    )


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
