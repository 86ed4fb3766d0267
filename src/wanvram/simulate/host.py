"""The machine around the card: what its processor, memory and disk take of a run's time. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Host:
    """Bytes, pixels and operations per second, seconds for what happens once per process."""

    pageable_bytes: float  # between pageable RAM and device; never faster than the card's link
    copy_bytes: float  # from RAM to RAM, in a thread beside the computation
    disk_bytes: float  # checkpoint files that are not in the page cache
    plain: Reading  # those that are, as they are
    converted: Reading  # and into another type of number
    stored: Mapping[str, float]  # components that are converted: bytes in the checkpoint's files per byte of the run
    cached_share: float  # of the checkpoint's bytes
    page_cache_bytes: float  # RAM that file pages may keep between two passes of streamed weights
    pin_bytes: float  # taking zeroed RAM and pinning it
    unpin_bytes: float
    flops: float  # bf16 products on the CPU
    memory_bytes: float  # read and written by operations on the CPU
    encode_pixels: float  # H.264 of noise, which random weights make; what people film is two to three times as fast
    operation_us: float  # one smallest operation of PyTorch: how fast Python and the processor issue work
    start_seconds: float  # from the command to the first stage: Python, PyTorch, the CUDA context
    context_seconds: float  # of these, looking at the machine and making the CUDA context, which follow a plan
    end_seconds: float  # from the last stage to the end of the process
    first_use: dict[str, FirstUse]


# The H200's machine, 16 cores of a virtual machine, 2026-11-24 and 2026-11-28. pageable_bytes is measured, flops and memory_bytes
# follow from T5 on the CPU (2.0 s for two prompts). copy_bytes (one thread's memcpy) is an assumption.
# disk_bytes: 40 GB from a virtual disk; between 0.7 and 4 GB/s on five machines of one kind. plain, converted: 11 and 28.6 GB loaded
# and streamed from the page cache by 8 threads (benchmarks/2026-11-28_h200_wall_clock_4.json).
# pin_bytes and below: benchmarks/probe_driver.py, and runs of 1.3B and 14B through the command.
HOST = Host(
    pageable_bytes=9.1e9,
    copy_bytes=10e9,
    disk_bytes=1.7e9,
    plain=Reading(taken=6.0e9, used=8.0e9),
    converted=Reading(taken=3.9e9, used=6.5e9),
    stored={},
    cached_share=0.0,
    page_cache_bytes=0.0,
    pin_bytes=14.3e9,
    unpin_bytes=32.5e9,
    flops=3e12,
    memory_bytes=20e9,
    encode_pixels=11.5e6,
    operation_us=3.6,
    start_seconds=5.3,
    context_seconds=0.9,
    end_seconds=0.6,
    first_use={
        "kernels": FirstUse(0.1, 0.1),
        "cublas": FirstUse(0.2, 0.2),
        "attention": FirstUse(2.2, 0.25),
        "fa4": FirstUse(4.4, 1.5),  # compiling one kernel takes 2.9 s (h200.md); importing its compiler is an estimate
        "cudnn": FirstUse(0.25, 0.25),
        "triton": FirstUse(6.9, 0.95),
    },
)
