"""Fused row-wise operations `wanvram::*`: norms, rotary embedding, adds, GELU with or without its product.

Arithmetic is float32 whatever the storage dtype. Each operation is a plain PyTorch reference (CPU, and CUDA without
Triton or with WANVRAM_KERNELS=reference) with a Triton kernel that allocates nothing but its output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wanvram.kernels.operation import operation, uses_triton

__all__ = [
    "add_",
    "gated_add_",
    "gelu_tanh_",
    "inverse_rms",
    "layer_norm_modulate",
    "linear_gelu",
    "rms_norm_",
    "rms_norm_rope_",
    "scaled_rope_",
]

_TRITON = "wanvram.kernels.triton_elementwise"


@operation(
    "(Tensor x, Tensor scale, Tensor shift, float eps, float scale_offset, ScalarType dtype) -> Tensor", triton=_TRITON
)
def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, scale_offset: float, dtype: torch.dtype
) -> Tensor:
    """LayerNorm over the last dimension of x [L,D], times (scale + scale_offset), plus shift -> [L,D] in dtype.

    scale, shift: float32 [D]. scale_offset is 1 for adaptive modulation and 0 for an affine norm.
    """
    normalised = torch.nn.functional.layer_norm(x.float(), (x.shape[-1],), eps=eps)
    return normalised.mul_(scale + scale_offset).add_(shift).to(dtype)


@layer_norm_modulate.on_meta
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float, scale_offset: float, dtype: torch.dtype) -> Tensor:
    del scale, shift, eps, scale_offset
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _inverse(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.float().square().mean(-1) + eps)


def _normalised(x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    """Float32 result; official rounds between the normalisation and the float32 weight, so this does too."""
    return (x.float() * inverse.unsqueeze(-1)).to(x.dtype).float().mul_(weight)


def _rotated(wide: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """Interleaved pairs of each head of wide [L,D], rotated."""
    even, odd = wide.view(wide.shape[0], num_heads, -1, 2).unbind(-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).view(wide.shape)


@operation("(Tensor(a!) x, Tensor weight, float eps) -> ()", triton=_TRITON)
def rms_norm_(x: Tensor, weight: Tensor, eps: float) -> None:
    """RMSNorm of x [L,D] in place: normalised in float32, rounded to x's dtype, times float32 weight [D]."""
    x.copy_(_normalised(x, _inverse(x, eps), weight))


@operation("(Tensor(a!) x, Tensor weight, Tensor cos, Tensor sin, int num_heads, float eps) -> ()", triton=_TRITON)
def rms_norm_rope_(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, num_heads: int, eps: float) -> None:
    """rms_norm_ over the full width, then rotation of each head's interleaved pairs by cos, sin [L, D/heads/2]."""
    x.copy_(_rotated(_normalised(x, _inverse(x, eps), weight), cos, sin, num_heads))


@operation("(Tensor x, Tensor(a!) out, float eps) -> ()", triton=_TRITON)
def inverse_rms(x: Tensor, out: Tensor, eps: float) -> None:
    """out [L] float32 = 1 / sqrt(mean of the row's squares + eps) for x [L,D]: the statistics of an RMSNorm."""
    out.copy_(_inverse(x, eps))


@operation("(Tensor(a!) x, Tensor inverse, Tensor weight, Tensor cos, Tensor sin, int num_heads) -> ()", triton=_TRITON)
def scaled_rope_(x: Tensor, inverse: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> None:
    """rms_norm_rope_ of some of the columns, x [L,D] with their weight [D], given the statistics of the full width [L]."""
    x.copy_(_rotated(_normalised(x, inverse, weight), cos, sin, num_heads))


@operation("(Tensor(a!) x, Tensor y, Tensor gate) -> ()", triton=_TRITON)
def gated_add_(x: Tensor, y: Tensor, gate: Tensor) -> None:
    """x += y * gate for float32 x [L,D] and gate [D]; y [L,D] of any dtype."""
    x.addcmul_(y.float(), gate)


@operation("(Tensor(a!) x, Tensor y) -> ()", triton=_TRITON)
def add_(x: Tensor, y: Tensor) -> None:
    """x += y for float32 x [L,D] and y [L,D] of any dtype, to the bit; PyTorch's own takes 1.6 times as long where they differ."""
    x.add_(y)


@operation("(Tensor(a!) x) -> ()", triton=_TRITON)
def gelu_tanh_(x: Tensor) -> None:
    """GELU in its tanh form, in place."""
    torch.ops.aten.gelu_(x, approximate="tanh")


@operation("(Tensor x, Tensor matrix, Tensor bias) -> Tensor")
def linear_gelu(x: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    """gelu_tanh_(x @ matrix + bias) for x [L,K], matrix [K,N], bias [N] -> [L,N].

    On CUDA 16-bit products apply it to their float32 sums before these are rounded, in the product's own kernel: a read and a
    write of [L,N] less, 35 ms of a 5.3 s step of 14B at 480P.
    """
    # On the CPU PyTorch's fused form is the other GELU, by erf; private, so it is asked for and not assumed.
    fused = getattr(torch, "_addmm_activation", None)
    if fused is not None and uses_triton(x) and x.itemsize == 2:
        result: Tensor = fused(bias, x, matrix, use_gelu=True)
        return result
    result = torch.addmm(bias, x, matrix)
    gelu_tanh_(result)
    return result


@linear_gelu.on_meta
def _(x: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    del bias
    return x.new_empty((x.shape[0], matrix.shape[1]))
