"""NVML's figures of one GPU: asking them creates no CUDA context, which takes 0.5 GiB and makes PyTorch read its settings. No torch."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from wanvram.errors import DeviceError
from wanvram.machine.launched import launched

__all__ = ["Gpu", "first_gpu", "first_visible"]


@dataclass(frozen=True)
class Gpu:
    """One GPU by its NVML handle."""

    _nvml: Any
    _handle: Any

    @property
    def name(self) -> str:
        name = self._nvml.nvmlDeviceGetName(self._handle)
        return name.decode() if isinstance(name, bytes) else str(name)  # bytes before nvidia-ml-py 11.515

    @property
    def uuid(self) -> str:
        return str(self._nvml.nvmlDeviceGetUUID(self._handle))

    @property
    def driver(self) -> str:
        version = self._nvml.nvmlSystemGetDriverVersion()
        return version.decode() if isinstance(version, bytes) else str(version)

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes."""
        memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        return int(memory.free), int(memory.total)

    def used_bytes(self) -> int:
        """Of the whole GPU, by everybody and by the driver itself."""
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def process_bytes(self) -> int | None:
        """What the driver charges to this process; None where it does not tell processes apart, as in most containers."""
        with suppress(self._nvml.NVMLError):
            for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle):
                if process.pid == os.getpid() and process.usedGpuMemory:
                    return int(process.usedGpuMemory)
        return None


def first_gpu() -> Gpu:
    """CUDA's device 0, whatever CUDA_VISIBLE_DEVICES says; of a run on several GPUs this process's own. Raises DeviceError without
    a driver or a visible GPU."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return Gpu(pynvml, first_visible(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"), launched().local_rank))
    except pynvml.NVMLError as error:
        raise DeviceError(f"no NVIDIA GPU answers here ({error}); state the memory, for example --vram 8GiB") from error


def first_visible(nvml: Any, visible: str | None, number: int = 0) -> Any:
    """The first, or with a number another one, of those that CUDA sees; NVML itself counts every card."""
    if visible is None:
        return nvml.nvmlDeviceGetHandleByIndex(number)
    first = [*visible.split(","), *[""] * number][number].strip()
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
