"""What CUDA libraries allocate beside the tensors: rules by GPU and tables measured on the H200. No torch.

Measured with benchmarks/probe_libraries.py (2026-11-24, H200, torch 2.11.0+cu130, cuDNN 9.19); rules for other
architectures are read from PyTorch's sources and marked so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib import resources

from wanvram.simulate.gpus import GPU
from wanvram.units import MIB

__all__ = ["KNOWN_TORCH", "Libraries", "conv_key"]

KNOWN_TORCH = (
    (2, 11),
    (2, 15),
)  # from, to before: the releases whose allocator and choice of attention the rules here describe


def conv_key(dtype: str, x: Sequence[int], weight: Sequence[int], stride: Sequence[int]) -> str:
    """Identifies one convolution in the workspace table: dtype, input [C,T,H,W], weight, stride."""
    return f"{dtype} {'x'.join(map(str, x[1:]))} {'x'.join(map(str, weight))} {'x'.join(map(str, stride))}"


@cache
def _workspaces() -> dict[str, int]:
    file = resources.files("wanvram.simulate").joinpath("conv_workspaces.json")
    return dict(json.loads(file.read_text()))


class Libraries:
    """Sizes for one GPU."""

    def __init__(self, gpu: GPU) -> None:
        self.gpu = gpu

    @property
    def cublas_workspace_bytes(self) -> int:
        """Taken at the first product and kept. sm_90 and newer: 32 MiB (measured); older: 8,519,680 B (PyTorch source)."""
        return 32 * MIB if self.gpu.compute_capability >= (9, 0) else 8_519_680

    @property
    def cublaslt_workspace_bytes(self) -> int:
        """Taken at the first product with a fused bias and kept: 1 MiB (measured)."""
        return MIB

    def attention_backend(self, dtype_bytes: int, head_dim: int) -> str:
        """What scaled_dot_product_attention picks (PyTorch's sdp_utils.cpp): cudnn, flash or efficient."""
        capability = self.gpu.compute_capability
        if dtype_bytes == 2 and head_dim <= 128 and capability >= (9, 0) and capability < (12, 0):
            return "cudnn"
        if dtype_bytes == 2 and head_dim <= 256 and capability >= (8, 0):
            return "flash"
        return "efficient"

    def attention_extra(self, backend: str, lq: int, heads: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Bytes taken (before the output and freed last, after it and freed at once).

        cudnn: two 8-byte seeds and 256 bytes (measured); flash: fp32 log-sum-exp and two seeds; efficient: nothing (measured).
        """
        if backend == "cudnn":
            return (8, 8), (256,)
        if backend == "flash":
            return (), (4 * heads * lq, 16, 8)
        return (), ()

    def conv_workspace(self, dtype: str, x: Sequence[int], weight: Sequence[int], stride: Sequence[int]) -> int:
        """cuDNN's workspace in channels_last_3d, bytes: the H200's table where it has the shape, else its commonest value, 131.

        Most are under 512 bytes; those of small frames and of the convolutions to and from three channels are megabytes.
        """
        return _workspaces().get(conv_key(dtype, x, weight, stride), 131)
