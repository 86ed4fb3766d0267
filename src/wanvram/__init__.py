"""GPU memory of Wan2.1 video generation: predicted before it runs, made to fit, proved by measurement.

The profiler classes load torch only when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wanvram.version import __version__

if TYPE_CHECKING:
    from wanvram.foreign.session import simulated_gpu
    from wanvram.recorder.profiler import MemoryProfiler, MemoryTracker
    from wanvram.recorder.tracing import setup_profiler

__all__ = ["MemoryProfiler", "MemoryTracker", "__version__", "setup_profiler", "simulated_gpu"]


def __getattr__(name: str) -> Any:
    if name in ("MemoryProfiler", "MemoryTracker"):
        from wanvram.recorder import profiler

        return getattr(profiler, name)
    if name == "setup_profiler":
        from wanvram.recorder.tracing import setup_profiler

        return setup_profiler
    if name == "simulated_gpu":
        from wanvram.foreign.session import simulated_gpu

        return simulated_gpu
    raise AttributeError(f"module 'wanvram' has no attribute '{name}'")
