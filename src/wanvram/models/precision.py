"""Which dtype a parameter is stored in: the decision official makes with autocast, made explicit.

Under official's bfloat16 autocast every large product rounds its operands (weight, bias and input) to bfloat16, so storing
those weights and biases rounded changes nothing. What official computes outside that autocast stays float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["BF16", "FP16", "FP32", "PRECISIONS", "Precision"]


@dataclass(frozen=True)
class Precision:
    """matmul: large matrices, their biases and their inputs. small: norms, modulation, time embedding, head, residual."""

    matmul: torch.dtype
    small: torch.dtype


FP32 = Precision(torch.float32, torch.float32)
BF16 = Precision(torch.bfloat16, torch.float32)
FP16 = Precision(torch.float16, torch.float32)
PRECISIONS = {"fp32": FP32, "bf16": BF16, "fp16": FP16}
