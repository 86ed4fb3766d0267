"""How the operations `wanvram::*` are registered: PyTorch's dispatcher sees them on CPU and meta tensors, not on CUDA."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache, update_wrapper
from importlib import import_module
from typing import Any, Generic, ParamSpec, TypeVar

import torch

__all__ = ["Operation", "operation", "uses_triton"]

# Not torch.library.custom_op: its layer for gradients, in Python, was a quarter of the time of a simulated run.
_LIBRARY = torch.library.Library("wanvram", "FRAGMENT")
_P = ParamSpec("_P")
_R = TypeVar("_R")


class Operation(Generic[_P, _R]):
    """Called with CUDA tensors, the function itself runs, or the Triton kernel of its name.

    There the dispatcher would cost 50 to 100 us of Python a call, as much as a small kernel, and import PyTorch's compiler
    at the first (5 s in a fresh process on an H200's machine). On meta tensors the simulated device has to see the call.
    """

    direct_on_cuda = True

    def __init__(self, reference: Callable[_P, _R], schema: str, triton: str | None) -> None:
        update_wrapper(self, reference)
        self.name = reference.__name__.removeprefix("_")
        self._reference = reference
        self.triton = triton
        self._kernel: Callable[_P, _R] | None = None
        _LIBRARY.define(self.name + schema)
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(self.name, self.compute, key)
        if schema.endswith("-> ()"):  # changes its arguments: nothing new on meta tensors
            self.on_meta(lambda *_: None)
        self._dispatched: Callable[_P, _R] = getattr(torch.ops.wanvram, self.name).default

    def on_meta(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Registers what the operation's result is like, from meta tensors. Gives the function back, for another's."""
        _LIBRARY.impl(self.name, fake, "Meta")
        return fake

    def compute(self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        x: Any = args[0]
        if self.triton is None or not uses_triton(x):
            return self._reference(*args, **kwargs)
        kernel = self._kernel
        if kernel is None:
            kernel = self._kernel = getattr(import_module(self.triton), self.name)
        # Triton launches on the current device; asking which that is, and naming it again, costs 2 and 5 us a call.
        if _one_gpu() or x.get_device() == torch.cuda.current_device():
            return kernel(*args, **kwargs)
        with torch.cuda.device(x.device):
            return kernel(*args, **kwargs)

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        x: Any = args[0]
        if x.is_cuda and self.direct_on_cuda:
            return self.compute(*args, **kwargs)
        return self._dispatched(*args, **kwargs)


def operation(schema: str, *, triton: str | None = None) -> Callable[[Callable[_P, _R]], Operation[_P, _R]]:
    """Decorates the plain PyTorch form of `wanvram::<function's name>`. One that changes arguments returns nothing.

    triton: the module with its kernel, a function of that name, where there is one; imported with the first CUDA tensor.
    """
    return lambda reference: Operation(reference, schema, triton)


def uses_triton(x: Any) -> bool:
    """On CUDA where Triton is installed, unless WANVRAM_KERNELS=reference asks for PyTorch's operations."""
    return bool(x.is_cuda) and _triton_installed() and os.environ.get("WANVRAM_KERNELS") != "reference"


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _one_gpu() -> bool:
    return torch.cuda.device_count() == 1
