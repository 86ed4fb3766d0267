"""What joins several cards of one machine: how fast they exchange, and what NCCL takes of each card's memory for it. No torch.

Cards with peer access copy out of each other's memory (engine/symmetric.py), others exchange by NCCL, and so do those where PyTorch
lacks what copies need. Measured on two H200s of one host (torch 2.11.0+cu130, NCCL 2.28.9): a copy runs at 370 GB/s, 5.2 MB with two
barriers take 0.037 ms; by NCCL with NCCL_MAX_CTAS=8, which a run sets, 194 MB sent and received at once take 1.40 ms, 5.2 MB 0.12 ms;
without peer access 8.4 and 0.29 ms. Everything else here follows from that and is said to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf

from wanvram.errors import InputError
from wanvram.sharing import LINKS
from wanvram.simulate.card import GPU
from wanvram.units import MIB

__all__ = ["WEIGHT_CHANNELS", "Link", "communication_bytes", "link_of", "linked", "links_of"]

_BUS = {"pcie3": 12.5e9, "pcie4": 25e9, "pcie5": 55e9}  # what a copy reaches over 16 lanes, as in card_table.py

# NVLink's published bytes per second in each direction, GB/s. Of boards that are joined in one machine however many there are,
_SWITCHED = {
    **dict.fromkeys(("h200", "h100", "h20", "gh200-96gb", "gh200-144gb"), 450.0),
    **dict.fromkeys(("b200", "gb200"), 900.0),
    **dict.fromkeys(("a100-80gb", "a100-40gb"), 300.0),
    **dict.fromkeys(("h800", "a800-80gb", "a800-40gb"), 200.0),
    **dict.fromkeys(("v100-32gb", "v100-16gb"), 150.0),
}
# and of those that a bridge, bought apart, joins in pairs.
_BRIDGED = {
    **dict.fromkeys(("h100-pcie", "h100-nvl"), 300.0),
    "h800-pcie": 200.0,
    "a30": 100.0,
    **dict.fromkeys(("a40", "a6000", "a5000", "a4500", "rtx3090", "rtx3090ti"), 56.25),
    "rtx2080ti": 50.0,
    **dict.fromkeys(("rtx2080", "rtx2080-super", "rtx2070-super"), 25.0),
}

# A copy: 370 of 450 GB/s. Before it a card puts its part where others can read it, reading and writing its memory, and 32 MiB wait once.
_COPY_SHARE, _COPY_SECONDS = 370 / 450, 20e-6
_ROUND_BYTES, _BARRIER_SECONDS = 32 * MIB, 10e-6
# NCCL: 147 GB/s of NVLink 4 over eight channels, 277 of 450 over all: a channel, or the link, is what holds back.
_CHANNELS, _CHANNEL_BYTES, _NVLINK_SHARE = 8, 18.4e9, 277 / 450
_NVLINK_SECONDS = 85e-6
# Without peer access the data goes through pinned RAM: 23.2 of the 55.2 GB/s that a copy alone reaches.
_HOST_SHARE, _HOST_SECONDS = 23.2 / 55.2, 65e-6
_PEER_SHARE = 0.8  # of a copy, between cards on PCIe with peer access: an assumption

# Device memory that NCCL takes, MiB, as NVML shows it: by init_process_group, by the first message's kernels, and for every channel to
# every peer (10 MiB to receive in, 2 to send from; without peer access they are pinned RAM). 222 + 344, 318 + 344, 366 + 632 and
# 198 + 248 were measured with 8, 8, 32 and no channels on the device: 248 + 12 x channels each time.
# A second communicator took 18, and 24 for two channels.
_INIT, _INIT_HOST, _KERNELS, _CONNECTION, _SECOND = 222, 198, 248, 12, 18
WEIGHT_CHANNELS = 2  # of the connections that gather weights
_PCIE_CHANNELS = 2  # of NCCL to a peer on PCIe, by its source


@dataclass(frozen=True)
class Link:
    """Between any two of the cards, each direction. bytes: per second, while others send, too. latency: seconds of a message of none.

    bus_bytes: of the bus that the cards are in, where it is stated, copies per second. channels: connections to a peer whose
    buffers lie on the device, of NCCL. copies: the cards copy out of each other's memory, without NCCL. source: what the figures rest on.
    """

    name: str
    bytes: float
    latency: float
    channels: int
    source: str
    bus_bytes: float | None = None
    copies: bool = False

    def seconds(self, nbytes: float) -> float:
        """A card sends so many bytes and receives as many."""
        return self.latency + nbytes / self.bytes

    def gather_seconds(self, nbytes: float) -> float:
        """Weights have few channels of their own: 141 MB in 3.5 ms between two H200s."""
        return self.latency + nbytes / self.bytes * max(1.0, self.channels / WEIGHT_CHANNELS)

    @property
    def shares_the_bus(self) -> bool:
        """What comes from another card takes the way that copies from the host take."""
        return self.name != "nvlink"


def link_of(gpu: GPU, name: str | None, count: int, *, nccl: bool = False) -> Link:
    """The link by its name, or the usual one, of `count` such cards. nccl: by NCCL, also where cards could copy.

    InputError where these cards have none of that name.
    """
    usual = "nvlink" if gpu.key in _SWITCHED else "host" if _is_geforce(gpu) else None
    name = name or usual or min(_BUS, key=lambda bus: abs(_BUS[bus] - gpu.pcie_bytes))
    if name == "nvlink":
        return _nvlink(gpu, count, nccl)
    if name not in LINKS:
        raise InputError(f"link: '{name}'; choose one of {', '.join(LINKS)}")
    bus = _BUS.get(name)
    reached = gpu.pcie_bytes if bus is None else min(bus, gpu.pcie_bytes)
    if name == "host" or _is_geforce(gpu):
        why = "; GeForce cards have no peer access by NVIDIA's driver" if _is_geforce(gpu) else ""
        source = (
            f"through the host's RAM by NCCL{why}: 0.42 of a copy's speed, measured on the H200 without peer access"
        )
        return Link(name, _HOST_SHARE * reached, _HOST_SECONDS, 0, source, bus)
    source = "peer access over PCIe: 0.8 of a copy's speed, an assumption"
    if nccl:
        return Link(name, _PEER_SHARE * reached, _HOST_SECONDS, _PCIE_CHANNELS, f"{source}, by NCCL", bus)
    return Link(name, _copying(gpu, _PEER_SHARE * reached), _COPY_SECONDS, 0, source, bus, copies=True)


def links_of(gpu: GPU) -> Iterator[Link]:
    """Every link that two such cards can have, the usual one first; each by copies and by NCCL where both are possible."""
    first = link_of(gpu, None, 2).name
    others = (n for n in LINKS if n != first and (n != "nvlink" or gpu.key in _SWITCHED or gpu.key in _BRIDGED))
    for name in (first, *others):
        link = link_of(gpu, name, 2)
        yield link
        if link.copies:
            yield link_of(gpu, name, 2, nccl=True)


def communication_bytes(link: Link, count: int, *, shards: bool = False) -> int:
    """Device memory outside the allocator that each of `count` ranks gives to NCCL, once all are connected; 0 of one rank, or by copies.

    Measured on two ranks; of more it is computed: every further peer takes its channels' buffers. shards: weights, too, come
    from other ranks.
    """
    if count < 2 or link.copies:
        return 0
    init = _INIT if link.channels else _INIT_HOST
    channels = link.channels
    if shards:
        init, channels = init + _SECOND, channels + min(channels, WEIGHT_CHANNELS)
    return (init + _KERNELS + _CONNECTION * channels * (count - 1)) * MIB


def linked(gpu: GPU, link: Link, taken_bytes: int) -> GPU:
    """The card among others: what communication takes comes with its context, and a stated bus bounds its copies from RAM."""
    copies = min(gpu.pcie_bytes, link.bus_bytes or inf)
    return replace(gpu, context_bytes=gpu.context_bytes + taken_bytes, pcie_bytes=copies)


def _nvlink(gpu: GPU, count: int, nccl: bool) -> Link:
    published = _SWITCHED.get(gpu.key) or _BRIDGED.get(gpu.key)
    if published is None:
        raise InputError(f"link: the {gpu.name} has no NVLink; choose pcie3, pcie4, pcie5 or host (through RAM)")
    if gpu.key in _BRIDGED and count > 2:
        raise InputError(f"link: NVLink joins the {gpu.name} in pairs, not {count} of them; choose pcie4 or host")
    source = f"NVLink, {published:g} GB/s published in each direction"
    if nccl:
        reached = min(_CHANNELS * _CHANNEL_BYTES, _NVLINK_SHARE * published * 1e9)
        source += "; what of it NCCL's 8 channels reach was measured on the H200"
        return Link("nvlink", reached, _NVLINK_SECONDS, _CHANNELS, source)
    source += ", of which copies reach 0.82 (measured on the H200), less the time of putting things where they are read"
    return Link("nvlink", _copying(gpu, _COPY_SHARE * published * 1e9), _COPY_SECONDS, 0, source, copies=True)


def _copying(gpu: GPU, rate: float) -> float:
    """Bytes per second of a whole exchange by copies."""
    put = 2 / (gpu.bandwidth_bytes * gpu.efficiency.memory)
    return 1 / (1 / rate + put + _BARRIER_SECONDS / _ROUND_BYTES)


def _is_geforce(gpu: GPU) -> bool:
    return "GeForce" in gpu.name
