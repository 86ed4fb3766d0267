"""What CUDA libraries allocate beside the tensors: rules by GPU, measured on the H200. No torch.

Measured with benchmarks/probe_libraries.py (2026-11-24, H200, torch 2.11.0+cu130, cuDNN 9.19); rules for other
architectures are read from PyTorch's sources and marked so.
"""

from __future__ import annotations

from wanvram.simulate.convolutions import MULTIPROCESSORS, UNKNOWN_BYTES, Convolution, Workspace, workspace
from wanvram.simulate.gpus import GPU
from wanvram.units import MIB

__all__ = ["KNOWN_TORCH", "Libraries"]

# From, to before: the releases whose allocator and choice of attention the rules here describe.
KNOWN_TORCH = (2, 11), (2, 15)


class Libraries:
    """Sizes for one GPU. multiprocessors: of a card of sm_90; the rules for convolutions are measured for 132."""

    def __init__(self, gpu: GPU, multiprocessors: int = MULTIPROCESSORS) -> None:
        self.gpu = gpu
        self.multiprocessors = multiprocessors
        self._convolutions: dict[Convolution, Workspace] = {}

    @property
    def cublas_workspace_bytes(self) -> int:
        """Taken at the first product and kept. sm_90 and newer: 32 MiB (measured); older: 8,519,680 B (PyTorch source)."""
        return 32 * MIB if self.gpu.compute_capability >= (9, 0) else 8_519_680

    @property
    def cublaslt_workspace_bytes(self) -> int:
        """Taken at the first product with a fused bias and kept: 1 MiB (measured)."""
        return MIB

    def conv_workspace(self, convolution: Convolution) -> int:
        """cuDNN's workspace in channels_last_3d, bytes. Other architectures than sm_90 are taken for it."""
        found = self._convolutions.get(convolution)
        if found is None:
            found = self._convolutions[convolution] = workspace(convolution, self.multiprocessors)
        return found.size

    @property
    def gaps(self) -> str | None:
        """What was asked for so far and is not known to the byte, in a sentence. None: nothing, or nothing is, for this architecture."""
        if self.gpu.compute_capability != (9, 0):
            return None
        found = self._convolutions.values()
        bounded = [size.size - size.lowest for size in found if size.basis == "bound"]
        outside, unknown = (sum(size.basis == basis for size in found) for basis in ("outside", "unknown"))
        parts = []
        if bounded:
            text = f"{len(bounded)} were not measured, and their neighbours differ: the largest workspace is counted"
            parts.append(f"{text}, up to {max(bounded) / MIB:.1f} MiB too much")
        if outside:
            parts.append(f"{outside} are smaller than all measured: the rule of the nearest is counted")
        if unknown:
            parts.append(f"{unknown} have weights never measured: {UNKNOWN_BYTES} bytes of workspace are counted")
        return f"of {len(found)} shapes of convolutions {'; '.join(parts)}" if parts else None
