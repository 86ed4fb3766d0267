"""`wanvram::merge_attention_`: attention over one part of the keys joined with that over another."""

from __future__ import annotations

import torch
from torch import Tensor

from wanvram.kernels.operation import operation, uses_triton

__all__ = ["merge_attention_"]


def merge_attention_(out: Tensor, sums: Tensor, part: Tensor, part_sums: Tensor) -> None:
    """out float32 [n,H,D], sums float32 [H,n] (attention_with_sums) of some keys take those of further keys, part [n,H,D], in.

    The arithmetic is float32; part may be of any dtype.
    """
    _merge_attention_(out, sums, part, part_sums)


@operation("(Tensor(a!) out, Tensor(b!) sums, Tensor part, Tensor part_sums) -> ()")
def _merge_attention_(out: Tensor, sums: Tensor, part: Tensor, part_sums: Tensor) -> None:
    if uses_triton(out):
        from wanvram.kernels import triton_elementwise

        triton_elementwise.merge_attention_(out, sums, part, part_sums)
        return
    weight = torch.sigmoid(part_sums - sums).t().unsqueeze(-1)
    out.lerp_(part.float(), weight)
    sums.copy_(torch.logaddexp(sums, part_sums))
