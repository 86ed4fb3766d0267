"""Which library buffers one dispatched operation takes beside its outputs: operation and arguments -> BufferPlan.

The sizes are rules and measured tables (libraries.py, convolutions.py); this file only reads shapes from the arguments.
Order as seen in H200 histories (benchmarks/2026-11-24_h200_probe_libraries.json): cuDNN attention takes two 8-byte seeds, then its
output, then 256 bytes of workspace; convolutions take output, then workspace; the first product takes output, then cuBLAS's buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from wanvram.kernels.attention_backends import chosen
from wanvram.simulate.convolutions import Convolution
from wanvram.simulate.gpus import GPU
from wanvram.simulate.libraries import Libraries

__all__ = ["BufferPlan", "LibraryBuffers"]


@dataclass(frozen=True)
class BufferPlan:
    """before: taken before the output, freed at the end. during: after the output, freed at the end. loads: libraries used."""

    before: tuple[int, ...] = ()
    during: tuple[int, ...] = ()
    loads: tuple[str, ...] = ()


_PRODUCT = BufferPlan(loads=("cublas",))
_LT_PRODUCT = BufferPlan(loads=("cublas", "cublaslt"))
_SCALAR = BufferPlan(during=(8,))  # the scalar base becomes a tensor on the device
_TRITON = BufferPlan(loads=("triton",))


class LibraryBuffers:
    """Plans for one GPU; unknown operations take nothing."""

    def __init__(self, gpu: GPU, libraries: Libraries) -> None:
        self.gpu = gpu
        self.libraries = libraries
        self._workspaces: dict[Any, int] = {}
        self._planners: dict[str, Callable[[tuple[Any, ...]], BufferPlan]] = {
            "aten.mm.default": lambda args: _PRODUCT,
            "aten.mm.out": lambda args: _PRODUCT,
            "aten.bmm.default": lambda args: _PRODUCT,
            "aten.bmm.out": lambda args: _PRODUCT,
            "aten.baddbmm.default": lambda args: _PRODUCT,
            "aten.addmm.default": lambda args: _LT_PRODUCT,
            "aten.addmm.out": lambda args: _LT_PRODUCT,
            "wanvram.scaled_product.default": lambda args: _LT_PRODUCT,
            "wanvram.linear_gelu.default": lambda args: _LT_PRODUCT,
            "aten.pow.Scalar": lambda args: _SCALAR,
            "wanvram.attention.default": self._attention,
            "wanvram.attention_lse.default": self._attention_with_sums,
            "wanvram.conv3d.default": self._convolution,
        }

    def plan(self, operation: str, args: tuple[Any, ...]) -> BufferPlan | None:
        planner = self._planners.get(operation)
        if planner is not None:
            return planner(args)
        return _TRITON if operation.startswith("wanvram.") else None

    @property
    def gaps(self) -> str | None:
        """See Libraries.gaps."""
        return self.libraries.gaps

    def persistent_buffers(self, library: str) -> tuple[int, ...]:
        """What a library allocates at its first use and keeps, bytes."""
        if library == "cublas":
            return (self.libraries.cublas_workspace_bytes,)
        if library == "cublaslt":
            return (self.libraries.cublaslt_workspace_bytes,)
        return ()

    def _attention(self, args: tuple[Any, ...]) -> BufferPlan:
        lq, heads, head_dim = args[0].shape
        backend = chosen(self.gpu.compute_capability, args[0].element_size(), head_dim, args[1].shape[0], *args[3:])
        before, during = backend.extra(lq, heads)
        return BufferPlan(before, during, loads=(backend.library,) if backend.library else ())

    def _attention_with_sums(self, args: tuple[Any, ...]) -> BufferPlan:
        """The sums are a result here, which a backend that makes them either way takes at once with its own buffers."""
        plan, sums = self._attention(args), 4 * args[0].shape[0] * args[0].shape[1]
        return BufferPlan(plan.before, tuple(n for n in plan.during if n != sums), plan.loads)

    def _convolution(self, args: tuple[Any, ...]) -> BufferPlan:
        x, weight, _, stride, padding = args
        key = x.dtype, x.shape, weight.shape, tuple(stride), tuple(padding)
        workspace = self._workspaces.get(key)
        if workspace is None:
            name = str(x.dtype).removeprefix("torch.")
            sizes = (tuple(x.shape[1:]), tuple(weight.shape), tuple(stride), tuple(padding))
            workspace = self._workspaces[key] = self.libraries.conv_workspace(Convolution(name, *sizes))
        return BufferPlan(during=(workspace,) if workspace else (), loads=("cudnn",))
