"""How fast each backend of attention is on the card in this machine: a measurement of seconds, kept for `auto`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from statistics import median
from typing import Any

import torch

from wanvram.errors import DeviceError, InputError
from wanvram.foreign_text import shown
from wanvram.kernels.attention_backends import BACKENDS, FA4, Backend
from wanvram.kernels.fused_attention import usable
from wanvram.machine.attention_cache import CROSS, HEAD_DIM, SELF, Conditions, Measured, ShapeTimes, found
from wanvram.machine.nvml import first_gpu

__all__ = ["checked_here", "conditions_here", "measure"]

# (use, heads, queries, keys): a chunk of rows of a 1.3B video at 832x480 among all of its tokens, and to a prompt. 1.6 T operations
# and 350 MB, so half a minute on the slowest card.
SHAPES = ((SELF, 12, 8190, 32760), (CROSS, 12, 8190, 512))
ROUNDS = 5


def conditions_here() -> Conditions | None:
    """Of the first GPU; None without one. Makes no CUDA context."""
    try:
        gpu = first_gpu()
        name, driver = gpu.name, gpu.driver
    except DeviceError:
        return None
    version = next(backend.version() for backend in BACKENDS if backend.name == FA4)
    return Conditions(name, driver, torch.__version__, torch.backends.cudnn.version(), version)


@cache
def checked_here() -> tuple[Measured | None, str]:
    """What `wanvram check --attention` kept for this machine as it is now, and a note where its file cannot be read."""
    conditions = conditions_here()
    return (None, "") if conditions is None else found(conditions)


def measure(conditions: Conditions) -> tuple[Measured, dict[str, str]]:
    """Seconds of one call, the median of five, and why each backend that is missing is missing. Needs CUDA."""
    device = torch.device("cuda", 0)
    capability = torch.cuda.get_device_capability(device)
    dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
    missing = {b.name: said for b in BACKENDS if (said := _missing(b, capability, dtype, device)) is not None}
    shapes = []
    for use, heads, queries, keys in SHAPES:
        q, k, v = (torch.randn((n, heads, HEAD_DIM), device=device, dtype=dtype) for n in (queries, keys, keys))
        ready = [backend for backend in BACKENDS if backend.name not in missing]
        times = {backend.name: _seconds(partial(backend.function(), q, k, v)) for backend in ready}
        shapes.append(ShapeTimes(use, heads, queries, keys, times))
        del q, k, v
    torch.cuda.empty_cache()
    return Measured(conditions, tuple(shapes)), missing


def _missing(backend: Backend, capability: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why it is not measured; None if it is."""
    if not backend.takes(capability, dtype.itemsize, HEAD_DIM):
        return "not on this card"
    if backend.package is not None and backend.version() is None:
        return f"{backend.package} is not installed"
    like = torch.empty((64, 1, HEAD_DIM), dtype=dtype, device=device)
    try:
        if not usable(backend, like):
            return f"PyTorch {torch.__version__} refuses it here"
        backend.function()(like, like, like)
        torch.cuda.synchronize(device)
    except InputError as error:
        return str(error)
    except Exception as error:  # a kernel that does not compile or run, in many ways
        return f"it failed: {shown(error, 200)}"
    return None


def _seconds(call: Callable[[], Any]) -> float:
    call()
    times: list[float] = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return median(times)
