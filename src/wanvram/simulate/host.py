"""The machine around the card: what its processor, memory and disk take of a run's time. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["HOST", "FirstUse", "Host", "Reading"]


@dataclass(frozen=True)
class FirstUse:
    """Seconds that the first operation of a library costs a process beyond its own work: modules loaded, plans made.

    cold: kernels have never been compiled on this machine; warm: they lie in the caches on its disk.
    """

    cold: float
    warm: float


@dataclass(frozen=True)
class Reading:
    """Bytes of checkpoint files in the page cache per second, by where they go.

    taken: into memory just taken, as weights are loaded; used: into buffers written before, as they are streamed.
    """

    taken: float
    used: float


_FIRST_USE = {
    "kernels": FirstUse(0.1, 0.1),
    "cublas": FirstUse(0.2, 0.2),
    "attention": FirstUse(2.2, 0.25),
    "fa4": FirstUse(2.9, 0.1),  # compiling one kernel (h200.md), reading it; start_seconds holds the import
    "cudnn": FirstUse(0.25, 0.25),
    "triton": FirstUse(6.9, 0.95),
}


@dataclass(frozen=True)
class Host:
    """Bytes, pixels and operations per second, seconds for what happens once per process.

    Those of the H200's machine, 16 cores of a virtual machine, 2026-11-24 and 2026-11-28; from pin_bytes on by
    benchmarks/probe_driver.py, and runs of 1.3B and 14B through the command.
    """

    pageable_bytes: float = 9.1e9  # between pageable RAM and device, measured; never faster than the card's link
    copy_bytes: float = 10e9  # from RAM to RAM, in a thread beside the computation: an assumption (one thread's memcpy)
    # Checkpoint files that are not in the page cache: 40 GB from a virtual disk; between 0.7 and 4 GB/s on five machines of one kind.
    disk_bytes: float = 1.7e9
    # Those that are, as they are, and into another type of number: 11 and 28.6 GB loaded and streamed by 8 threads
    # (benchmarks/2026-11-28_h200_wall_clock_4.json).
    plain: Reading = Reading(taken=6.0e9, used=8.0e9)
    converted: Reading = Reading(taken=3.9e9, used=6.5e9)
    # Components that are converted: bytes in the checkpoint's files per byte of the run.
    stored: Mapping[str, float] = field(default_factory=dict)
    cached_share: float = 0.0  # of the checkpoint's bytes
    page_cache_bytes: float = 0.0  # RAM that file pages may keep between two passes of streamed weights
    pin_bytes: float = 14.3e9  # taking zeroed RAM and pinning it
    unpin_bytes: float = 32.5e9
    flops: float = 3e12  # bf16 products on the CPU; this and the next follow from T5 there (2.0 s for two prompts)
    memory_bytes: float = 20e9  # read and written by operations on the CPU
    # H.264 of noise, which random weights make; what people film is two to three times as fast.
    encode_pixels: float = 11.5e6
    operation_us: float = 3.6  # one smallest operation of PyTorch: how fast Python and the processor issue work
    start_seconds: float = 5.3  # from the command to the first stage: Python, PyTorch, flash-attn-4, the CUDA context
    context_seconds: float = 0.9  # of these, looking at the machine and making the CUDA context, which follow a plan
    end_seconds: float = 0.6  # from the last stage to the end of the process
    first_use: Mapping[str, FirstUse] = field(default_factory=lambda: _FIRST_USE)


HOST = Host()
