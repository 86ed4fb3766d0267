"""The cards people own: memory, rates, and what CUDA takes outside the caching allocator. No torch.

Rates are published peaks; what of them is reached (`Efficiency`) was measured on the H200 and is applied to every card, so times
on other cards are estimates. The H200's memory figures were measured (benchmarks/*_h200_*.json); for every other card the CUDA
context is an estimate: the H200's, generous for cards with fewer multiprocessors. total_bytes is what the driver offers a process.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from wanvram.errors import InputError
from wanvram.units import GIB, MIB

__all__ = ["DEFAULT_GPU", "EFFICIENCY", "GPU", "GPUS", "HOST", "Efficiency", "Host", "cards_with_memory", "find_gpu"]

DEFAULT_GPU = "h200"


@dataclass(frozen=True)
class Efficiency:
    """The share of a card's peak rates that long kernels reach, and what every operation costs besides. See EFFICIENCY."""

    product: float  # 16-bit and 8-bit matrix products
    product_fp32: float
    attention: float  # 16-bit: cuDNN on the H200; FlashAttention-2 reaches about this share on Ampere and Ada
    attention_fp32: float
    conv_tf32: float
    conv_tf32_narrow: float  # fewer than 128 channels on one side: the matrix units' tiles are partly empty
    conv_half: float
    conv_half_narrow: float
    memory: float  # of the bandwidth, in elementwise kernels and copies within the device
    launch_seconds: float  # from one kernel's end to the next one's start
    view_seconds: float  # host time of a view or an allocation; the device does nothing
    dispatch_seconds: float  # host time of one operation with its share of Python
    own_seconds: float  # the same for the operations `wanvram::*`: Triton's launcher, attention, convolutions


@dataclass(frozen=True)
class Host:
    """The machine around the card, bytes and operations per second."""

    pageable_bytes: float  # between pageable RAM and device; never faster than the card's link
    copy_bytes: float  # from RAM to RAM, in a thread beside the computation
    disk_bytes: float  # checkpoint files
    flops: float  # bf16 products on the CPU
    memory_bytes: float  # read and written by operations on the CPU


# Fitted on an H200, 2026-11-24, torch 2.11.0+cu130, against whole steps and decodes (benchmarks/calibrate_clock.py): products and
# attention of 1.3B at 832x480 and 14B at 1280x720, the VAE in float32 at both. 16-bit convolutions and float32 attention are from
# single kernels (h200.md, *_probe_libraries.json). The host's times per operation are estimates.
EFFICIENCY = Efficiency(
    product=0.715,
    product_fp32=0.71,
    attention=0.58,
    attention_fp32=0.62,
    conv_tf32=0.41,
    conv_tf32_narrow=0.275,
    conv_half=0.63,
    conv_half_narrow=0.30,
    memory=0.77,
    launch_seconds=3e-6,
    view_seconds=5e-6,
    dispatch_seconds=18e-6,
    own_seconds=50e-6,
)

# The H200's machine, 16 cores: pageable_bytes is measured, flops and memory_bytes follow from T5 on the CPU (2.0 s for two
# prompts). copy_bytes (one thread's memcpy) and disk_bytes (an NVMe drive, files not in the page cache) are assumptions.
HOST = Host(pageable_bytes=9.1e9, copy_bytes=10e9, disk_bytes=3e9, flops=3e12, memory_bytes=20e9)


@dataclass(frozen=True)
class GPU:
    """One card. module_bytes: device memory taken at a library's first use.

    Rates are published peaks per second: products dense (no sparsity) with sums in float32, float32 without tensor cores.
    pcie_bytes is not a peak but what a copy from pinned memory reaches: 55 GB/s on PCIe 5.0 x16 (measured), half for each step down.
    """

    key: str
    name: str
    total_bytes: int
    compute_capability: tuple[int, int]
    bf16_flops: float
    fp32_flops: float
    fp8_flops: float | None
    bandwidth_bytes: float
    pcie_bytes: float
    context_bytes: int
    module_bytes: Mapping[str, int] = field(default_factory=dict)
    efficiency: Efficiency = EFFICIENCY
    measured: bool = False
    note: str = ""

    @property
    def tf32_flops(self) -> float:
        """float32 products with TF32, which cuDNN uses unless told not to: half of bf16 since Ampere (NVIDIA's data sheets)."""
        return self.bf16_flops / 2 if self.compute_capability >= (8, 0) else self.fp32_flops


_MODULES = {"kernels": 92 * MIB, "cublas": 66 * MIB, "attention": 8 * MIB, "cudnn": 2 * MIB, "triton": 2 * MIB}
_CONTEXT = 588 * MIB
_ESTIMATE = "published rates; context estimated from the H200; usable memory taken as 98 % of nominal"


def _card(
    key: str, name: str, gib: float, capability: tuple[int, int], rates: tuple[float, float, float, float, float | None]
) -> GPU:
    """rates: bf16 TFLOP/s, fp32 TFLOP/s, memory GB/s, link GB/s, fp8 TFLOP/s or None."""
    bf16, fp32, bandwidth, pcie, fp8 = rates
    return GPU(
        key=key,
        name=name,
        total_bytes=int(gib * GIB * 0.98),
        compute_capability=capability,
        bf16_flops=bf16 * 1e12,
        fp32_flops=fp32 * 1e12,
        fp8_flops=fp8 * 1e12 if fp8 else None,
        bandwidth_bytes=bandwidth * 1e9,
        pcie_bytes=pcie * 1e9,
        context_bytes=_CONTEXT,
        module_bytes=_MODULES,
        note=_ESTIMATE,
    )


_H200 = GPU(
    key="h200",
    name="NVIDIA H200",
    total_bytes=150_109_880_320,
    compute_capability=(9, 0),
    bf16_flops=989e12,
    fp32_flops=67e12,
    fp8_flops=1979e12,
    bandwidth_bytes=4.8e12,
    pcie_bytes=55.2e9,
    context_bytes=_CONTEXT,
    module_bytes=_MODULES,
    measured=True,
    note="measured 2026-11-24, driver 580.159, torch 2.11.0+cu130",
)

GPUS: dict[str, GPU] = {
    gpu.key: gpu
    for gpu in (
        _H200,
        _card("h100", "NVIDIA H100 80GB", 80, (9, 0), (989, 67, 3350, 55, 1979)),
        _card("a100-80gb", "NVIDIA A100 80GB", 80, (8, 0), (312, 19.5, 2039, 25, None)),
        _card("a100-40gb", "NVIDIA A100 40GB", 40, (8, 0), (312, 19.5, 1555, 25, None)),
        _card("l40s", "NVIDIA L40S", 48, (8, 9), (362, 91.6, 864, 25, 733)),
        _card("a6000", "NVIDIA RTX A6000", 48, (8, 6), (155, 38.7, 768, 25, None)),
        _card("rtx5090", "NVIDIA GeForce RTX 5090", 32, (12, 0), (210, 105, 1792, 55, 419)),
        _card("rtx4090", "NVIDIA GeForce RTX 4090", 24, (8, 9), (165, 82.6, 1008, 25, 330)),
        _card("rtx3090", "NVIDIA GeForce RTX 3090", 24, (8, 6), (71, 35.6, 936, 25, None)),
        _card("rtx4080", "NVIDIA GeForce RTX 4080", 16, (8, 9), (97, 48.7, 717, 25, 195)),
        _card("rtx4070ti-super", "NVIDIA GeForce RTX 4070 Ti SUPER", 16, (8, 9), (88, 44.1, 672, 25, 176)),
        _card("rtx4060ti-16gb", "NVIDIA GeForce RTX 4060 Ti 16GB", 16, (8, 9), (44, 22.1, 288, 12.5, 88)),
        _card("t4", "NVIDIA T4", 16, (7, 5), (65, 8.1, 320, 12.5, None)),
        _card("rtx4070", "NVIDIA GeForce RTX 4070", 12, (8, 9), (58, 29.1, 504, 25, 117)),
        _card("rtx3060-12gb", "NVIDIA GeForce RTX 3060 12GB", 12, (8, 6), (25, 12.7, 360, 25, None)),
        _card("rtx3080-10gb", "NVIDIA GeForce RTX 3080 10GB", 10, (8, 6), (59, 29.8, 760, 25, None)),
        _card("rtx4060", "NVIDIA GeForce RTX 4060 8GB", 8, (8, 9), (30, 15.1, 272, 12.5, 60)),
    )
}


# Also what the driver adds to data-centre cards, as in `NVIDIA A100-SXM4-80GB`, `NVIDIA H100 80GB HBM3` and `Tesla T4`.
_IGNORED = ("nvidia", "geforce", "tesla", "simulated:", "sxm4", "sxm5", "pcie", "hbm3", " ", "-", "_")


def _normal(text: str) -> str:
    text = text.lower()
    for word in _IGNORED:
        text = text.replace(word, "")
    return text


def find_gpu(text: str) -> GPU:
    """By key or product name, whatever the case and spaces; a card's memory may be left out where only one size is known.

    Raises InputError listing the known cards.
    """
    wanted = _normal(text)
    for gpu in GPUS.values():
        if wanted in (_normal(gpu.key), _normal(gpu.name)):
            return gpu
    close = [gpu for gpu in GPUS.values() if re.fullmatch(re.escape(wanted) + r"\d+gb", _normal(gpu.key))]
    if len(close) == 1:
        return close[0]
    raise InputError(f"GPU '{text}' is unknown; name the nearest of these (--gpu): {', '.join(GPUS)}")


def cards_with_memory(nbytes: int) -> list[str]:
    """Keys of the cards that are sold with about that much memory."""
    return [gpu.key for gpu in GPUS.values() if abs(gpu.total_bytes - nbytes) < 0.06 * nbytes]
