"""What would falsify a measurement here: who else uses the GPU, its clocks, settings of the environment, a busy host.

Only looks: ends no process, changes no setting, and asks the driver (NVML) instead of CUDA, whose context takes about 0.5 GiB.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pynvml
import torch

from wanvram.errors import InputError
from wanvram.machine.host import available_ram_bytes, operation_us
from wanvram.units import GIB, MIB, human

__all__ = ["own_gpu_process", "run_checks", "warm_up"]

LEAST_FREE_DISK = 5 * GIB  # a trace of three steps takes 1 to 2 GiB
LEAST_FREE_RAM_SHARE = 0.1
BUSY_PERCENT = 10
# Hosts of 6 us took up to 4 times what the clock says for small tiles (benchmarks/*_h100_tiled_vae.json).
SLOW_OPERATION_US = 4.0
OTHERS_BYTES = 64 * MIB  # less is what a driver keeps for itself
# nvml.h, nvmlClocksThrottleReason*: what slows the GPU down beyond idling and the clocks somebody chose.
_SLOWED = {0x04: "power cap", 0x08: "hardware slowdown", 0x20: "temperature", 0x40: "temperature", 0x80: "power brake"}
_VARIABLES = {
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "turns the allocator's cache off: reserved memory and times are not those of a normal run",
    "CUDA_LAUNCH_BLOCKING": "makes every kernel wait: times are not those of a normal run",
    "CUBLAS_WORKSPACE_CONFIG": "changes cuBLAS's workspace: device memory is not what is predicted",
    "NVIDIA_TF32_OVERRIDE": "changes the precision of matrix products, and so times and results",
    "PYTORCH_CUDA_ALLOC_CONF": None,
    "PYTORCH_ALLOC_CONF": None,
    "CUDA_VISIBLE_DEVICES": None,
}
_ALLOCATOR_OPTIONS = ("backend:cudaMallocAsync", "max_split_size_mb", "garbage_collection_threshold", "roundup_power2")


def run_checks(directory: Path | None = None, nvml: Any = pynvml) -> dict[str, Any]:
    """Plain JSON values; `warnings` says in sentences what would falsify a measurement.

    directory: whose disk is looked at, default the current one. nvml: the driver's library.
    """
    driver, gpus = _gpus(nvml)
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cuda_usable": torch.cuda.is_available(),
        "driver": driver,
        "gpus": gpus,
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "host": _host(directory or Path.cwd()),
    }
    return result | {"warnings": [*_gpu_warnings(result), *_variable_warnings(), *_host_warnings(result["host"])]}


# --- GPUs ----------------------------------------------------------------------------------------------------------------


def _gpus(nvml: Any) -> tuple[str | None, list[dict[str, Any]]]:
    """(version of the driver, every GPU it knows); (None, []) without one."""
    try:
        nvml.nvmlInit()
        driver = str(nvml.nvmlSystemGetDriverVersion())
        return driver, [_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError:
        return None, []


def _gpu(nvml: Any, index: int) -> dict[str, Any]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)

    def asked(question: str, *arguments: Any) -> Any:
        """The answer, None where this GPU has none."""
        try:
            return getattr(nvml, question)(handle, *arguments)
        except (nvml.NVMLError, AttributeError):
            return None

    utilization = asked("nvmlDeviceGetUtilizationRates")
    reasons = asked("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
    return {
        "index": index,
        "name": str(nvml.nvmlDeviceGetName(handle)),
        "total_bytes": int(memory.total),
        "free_bytes": int(memory.free),
        "used_bytes": int(memory.used),
        "utilization_percent": None if utilization is None else int(utilization.gpu),
        "temperature_c": asked("nvmlDeviceGetTemperature", 0),
        "sm_clock_mhz": asked("nvmlDeviceGetClockInfo", 1),
        "max_sm_clock_mhz": asked("nvmlDeviceGetMaxClockInfo", 1),
        "slowed_by": sorted({name for bit, name in _SLOWED.items() if reasons & bit}),
        "processes": _processes(asked, index),
    }


def _processes(asked: Any, gpu: int) -> list[dict[str, Any]]:
    """used_bytes None: the driver does not tell, as in most containers. own: of this user."""
    found: dict[int, dict[str, Any]] = {}
    for question in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
        for process in asked(question) or ():
            pid, used = int(process.pid), process.usedGpuMemory
            name, user, own = _described(pid)
            used = None if used is None else int(used)
            about = {"pid": pid, "gpu": gpu, "name": name, "user": user, "used_bytes": used, "own": own}
            found.setdefault(pid, about)
    return list(found.values())


def _described(pid: int) -> tuple[str, str | None, bool]:
    """(name, user, whether it is this user's). A container may not see the processes of others."""
    name, user, own = "(not visible from here)", None, False
    with suppress(psutil.Error, KeyError):
        process = psutil.Process(pid)
        name = "".join(c if c.isprintable() else "?" for c in process.name())
        user = process.username()
        own = user == psutil.Process().username()
    return name, user, own


def _gpu_warnings(checks: dict[str, Any]) -> list[str]:
    gpus, result = checks["gpus"], []
    if not gpus:
        return ["no NVIDIA GPU answers: nothing can be measured here; --device simulated predicts instead"]
    if not checks["cuda_usable"]:
        result.append(
            f"torch {checks['torch']} cannot use the GPU (built for CUDA {checks['cuda']}, driver {checks['driver']})"
        )
    for gpu in gpus:
        name = f"GPU {gpu['index']}"
        others = [process for process in gpu["processes"] if process["pid"] != os.getpid()]
        for process in others:
            used = "an unknown amount" if process["used_bytes"] is None else human(process["used_bytes"])
            result.append(f"{name} is also used by process {process['pid']} ({process['name']}, {used})")
        if not gpu["processes"] and gpu["used_bytes"] > gpu["total_bytes"] * 0.02 + OTHERS_BYTES:
            result.append(f"{name} has {human(gpu['used_bytes'])} in use by processes that are not visible from here")
        if (gpu["utilization_percent"] or 0) > BUSY_PERCENT and others:
            result.append(f"{name} is busy ({gpu['utilization_percent']} %): times will be too long")
        if gpu["slowed_by"]:
            result.append(f"{name} is slowed down by {' and '.join(gpu['slowed_by'])}: times will be too long")
    if len(gpus) > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ:
        result.append(f"{len(gpus)} GPUs are visible; the first of CUDA is measured (CUDA_VISIBLE_DEVICES chooses)")
    return result


# --- environment and host ------------------------------------------------------------------------------------------------


def _variable_warnings() -> list[str]:
    result = []
    for name, effect in _VARIABLES.items():
        value = os.environ.get(name, "")
        off = "" if name == "NVIDIA_TF32_OVERRIDE" else "0"  # whose 0 forbids TF32
        if effect is not None and value not in ("", off):
            result.append(f"{name}={value} {effect}")
        options = _ALLOCATOR_OPTIONS if "ALLOC_CONF" in name else ()
        effect = "reserved memory is not what is predicted for the default allocator"
        result += [f"{name} sets {option}: {effect}" for option in options if option in value]
    return result


def _host(directory: Path) -> dict[str, Any]:
    place = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    return {
        "ram_total_bytes": psutil.virtual_memory().total,
        "ram_available_bytes": available_ram_bytes(),
        "disk": str(place),
        "disk_free_bytes": shutil.disk_usage(place).free,
        "cpu_count": os.cpu_count(),
        "load_average": psutil.getloadavg()[0],
        "operation_us": operation_us(),
    }


def _host_warnings(host: dict[str, Any]) -> list[str]:
    result = []
    if host["ram_available_bytes"] < LEAST_FREE_RAM_SHARE * host["ram_total_bytes"]:
        result.append(f"only {human(host['ram_available_bytes'])} of host RAM are free: weights may be swapped out")
    if host["disk_free_bytes"] < LEAST_FREE_DISK:
        result.append(f"only {human(host['disk_free_bytes'])} are free on the disk of {host['disk']}")
    cores = host["cpu_count"] or 1
    if host["load_average"] > cores:
        load = f"{host['load_average']:.1f} processes wait for {cores} CPU cores"
        result.append(f"the host is busy ({load}): loading and launching kernels take longer")
    if host["operation_us"] > SLOW_OPERATION_US:
        cost = f"{host['operation_us']:.1f} us an operation"
        result.append(f"the host issues work slowly ({cost}): small tiles and short videos take longer than predicted")
    return result


# --- what `wanvram check` does beyond looking ----------------------------------------------------------------------------


def warm_up(duration: float = 1.0) -> dict[str, Any] | None:
    """Matrix products for `duration` seconds, so that the GPU's clocks are those of work; None without CUDA.

    Creates the CUDA context of this process: for the check alone, never before a measurement in the same process.
    """
    if not torch.cuda.is_available():
        return None
    before = _first_clock()
    matrix = torch.ones(4096, 4096, dtype=torch.float16, device="cuda")
    end = time.monotonic() + duration
    while time.monotonic() < end:
        torch.mm(matrix, matrix)
        torch.cuda.synchronize()
    after = _first_clock()
    del matrix
    torch.cuda.empty_cache()
    return {"seconds": duration, "sm_clock_before_mhz": before, "sm_clock_after_mhz": after}


def _first_clock() -> int | None:
    with suppress(Exception):  # of torch.cuda without NVML, in several ways
        return int(torch.cuda.clock_rate())
    return None


def own_gpu_process(pid: int, checks: dict[str, Any]) -> dict[str, Any]:
    """The process, if it uses a GPU and belongs to this user. Raises InputError that says why it may not be ended."""
    found = [process for gpu in checks["gpus"] for process in gpu["processes"] if process["pid"] == pid]
    if not found:
        raise InputError(f"--terminate {pid}: no process of that number uses a GPU here; nothing was ended")
    if pid in (os.getpid(), os.getppid()):
        raise InputError(f"--terminate {pid}: that is this command itself or what started it; nothing was ended")
    process: dict[str, Any] = found[0]
    if not process["own"]:
        owner = process["user"] or "another user"
        raise InputError(f"--terminate {pid}: it belongs to {owner}, not to you; nothing was ended")
    return process
