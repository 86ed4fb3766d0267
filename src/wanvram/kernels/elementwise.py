"""Fused row-wise operations `wanvram::*`: norms, rotary embedding, adds, GELU with or without its product.

Arithmetic is float32 whatever the storage dtype. Each operation has a plain PyTorch reference (CPU, and CUDA without
Triton or with WANVRAM_KERNELS=reference) and a Triton kernel that allocates nothing but its output.
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


def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, scale_offset: float, dtype: torch.dtype
) -> Tensor:
    """LayerNorm over the last dimension of x [L,D], times (scale + scale_offset), plus shift -> [L,D] in dtype.

    scale, shift: float32 [D]. scale_offset is 1 for adaptive modulation and 0 for an affine norm.
    """
    result: Tensor = _layer_norm_modulate(x, scale, shift, eps, scale_offset, dtype)
    return result


def rms_norm_(x: Tensor, weight: Tensor, eps: float) -> None:
    """RMSNorm of x [L,D] in place: normalised in float32, rounded to x's dtype, times float32 weight [D]."""
    _rms_norm_(x, weight, eps)


def rms_norm_rope_(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, num_heads: int, eps: float) -> None:
    """rms_norm_ over the full width, then rotation of each head's interleaved pairs by cos, sin [L, D/heads/2]."""
    _rms_norm_rope_(x, weight, cos, sin, num_heads, eps)


def inverse_rms(x: Tensor, out: Tensor, eps: float) -> None:
    """out [L] float32 = 1 / sqrt(mean of the row's squares + eps) for x [L,D]: the statistics of an RMSNorm."""
    _inverse_rms(x, out, eps)


def scaled_rope_(x: Tensor, inverse: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> None:
    """rms_norm_rope_ of some of the columns, x [L,D] with their weight [D], given the statistics of the full width [L]."""
    _scaled_rope_(x, inverse, weight, cos, sin, num_heads)


def gated_add_(x: Tensor, y: Tensor, gate: Tensor) -> None:
    """x += y * gate for float32 x [L,D] and gate [D]; y [L,D] of any dtype."""
    _gated_add_(x, y, gate)


def add_(x: Tensor, y: Tensor) -> None:
    """x += y for float32 x [L,D] and y [L,D] of any dtype, to the bit; PyTorch's own takes 1.6 times as long where they differ."""
    _add_(x, y)


def gelu_tanh_(x: Tensor) -> None:
    """GELU in its tanh form, in place."""
    _gelu_tanh_(x)


def linear_gelu(x: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    """gelu_tanh_(x @ matrix + bias) for x [L,K], matrix [K,N], bias [N] -> [L,N].

    On CUDA 16-bit products apply it to their float32 sums before these are rounded, in the product's own kernel: a read and a
    write of [L,N] less, 35 ms of a 5.3 s step of 14B at 480P.
    """
    result: Tensor = _linear_gelu(x, matrix, bias)
    return result


@operation("(Tensor x, Tensor scale, Tensor shift, float eps, float scale_offset, ScalarType dtype) -> Tensor")
def _layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, scale_offset: float, dtype: torch.dtype
) -> Tensor:
    if uses_triton(x):
        from wanvram.kernels import triton_elementwise

        return triton_elementwise.layer_norm_modulate(x, scale, shift, eps, scale_offset, dtype)
    normalised = torch.nn.functional.layer_norm(x.float(), (x.shape[-1],), eps=eps)
    return normalised.mul_(scale + scale_offset).add_(shift).to(dtype)


@_layer_norm_modulate.on_meta
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


@operation("(Tensor(a!) x, Tensor weight, float eps) -> ()")
def _rms_norm_(x: Tensor, weight: Tensor, eps: float) -> None:
    if uses_triton(x):
        from wanvram.kernels import triton_elementwise

        triton_elementwise.rms_norm_(x, weight, eps)
    else:
        x.copy_(_normalised(x, _inverse(x, eps), weight))


@operation("(Tensor(a!) x, Tensor weight, Tensor cos, Tensor sin, int num_heads, float eps) -> ()")
def _rms_norm_rope_(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, num_heads: int, eps: float) -> None:
    if uses_triton(x):
        from wanvram.kernels import triton_elementwise

        triton_elementwise.rms_norm_rope_(x, weight, cos, sin, num_heads, eps)
        return
    x.copy_(_rotated(_normalised(x, _inverse(x, eps), weight), cos, sin, num_heads))


@operation("(Tensor x, Tensor(a!) out, float eps) -> ()")
def _inverse_rms(x: Tensor, out: Tensor, eps: float) -> None:
    if uses_triton(x):
        from wanvram.kernels import triton_elementwise

        triton_elementwise.inverse_rms(x, out, eps)
    else:
        out.copy_(_inverse(x, eps))


@operation("(Tensor(a!) x, Tensor inverse, Tensor weight, Tensor cos, Tensor sin, int num_heads) -> ()")
def _scaled_rope_(x: Tensor, inverse: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> None:
    if uses_triton(x):
        from wanvram.kernels import triton_elementwise

        triton_elementwise.scaled_rope_(x, inverse, weight, cos, sin, num_heads)
    else:
        x.copy_(_rotated(_normalised(x, inverse, weight), cos, sin, num_heads))


@operation("(Tensor(a!) x, Tensor y, Tensor gate) -> ()")
def _gated_add_(x: Tensor, y: Tensor, gate: Tensor) -> None:
    if uses_triton(x):
        from wanvram.kernels import triton_elementwise

        triton_elementwise.gated_add_(x, y, gate)
    else:
        x.addcmul_(y.float(), gate)


@operation("(Tensor(a!) x, Tensor y) -> ()")
def _add_(x: Tensor, y: Tensor) -> None:
    if uses_triton(x):
        from wanvram.kernels import triton_elementwise

        triton_elementwise.add_(x, y)
    else:
        x.add_(y)


@operation("(Tensor(a!) x) -> ()")
def _gelu_tanh_(x: Tensor) -> None:
    if uses_triton(x):
        from wanvram.kernels import triton_elementwise

        triton_elementwise.gelu_tanh_(x)
    else:
        torch.ops.aten.gelu_(x, approximate="tanh")


@operation("(Tensor x, Tensor matrix, Tensor bias) -> Tensor")
def _linear_gelu(x: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    # On the CPU PyTorch's fused form is the other GELU, by erf; private, so it is asked for and not assumed.
    fused = getattr(torch, "_addmm_activation", None)
    if fused is not None and uses_triton(x) and x.itemsize == 2:
        result: Tensor = fused(bias, x, matrix, use_gelu=True)
        return result
    result = torch.addmm(bias, x, matrix)
    gelu_tanh_(result)
    return result


@_linear_gelu.on_meta
def _(x: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    del bias
    return x.new_empty((x.shape[0], matrix.shape[1]))
