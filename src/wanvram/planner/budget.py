"""What a plan may use: device memory with a stated margin, host RAM without the system's, and the card it is for. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from wanvram.errors import require
from wanvram.simulate.gpus import DEFAULT_GPU, GPU, find_gpu
from wanvram.simulate.links import link_of
from wanvram.units import GIB, MIB, human

__all__ = ["PROCESS_BYTES", "Budget", "beyond_card", "desktop_bytes", "system_ram", "usable_memory"]

LEAST_MARGIN_BYTES = 64 * MIB
MARGIN_SHARE = 0.015  # predictions may be below a measurement by 1 % at most, so 1.5 % keeps the promise
PROCESS_BYTES = 3 * GIB  # host RAM of Python, PyTorch, the CUDA libraries and the frames, beside any weights
PINNED_SHARE = 0.75  # pinned pages cannot be swapped out: the rest of the machine keeps a quarter of its RAM
ROUND_BYTES = GIB / 10
SYSTEM_SHARE = 8  # the system and everything else that runs keep an eighth of the RAM,
LEAST_SYSTEM_BYTES = 4 * GIB  # and at least a desktop with a browser
NAMED_SHARE = 1.03  # a card sold as 24 GB offers 23.5 GiB: what is within 3 % of the name means the card
DESKTOP_BYTES = GIB  # a desktop with a browser on the card that draws it
SERVER_BYTES = 3 * GIB // 10  # what drivers and monitoring take of a card that draws nothing


def usable_memory(stated_bytes: int, card: GPU) -> int:
    """What is stated counts; only within 3 % of what the card is sold with, it is what the driver offers of that."""
    return card.total_bytes if card.total_bytes < stated_bytes <= card.memory_bytes * NAMED_SHARE else stated_bytes


def beyond_card(stated_bytes: int, card: GPU) -> str | None:
    """A note for who states more memory than the card is known with; None: it is not more."""
    if usable_memory(stated_bytes, card) <= card.total_bytes:
        return None
    return f"the {card.name} is known with {human(card.total_bytes)}; the {human(stated_bytes)} that were stated count"


def desktop_bytes(card: GPU) -> int:
    """What is left to others where the card is known and not what is free on it."""
    return DESKTOP_BYTES if "GeForce" in card.name else SERVER_BYTES


def system_ram(ram_bytes: int) -> int:
    """Of this much RAM, what is kept for the system."""
    return max(LEAST_SYSTEM_BYTES, ram_bytes // SYSTEM_SHARE)


@dataclass(frozen=True)
class Budget:
    """vram_bytes: device memory by the driver's view, CUDA context included. ram_bytes None: host RAM is not limited.

    margin_bytes None: 1.5 % of the budget and at least 64 MiB. system_bytes: RAM that is not ours, None: an eighth, at least
    4 GiB. gpu: a card of simulate.gpus; InputError if unknown. notes: where these figures are from, if nobody stated them. gpus: how
    many such cards, of each of which so much may be used, joined by `link` (None: what usually joins them); RAM is that of all.
    """

    vram_bytes: int
    margin_bytes: int | None = None
    ram_bytes: int | None = None
    gpu: str = DEFAULT_GPU
    system_bytes: int | None = None
    notes: tuple[str, ...] = ()
    gpus: int = 1
    link: str | None = None

    def __post_init__(self) -> None:
        require(self.vram_bytes >= 1, f"--vram: {self.vram_bytes} bytes is no budget; write for example 8GiB")
        require(self.margin_bytes is None or self.margin_bytes >= 0, f"margin: {self.margin_bytes} is negative")
        require(
            self.ram_bytes is None or self.ram_bytes - self.system > self.process_bytes,
            f"--ram: {human(self.ram_bytes or 0)} does not hold the process itself, which takes {human(self.process_bytes)}, beside "
            f"{human(self.system)} kept for the system",
        )
        link_of(self.card, self.link, self.gpus)

    @property
    def card(self) -> GPU:
        return find_gpu(self.gpu)

    @property
    def process_bytes(self) -> int:
        """Host RAM of all GPUs' processes themselves."""
        return PROCESS_BYTES * self.gpus

    @property
    def usable_bytes(self) -> int:
        """The budget, or what the card's driver offers a process of it (of a card sold as 8 GB: 7.84 GiB)."""
        return usable_memory(self.vram_bytes, self.card)

    @property
    def margin(self) -> int:
        return self._margin_of(self.usable_bytes)

    @property
    def device_limit(self) -> int:
        """What a prediction may reach: usable minus margin."""
        return self.usable_bytes - self.margin

    @property
    def system(self) -> int:
        """RAM kept for the system; 0 where RAM is not limited."""
        if self.ram_bytes is None:
            return 0
        return system_ram(self.ram_bytes) if self.system_bytes is None else self.system_bytes

    def host_limit(self, home: str) -> float:
        """Bytes of weights that host RAM holds: pinned, pageable or read from disk; inf when RAM is not limited."""
        if self.ram_bytes is None:
            return math.inf
        whole = self.ram_bytes - self.system - self.process_bytes
        return min(whole, self.ram_bytes * PINNED_SHARE) if home == "pinned" else whole

    def smallest_ram(self, host_bytes: int) -> int:
        """RAM of a machine that holds this many bytes of weights beside the process and the system."""
        needed = host_bytes + self.process_bytes
        if self.system_bytes is not None:
            return needed + self.system_bytes
        return max(needed + LEAST_SYSTEM_BYTES, math.ceil(needed * SYSTEM_SHARE / (SYSTEM_SHARE - 1)))

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
