"""Which compiled kernels and which of a checkpoint's bytes this machine has at hand. No torch."""

from __future__ import annotations

import ctypes
import getpass
import mmap
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["cached_share", "cold_libraries"]

SAMPLE_BYTES = 64 * 2**20  # of each file: more would take a second of a 40 GB checkpoint


def cold_libraries(environment: Mapping[str, str] | None = None) -> frozenset[str]:
    """Libraries whose kernels were never compiled here: Triton keeps its own on disk, the driver those of cuDNN's attention."""
    environment = os.environ if environment is None else environment
    home = Path(environment.get("HOME", "~")).expanduser()
    triton = environment.get("TRITON_CACHE_DIR") or Path(environment.get("TRITON_HOME", home)) / ".triton" / "cache"
    driver = environment.get("CUDA_CACHE_PATH") or home / ".nv" / "ComputeCache"
    own = _temporary(environment) / "flash_attention_cute_dsl_cache"
    fa4 = environment.get("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR") or own
    places = {"triton": Path(triton), "attention": Path(driver), "fa4": Path(fa4)}
    return frozenset(library for library, place in places.items() if _is_empty(place))


def _temporary(environment: Mapping[str, str]) -> Path:
    """Where flash-attn-4 keeps its compiled kernels unless told otherwise."""
    folder = Path(environment.get("TMPDIR") or tempfile.gettempdir())
    try:
        return folder / getpass.getuser()
    except (OSError, KeyError):  # a user without a name
        return folder


def _is_empty(place: Path) -> bool:
    try:
        return not any(place.iterdir())
    except OSError:
        return True


def cached_share(files: Iterable[Path]) -> float | None:
    """The share of the files' bytes that lie in the page cache, from samples; None where the system does not tell."""
    cached = total = 0.0
    for file in files:
        try:
            size = file.stat().st_size
            share = _share(file, size) if size else None
        except (OSError, ValueError, AttributeError):
            share = None
        if share is None:
            return None
        cached, total = cached + share * size, total + size
    return cached / total if total else None


def _share(file: Path, size: int) -> float | None:
    """mincore of a part at the file's beginning, middle and end."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    granule = mmap.ALLOCATIONGRANULARITY
    length = min(size, SAMPLE_BYTES)
    offsets = sorted({0, (size - length) // 2 // granule * granule, (size - length) // granule * granule})
    resident = pages = 0
    with file.open("rb") as opened:
        for offset in offsets:
            view = mmap.mmap(opened.fileno(), length, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)
            address = ctypes.addressof(ctypes.c_char.from_buffer(view))
            count = -(-length // mmap.PAGESIZE)
            answer = (ctypes.c_ubyte * count)()
            if library.mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), answer) != 0:
                return None
            resident, pages = resident + sum(byte & 1 for byte in answer), pages + count
    return resident / pages
