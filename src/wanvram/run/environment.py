"""What a figure depends on beside the configuration: versions, GPU, driver, allocator settings, host."""

from __future__ import annotations

import os
import platform
from typing import Any

import psutil
import torch

from wanvram.errors import DeviceError
from wanvram.version import __version__

__all__ = ["cuda_usable", "describe_environment", "free_device_bytes"]


def describe_environment() -> dict[str, Any]:
    """Plain JSON values; keys of CUDA are absent without a GPU."""
    memory = psutil.virtual_memory()
    result: dict[str, Any] = {
        "wanvram": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "host_memory_bytes": memory.total,
        "host_available_bytes": memory.available,
        "allocator": {
            name: os.environ.get(name, "")
            for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
            if name in os.environ
        },
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        result |= {
            "gpu": properties.name,
            "gpu_total_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver_version(),
        }
    return result


def free_device_bytes() -> tuple[int, int, str]:
    """(free, total, name) of the first CUDA device. Raises DeviceError without one.

    Asked through NVML, because asking CUDA would create the context, which takes 0.5 GiB of what is to be planned.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = _first_visible(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return int(memory.free), int(memory.total), str(pynvml.nvmlDeviceGetName(handle))
    except pynvml.NVMLError as error:
        raise DeviceError(f"no NVIDIA GPU answers here ({error}); state the memory, for example --vram 8GiB") from error


def _first_visible(nvml: Any, visible: str | None) -> Any:
    """NVML's handle of CUDA's device 0; NVML itself counts every card, whatever CUDA_VISIBLE_DEVICES says."""
    if visible is None:
        return nvml.nvmlDeviceGetHandleByIndex(0)
    first = visible.split(",")[0].strip()
    if first.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(first)
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    if first.startswith("GPU-"):
        found = [handle for handle in handles if str(nvml.nvmlDeviceGetUUID(handle)).startswith(first)]
    else:
        # NVML counts in the order of the bus; CUDA's own default, fastest first, differs only among unlike cards.
        found = handles[int(first) :][:1] if first.isascii() and first.isdigit() else []
    if len(found) != 1:
        raise DeviceError(
            f"CUDA_VISIBLE_DEVICES is '{visible}', which shows none of the {len(handles)} GPUs here; change or unset it, or state "
            "the memory, for example --vram 8GiB"
        )
    return found[0]


def cuda_usable() -> bool:
    """Whether `auto` is CUDA here."""
    return bool(torch.cuda.is_available())


def _driver_version() -> str | None:
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None
