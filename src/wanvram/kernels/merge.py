"""`wanvram::merge_attention_`: attention over one part of the keys joined with that over another."""

from __future__ import annotations

import torch
from torch import Tensor

from wanvram.kernels.operation import operation

__all__ = ["merge_attention_"]


@operation(
    "(Tensor(a!) out, Tensor(b!) sums, Tensor part, Tensor part_sums) -> ()",
    triton="wanvram.kernels.triton_elementwise",
)
def merge_attention_(out: Tensor, sums: Tensor, part: Tensor, part_sums: Tensor) -> None:
    """out float32 [n,H,D], sums float32 [H,n] (attention_with_sums) of some keys take those of further keys, part [n,H,D], in.

    The arithmetic is float32; part may be of any dtype.
    """
    weight = torch.sigmoid(part_sums - sums).t().unsqueeze(-1)
    out.lerp_(part.float(), weight)
    sums.copy_(torch.logaddexp(sums, part_sums))
