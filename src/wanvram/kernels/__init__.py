"""The operations `wanvram::*` that models call: exact output memory, one definition for CPU, CUDA and meta tensors.

Convolution lives in `kernels.conv` and is imported from there.
"""

from __future__ import annotations

from wanvram.kernels.attention import attention
from wanvram.kernels.elementwise import (
    gated_add_,
    gelu_tanh_,
    inverse_rms,
    layer_norm_modulate,
    rms_norm_,
    rms_norm_rope_,
    scaled_rope_,
)

MEMORY_IS = "the caller's"  # read by simulate.timeline

__all__ = [
    "attention",
    "gated_add_",
    "gelu_tanh_",
    "inverse_rms",
    "layer_norm_modulate",
    "rms_norm_",
    "rms_norm_rope_",
    "scaled_rope_",
]
