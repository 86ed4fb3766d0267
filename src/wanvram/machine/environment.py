"""What a figure depends on beside the configuration: versions, GPU, driver, allocator settings, host."""

from __future__ import annotations

import os
import platform
from typing import Any

import psutil
import torch

from wanvram.errors import DeviceError
from wanvram.machine import allocator_settings
from wanvram.machine.launched import launched
from wanvram.machine.nvml import first_gpu
from wanvram.version import __version__, commit

__all__ = ["cuda_usable", "describe_environment"]


def describe_environment() -> dict[str, Any]:
    """Plain JSON values; keys of CUDA are absent without a GPU."""
    memory = psutil.virtual_memory()
    result: dict[str, Any] = {
        "wanvram": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "host_memory_bytes": memory.total,
        "host_available_bytes": memory.available,
        "allocator": {name: os.environ[name] for name in allocator_settings.NAMES if name in os.environ},
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(launched().local_rank)
        result |= {
            "gpu": properties.name,
            "gpu_total_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver_version(),
        }
    return result


def cuda_usable() -> bool:
    """Whether `auto` is CUDA here."""
    return bool(torch.cuda.is_available())


def _driver_version() -> str | None:
    try:
        return first_gpu().driver
    except DeviceError:
        return None
