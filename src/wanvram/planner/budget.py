"""What a plan may use: device memory with a stated margin, host RAM, and the card it is for. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from wanvram.errors import require
from wanvram.simulate.gpus import DEFAULT_GPU, GPU, find_gpu
from wanvram.units import GIB, MIB, human

__all__ = ["PROCESS_BYTES", "Budget"]

LEAST_MARGIN_BYTES = 64 * MIB
MARGIN_SHARE = 0.015  # predictions may be below a measurement by 1 % at most, so 1.5 % keeps the promise
PROCESS_BYTES = 3 * GIB  # host RAM of Python, PyTorch, the CUDA libraries and the frames, beside any weights
PINNED_SHARE = 0.75  # pinned pages cannot be swapped out: the rest of the machine keeps a quarter of its RAM
ROUND_BYTES = GIB / 10


@dataclass(frozen=True)
class Budget:
    """vram_bytes: device memory by the driver's view, CUDA context included. ram_bytes None: host RAM is not limited.

    margin_bytes None: 1.5 % of the budget and at least 64 MiB. gpu: a card of simulate.gpus; InputError if unknown.
    """

    vram_bytes: int
    margin_bytes: int | None = None
    ram_bytes: int | None = None
    gpu: str = DEFAULT_GPU

    def __post_init__(self) -> None:
        require(self.vram_bytes >= 1, f"--vram: {self.vram_bytes} bytes is no budget; write for example 8GiB")
        require(self.margin_bytes is None or self.margin_bytes >= 0, f"margin: {self.margin_bytes} is negative")
        require(
            self.ram_bytes is None or self.ram_bytes > PROCESS_BYTES,
            f"--ram: {human(self.ram_bytes or 0)} does not hold the process itself, which takes {human(PROCESS_BYTES)}",
        )
        find_gpu(self.gpu)

    @property
    def card(self) -> GPU:
        return find_gpu(self.gpu)

    @property
    def usable_bytes(self) -> int:
        """The budget, or what the card's driver offers a process if that is less (a card sold as 8 GB: 7.84 GiB)."""
        return min(self.vram_bytes, self.card.total_bytes)

    @property
    def margin(self) -> int:
        return self._margin_of(self.usable_bytes)

    @property
    def device_limit(self) -> int:
        """What a prediction may reach: usable minus margin."""
        return self.usable_bytes - self.margin

    def host_limit(self, home: str) -> float:
        """Bytes of weights that host RAM holds: pinned, pageable or read from disk; inf when RAM is not limited."""
        if self.ram_bytes is None:
            return math.inf
        whole = self.ram_bytes - PROCESS_BYTES
        return min(whole, self.ram_bytes * PINNED_SHARE) if home == "pinned" else whole

    def smallest_for(self, peak_bytes: int) -> int:
        """The smallest multiple of 0.1 GiB whose margin leaves room for `peak_bytes`, as parse_bytes reads it."""
        tenths = 1
        while int(tenths * ROUND_BYTES) - self._margin_of(int(tenths * ROUND_BYTES)) < peak_bytes:
            tenths += 1
        return int(tenths * ROUND_BYTES)

    def _margin_of(self, nbytes: int) -> int:
        if self.margin_bytes is not None:
            return self.margin_bytes
        return max(LEAST_MARGIN_BYTES, math.ceil(nbytes * MARGIN_SHARE))
