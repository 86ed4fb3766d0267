"""A small first use of every library, before any weights: what they take outside the allocator is then there, and known."""

from __future__ import annotations

import torch

from wanvram.config import Strategy
from wanvram.engine.devices import Device
from wanvram.kernels.attention_backends import LONG_KEYS, is_for_long
from wanvram.kernels.conv import conv3d
from wanvram.kernels.elementwise import rms_norm_
from wanvram.kernels.scaled_attention import attention
from wanvram.kernels.scaled_products import scaled_product, scaled_rows
from wanvram.knobs import PRECISION, PRODUCT_PRECISION
from wanvram.models.precision import PRECISIONS

__all__ = ["use_libraries"]

ROWS, COLUMNS = 64, 128
CHANNELS, EDGE = 16, 16


def use_libraries(device: Device, strategy: Strategy, asked: str) -> None:
    """One smallest operation of each: PyTorch's own kernels, products, attention, convolution, ours. Values do not matter."""
    matmul, vae = PRECISIONS[PRECISION.of(strategy)].matmul, PRECISIONS[strategy.vae_precision].matmul
    x = device.empty((ROWS, COLUMNS), matmul)
    weight = device.empty((COLUMNS, COLUMNS), matmul)
    x.fill_(1.0)
    torch.mm(x, weight)
    torch.addmm(weight[0], x, weight)
    if PRODUCT_PRECISION.of(strategy) == "fp8":
        rows = scaled_rows(weight)
        scaled_product(scaled_rows(x), rows.values, rows.scales, weight[0], torch.empty_like(x))
        del rows
    rms_norm_(x, device.empty((COLUMNS,), torch.float32), 1e-6)
    heads = x.view(ROWS, 1, COLUMNS)
    attention(heads, heads, heads, asked)
    if is_for_long(asked):
        many = device.empty((LONG_KEYS + ROWS, 1, COLUMNS), matmul)
        attention(heads, many, many, asked)
        del many
    window, kernel = (
        device.empty((count, 3, size, size, CHANNELS), vae).permute(0, 4, 1, 2, 3)  # channels_last_3d
        for count, size in ((1, EDGE), (CHANNELS, 3))
    )
    conv3d(window, kernel, None, (1, 1, 1), (0, 0, 0))
