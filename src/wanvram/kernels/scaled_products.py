"""Numbers in float8_e4m3fn with one scale per row, and products of them: `wanvram::scaled_product` and what quantises. Lossy.

Three mantissa bits: an error of at most 2^-4 of a value, or 2^-10 of its row's largest for values under 2^-6 of that. It is what
`wanvram convert` writes, what the engine packs, and what the transformer multiplies where it is asked to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wanvram.kernels.elementwise import gelu_tanh_, layer_norm_modulate
from wanvram.kernels.operation import operation

__all__ = [
    "FP8",
    "LARGEST",
    "SCALE_SUFFIX",
    "ScaledRows",
    "gelu_rows",
    "modulated_rows",
    "quantise_rows",
    "row_scales",
    "scaled_product",
    "scaled_rows",
    "to_fp8",
]

SCALE_SUFFIX = ".scale"  # of a matrix's name: what the scales of its rows are called
FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # the largest finite e4m3 number
_TRITON = "wanvram.kernels.triton_fp8"


@dataclass(frozen=True)
class ScaledRows:
    """values [L,K] in FP8 times scales, float32 [L,1]."""

    values: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


def row_scales(matrix: Tensor) -> Tensor:
    """[rows, columns] -> float32 [rows, 1]: what brings each row's largest value to LARGEST; 1 for a row of zeros."""
    largest = matrix.abs().amax(dim=1, keepdim=True).float()
    return torch.where(largest > 0, largest / LARGEST, 1.0)


def to_fp8(matrix: Tensor, scales: Tensor) -> Tensor:
    """[rows, columns] over its scales, in fp8. The quotient can be rounded above LARGEST, which fp8 would store as NaN.

    Times the reciprocal, as a kernel does it that has no time for divisions.
    """
    return (matrix * (1.0 / scales)).clamp_(-LARGEST, LARGEST).to(FP8)


@operation("(Tensor x, Tensor(a!) values, Tensor(b!) scales) -> ()", triton=_TRITON)
def quantise_rows(x: Tensor, values: Tensor, scales: Tensor) -> None:
    """x [L,K] -> values FP8 [L,K] and scales float32 [L,1]: `row_scales` and `to_fp8` in one pass, to the bit."""
    scales.copy_(row_scales(x))
    values.copy_(to_fp8(x, scales))


def scaled_rows(x: Tensor) -> ScaledRows:
    """x [L,K], quantised into tensors of its own."""
    rows = _empty(x)
    quantise_rows(x, rows.values, rows.scales)
    return rows


def _empty(x: Tensor) -> ScaledRows:
    values = torch.empty(x.shape, dtype=FP8, device=x.device)
    return ScaledRows(values, torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device))


def modulated_rows(x: Tensor, scale: Tensor, shift: Tensor, eps: float, scale_offset: float) -> ScaledRows:
    """scaled_rows of layer_norm_modulate of x in bfloat16, in one pass; sums may be added in another order."""
    rows = _empty(x)
    _modulated_rows(x, scale, shift, eps, scale_offset, rows.values, rows.scales)
    return rows


def gelu_rows(x: Tensor) -> ScaledRows:
    """scaled_rows of gelu_tanh_ of x, in one pass, to the bit; x is used up."""
    rows = _empty(x)
    _gelu_rows(x, rows.values, rows.scales)
    return rows


def scaled_product(x: ScaledRows, weight: Tensor, scale: Tensor, bias: Tensor, out: Tensor) -> None:
    """out [L,N] = x times the transpose of weight FP8 [N,K] with its rows' scale float32 [N,1], plus bias [N].

    On CUDA out and bias are bfloat16, N and K multiples of 16, compute capability 8.9 or newer: cuBLAS's kernels on sm_90, CUTLASS's
    elsewhere (PyTorch's ScaledBlas.cpp). It then takes no memory beside cuBLAS's workspace (read from CUDABlas.cpp, not yet measured).
    """
    _scaled_product(x.values, x.scales, weight, scale, bias, out)


@operation(
    "(Tensor x, Tensor scale, Tensor shift, float eps, float offset, Tensor(a!) values, Tensor(b!) scales) -> ()",
    triton=_TRITON,
)
def _modulated_rows(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, offset: float, values: Tensor, scales: Tensor
) -> None:
    quantise_rows(layer_norm_modulate(x, scale, shift, eps, offset, torch.bfloat16), values, scales)


@operation("(Tensor(a!) x, Tensor(b!) values, Tensor(c!) scales) -> ()", triton=_TRITON)
def _gelu_rows(x: Tensor, values: Tensor, scales: Tensor) -> None:
    gelu_tanh_(x)
    quantise_rows(x, values, scales)


@operation("(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor bias, Tensor(a!) out) -> ()")
def _scaled_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, out: Tensor
) -> None:
    """Sums in what the tensor cores keep (use_fast_accum): its error is far below that of the operands."""
    if x.is_cuda:
        torch._scaled_mm(
            x,
            weight.t(),
            x_scale,
            weight_scale.t(),
            bias=bias,
            out_dtype=out.dtype,
            use_fast_accum=True,
            out=out,
        )
        return
    wide = torch.mm(x.float(), weight.float().t())
    out.copy_(wide.mul_(x_scale).mul_(weight_scale.t()).add_(bias))
