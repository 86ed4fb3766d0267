"""What CUDA libraries allocate beside the tensors, by GPU: what they keep from their first use on, and what one operation takes. No torch.

Measured with benchmarks/probe_libraries.py (2026-11-24, H200, torch 2.11.0+cu130, cuDNN 9.19); rules for other
architectures are read from PyTorch's sources and marked so. Order as seen in H200 histories
(benchmarks/2026-11-24_h200_probe_libraries.json): cuDNN attention takes two 8-byte seeds, then its output, then 256 bytes of
workspace; convolutions take output, then workspace; the first product takes output, then cuBLAS's buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from wanvram.kernels.attention_backends import chosen
from wanvram.simulate.convolutions import UNKNOWN_BYTES, Convolution, Workspace, workspace
from wanvram.simulate.gpus import GPU
from wanvram.units import MIB

__all__ = ["KNOWN_TORCH", "BufferPlan", "Libraries"]

# From, to before: the releases whose allocator and choice of attention the rules here describe.
KNOWN_TORCH = (2, 11), (2, 15)


@dataclass(frozen=True)
class BufferPlan:
    """before: taken before the output, freed at the end. during: after the output, freed at the end. loads: libraries used."""

    before: tuple[int, ...] = ()
    during: tuple[int, ...] = ()
    loads: tuple[str, ...] = ()


_PRODUCT = BufferPlan(loads=("cublas",))
_LT_PRODUCT = BufferPlan(loads=("cublas", "cublaslt"))
_SCALAR = BufferPlan(during=(8,))  # the scalar base becomes a tensor on the device
_TRITON = BufferPlan(loads=("triton",))


class Libraries:
    """Of one GPU; operations that are not known take nothing."""

    def __init__(self, gpu: GPU) -> None:
        self.gpu = gpu
        self._convolutions: dict[Convolution, Workspace] = {}
        self._planners: dict[str, Callable[[tuple[Any, ...]], BufferPlan]] = {
            "aten.mm.default": lambda args: _PRODUCT,
            "aten.mm.out": lambda args: _PRODUCT,
            "aten.bmm.default": lambda args: _PRODUCT,
            "aten.bmm.out": lambda args: _PRODUCT,
            "aten.baddbmm.default": lambda args: _PRODUCT,
            "aten.addmm.default": lambda args: _LT_PRODUCT,
            "aten.addmm.out": lambda args: _LT_PRODUCT,
            "wanvram.scaled_product.default": lambda args: _LT_PRODUCT,
            "wanvram.linear_gelu.default": lambda args: _LT_PRODUCT,
            "aten.pow.Scalar": lambda args: _SCALAR,
            "wanvram.attention.default": self._attention,
            "wanvram.attention_lse.default": self._attention_with_sums,
            "wanvram.conv2d.default": self._convolution,
            "wanvram.conv3d.default": self._convolution,
        }

    def plan(self, operation: str, args: tuple[Any, ...]) -> BufferPlan | None:
        planner = self._planners.get(operation)
        if planner is not None:
            return planner(args)
        return _TRITON if operation.startswith("wanvram.") else None

    def persistent_buffers(self, library: str) -> tuple[int, ...]:
        """What a library allocates at its first use and keeps, bytes.

        cuBLAS 32 MiB on sm_90 and newer (measured), 8,519,680 B on older cards (PyTorch source); with a fused bias 1 MiB (measured).
        """
        if library == "cublas":
            return (32 * MIB if self.gpu.compute_capability >= (9, 0) else 8_519_680,)
        return (MIB,) if library == "cublaslt" else ()

    def conv_workspace(self, convolution: Convolution) -> int:
        """cuDNN's workspace in channels_last_3d, bytes. Other architectures than sm_90 are taken for it."""
        found = self._convolutions.get(convolution)
        if found is None:
            found = self._convolutions[convolution] = workspace(convolution)
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

    def _attention(self, args: tuple[Any, ...]) -> BufferPlan:
        lq, heads, head_dim = args[0].shape
        backend = chosen(self.gpu.compute_capability, args[0].element_size(), head_dim, args[1].shape[0], *args[3:])
        before, during = backend.extra(lq, heads)
        return BufferPlan(before, during, loads=(backend.library,) if backend.library else ())

    def _attention_with_sums(self, args: tuple[Any, ...]) -> BufferPlan:
        """The sums are a result here, which a backend that makes them either way takes at once with its own buffers."""
        plan, sums = self._attention(args), 4 * args[0].shape[0] * args[0].shape[1]
        return BufferPlan(plan.before, tuple(n for n in plan.during if n != sums), plan.loads)

    def _convolution(self, args: tuple[Any, ...]) -> BufferPlan:
        taken = self.conv_workspace(Convolution.of(*args))
        return BufferPlan(during=(taken,) if taken else (), loads=("cudnn",))
