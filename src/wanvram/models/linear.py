"""A product with a bias: in the dtype of its parameters, or of float8 numbers where the engine put such a weight in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wanvram.kernels.elementwise import layer_norm_modulate, linear_gelu
from wanvram.kernels.scaled_products import ScaledRows, modulated_rows, scaled_product, scaled_rows

__all__ = ["Linear", "parameter"]


def parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class Linear(nn.Module):
    """Product and bias in the dtype of the parameters, which are left uninitialised.

    scale: None, or float32 [outputs, 1] where a weight in float8 was put in place; the product is then one of float8 numbers.
    """

    scale: Tensor | None

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = parameter(outputs, inputs, dtype=dtype)
        self.bias = parameter(outputs, dtype=dtype)
        self.register_parameter("scale", None)

    def operand(self, h: Tensor) -> Tensor | ScaledRows:
        """h [L, inputs] as this product takes it: once for all products of the same rows, and instead of them."""
        return h if self.scale is None else scaled_rows(h)

    def modulated(
        self, x: Tensor, scale: Tensor, shift: Tensor, eps: float, scale_offset: float
    ) -> Tensor | ScaledRows:
        """layer_norm_modulate of x float32 [L, inputs], as this product takes it."""
        if self.scale is None:
            return layer_norm_modulate(x, scale, shift, eps, scale_offset, self.bias.dtype)
        return modulated_rows(x, scale, shift, eps, scale_offset)

    def forward(self, h: Tensor | ScaledRows) -> Tensor:
        if self.scale is None and isinstance(h, Tensor):
            return torch.addmm(self.bias, h, self.weight.t())
        out = self.bias.new_empty((h.shape[0], self.bias.shape[0]))
        self.into(out, h)
        return out

    def gelu(self, h: Tensor) -> Tensor:
        """GELU in its tanh form, of the product with its bias, in 16 bits."""
        return linear_gelu(h, self.weight.t(), self.bias)

    def into(self, out: Tensor, h: Tensor | ScaledRows) -> None:
        if self.scale is not None:
            rows = scaled_rows(h) if isinstance(h, Tensor) else h
            scaled_product(rows, self.weight, self.scale, self.bias, out)
        elif isinstance(h, Tensor):
            torch.addmm(self.bias, h, self.weight.t(), out=out)

    def columns_into(self, out: Tensor, h: Tensor | ScaledRows, columns: slice) -> None:
        """These columns of the result only."""
        if self.scale is not None:
            rows = scaled_rows(h) if isinstance(h, Tensor) else h
            scaled_product(rows, self.weight[columns], self.scale[columns], self.bias[columns], out)
        elif isinstance(h, Tensor):
            torch.addmm(self.bias[columns], h, self.weight[columns].t(), out=out)
