"""How the operations `wanvram::*` are registered: PyTorch's dispatcher sees them on CPU and meta tensors, not on CUDA."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

__all__ = ["Operation", "operation", "uses_triton"]

# Not torch.library.custom_op: its layer for gradients, in Python, was a quarter of the time of a simulated run.
_LIBRARY = torch.library.Library("wanvram", "FRAGMENT")


class Operation:
    """Called with CUDA tensors, the function itself runs.

    There the dispatcher would cost 50 to 100 us of Python a call, as much as a small kernel, and import PyTorch's compiler
    at the first (5 s in a fresh process on an H200's machine). On meta tensors the simulated device has to see the call.
    """

    direct_on_cuda = True

    def __init__(self, compute: Callable[..., Any], schema: str) -> None:
        name = compute.__name__.removeprefix("_")
        self.compute = compute
        self._name = name
        _LIBRARY.define(name + schema)
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, compute, key)
        if schema.endswith("-> ()"):  # changes its arguments: nothing new on meta tensors
            self.on_meta(lambda *_: None)
        self.dispatched = getattr(torch.ops.wanvram, name).default

    def on_meta(self, fake: Callable[..., Any]) -> None:
        """Registers what the operation's result is like, from meta tensors."""
        _LIBRARY.impl(self._name, fake, "Meta")

    def __call__(self, x: torch.Tensor, *args: Any) -> Any:
        if x.is_cuda and self.direct_on_cuda:
            return self.compute(x, *args)
        return self.dispatched(x, *args)


def operation(schema: str) -> Callable[[Callable[..., Any]], Operation]:
    """Decorates what computes `wanvram::<function's name>`. An operation that changes arguments returns nothing."""
    return lambda compute: Operation(compute, schema)


def uses_triton(x: torch.Tensor) -> bool:
    """On CUDA where Triton is installed, unless WANVRAM_KERNELS=reference asks for PyTorch's operations."""
    return x.is_cuda and _triton_installed() and os.environ.get("WANVRAM_KERNELS") != "reference"


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
