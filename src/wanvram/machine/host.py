"""The host: its RAM, how fast it issues work, how long this process has run. No torch before its speed is asked for."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

import psutil

__all__ = ["available_ram_bytes", "operation_us", "since_process_start", "total_ram_bytes"]

MEASURED_SECONDS = 0.2  # a shared processor is slow now and then: the fastest of many short rounds is its own speed


@cache
def operation_us() -> float:
    """Microseconds of one smallest operation of PyTorch on the CPU: how fast this host issues work, also to a GPU."""
    import torch

    x, fastest = torch.zeros(1), float("inf")
    end = time.perf_counter() + MEASURED_SECONDS
    while (start := time.perf_counter()) < end:
        for _ in range(200):
            x.add_(1.0)
        fastest = min(fastest, time.perf_counter() - start)
    return round(fastest / 200 * 1e6, 2)


def since_process_start(pid: int | None = None) -> float:
    """Seconds; imports and a plan made before the run are in it. pid: another process than this one."""
    return time.time() - float(psutil.Process(pid).create_time())


# Limit, use and the statistics' name of file pages that the kernel takes back before it kills: cgroup v2, then v1.
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def available_ram_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Host memory that can be used without swapping; what a container's limit leaves beside its use counts."""
    available = int(psutil.virtual_memory().available)
    for limit_file, use_file, statistics_file, reclaimable in _CGROUPS:
        limit = _text(cgroup / limit_file).strip()
        if not limit.isdigit():
            continue
        use = _text(cgroup / use_file).strip()
        statistics = dict(line.split() for line in _text(cgroup / statistics_file).splitlines() if line.count(" ") == 1)
        used = (int(use) if use.isdigit() else 0) - int(statistics.get(reclaimable, 0))
        available = min(available, max(0, int(limit) - max(0, used)))
    return available


def total_ram_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Host memory of the machine, or a container's limit if that is less."""
    limits = [_text(cgroup / limit_file).strip() for limit_file, *_ in _CGROUPS]
    return min([int(psutil.virtual_memory().total), *(int(limit) for limit in limits if limit.isdigit())])


def _text(path: Path) -> str:
    """What a file of the system says; nothing where it does not exist."""
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
