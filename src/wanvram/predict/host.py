"""The machine around a simulated card: this one where the card is here, else the one whose figures are known."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from wanvram.config import RunConfig
from wanvram.engine.cuda import own_pages
from wanvram.errors import DeviceError, InputError
from wanvram.knobs import PRECISION
from wanvram.machine.caches import cached_share, cold_libraries
from wanvram.machine.host import available_ram_bytes, operation_us
from wanvram.machine.nvml import first_gpu
from wanvram.models.precision import PRECISIONS
from wanvram.simulate.clock import Clock
from wanvram.simulate.gpus import GPU, find_gpu
from wanvram.simulate.host import HOST, Host, Reading
from wanvram.weights.folder import GENERATED
from wanvram.weights.official import open_checkpoint
from wanvram.weights.reading_speed import ReadingSpeed, largest_matrices, reading_speed
from wanvram.weights.sources import FileSource
from wanvram.weights.stored import Stored

__all__ = ["clock_of", "is_here", "streaming_note"]

ROOM_BYTES = 2**30  # of memory: more than a processor's cache holds, as weights are; four times 0.2 s
MOSTLY_ON_DISK = 0.5  # share of the page cache below which what a sample's first reading takes is the disk's speed


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
    wanted = PRECISIONS[PRECISION.of(config.strategy)].matmul
    host = HOST if config.weights in GENERATED else _reading(config.weights, wanted, is_here(gpu.key))
    if not is_here(gpu.key):
        return Clock(gpu, host)
    here = replace(host, operation_us=operation_us(), page_cache_bytes=float(available_ram_bytes()))
    return Clock(gpu, here, cold_libraries())


def streaming_note(config: RunConfig, gpu: GPU) -> str:
    """How fast a plan takes the blocks to come that are read from disk in every pass, and how that is known."""
    clock = clock_of(config, gpu)
    known = clock.machine.plain != HOST.plain
    source = "as a sample of them was read just now" if known else "the rate of a drive that was measured"
    return (
        f"blocks are read from disk in every pass: times assume {clock.streamed_bytes('dit') / 1e9:.1f} GB/s, {source}"
    )


@cache
def _reading(weights: str, wanted: torch.dtype, measured: bool) -> Host:
    """HOST as far as a checkpoint is concerned; measured: with the speed at which this machine reads it."""
    share = _cached_share(weights)
    host = replace(HOST, cached_share=HOST.cached_share if share is None else share)
    try:
        source = open_checkpoint(Path(weights), "dit")
        matrices = largest_matrices(source) if isinstance(source, FileSource) else []
        if not matrices:
            return host
        stored = matrices[0].dtype
        if stored != wanted:
            host = replace(host, stored={"dit": stored.itemsize / wanted.itemsize})
        return _as_measured(host, matrices, wanted) if measured else host
    except (InputError, OSError):
        return host  # no checkpoint, or not a whole one: the run itself says what is wrong with it


def _as_measured(host: Host, matrices: list[Stored], wanted: torch.dtype) -> Host:
    def speed_into(dtype: torch.dtype) -> ReadingSpeed | None:
        return reading_speed(matrices, dtype, torch.frombuffer(own_pages(ROOM_BYTES), dtype=torch.uint8).zero_())

    plain = speed_into(matrices[0].dtype)
    converted = plain if wanted == matrices[0].dtype else speed_into(wanted)
    if plain is None or converted is None:
        return host
    on_disk = host.cached_share < MOSTLY_ON_DISK
    return replace(
        host,
        disk_bytes=plain.first if on_disk else host.disk_bytes,
        plain=Reading(plain.taken, plain.used),
        converted=Reading(converted.taken, converted.used),
    )


def _cached_share(weights: str) -> float | None:
    """Of a checkpoint's bytes in the page cache; None where there is none or the system does not tell."""
    found = [path for pattern in ("*", "*/*") for path in sorted(Path(weights).glob(pattern))]
    files = [path for path in found if path.suffix in (".safetensors", ".pth") and path.is_file()]
    return cached_share(files) if files else None
