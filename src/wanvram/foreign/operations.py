"""What is known of an ATen operation before it is called: asked once, for half a million calls of a video's decode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodDescriptorType
from typing import Any

import torch

from wanvram.foreign.buffers import ForeignBuffers
from wanvram.simulate.clock import Costs, Price

__all__ = ["DATA_SHAPED", "TO_THE_HOST", "WITH_TEMPORARIES", "AtenOp", "operation_of"]

DATA_SHAPED = tuple(f"aten.{name}.default" for name in ("nonzero", "masked_select", "_unique2", "unique_dim"))
TO_THE_HOST = ("aten._local_scalar_dense.default", "aten.equal.default", "aten.allclose.default")
# Operations for which CUDA's libraries take temporary memory by rules that are not known here.
WITH_TEMPORARIES = (
    *("aten.sort.", "aten.topk.", "aten.kthvalue", "aten.median", "aten.mode.", "aten.multinomial", "aten._fft_"),
    *("aten._linalg_", "aten.linalg_eig", "aten.linalg_qr", "aten.lstm", "aten.gru", "aten._cudnn_rnn", "aten._cdist"),
    *("aten.cumsum.", "aten.cumprod.", "aten.unique", "aten._unique", "aten.nonzero.", "aten.histc", "aten.bincount"),
    "aten.searchsorted",
)


@dataclass(frozen=True)
class AtenOp:
    """name: aten.add_.Tensor. composite: made of other operations. writes: positions and names of arguments that it changes.

    view: makes the view of the first argument that it is; None: it is none. usual: it neither copies nor reads values. planned:
    something may be taken beside the result, untold: by rules that are not known. whole: as CUDA computes it in one; own: its result.
    """

    name: str
    composite: bool
    writes: tuple[int | str, ...]
    view: Callable[..., Any] | None
    price: Price | None
    memorised: bool
    usual: bool
    planned: bool
    untold: bool
    whole: Callable[..., Any] | None
    own: Callable[..., Any] | None


def operation_of(func: Any, buffers: ForeignBuffers, costs: Costs, whole: dict[Any, Callable[..., Any]]) -> AtenOp:
    """func: an OpOverload."""
    name, arguments = str(func), func._schema.arguments
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    writes = tuple(
        argument.name if argument.kwarg_only else index
        for index, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    known = buffers.knows(name)
    untold = name.startswith(WITH_TEMPORARIES) or not name.startswith(("aten.", "prim", "profiler."))
    untold = untold and not composite and not known
    return AtenOp(
        name,
        composite,
        writes,
        view=_method(func) if func.is_view and not composite and str(arguments[0].type) == "Tensor" else None,
        price=None if func.is_view else costs.price(name),
        memorised=not func.is_view and "out" not in writes and not name.startswith(("aten.set_", "aten.resize_")),
        usual=not name.startswith(("aten.copy_.default", "aten.index", *TO_THE_HOST, *DATA_SHAPED)),
        planned=known or untold or buffers.measured is not None,
        untold=untold,
        whole=whole.get(func),
        own=buffers.results.get(name),
    )


def _method(func: Any) -> Callable[..., Any]:
    """Tensor.view of aten.view.default, which takes 0.9 us where the operation itself takes 2.2; else the operation."""
    found = getattr(torch.Tensor, func._schema.name.removeprefix("aten::"), None)
    return found if isinstance(found, MethodDescriptorType) else func
