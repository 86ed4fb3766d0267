"""How the operations `wanvram::*` are registered: PyTorch's dispatcher sees them on CPU and meta tensors, not on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["Operation", "operation"]


class Operation:
    """Called with CUDA tensors, the function itself runs.

    There the dispatcher would cost 50 to 100 us of Python a call, as much as a small kernel, and import PyTorch's compiler
    at the first (5 s in a fresh process on an H200's machine). On meta tensors the simulated device has to see the call.
    """

    direct_on_cuda = True

    def __init__(self, compute: Callable[..., Any], schema: str, mutates_args: Sequence[str]) -> None:
        name = "wanvram::" + compute.__name__.removeprefix("_")
        self.compute = compute
        self.custom = torch.library.custom_op(name, mutates_args=mutates_args, schema=schema)(compute)
        if mutates_args:
            self.custom.register_fake(_nothing_new)

    def __call__(self, x: torch.Tensor, *args: Any) -> Any:
        if x.is_cuda and self.direct_on_cuda:
            return self.compute(x, *args)
        return self.custom(x, *args)


def operation(schema: str, mutates_args: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Operation]:
    """Decorates what computes `wanvram::<function's name>`. An operation that changes arguments returns nothing."""
    return lambda compute: Operation(compute, schema, mutates_args)


def _nothing_new(*_: object) -> None:
    """An operation that changes its arguments allocates nothing on meta tensors."""
