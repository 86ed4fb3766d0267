"""A simulated card for a configuration: the allocator, the libraries and the limits of the GPU it names."""

from __future__ import annotations

from wanvram.config import RunConfig
from wanvram.errors import InputError
from wanvram.machine.driver import LATER_BYTES
from wanvram.planner.budget import usable_memory
from wanvram.run.host import clock_of
from wanvram.simulate.allocator import AllocatorSettings, CachingAllocator
from wanvram.simulate.buffers import LibraryBuffers
from wanvram.simulate.gpus import DEFAULT_GPU, GPU, find_gpu
from wanvram.simulate.libraries import Libraries
from wanvram.simulate.memory import SimulatedMemory

__all__ = ["simulated_memory"]

UNLIMITED_BYTES = 2**50


def simulated_memory(config: RunConfig, *, keep_events: bool = False, unlimited: bool = False) -> SimulatedMemory:
    """Raises InputError for an unknown GPU, or one that cannot compute in the precision.

    unlimited: a card of 1 PiB and no cap, to learn what a run would take.
    """
    gpu: GPU = find_gpu(config.gpu or DEFAULT_GPU)
    if config.strategy.precision == "bf16" and gpu.compute_capability < (8, 0):
        raise InputError(
            f"precision: bf16 has no fast attention on {gpu.name} (compute capability under 8.0); use fp16"
        )
    settings = AllocatorSettings(expandable_segments=config.strategy.expandable_segments)
    outside = gpu.context_bytes + sum(gpu.module_bytes.values())
    # A card with more memory than its name had: what is stated counts.
    stated = usable_memory(config.memory_limit_bytes or 0, gpu)
    usable = UNLIMITED_BYTES if unlimited else max(gpu.total_bytes, stated) - outside
    capped = config.memory_limit_bytes is not None and not unlimited
    limit = max(0, (config.memory_limit_bytes or 0) - outside - LATER_BYTES) if capped else None
    allocator = CachingAllocator(settings, total_bytes=usable, limit_bytes=limit)
    buffers = LibraryBuffers(gpu, Libraries(gpu))
    return SimulatedMemory(gpu, allocator, buffers, clock=clock_of(config, gpu), keep_events=keep_events)
