"""The machine around a simulated card: this one where the card is here, else the one whose figures are known."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from wanvram.config import RunConfig
from wanvram.errors import DeviceError, InputError
from wanvram.knobs import PRECISION
from wanvram.machine.caches import cached_share, cold_libraries
from wanvram.machine.host import available_ram_bytes, operation_us
from wanvram.machine.nvml import first_gpu
from wanvram.models.precision import PRECISIONS
from wanvram.simulate.clock import Clock
from wanvram.simulate.gpus import GPU, find_gpu
from wanvram.simulate.host import HOST
from wanvram.weights.folder import GENERATED
from wanvram.weights.official import open_checkpoint
from wanvram.weights.sources import FileSource

__all__ = ["clock_of", "is_here"]


@cache
def is_here(key: str) -> bool:
    """Whether the card is the one in this machine."""
    try:
        gpu = first_gpu()
        return find_gpu(gpu.name, gpu.memory()[1]).key == key
    except (DeviceError, InputError):
        return False


def clock_of(config: RunConfig, gpu: GPU) -> Clock:
    """With this machine's speed and caches where the card is here. A checkpoint that is here is read from where it lies."""
    host = replace(HOST, cached_share=_cached(config.weights), stored=_stored(config))
    if not is_here(gpu.key):
        return Clock(gpu, host)
    here = replace(host, operation_us=operation_us(), page_cache_bytes=float(available_ram_bytes()))
    return Clock(gpu, here, cold_libraries())


def _cached(weights: str) -> float:
    """Of a checkpoint's bytes in the page cache; 0 where there is none."""
    found = [path for pattern in ("*", "*/*") for path in sorted(Path(weights).glob(pattern))]
    files = [path for path in found if path.suffix in (".safetensors", ".pth") and path.is_file()]
    return (cached_share(files) if files else None) or HOST.cached_share


@cache
def _stored_dtype(weights: str) -> torch.dtype | None:
    """Of the transformer's first matrix in the checkpoint; None where there is no checkpoint that can be opened."""
    try:
        source = open_checkpoint(Path(weights), "dit")
    except (InputError, OSError):
        return None
    if not isinstance(source, FileSource):
        return None
    return next((source.stored_dtype(key) for key in source.keys() if len(source.shape(key)) == 2), None)  # noqa: SIM118


def _stored(config: RunConfig) -> dict[str, float]:
    """The transformer, if its files are of another type of number than the run."""
    if config.weights in GENERATED:
        return {}
    stored, wanted = _stored_dtype(config.weights), PRECISIONS[PRECISION.of(config.strategy)].matmul
    return {} if stored is None or stored == wanted else {"dit": stored.itemsize / wanted.itemsize}
