"""`wanvram::attention`: softmax attention of one unbatched sample, heads in the middle, no hidden output copy."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from wanvram.kernels.operation import operation

__all__ = ["attention"]


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(scale * q k^T + bias) v for q [Lq,H,D], k and v [Lk,H,D], bias [H,Lq,Lk] -> contiguous [Lq,H,D].

    scale None means D^-0.5. The bias has the dtype of q.
    """
    result: Tensor = _attention(q, k, v, bias, scale)
    return result


@operation("(Tensor q, Tensor k, Tensor v, Tensor? bias=None, float? scale=None) -> Tensor")
def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    mask = None if bias is None else bias.unsqueeze(0)
    out = F.scaled_dot_product_attention(_heads_first(q), _heads_first(k), _heads_first(v), mask, scale=scale)
    # Flash, cuDNN and memory-efficient attention allocate [1,Lq,H,D] and return it transposed: contiguous() is free.
    return out.squeeze(0).transpose(0, 1).contiguous()


def _heads_first(x: Tensor) -> Tensor:
    """View [L,H,D] as [1,H,L,D]."""
    return x.transpose(0, 1).unsqueeze(0)


@_attention.custom.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    del k, bias, scale
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
