"""The cards people own, one row each. No torch.

A row: key, name as drivers say it, GiB; 16-bit TFLOP/s (dense, sums in float32), float32 TFLOP/s, memory GB/s; the boost clock in
MHz that those are published at; what is known of the clock under load. Where a source lists SMs and clocks only, the rate is
SMs x operations per clock (512 on GeForce, whose matrix units sum in float32 at half speed; 1024 on RTX A and Ada) x boost clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from wanvram.simulate.card import BUSY, CONTEXT, GPU, H200_BOOST_MHZ, H200_SUSTAINED_MHZ, MODULES
from wanvram.units import GIB

__all__ = ["CARDS"]

# What a copy from pinned memory reaches, GB/s: 5.0 x16 measured on the H200, half for each step down; C2C an estimate from 450 peak.
GEN3_X16, GEN4_X8, GEN4_X16, GEN5_X8, GEN5_X16, C2C = 12.5, 12.5, 25.0, 27.5, 55.0, 350.0

_ESTIMATE = (
    "published rates at the clock under load; context estimated from the H200; usable memory taken as 98 % of nominal"
)
_SHEET = "NVIDIA's data sheet of the card"
_TURING_PAPER = "NVIDIA's Turing whitepaper, and SMs x 512 x boost clock for cards that it does not list"
_AMPERE_PAPER = "NVIDIA's GA102 whitepaper, and SMs x 512 x boost clock for cards that it does not list"
_ADA_PAPER = "NVIDIA's Ada whitepaper, and SMs x 512 x boost clock for cards that it does not list"
_BLACKWELL_PAPER = "NVIDIA's RTX Blackwell whitepaper, and SMs x 512 x boost clock for cards that it does not list"
_LAPTOP = "SMs and the highest boost clock that NVIDIA lists for laptops, SMs x 512 x boost clock"
_LAPTOP_50 = "NVIDIA's AI TOPS for laptops (FP4, sparse) / 16, and the boost clock that gives them"
# Rates of products measured by others in PyTorch, in TFLOP/s.
_SQUARE = "PyTorch, bf16, 8192 x 8192 x 8192: {:g} TFLOP/s (github.com/zzc0721/torch-performance-test-data{})"
_BEST = "PyTorch, best of several sizes: {:g} TFLOP/s (github.com/zzc0721/torch-performance-test-data{}), so at most this clock"
_SHAPE = "PyTorch, bf16, best of many shapes: {:g} TFLOP/s (github.com/mag-/gpu_benchmark), so at most this clock"


@dataclass(frozen=True)
class _Clock:
    """tflops: a measured rate that the sustained clock follows from; mhz: the clock itself; neither: the boost clock is held."""

    source: str
    tflops: float | None = None
    mhz: float | None = None

    def sustained(self, published_tflops: float, boost_mhz: float) -> float:
        if self.tflops is not None:
            return float(round(boost_mhz * self.tflops / (published_tflops * BUSY)))
        return boost_mhz if self.mhz is None else self.mhz


def _square(tflops: float, issue: str = "") -> _Clock:
    return _Clock(_SQUARE.format(tflops, f" {issue}" if issue else ", database.md"), tflops)


def _best(tflops: float, issue: str = "") -> _Clock:
    return _Clock(_BEST.format(tflops, f" {issue}" if issue else ", database.md"), tflops)


def _shape(tflops: float) -> _Clock:
    return _Clock(_SHAPE.format(tflops), tflops)


def _assumed(mhz: float, why: str) -> _Clock:
    return _Clock(f"assumption: {why}", mhz=mhz)


_HELD = _Clock("assumption: the boost clock is held; cards of its kind that were measured held 0.96 to 1.19 of theirs")
_HELD_OLD = _Clock("assumption: the boost clock is held, as the RTX 2080 does")
_LAPTOP_CLOCK = _Clock(
    "assumption: the boost clock is held, which takes the highest power setting; laptops differ much"
)
_HOPPER = _assumed(
    H200_SUSTAINED_MHZ, "the H200's, which has the same chip and power limit; 797.5 TFLOP/s were measured by others"
)
_GRACE = _assumed(1604, "3.8 % above the H100's, as in the best of many shapes (github.com/mag-/gpu_benchmark)")
_GB200 = _assumed(1473, "the B200's")
_A30 = _assumed(
    1024, "that of the A100 PCIe at 250 W, 215.3 TFLOP/s (github.com/zzc0721/torch-performance-test-data #108)"
)
_LIKE_A5000 = _assumed(1508, "the RTX A5000's, which has the same chip and as many watts for each SM")
_A10 = _assumed(1201, "the RTX A4000's, which has 2.9 W for each SM; this one has 2.1")
_LIKE_L40S = _assumed(1847, "the L40S's, which has as many watts for each SM, or a few less")
_MAX_Q = _assumed(1093, "0.57 of the 600 W card's: what the L4 runs at of the L40S's, with half the watts for each SM")


_Rates = tuple[float, float, float]


@dataclass(frozen=True)
class _Family:
    """What cards of a kind share. fp8 on compute capability 8.9 and newer is twice the 16-bit rate."""

    capability: tuple[int, int]
    link: float
    source: str
    note: str = _ESTIMATE

    def card(self, key: str, name: str, gib: int, rates: _Rates, mhz: float, clock: _Clock, link: float = 0.0) -> GPU:
        bf16, fp32, bandwidth = rates
        return GPU(
            key=key,
            name=name,
            total_bytes=int(gib * GIB * 0.98),
            compute_capability=self.capability,
            bf16_flops=bf16 * 1e12,
            fp32_flops=fp32 * 1e12,
            fp8_flops=2 * bf16 * 1e12 if self.capability >= (8, 9) else None,
            bandwidth_bytes=bandwidth * 1e9,
            pcie_bytes=(link or self.link) * 1e9,
            context_bytes=CONTEXT,
            module_bytes=MODULES,
            note=self.note,
            memory_bytes=gib * GIB,
            boost_mhz=float(mhz),
            sustained_mhz=clock.sustained(bf16, mhz),
            rates_source=self.source,
            clock_source=clock.source,
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
    context_bytes=CONTEXT,
    module_bytes=MODULES,
    measured=True,
    note="measured 2026-11-24, driver 580.159, torch 2.11.0+cu130",
    memory_bytes=141 * GIB,
    boost_mhz=H200_BOOST_MHZ,
    sustained_mhz=H200_SUSTAINED_MHZ,
    rates_source=f"{_SHEET}; the link is measured",
    clock_source="bf16, 8192 x 8192 x 8192: 793 TFLOP/s, measured by this project; attention, which draws less, runs at 1785 to 1920 MHz",
)

_VOLTA_NOTE = f"{_ESTIMATE}; no bf16; needs a PyTorch built for CUDA 12, which CUDA 13 no longer allows"
_volta = _Family((7, 0), GEN3_X16, _SHEET, _VOLTA_NOTE).card
_turing = _Family((7, 5), GEN3_X16, _TURING_PAPER, f"{_ESTIMATE}; no bf16").card
_ampere = _Family((8, 0), GEN4_X16, _SHEET).card
_ampere_rtx = _Family((8, 6), GEN4_X16, _SHEET).card
_geforce30 = _Family((8, 6), GEN4_X16, _AMPERE_PAPER).card
_laptop30 = _Family((8, 6), GEN4_X16, _LAPTOP).card
_ada_rtx = _Family((8, 9), GEN4_X16, _SHEET).card
_geforce40 = _Family((8, 9), GEN4_X16, _ADA_PAPER).card
_laptop40 = _Family((8, 9), GEN4_X16, _LAPTOP).card
_hopper = _Family((9, 0), GEN5_X16, _SHEET).card
_blackwell = _Family((10, 0), GEN5_X16, _SHEET).card
_rtx_pro = _Family((12, 0), GEN5_X16, _BLACKWELL_PAPER).card
_geforce50 = _Family((12, 0), GEN5_X16, _BLACKWELL_PAPER).card
_laptop50 = _Family((12, 0), GEN5_X16, _LAPTOP_50).card

_GF, _RTX = "NVIDIA GeForce RTX", "NVIDIA RTX"

# fmt: off
CARDS: tuple[GPU, ...] = (
    _H200,
    # Data centre
    _hopper("h100", "NVIDIA H100 80GB", 80, (989, 67, 3350), 1830, _HOPPER),
    _hopper("h100-pcie", "NVIDIA H100 PCIe", 80, (756, 51.2, 2000), 1620, _square(492.8, "#95")),
    _hopper("h100-nvl", "NVIDIA H100 NVL", 94, (835, 60, 3900), 1545, _shape(488.5)),
    _hopper("h800", "NVIDIA H800", 80, (989, 67, 3350), 1830, _HOPPER),
    _hopper("h800-pcie", "NVIDIA H800 PCIe", 80, (756, 51.2, 2000), 1620, _square(499.5, "#112")),
    _hopper("h20", "NVIDIA H20", 96, (148, 44, 4000), 1980, _square(138.6, "#77")),
    _hopper("gh200-96gb", "NVIDIA GH200 480GB", 96, (989, 67, 4000), 1830, _GRACE, C2C),
    _hopper("gh200-144gb", "NVIDIA GH200 144G HBM3e", 144, (989, 67, 4900), 1830, _GRACE, C2C),
    _blackwell("b200", "NVIDIA B200", 180, (2250, 75, 8000), 1856, _best(1696)),
    _blackwell("gb200", "NVIDIA GB200", 186, (2500, 80, 8000), 2062, _GB200, C2C),
    _ampere("a100-80gb", "NVIDIA A100 80GB", 80, (312, 19.5, 2039), 1410, _best(264.5)),
    _ampere("a100-40gb", "NVIDIA A100 40GB", 40, (312, 19.5, 1555), 1410, _best(246.3)),
    _ampere("a800-80gb", "NVIDIA A800 80GB", 80, (312, 19.5, 2039), 1410, _best(266.5)),
    _ampere("a800-40gb", "NVIDIA A800 40GB", 40, (312, 19.5, 1555), 1410, _assumed(1172, "the A100 40GB's")),
    _ampere("a30", "NVIDIA A30", 24, (165, 10.3, 933), 1440, _A30),
    _ampere_rtx("a40", "NVIDIA A40", 48, (149.7, 37.4, 696), 1740, _square(110.6, "#185")),
    _ampere_rtx("a10", "NVIDIA A10", 24, (125, 31.2, 600), 1695, _A10),
    _ampere_rtx("a10g", "NVIDIA A10G", 24, (70, 35, 600), 1710, _shape(69.7)),
    _ada_rtx("l40s", "NVIDIA L40S", 48, (362, 91.6, 864), 2520, _shape(252)),
    _ada_rtx("l40", "NVIDIA L40", 48, (181, 90.5, 864), 2490, _shape(170.3)),
    _ada_rtx("l20", "NVIDIA L20", 48, (119.5, 59.8, 864), 2520, _square(114.1, "#107")),
    _ada_rtx("l4", "NVIDIA L4", 24, (121, 30.3, 300), 2040, _square(59.4, "#120")),
    _turing("t4", "NVIDIA T4", 16, (65, 8.1, 320), 1590, _best(41.9)),
    _volta("v100-32gb", "Tesla V100-SXM2-32GB", 32, (125, 15.7, 900), 1530, _shape(94)),
    _volta("v100-16gb", "Tesla V100-SXM2-16GB", 16, (125, 15.7, 900), 1530, _shape(96.1)),
    # Workstations
    _rtx_pro("rtxpro6000", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 96, (503.8, 126, 1792), 2617, _square(350.3, "#160")),
    _rtx_pro("rtxpro6000-max-q", "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 96, (440.5, 110.1, 1792), 2288, _MAX_Q),
    _ada_rtx("rtx6000-ada", f"{_RTX} 6000 Ada Generation", 48, (364.2, 91.1, 960), 2505, _shape(278.5)),
    _ada_rtx("rtx5000-ada", f"{_RTX} 5000 Ada Generation", 32, (261.1, 65.3, 576), 2550, _LIKE_L40S),
    _ada_rtx("rtx4000-ada", f"{_RTX} 4000 Ada Generation", 20, (106.9, 26.7, 360), 2175, _shape(82.7)),
    _ada_rtx("rtx4000-sff-ada", f"{_RTX} 4000 SFF Ada Generation", 20, (76.7, 19.2, 280), 1560, _shape(59)),
    _ada_rtx("rtx2000-ada", f"{_RTX} 2000 Ada Generation", 16, (48, 12, 224), 2130, _LIKE_L40S, GEN4_X8),
    _ampere_rtx("a6000", f"{_RTX} A6000", 48, (154.8, 38.7, 768), 1800, _shape(131.2)),
    _ampere_rtx("a5000", f"{_RTX} A5000", 24, (111.1, 27.8, 768), 1695, _shape(93.9)),
    _ampere_rtx("a4500", f"{_RTX} A4500", 20, (94.6, 23.7, 640), 1650, _LIKE_A5000),
    _ampere_rtx("a4000", f"{_RTX} A4000", 16, (76.7, 19.2, 448), 1560, _square(56.1, "#97")),
    _ampere_rtx("a2000-12gb", f"{_RTX} A2000 12GB", 12, (31.9, 8, 288), 1200, _square(28.8, "#72")),
    _ampere_rtx("a2000-6gb", f"{_RTX} A2000 6GB", 6, (31.9, 8, 288), 1200, _assumed(1140, "the A2000 12GB's")),
    # GeForce RTX 50
    _geforce50("rtx5090", f"{_GF} 5090", 32, (209.5, 104.8, 1792), 2407, _square(234.7, "#124")),
    _geforce50("rtx5080", f"{_GF} 5080", 16, (112.6, 56.3, 960), 2617, _square(102.9, "#104")),
    _geforce50("rtx5070ti", f"{_GF} 5070 Ti", 16, (87.9, 43.9, 896), 2452, _square(84, "#172")),
    _geforce50("rtx5070", f"{_GF} 5070", 12, (61.7, 30.9, 672), 2512, _HELD),
    _geforce50("rtx5060ti-16gb", f"{_GF} 5060 Ti 16GB", 16, (47.4, 23.7, 448), 2572, _square(48.1, "#85"), GEN5_X8),
    _geforce50("rtx5060ti-8gb", f"{_GF} 5060 Ti 8GB", 8, (47.4, 23.7, 448), 2572, _square(48.1, "#85"), GEN5_X8),
    _geforce50("rtx5060", f"{_GF} 5060", 8, (38.4, 19.2, 448), 2497, _square(41.6, "#128"), GEN5_X8),
    # GeForce RTX 40
    _geforce40("rtx4090", f"{_GF} 4090", 24, (165.2, 82.6, 1008), 2520, _square(160.2, "#78")),
    _geforce40("rtx4090d", f"{_GF} 4090 D", 24, (147.1, 73.5, 1008), 2520, _best(148.9)),
    _geforce40("rtx4080-super", f"{_GF} 4080 SUPER", 16, (104.4, 52.2, 736), 2550, _HELD),
    _geforce40("rtx4080", f"{_GF} 4080", 16, (97.5, 48.7, 717), 2505, _HELD),
    _geforce40("rtx4070ti-super", f"{_GF} 4070 Ti SUPER", 16, (88.2, 44.1, 672), 2610, _square(91, "#70")),
    _geforce40("rtx4070ti", f"{_GF} 4070 Ti", 12, (80.2, 40.1, 504), 2610, _HELD),
    _geforce40("rtx4070-super", f"{_GF} 4070 SUPER", 12, (71, 35.5, 504), 2475, _best(76.8)),
    _geforce40("rtx4070", f"{_GF} 4070", 12, (58.3, 29.1, 504), 2475, _HELD),
    _geforce40("rtx4060ti-16gb", f"{_GF} 4060 Ti 16GB", 16, (44.1, 22.1, 288), 2535, _HELD, GEN4_X8),
    _geforce40("rtx4060ti-8gb", f"{_GF} 4060 Ti 8GB", 8, (44.1, 22.1, 288), 2535, _HELD, GEN4_X8),
    _geforce40("rtx4060", f"{_GF} 4060 8GB", 8, (30.2, 15.1, 272), 2460, _square(30.7, "#66"), GEN4_X8),
    # GeForce RTX 30
    _geforce30("rtx3090ti", f"{_GF} 3090 Ti", 24, (80, 40, 1008), 1860, _shape(86)),
    _geforce30("rtx3090", f"{_GF} 3090", 24, (71.2, 35.6, 936), 1695, _best(76.3)),
    _geforce30("rtx3080ti", f"{_GF} 3080 Ti", 12, (68.2, 34.1, 912), 1665, _square(72.7, "#117")),
    _geforce30("rtx3080-12gb", f"{_GF} 3080 12GB", 12, (61.3, 30.6, 912), 1710, _HELD),
    _geforce30("rtx3080-10gb", f"{_GF} 3080 10GB", 10, (59.5, 29.8, 760), 1710, _square(63.6, "#114")),
    _geforce30("rtx3070ti", f"{_GF} 3070 Ti", 8, (43.5, 21.7, 608), 1770, _HELD),
    _geforce30("rtx3070", f"{_GF} 3070", 8, (40.6, 20.3, 448), 1725, _HELD),
    _geforce30("rtx3060ti", f"{_GF} 3060 Ti", 8, (32.4, 16.2, 448), 1665, _HELD),
    _geforce30("rtx3060-12gb", f"{_GF} 3060 12GB", 12, (25.5, 12.7, 360), 1777, _square(25.4, "#131")),
    _geforce30("rtx3060-8gb", f"{_GF} 3060 8GB", 8, (25.5, 12.7, 240), 1777, _HELD),
    _geforce30("rtx3050-8gb", f"{_GF} 3050 8GB", 8, (18.2, 9.1, 224), 1777, _HELD, GEN4_X8),
    _geforce30("rtx3050-6gb", f"{_GF} 3050 6GB", 6, (13.5, 6.8, 168), 1470, _HELD, GEN4_X8),
    # GeForce RTX 20
    _turing("rtx2080ti", f"{_GF} 2080 Ti", 11, (53.8, 13.4, 616), 1545, _HELD_OLD),
    _turing("rtx2080-super", f"{_GF} 2080 SUPER", 8, (44.6, 11.2, 496), 1815, _HELD_OLD),
    _turing("rtx2080", f"{_GF} 2080", 8, (40.3, 10.1, 448), 1710, _best(39)),
    _turing("rtx2070-super", f"{_GF} 2070 SUPER", 8, (36.2, 9.1, 448), 1770, _HELD_OLD),
    _turing("rtx2070", f"{_GF} 2070", 8, (29.9, 7.5, 448), 1620, _HELD_OLD),
    _turing("rtx2060-super", f"{_GF} 2060 SUPER", 8, (28.7, 7.2, 448), 1650, _HELD_OLD),
    _turing("rtx2060-12gb", f"{_GF} 2060 12GB", 12, (28.7, 7.2, 336), 1650, _HELD_OLD),
    _turing("rtx2060-6gb", f"{_GF} 2060 6GB", 6, (25.8, 6.5, 336), 1680, _HELD_OLD),
    # Laptops
    _laptop50("rtx5090-laptop", f"{_GF} 5090 Laptop GPU", 24, (114, 57, 896), 2715, _square(83.3, "#116")),
    _laptop50("rtx5080-laptop", f"{_GF} 5080 Laptop GPU", 16, (83.4, 41.7, 896), 2714, _square(76.2, "#141")),
    _laptop50("rtx5070ti-laptop", f"{_GF} 5070 Ti Laptop GPU", 12, (62, 31, 672), 2632, _square(58.3, "#69")),
    _laptop50("rtx5070-laptop", f"{_GF} 5070 Laptop GPU", 8, (49.9, 24.9, 384), 2706, _square(41.4, "#94"), GEN5_X8),
    _laptop50("rtx5060-laptop", f"{_GF} 5060 Laptop GPU", 8, (35.8, 17.9, 384), 2686, _square(35.6, "#146"), GEN5_X8),
    _laptop40("rtx4090-laptop", f"{_GF} 4090 Laptop GPU", 16, (79.4, 39.7, 576), 2040, _LAPTOP_CLOCK),
    _laptop40("rtx4080-laptop", f"{_GF} 4080 Laptop GPU", 12, (67.7, 33.9, 432), 2280, _square(47, "#64")),
    _laptop40("rtx4070-laptop", f"{_GF} 4070 Laptop GPU", 8, (40.1, 20, 256), 2175, _square(42.3, "#29"), GEN4_X8),
    _laptop40("rtx4060-laptop", f"{_GF} 4060 Laptop GPU", 8, (29.1, 14.6, 256), 2370, _square(27.7, "#143"), GEN4_X8),
    _laptop40("rtx4050-laptop", f"{_GF} 4050 Laptop GPU", 6, (24.3, 12.1, 192), 2370, _best(26.4, "#139"), GEN4_X8),
    _laptop30("rtx3080ti-laptop", f"{_GF} 3080 Ti Laptop GPU", 16, (47.2, 23.6, 512), 1590, _LAPTOP_CLOCK),
    _laptop30("rtx3080-laptop-16gb", f"{_GF} 3080 Laptop GPU 16GB", 16, (42, 21, 448), 1710, _square(33.8, "#61")),
    _laptop30("rtx3080-laptop-8gb", f"{_GF} 3080 Laptop GPU 8GB", 8, (42, 21, 448), 1710, _square(33.8, "#61")),
    _laptop30("rtx3070-laptop", f"{_GF} 3070 Laptop GPU", 8, (33.2, 16.6, 448), 1620, _square(24.6, "#105")),
    _laptop30("rtx3060-laptop", f"{_GF} 3060 Laptop GPU", 6, (26.2, 13.1, 336), 1703, _square(21.7, "#169")),
    _laptop30("rtx3050-laptop-4gb", f"{_GF} 3050 Laptop GPU 4GB", 4, (14.3, 7.1, 192), 1740, _LAPTOP_CLOCK, GEN4_X8),
)
# fmt: on
