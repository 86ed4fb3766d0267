"""Counts in each other's memory, written and awaited by commands of a stream: no kernel, which would wait for a multiprocessor.

cuStreamWriteValue32 and cuStreamWaitValue32 of CUDA's driver, version 2 of them (run with driver 580).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from functools import cache
from typing import Any

import torch
from torch import Tensor

from wanvram.errors import DeviceError
from wanvram.knobs import EXCHANGE

__all__ = ["COUNT_BYTES", "Kind", "StreamSignals", "commands_are_missing"]

COUNT_BYTES = 4
_WRITE, _WAIT = "cuStreamWriteValue32_v2", "cuStreamWaitValue32_v2"
_DEFAULT = (
    0  # flags: a count is written behind a fence, so that earlier writes are seen; waited for as at least, cyclic
)


class Kind(IntEnum):
    """What is counted of each member: rounds that it has put down, rounds that it has taken from the others."""

    PUT = 0
    TAKEN = 1


@cache
def _command_of(name: str) -> Any:
    command = getattr(ctypes.CDLL("libcuda.so.1"), name)
    stream, address, value, flags = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint
    command.argtypes = (stream, address, value, flags)
    return command


def commands_are_missing() -> bool:
    """Whether this machine's driver lacks the two commands."""
    try:
        return not (_command_of(_WRITE) and _command_of(_WAIT))
    except (OSError, AttributeError):
        return True


class StreamSignals:
    """pages: of each member, [2 * members] int32 at the same place of its memory, zeros that all can write to. index: mine."""

    def __init__(self, pages: Sequence[Tensor], index: int) -> None:
        self._pages, self._index = [page.data_ptr() for page in pages], index
        self._others = [n for n in range(len(pages)) if n != index]

    def stream(self) -> Any:
        """The current one."""
        return torch.cuda.current_stream()

    def tell(self, kind: Kind, number: int, stream: Any) -> None:
        """Every other member learns that I have come to `number`, after what the stream has done by then."""
        for other in self._others:
            self._command(_WRITE, self._pages[other], kind, self._index, number, stream)

    def wait(self, kind: Kind, number: int, stream: Any) -> None:
        """What the stream does later is done once all others have come to `number`."""
        for other in self._others:
            self._command(_WAIT, self._pages[self._index], kind, other, number, stream)

    def _command(self, name: str, page: int, kind: Kind, member: int, number: int, stream: Any) -> None:
        place = page + COUNT_BYTES * (kind * (1 + len(self._others)) + member)
        code = _command_of(name)(stream.cuda_stream, place, number % 2**32, _DEFAULT)
        if code:
            raise DeviceError(f"GPUs cannot tell how far they are (CUDA error {code}); use {EXCHANGE.asked('nccl')}")
