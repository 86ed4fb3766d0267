"""`wanvram::attention`: softmax attention of one unbatched sample, heads in the middle, no hidden output copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from wanvram.kernels.attention_backends import AUTO, chosen
from wanvram.kernels.fused_attention import Attended, heads_first, reference, rows_first
from wanvram.kernels.operation import operation

__all__ = ["attention", "attention_with_sums", "scaled_dot_product"]

ALIGNED = 8  # numbers of a head come in multiples of it, or PyTorch pads them first


@operation(f"(Tensor q, Tensor k, Tensor v, str asked='{AUTO}') -> Tensor")
def attention(q: Tensor, k: Tensor, v: Tensor, asked: str = AUTO) -> Tensor:
    """softmax(D^-0.5 q k^T) v for q [Lq,H,D], k and v [Lk,H,D] -> contiguous [Lq,H,D].

    asked: a backend of the registry, taken where it takes these (attention_backends.chosen). On the CPU PyTorch computes.
    """
    if not q.is_cuda or q.shape[2] % ALIGNED:
        return scaled_dot_product(q, k, v)
    return _on_cuda(q.device, q.element_size(), q.shape[2], k.shape[0], asked)(q, k, v)[0]


@attention.on_meta
def _(q: Tensor, k: Tensor, v: Tensor, asked: str = AUTO) -> Tensor:
    del k, asked
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))


def attention_with_sums(q: Tensor, k: Tensor, v: Tensor, asked: str = AUTO) -> tuple[Tensor, Tensor]:
    """The same and the natural log-sum-exp of every row of scores, float32 [H,Lq]; the reference on the CPU."""
    result: tuple[Tensor, Tensor] = _attention_lse(q, k, v, asked)  # type: ignore[assignment]
    return result


@operation("(Tensor q, Tensor k, Tensor v, str asked) -> (Tensor, Tensor)")
def _attention_lse(q: Tensor, k: Tensor, v: Tensor, asked: str) -> Attended:
    compute = _on_cuda(q.device, q.element_size(), q.shape[2], k.shape[0], asked) if q.is_cuda else reference
    return compute(q, k, v, True)


@_attention_lse.on_meta
def _(q: Tensor, k: Tensor, v: Tensor, asked: str) -> Attended:
    del k, asked
    rows, heads, _ = q.shape
    return q.new_empty((rows, heads, v.shape[2])), q.new_empty((heads, rows), dtype=torch.float32)


@cache
def _on_cuda(device: torch.device, dtype_bytes: int, head_dim: int, keys: int, asked: str) -> Callable[..., Attended]:
    return chosen(torch.cuda.get_device_capability(device), dtype_bytes, head_dim, keys, asked).function()


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's, which looks for a backend itself, in the order of the registry."""
    return rows_first(F.scaled_dot_product_attention(heads_first(q), heads_first(k), heads_first(v)))
