"""Why CUDA cannot be used here, and what would help: asked of PyTorch and of the driver (NVML), without a CUDA context."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

import pynvml
import torch

from wanvram.errors import DeviceError
from wanvram.machine.nvml import first_visible

__all__ = ["Obstacle", "require_gpu", "what_hides_the_gpu"]

INSTALL = "https://pytorch.org/get-started/locally"


@dataclass(frozen=True)
class Obstacle:
    """why: a clause without a full stop. remedy: a clause in the imperative."""

    why: str
    remedy: str


@dataclass(frozen=True)
class _Driver:
    """What NVML says. cuda: the newest CUDA it runs, (13, 0). hidden: by CUDA_VISIBLE_DEVICES, all of `count` GPUs."""

    version: str
    cuda: tuple[int, int]
    count: int
    hidden: bool


def require_gpu(undone: str) -> None:
    """DeviceError that begins with `undone`, what did not happen, unless CUDA can be used here."""
    obstacle = what_hides_the_gpu()
    if obstacle is not None:
        raise DeviceError(
            f"{undone}: {obstacle.why}; {obstacle.remedy}. `wanvram estimate` predicts memory and time without a GPU."
        )


def what_hides_the_gpu(nvml: Any = pynvml) -> Obstacle | None:
    """None where CUDA can be used. nvml: the driver's library."""
    with warnings.catch_warnings(record=True) as said:  # PyTorch says in a warning why it cannot
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    driver = _driver(nvml)
    built_for = torch.version.cuda
    if built_for is None:
        seen = "no NVIDIA driver answers here either" if driver is None else f"the driver sees {driver.count} GPU(s)"
        install = f"install the CUDA build of torch ({INSTALL})"
        return Obstacle(
            f"torch {torch.__version__} is a CPU build, which uses no GPU ({seen})",
            install if driver is not None else f"on a machine with an NVIDIA GPU and its driver {install}",
        )
    if driver is None:
        return Obstacle("no NVIDIA driver answers here", "install the driver of the GPU; `nvidia-smi` then lists it")
    if driver.count == 0:
        return Obstacle(f"the NVIDIA driver {driver.version} sees no GPU", "give this machine or container a GPU")
    if driver.hidden:
        shown = os.environ["CUDA_VISIBLE_DEVICES"]
        return Obstacle(
            f"CUDA_VISIBLE_DEVICES is '{shown}', which hides the {driver.count} GPU(s) here", "change or unset it"
        )
    if driver.cuda[0] < int(built_for.split(".")[0]):  # a driver runs every minor version of its major one
        runs = "{}.{}".format(*driver.cuda)
        return Obstacle(
            f"the NVIDIA driver {driver.version} is too old: it runs CUDA {runs}, torch {torch.__version__} is built for {built_for}",
            f"update the driver, or install the torch build for CUDA {driver.cuda[0]} ({INSTALL})",
        )
    reason = str(said[0].message).splitlines()[0] if said else "it does not say why"
    return Obstacle(f"torch {torch.__version__} cannot start CUDA ({reason})", "look at `wanvram check`")


def _driver(nvml: Any) -> _Driver | None:
    try:
        nvml.nvmlInit()
        version, number = str(nvml.nvmlSystemGetDriverVersion()), int(nvml.nvmlSystemGetCudaDriverVersion())
        count = int(nvml.nvmlDeviceGetCount())
        return _Driver(version, (number // 1000, number % 1000 // 10), count, _hidden(nvml, count))
    except nvml.NVMLError:
        return None


def _hidden(nvml: Any, count: int) -> bool:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or count == 0:
        return False
    try:
        first_visible(nvml, visible)
    except DeviceError:
        return True
    return False
