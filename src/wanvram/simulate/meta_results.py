"""The commonest operations of a simulated run without PyTorch's meta kernels, which spend 50 to 500 us of Python on each.

Only the result's shape, dtype and layout matter, and for these operations they are known. The operations themselves, with every
check, run in the tests on real tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Shortcut", "shortcut_of"]


def _addmm(args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
    a, b = args[1], args[2]
    return torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype, device="meta")


def _mm(args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
    a, b = args[0], args[1]
    return torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype, device="meta")


def _out(_args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return kwargs["out"]


def _first(args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
    return args[0]


def _nothing(_args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
    return None


def _attention(args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
    q, v = args[0], args[2]
    return torch.empty((q.shape[0], q.shape[1], v.shape[2]), dtype=q.dtype, device="meta")


def _layer_norm(args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
    return torch.empty(args[0].shape, dtype=args[5], device="meta")


IN_PLACE = ("copy_.default", "add_.Tensor", "sub_.Tensor", "mul_.Tensor", "div_.Tensor", "zero_.default")
Shortcut = Callable[[tuple[Any, ...], dict[str, Any]], Any]
_SHORTCUTS: dict[str, Shortcut] = {
    "aten.addmm.default": _addmm,
    "aten.mm.default": _mm,
    "aten.addmm.out": _out,
    "aten.mm.out": _out,
    "wanvram.linear_gelu.default": _mm,
    "wanvram.attention.default": _attention,
    "wanvram.layer_norm_modulate.default": _layer_norm,
    **{f"aten.{name}": _first for name in IN_PLACE},
}


def shortcut_of(operation: Any) -> Shortcut | None:
    """Arguments and named arguments -> the result, without the meta kernel; None: there is no such way."""
    name = str(operation)
    if name.startswith("wanvram.") and not operation._schema.returns:  # it changes its arguments
        return _nothing
    return _SHORTCUTS.get(name)
