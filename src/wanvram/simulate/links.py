"""What joins several cards of one machine: how fast they exchange, and what NCCL takes of each card's memory for it. No torch.

Measured on two H200s of one host (torch 2.11.0+cu130, NCCL 2.28.9) with NCCL_MAX_CTAS=8, which a run sets: 194 MB sent and received
at once take 1.40 ms, 5.2 MB 0.12 ms; without peer access 8.4 and 0.29 ms. Everything else here follows from that and is said to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf

from wanvram.errors import InputError
from wanvram.sharing import LINKS
from wanvram.simulate.card import GPU
from wanvram.units import MIB

__all__ = ["WEIGHT_CHANNELS", "Link", "communication_bytes", "exchanged", "link_of", "linked", "links_of"]

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

# 147 GB/s of NVLink 4 over eight channels, 277 of 450 over all: a channel, or the link, is what holds back.
_CHANNELS, _CHANNEL_BYTES, _NVLINK_SHARE = 8, 18.4e9, 277 / 450
_NVLINK_SECONDS = 85e-6
# Without peer access the data goes through pinned RAM: 23.2 of the 55.2 GB/s that a copy alone reaches.
_HOST_SHARE, _HOST_SECONDS = 23.2 / 55.2, 65e-6
_PEER_SHARE = 0.8  # of a copy, between cards on PCIe with peer access: an assumption

# By copies out of the peer's memory 194 MB take 0.525 ms of NVLink 4, and a barrier 7 to 12 us; before it the sender puts them into its
# buffer, which reads and writes its own memory.
_COPIED_SHARE, _BARRIER_SECONDS = 370 / 450, 12e-6

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
    buffers lie on the device. source: what the figures rest on. copies: out of each other's memory, without NCCL.
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


def link_of(gpu: GPU, name: str | None, count: int) -> Link:
    """The link by its name, or the usual one, of `count` such cards. InputError where these cards have none of that name."""
    usual = "nvlink" if gpu.key in _SWITCHED else "host" if _is_geforce(gpu) else None
    name = name or usual or min(_BUS, key=lambda bus: abs(_BUS[bus] - gpu.pcie_bytes))
    if name == "nvlink":
        return _nvlink(gpu, count)
    if name not in LINKS:
        raise InputError(f"link: '{name}'; choose one of {', '.join(LINKS)}")
    bus = _BUS.get(name)
    copies = gpu.pcie_bytes if bus is None else min(bus, gpu.pcie_bytes)
    if name == "host" or _is_geforce(gpu):
        why = "; GeForce cards have no peer access by NVIDIA's driver" if _is_geforce(gpu) else ""
        source = f"through the host's RAM{why}: 0.42 of a copy's speed, measured on the H200 without peer access"
        return Link(name, _HOST_SHARE * copies, _HOST_SECONDS, 0, source, bus)
    source = "peer access over PCIe: 0.8 of a copy's speed, an assumption"
    return Link(name, _PEER_SHARE * copies, _HOST_SECONDS, _PCIE_CHANNELS, source, bus)


def exchanged(link: Link, gpu: GPU, how: str) -> Link:
    """The link as the strategy has it used. InputError for copies between cards without access to each other's memory."""
    reach = link.channels > 0
    if how == "copies" and not reach:
        raise InputError(
            f"exchange_by: copies need access to each other's memory, which link {link.name} has not; use nccl"
        )
    if how == "nccl" or not reach:
        return link
    published = _SWITCHED.get(gpu.key) or _BRIDGED.get(gpu.key)
    reached = _COPIED_SHARE * published * 1e9 if link.name == "nvlink" and published else link.bytes
    passed = 1 / (1 / reached + 2 / gpu.bandwidth_bytes)
    source = "copies out of each other's memory; 0.82 of NVLink 4 and 12 us a barrier were measured on the H200"
    return replace(link, bytes=passed, latency=_BARRIER_SECONDS, channels=WEIGHT_CHANNELS, source=source, copies=True)


def links_of(gpu: GPU) -> Iterator[Link]:
    """Every link that two such cards can have, the usual one first."""
    first = link_of(gpu, None, 2)
    yield first
    for name in LINKS:
        if name != first.name and (name != "nvlink" or gpu.key in _SWITCHED or gpu.key in _BRIDGED):
            yield link_of(gpu, name, 2)


def communication_bytes(link: Link, count: int, *, shards: bool = False) -> int:
    """Device memory outside the allocator that each of `count` ranks gives to NCCL, once all are connected; 0 of one rank.

    Measured on two ranks; of more it is computed: every further peer takes its channels' buffers. shards: weights, too, come
    from other ranks.
    """
    if count < 2:
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


def _nvlink(gpu: GPU, count: int) -> Link:
    published = _SWITCHED.get(gpu.key) or _BRIDGED.get(gpu.key)
    if published is None:
        raise InputError(f"link: the {gpu.name} has no NVLink; choose pcie3, pcie4, pcie5 or host (through RAM)")
    if gpu.key in _BRIDGED and count > 2:
        raise InputError(f"link: NVLink joins the {gpu.name} in pairs, not {count} of them; choose pcie4 or host")
    reached = min(_CHANNELS * _CHANNEL_BYTES, _NVLINK_SHARE * published * 1e9)
    source = (
        f"NVLink, {published:g} GB/s published in each direction; what of it 8 channels reach was measured on the H200"
    )
    return Link("nvlink", reached, _NVLINK_SECONDS, _CHANNELS, source)


def _is_geforce(gpu: GPU) -> bool:
    return "GeForce" in gpu.name
