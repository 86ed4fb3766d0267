"""`wanvram::attention`: softmax attention of one unbatched sample, heads in the middle, no hidden output copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wanvram.kernels.attention_backends import chosen
from wanvram.kernels.operation import operation

__all__ = ["attention", "scaled_dot_product"]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(D^-0.5 q k^T) v for q [Lq,H,D], k and v [Lk,H,D] -> contiguous [Lq,H,D]."""
    result: Tensor = _attention(q, k, v)
    return result


@operation("(Tensor q, Tensor k, Tensor v) -> Tensor")
def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    compute = _on_cuda(q.device, q.element_size(), q.shape[2]) if q.is_cuda else scaled_dot_product
    result: Tensor = compute(q, k, v)
    return result


@cache
def _on_cuda(device: torch.device, dtype_bytes: int, head_dim: int) -> Callable[..., Any]:
    return chosen(torch.cuda.get_device_capability(device), dtype_bytes, head_dim).function()


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's, which looks for a backend itself, in the order of the registry."""
    out = F.scaled_dot_product_attention(_heads_first(q), _heads_first(k), _heads_first(v))
    # Flash, cuDNN and memory-efficient attention allocate [1,Lq,H,D] and return it transposed: contiguous() is free.
    return out.squeeze(0).transpose(0, 1).contiguous()


def _heads_first(x: Tensor) -> Tensor:
    """View [L,H,D] as [1,H,L,D]."""
    return x.transpose(0, 1).unsqueeze(0)


@_attention.on_meta
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    del k
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
