"""One card and the machine around it: memory, rates, clocks, what of the rates is reached; and a card described in a file. No torch.

The rows are in card_table.py, finding one by name in gpus.py, what each figure rests on in docs/cards.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from wanvram.errors import InputError, require
from wanvram.machine.driver import DRIVER_BYTES
from wanvram.strict_yaml import read_strict_yaml
from wanvram.units import MIB

__all__ = ["CONTEXT", "EFFICIENCY", "GPU", "MODULES", "Efficiency", "card_to_json", "read_card"]

BUSY = 0.95  # of the time, large 16-bit products keep the matrix units busy: 0.94 to 0.96 on an H20, which nothing holds back
H200_BOOST_MHZ = 1830.0  # at which its 989 TFLOP/s are published
H200_SUSTAINED_MHZ = 1545.0  # 793 TFLOP/s in a product of 8192 x 8192 x 8192 (h200.md), units busy BUSY of the time


@dataclass(frozen=True)
class Efficiency:
    """The share of a card's peak rates that long kernels reach, and what every operation costs besides.

    Fitted on an H200, 2026-11-24, torch 2.11.0+cu130, against whole steps and decodes (benchmarks/calibrate_clock.py): products and
    attention of 1.3B at 832x480 and 14B at 1280x720, the VAE's frames in float32 at both, its pictures at 1280x720 (2026-11-30).
    16-bit convolutions: kernels' time in eight decodes (2026-11-30_h200_bf16_busy_tiled_vae.json). float32 attention: single kernels
    (h200.md, *_probe_libraries.json). 8-bit products alone reached 0.63 and 0.65 (h200.md); in a step they are an assumption. The
    host's times, Python included, are estimates: small tensors take 0.7 to 1.25 times as long (*_issue_speed.json, *_short_2_*).
    """

    product: float = 0.715  # 16-bit matrix products
    product_fp8: float = 0.62  # with a scale per row
    product_fp32: float = 0.71
    attention: float = 0.58  # 16-bit: cuDNN on the H200; FlashAttention-2 reaches about this share on Ampere and Ada
    attention_fp32: float = 0.62
    conv_tf32: float = 0.41
    conv_tf32_narrow: float = 0.275  # fewer than 128 channels on one side: the matrix units' tiles are partly empty
    conv2d_tf32: float = 0.57  # of pictures, `kernels.conv.conv2d`: a decode of 2026-11-30 at 1280x720
    conv2d_tf32_narrow: float = 0.53
    conv_half: float = 0.56
    conv_half_narrow: float = 0.267
    memory: float = 0.77  # of the bandwidth, in elementwise kernels and copies within the device
    launch_seconds: float = 3e-6  # from one kernel's end to the next one's start
    view_seconds: float = 5e-6  # host time of a view or an allocation; the device does nothing
    dispatch_seconds: float = 18e-6  # host time of one operation with its share of Python
    own_seconds: float = 50e-6  # for `wanvram::*` (Triton's launcher, attention, convolutions) and products


EFFICIENCY = Efficiency()
_HALF_PER_CLOCK = {(8, 0): 2048.0, (9, 0): 4096.0, (10, 0): 8192.0, (10, 3): 8192.0}  # of data centre chips

# Device memory taken at a library's first use, and by the CUDA context: measured on the H200, taken for every card.
MODULES = {"kernels": 92 * MIB, "cublas": 66 * MIB, "attention": 8 * MIB, "cudnn": 2 * MIB, "triton": 2 * MIB}
CONTEXT = 588 * MIB + DRIVER_BYTES


@dataclass(frozen=True, kw_only=True)
class GPU:
    """One card. total_bytes: what the driver offers a process. module_bytes: device memory taken at a library's first use.

    Rates are published peaks per second at boost_mhz: products dense (no sparsity) with sums in float32, float32 without tensor
    cores. pcie_bytes is not a peak but what a copy from pinned memory reaches: 55 GB/s on PCIe 5.0 x16 (measured), half for each
    step down. sustained_mhz: the clock that the card's rate in large 16-bit products corresponds to, under its power limit.
    path: the file that describes it; None for a row of the table. The clocks' defaults are the H200's.
    """

    key: str
    name: str
    memory_bytes: int = 0  # nominal: as it is sold
    total_bytes: int
    compute_capability: tuple[int, int]
    bf16_flops: float
    fp32_flops: float
    fp8_flops: float | None
    bandwidth_bytes: float
    pcie_bytes: float
    boost_mhz: float = H200_BOOST_MHZ
    sustained_mhz: float = H200_SUSTAINED_MHZ
    context_bytes: int
    module_bytes: Mapping[str, int] = field(default_factory=dict)
    measured: bool = False
    rates_source: str = ""
    clock_source: str = ""
    note: str = ""
    efficiency: Efficiency = EFFICIENCY
    path: str | None = None

    @property
    def tf32_flops(self) -> float:
        """float32 products with TF32, which cuDNN uses unless told not to: half of bf16 since Ampere (NVIDIA's data sheets)."""
        return self.bf16_flops / 2 if self.compute_capability >= (8, 0) else self.fp32_flops

    @property
    def multiprocessors(self) -> int:
        """From the published rates and what one does per clock (NVIDIA's whitepapers): in 16 bits, or without matrix units."""
        per_clock = 256 if self.compute_capability >= (8, 6) else 128
        plain = self.fp32_flops / (per_clock * self.boost_mhz * 1e6)
        half = self.bf16_flops / (_HALF_PER_CLOCK.get(self.compute_capability, math.inf) * self.boost_mhz * 1e6)
        return max(round(half if half > plain / 2 else plain), 1)  # an H20's products are held back

    @property
    def half(self) -> str:
        """The 16-bit precision in which it computes fast."""
        return "bf16" if self.compute_capability >= (8, 0) else "fp16"

    @property
    def clock_ratio(self) -> float:
        """Sustained over boost clock, relative to the H200's, at which the shares in EFFICIENCY were fitted."""
        return (self.sustained_mhz / self.boost_mhz) / (H200_SUSTAINED_MHZ / H200_BOOST_MHZ)

    @property
    def product_flops(self) -> float:
        """What a product of 8192 x 8192 x 8192 in 16 bits reaches under sustained load, per second."""
        return self.bf16_flops * self.sustained_mhz / self.boost_mhz * BUSY

    @property
    def argument(self) -> str:
        """What `find_gpu` takes to find this card again."""
        return self.path or self.key


# --- a card as JSON, and one's own in a YAML file -------------------------------------------------------------------------------

_TEXTS = ("key", "name", "rates_source", "clock_source", "note")
_BYTES = ("memory_bytes", "total_bytes", "context_bytes")
_RATES = ("bf16_flops", "fp32_flops", "fp8_flops", "bandwidth_bytes", "pcie_bytes")
_CLOCKS = ("boost_mhz", "sustained_mhz")
_FIELDS = tuple(row.name for row in fields(GPU) if row.name not in ("efficiency", "path"))
_KEY = re.compile(r"[a-z0-9][a-z0-9._-]{0,59}")
_CAPABILITY = re.compile(r"(\d{1,2})\.(\d)")
LEAST_CAPABILITY = (7, 0)  # older cards have no matrix units
LEAST_RATE = 1e9  # per second: a smaller number is TFLOP/s or GB/s written without their powers of ten
MOST_BYTES = 1 << 50


def card_to_json(gpu: GPU) -> dict[str, Any]:
    """All fields of a card; `read_card` takes exactly these."""
    values = {name: getattr(gpu, name) for name in _FIELDS}
    major, minor = gpu.compute_capability
    return values | {"compute_capability": f"{major}.{minor}", "module_bytes": dict(gpu.module_bytes)}


def read_card(path: Path) -> GPU:
    """One's own card from a YAML file. Raises InputError naming the file, the field and what is allowed."""
    try:
        changed = path.stat().st_mtime_ns
    except OSError as error:
        raise InputError(f"--gpu {path}: cannot be read ({error.strerror or error})") from error
    return _read(str(path), changed)


@lru_cache(maxsize=16)  # a plan asks for its card thousands of times
def _read(path: str, _changed: int) -> GPU:
    data = read_strict_yaml(Path(path))
    try:
        return _card(data, path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _card(data: Any, path: str) -> GPU:
    require(isinstance(data, dict), "a card is a mapping of fields, as `wanvram check --cards --json` prints each")
    unknown, missing = [str(name) for name in data if name not in _FIELDS], [n for n in _FIELDS if n not in data]
    require(not unknown, f"{', '.join(unknown)}: unknown; a card has {', '.join(_FIELDS)}")
    require(
        not missing, f"{', '.join(missing)}: missing; `wanvram check --cards --json` prints rows to copy and change"
    )
    for name in _TEXTS:
        require(isinstance(data[name], str), f"{name}: {data[name]!r} is not text")
    require(
        bool(_KEY.fullmatch(data["key"])), f"key: {data['key']!r}; use small letters, digits and . _ - (at most 60)"
    )
    require(bool(data["name"].strip()), "name: is empty")
    require(data["measured"] is False, "measured: is true for cards measured by this project only; write false")
    for name in _BYTES:
        _whole(name, data[name])
    require(data["total_bytes"] <= data["memory_bytes"], "total_bytes: a driver offers no more than memory_bytes")
    require(data["context_bytes"] < data["total_bytes"], "context_bytes: leaves nothing of total_bytes")
    rates = {
        name: _number(name, data[name]) for name in (*_RATES, *_CLOCKS) if data[name] is not None or name != "fp8_flops"
    }
    for name in _RATES:
        what = "operations" if name.endswith("flops") else "bytes"
        require(
            rates.get(name, LEAST_RATE) >= LEAST_RATE,
            f"{name}: {data[name]!r} is too small; it is in {what} per second, so 100 T are 1.0e+14 and 100 G 1.0e+11",
        )
    for name in _CLOCKS:
        require(10 <= rates[name] <= 10_000, f"{name}: {data[name]!r} is no clock in MHz; cards run at 500 to 3500")
    texts = {name: data[name] for name in (*_TEXTS, *_BYTES)}
    return GPU(
        **texts | {"fp8_flops": None} | rates,
        compute_capability=_capability(data["compute_capability"]),
        module_bytes=_modules(data["module_bytes"]),
        path=path,
    )


def _whole(name: str, value: Any) -> None:
    good = type(value) is int and 1 <= value <= MOST_BYTES
    require(good, f"{name}: {value!r} is not a whole number of bytes from 1 to {MOST_BYTES}")


def _number(name: str, value: Any) -> float:
    hint = "; YAML wants 1.65e+14, with a point and a sign" if isinstance(value, str) else ""
    good = type(value) in (int, float) and math.isfinite(value) and value > 0
    require(good, f"{name}: {value!r} is not a number above 0{hint}")
    return float(value)


def _capability(value: Any) -> tuple[int, int]:
    found = _CAPABILITY.fullmatch(str(value))
    least = ".".join(map(str, LEAST_CAPABILITY))
    wrong = f"compute_capability: {value!r}; write it as NVIDIA does, for example '8.9', {least} or newer"
    if found is None:
        raise InputError(wrong)
    capability = int(found[1]), int(found[2])
    require(capability >= LEAST_CAPABILITY, wrong)
    return capability


def _modules(value: Any) -> dict[str, int]:
    right = isinstance(value, dict) and set(value) == set(MODULES)
    require(right, f"module_bytes: has bytes for each of {', '.join(MODULES)}, and nothing else")
    for name, nbytes in value.items():
        _whole(f"module_bytes.{name}", nbytes)
    return dict(value)
