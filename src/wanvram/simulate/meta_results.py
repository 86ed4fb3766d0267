"""The commonest operations of a simulated run without PyTorch's meta kernels, which spend 50 to 500 us of Python on each.

Only the result's shape, dtype and layout matter, and for these operations they are known. The operations themselves, with every
check, run in the tests on real tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Shortcut", "shortcut_of"]


Shortcut = Callable[[tuple[Any, ...], dict[str, Any]], Any]


def _product(a: torch.Tensor, b: torch.Tensor) -> Any:
    return torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype, device="meta")


def _attention(q: torch.Tensor, v: torch.Tensor) -> Any:
    return torch.empty((q.shape[0], q.shape[1], v.shape[2]), dtype=q.dtype, device="meta")


IN_PLACE = ("copy_.default", "add_.Tensor", "sub_.Tensor", "mul_.Tensor", "div_.Tensor", "zero_.default")
_SHORTCUTS: dict[str, Shortcut] = {
    "aten.addmm.default": lambda args, _: _product(args[1], args[2]),
    **dict.fromkeys(("aten.mm.default", "wanvram.linear_gelu.default"), lambda args, _: _product(args[0], args[1])),
    **dict.fromkeys(("aten.addmm.out", "aten.mm.out"), lambda _, kwargs: kwargs["out"]),
    **dict.fromkeys((f"aten.{name}" for name in IN_PLACE), lambda args, _: args[0]),
    "wanvram.attention.default": lambda args, _: _attention(args[0], args[2]),
    "wanvram.layer_norm_modulate.default": lambda args, _: torch.empty(args[0].shape, dtype=args[5], device="meta"),
}


def shortcut_of(operation: Any) -> Shortcut | None:
    """Arguments and named arguments -> the result, without the meta kernel; None: there is no such way."""
    name = str(operation)
    if name.startswith("wanvram.") and not operation._schema.returns:  # it changes its arguments
        return lambda args, kwargs: None
    return _SHORTCUTS.get(name)
