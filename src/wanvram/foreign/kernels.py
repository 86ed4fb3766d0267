"""Operations that CUDA computes in one kernel where PyTorch's meta device takes them apart: attention, linear, norms, softmax.

They are registered for the meta device while a simulation runs, so that they arrive whole, from Python as from C++.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch

from wanvram.foreign.fast_paths import FastPaths
from wanvram.foreign.memory import CUDA, ForeignMemory
from wanvram.kernels.attention_backends import BACKENDS, Backend
from wanvram.simulate.libraries import BufferPlan

__all__ = ["whole_operations"]

aten = torch.ops.aten
_ALIGNED = 8  # elements that a head and a row of a mask are padded to


@contextmanager
def whole_operations(memory: ForeignMemory) -> Iterator[None]:
    """Registers them with PyTorch's dispatcher, where autograd lets them pass, and the simulated device, and takes both back."""
    kernels, fast = _Kernels(memory), FastPaths(memory)
    table: dict[Any, Callable[..., Any]] = {
        aten.scaled_dot_product_attention.default: kernels.attention,
        aten.linear.default: kernels.linear,
        aten.rms_norm.default: kernels.rms_norm,
        aten.softmax.int: kernels.softmax,
        aten._safe_softmax.default: kernels.safe_softmax,
        aten._native_multi_head_attention.default: fast.multihead,
        aten._transformer_encoder_layer_fwd.default: fast.encoder_layer,
    }
    library: Any = torch._C._dispatch_library("IMPL", "aten", "", "wanvram/foreign/kernels.py", 0)
    for operation in table:
        if not operation._can_decompose():
            continue  # arrives whole
        name = operation._schema.name.removeprefix("aten::")
        full = f"{name}.{operation._overloadname}" if operation._overloadname != "default" else name
        library.impl(full, "AutogradMeta", torch.library.fallthrough_kernel, False)
    memory.whole.update(table)
    try:
        yield
    finally:
        library.reset()
        memory.whole.clear()


class _Kernels:
    def __init__(self, memory: ForeignMemory) -> None:
        self.memory = memory

    def _output(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        self.memory._operation = name
        self.memory._born(tensor, CUDA)
        return tensor

    # --- linear ----------------------------------------------------------------------------------------------------------

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        """linear.cpp without its detours for tensor subclasses, for which it takes every tensor under a dispatch mode."""
        if bias is not None and weight.dim() == 2 and x.dim() in (2, 3) and x.is_contiguous():
            return self._product(x, weight, bias)
        with self.memory:
            if bias is None or weight.dim() != 2 or x.dim() < 2:
                return aten.linear.default.decompose(x, weight, bias)
            if x.dim() == 2:
                return torch.addmm(bias, x, weight.t())
            if x.is_contiguous():
                flat = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.t())
                return flat.view(*x.shape[:-1], weight.shape[0])
            return torch.matmul(x, weight.t()).add_(bias)

    def _product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        """The usual case without the way through PyTorch's dispatcher, 15 us shorter: views are made beside the simulation."""
        if self.memory.timed:
            for _ in range(1 if x.dim() == 2 else 3):
                self.memory.clock.view()
        flat = x if x.dim() == 2 else x.view(-1, x.shape[-1])
        result = self.memory.__torch_dispatch__(aten.addmm.default, (), (bias, flat, weight.t()))
        return result if x.dim() == 2 else result.view(*x.shape[:-1], weight.shape[0])

    # --- norms and softmax -----------------------------------------------------------------------------------------------

    def rms_norm(
        self, x: torch.Tensor, shape: list[int], weight: torch.Tensor | None = None, eps: float | None = None
    ) -> Any:
        """Output and float32 rstd in one kernel; taken apart where the weight has another type, as CUDA does."""
        if weight is not None and weight.dtype != x.dtype:
            with self.memory:
                return aten.rms_norm.default.decompose(x, shape, weight, eps)
        self.memory.load_library("kernels")
        self.memory.operations += 1
        output = self._output(torch.empty(x.shape, dtype=x.dtype, device="meta"), "aten._fused_rms_norm.default")
        rows = x.numel() // max(prod(shape), 1)
        rstd = torch.empty((rows,), dtype=torch.float32, device="meta")
        self._output(rstd, "aten._fused_rms_norm.default")
        return output

    def softmax(self, x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
        """Half in, float32 out is one kernel."""
        with self.memory:
            if dtype == torch.float32 and x.dtype == torch.float16:
                return torch._softmax(x, dim, True)
            return torch._softmax(x if dtype is None or dtype == x.dtype else x.to(dtype), dim, False)

    # --- attention -------------------------------------------------------------------------------------------------------

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        *_: Any,
        scale: float | None = None,
        enable_gqa: bool = False,
        **__: Any,
    ) -> Any:
        """[B,H,Lq,D], [B,H,Lk,D] -> [B,H,Lq,D]; the first backend that PyTorch allows, taken apart where that is none."""
        backend = self._backend(q, k, v, attn_mask, enable_gqa)
        if backend is None:
            with self.memory:
                return self._math(q, k, v, attn_mask, scale, enable_gqa)
        mask = attn_mask
        with self.memory:
            if mask is not None and mask.dtype == torch.bool:
                mask = self._additive(mask, q.dtype)
            if mask is not None and backend.name == "efficient" and mask.shape[-1] % _ALIGNED:
                mask = torch.nn.functional.pad(mask, (0, _ALIGNED - mask.shape[-1] % _ALIGNED))
        return self._fused(backend, q, v)

    def _fused(self, backend: Backend, q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        memory = self.memory
        memory.operations += 1
        name = f"attention by {backend.name}"
        memory.load_library("kernels")
        if backend.library:
            memory.load_library(backend.library)
        batch, heads, rows, _ = q.shape
        before, during = backend.extra(rows, heads * batch)
        first = [memory._malloc(n, "before " + name) for n in before]
        result = self._output(_like_query(q, v.shape[-1], backend.name), name)
        memory._take(BufferPlan(during=during), first)
        if memory.timed:
            price = memory.clock.costs.price("wanvram.attention")
            assert price is not None
            memory.launch(price, tuple(t.transpose(1, 2).flatten(0, 1) for t in (q, v)), result)
        return result

    def _backend(self, q: Any, k: Any, v: Any, mask: Any, gqa: bool) -> Backend | None:
        if q.dim() != 4 or any(t.dtype != q.dtype for t in (k, v)) or q.dtype == torch.float64:
            return None
        # A mask that is a transposed table (UMT5's position bias) refuses them all: on an H200 it went the long way.
        if any(t.stride(-1) != 1 for t in (q, k, v, mask) if t is not None and t.shape[-1] > 1):
            return None
        asked, dim = torch.backends.cuda, q.shape[-1]
        aligned = dim % _ALIGNED == 0
        allowed = {
            "cudnn": asked.cudnn_sdp_enabled() and aligned,
            "flash": asked.flash_sdp_enabled() and mask is None and v.shape[-1] == dim,
            "efficient": asked.mem_efficient_sdp_enabled() and aligned and not gqa,
        }
        capability = self.memory.gpu.compute_capability
        able = (b for b in BACKENDS if allowed.get(b.name) and b.takes(capability, q.itemsize, dim))
        return next(able, None)

    def _math(self, q: Any, k: Any, v: Any, mask: Any, scale: float | None, gqa: bool) -> Any:
        """As attention.cpp: 16-bit inputs in float32, the scale on both factors, the mask added in place."""
        dtype, factor = q.dtype, (q.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
        if mask is not None and mask.dtype == torch.bool:
            mask = self._additive(mask, dtype)
        if dtype in (torch.float16, torch.bfloat16):
            q, k, v = q.to(torch.float32), k.to(torch.float32), v.to(torch.float32)
        if gqa:
            k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
        scaled = q * factor  # both live to the end
        scores = torch.matmul(scaled, k.transpose(-2, -1) * factor)
        if mask is not None:
            scores.add_(mask)
        weights = self.safe_softmax(scores, -1)
        del scores
        return torch.matmul(weights, v).to(dtype)

    def safe_softmax(self, x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
        """Rows that are masked whole become zeros: softmax, a mask of what is -inf, and the choice, which took no second
        result where it was measured (UMT5 on an H200, torch 2.11: scores, weights and mask to the byte)."""
        with self.memory:
            out = torch.softmax(x, dim, dtype=dtype)
            masked = x == float("-inf")
            return out.masked_fill_(torch.all(masked, dim, keepdim=True), 0.0)

    def _additive(self, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        lowest = torch.full((), float("-inf"), dtype=dtype, device=mask.device)
        return torch.where(mask, torch.zeros((), dtype=dtype, device=mask.device), lowest)


def _like_query(q: torch.Tensor, value_dim: int, backend: str) -> torch.Tensor:
    """[B,H,L,D] in memory as the query lies; of the efficient kernel always [B,L,H,D]."""
    batch, heads, rows = q.shape[:3]
    if backend == "efficient" or q.stride(1) < q.stride(2):
        return torch.empty((batch, rows, heads, value_dim), dtype=q.dtype, device="meta").transpose(1, 2)
    return torch.empty((batch, heads, rows, value_dim), dtype=q.dtype, device="meta")
