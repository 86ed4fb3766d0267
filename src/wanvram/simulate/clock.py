"""What a run would take: a clock that the simulated device's operations and copies advance. No torch.

Six timelines, as on a real machine: the host issues work, the device computes in order, two copy engines run beside it, one each
way, a thread on the host reads weights into pinned buffers, and a link carries what other GPUs are sent. Each moves by prices
from a card's rates (gpus.py); one waits for another only through marks and blocking calls, so a copy is hidden exactly where it
would be.

Not modelled: what the weights' values and the video's content change, and other programs on the same machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from math import prod
from typing import Any

from wanvram.kernels.attention_backends import chosen
from wanvram.simulate.gpus import GPU
from wanvram.simulate.host import HOST, Host, Reading
from wanvram.simulate.links import Link, link_of
from wanvram.spans import Copies

__all__ = ["CATEGORIES", "Clock", "Costs", "Price"]

CATEGORIES = ("attention", "product", "convolution", "elementwise")

# Attention over few keys: filling and draining the pipeline costs a query as much as this many more keys.
RAMP_KEYS = 256
NARROW_CHANNELS = 128
TILE_POSITIONS = 128
MOST_IDLE = 2.0  # times as long: with less to do cuDNN takes smaller tiles
MESSAGE_SECONDS = 20e-6  # of the host, to issue a send and a receive (torch.distributed, 10 us each)
# Of the host, for a convolution of a new shape, of which cuDNN makes a plan: 1.5 to 3.0 ms, what the first 9 frames took longer than
# as many later ones in tiles of three sizes at two (benchmarks/2026-11-24_h200_tiled_vae.json), over their 28 to 203 shapes.
PLAN_SECONDS = 2e-3
# 3 output channels cost as much as 32: 0.88 ms for 96 -> 3 at 480x832 (benchmarks/*_probe_libraries.json).
CHANNEL_TILE = 32

_NO_KERNEL = (
    *("aten.empty.", "aten.empty_", "aten.new_empty", "aten.set_.", "aten.resize_"),
    *("aten._unsafe_view.", "aten._reshape_alias.", "aten.lift_fresh."),
)
_WRITES_ONLY = (
    *("aten.fill_.", "aten.zero", "aten.one", "aten.full", "aten.new_zeros", "aten.new_ones", "aten.new_full"),
    *("aten.arange", "aten.rand", "aten.normal_", "aten.uniform_"),
)
_LOOKUPS = ("aten.embedding.", "aten.index.", "aten.index_select", "aten.gather")
_PRODUCTS = {  # where the first factor is among the arguments
    **dict.fromkeys(("wanvram.linear_gelu", "aten.mm", "aten.bmm", "aten._scaled_mm"), 0),
    **dict.fromkeys(("aten.addmm", "aten.addmm_", "aten.baddbmm"), 1),
}

_TIMELINES = ("_compute", "_host", "_copies", "_returns", "_reader", "_linked", "_gathered", "_encoder", "_read")

Arguments = tuple[Any, ...]
# Arithmetic operations, how many of them the device does per second, bytes of traffic.
Work = tuple[float, float, float]


@dataclass(frozen=True)
class Price:
    """One operation: its category, its work for (arguments, result), and the seconds of host time that issue it."""

    category: str
    work: Callable[[Arguments, Any], Work]
    dispatch: float


class Costs:
    """Prices of operations on one card, at the rates that are reached."""

    def __init__(self, gpu: GPU, host: Host = HOST) -> None:
        self.gpu = gpu
        self.bandwidth = gpu.bandwidth_bytes * gpu.efficiency.memory
        self.slowness = host.operation_us / HOST.operation_us  # times per operation were fitted on that machine
        self._own = self.slowness * self.gpu.efficiency.own_seconds  # a product comes with the Python of a layer
        # Published rates at the clock under load. Without matrix units a card draws less: none is faster there for holding more.
        self._half = gpu.bf16_flops * gpu.clock_ratio
        self._fp8 = (gpu.fp8_flops or gpu.bf16_flops) * gpu.clock_ratio
        self._tf32 = gpu.tf32_flops * gpu.clock_ratio
        self._fp32 = gpu.fp32_flops * min(1.0, gpu.clock_ratio)

    def price(self, operation: str) -> Price | None:
        """Of an operation by its full name, such as `aten.mm.out`; None for an allocation."""
        if operation.startswith(_NO_KERNEL):
            return None
        name = operation.rpartition(".")[0]
        dispatch = self._dispatch(name)
        if name in _PRODUCTS:
            first = _PRODUCTS[name]
            return Price("product", lambda args, out: self._product(args[first], args[first + 1]), self._own)
        if name == "wanvram.scaled_product":
            return Price("product", self._scaled_product, dispatch)
        if name in ("wanvram.attention", "wanvram.attention_lse"):
            return Price("attention", self._attention, dispatch)
        if name in ("wanvram.conv2d", "wanvram.conv3d", "aten.convolution"):
            return Price("convolution", partial(self._convolution, picture=name == "wanvram.conv2d"), dispatch)
        moved = _traffic(operation)
        return Price("elementwise", lambda args, out: (0.0, 1.0, moved(args, out)), dispatch)

    def _dispatch(self, name: str) -> float:
        return self._own if name.startswith("wanvram.") else self.slowness * self.gpu.efficiency.dispatch_seconds

    def seconds(self, work: Work) -> float:
        """The larger of arithmetic and memory traffic: they overlap."""
        flops, rate, nbytes = work
        return max(flops / rate, nbytes / self.bandwidth)

    def _product(self, a: Any, b: Any) -> Work:
        """[..., M, K] x [..., K, N]. float32 products do not use TF32 unless told to, and nothing here tells them."""
        batch, m, k, n = prod(a.shape[:-2]), a.shape[-2], a.shape[-1], b.shape[-1]
        out = batch * m * n * max(a.itemsize, 2)
        return 2 * batch * m * k * n, self._product_rate(a.itemsize), a.nbytes + b.nbytes + out

    def _scaled_product(self, args: Arguments, result: Any) -> Work:
        """x [M,K] and weight [N,K] in 8 bits, what they give in 16."""
        x, weight = args[0], args[2]
        (m, k), n = x.shape, weight.shape[0]
        return 2 * m * k * n, self._product_rate(x.itemsize), x.nbytes + weight.nbytes + 2 * m * n

    def _product_rate(self, itemsize: int) -> float:
        reached = self.gpu.efficiency
        if itemsize == 1:
            return self._fp8 * reached.product_fp8
        if itemsize == 2:
            return self._half * reached.product
        return self._fp32 * reached.product_fp32

    def _attention(self, args: Arguments, result: Any) -> Work:
        """q [Lq,H,D], k [Lk,H,D]: two products of 2 Lq Lk H D each."""
        q, k = args[0], args[1]
        flops = 4 * prod(q.shape) * (k.shape[0] + RAMP_KEYS)
        backend = chosen(self.gpu.compute_capability, q.itemsize, q.shape[2], k.shape[0], *args[3:])
        share: float = getattr(self.gpu.efficiency, backend.reached[q.itemsize])
        pace = backend.rate(self.gpu.compute_capability).pace
        rate = self._half * pace if q.itemsize == 2 else self._fp32
        return flops, rate * share, 2 * q.nbytes + 2 * k.nbytes

    def _convolution(self, args: Arguments, result: Any, *, picture: bool = False) -> Work:
        """x [N,I,...], weight [O,I,kernel...], result [N,O,...]. cuDNN may use TF32 for float32: PyTorch's default."""
        x, weight = args[0], args[1]
        narrow = min(weight.shape[:2])
        padding = -(-narrow // CHANNEL_TILE) * CHANNEL_TILE / narrow
        flops = 2 * padding * prod(weight.shape[1:]) * prod(result.shape)
        if picture or x.itemsize == 2:
            flops *= self._whole_rounds(prod(result.shape) // result.shape[1], result.shape[1])
        rate = self._conv_rate(x.itemsize, narrow < NARROW_CHANNELS, picture)
        return flops, rate, x.nbytes + weight.nbytes + result.nbytes

    def _whole_rounds(self, positions: int, outputs: int) -> float:
        """Rounds of all multiprocessors, a tile of the output each, that a kernel takes, to those it would fill: 1 or more.

        Tiles of cuDNN's kernels for pictures on an H200 (benchmarks/2026-11-30_h200_convolution_kernels.json; 96 channels: half the
        positions, two on a multiprocessor), taken for 16-bit frames, too, which come within 6 %, and on other cards.
        """
        tiles = -(-positions // TILE_POSITIONS) * -(-outputs // (192 if outputs >= 384 else 128))
        sms = self.gpu.multiprocessors
        return min(-(-tiles // sms) * sms / tiles, MOST_IDLE)

    def _conv_rate(self, itemsize: int, narrow: bool, picture: bool = False) -> float:
        reached = self.gpu.efficiency
        if itemsize == 2:
            return self._half * (reached.conv_half_narrow if narrow else reached.conv_half)
        if self.gpu.compute_capability < (8, 0):
            return self._fp32 * reached.product_fp32
        if picture:
            return self._tf32 * (reached.conv2d_tf32_narrow if narrow else reached.conv2d_tf32)
        return self._tf32 * (reached.conv_tf32_narrow if narrow else reached.conv_tf32)


def _traffic(operation: str) -> Callable[[Arguments, Any], float]:
    """Bytes read and written: arguments and result, with exceptions by name. An argument changed in place is both."""
    if operation.startswith("aten.copy_."):
        return lambda args, result: args[0].nbytes + args[1].nbytes
    if operation.startswith("wanvram.fill_window"):  # reads and writes a window, and the newest of its frames once more
        return lambda args, result: args[4].nbytes * 2 + args[0].nbytes * args[4].shape[-2] / args[0].shape[-2]
    if operation.startswith("wanvram.place_frame"):
        return lambda args, result: args[0].nbytes + args[2].nbytes * (1 + args[3])
    if operation.startswith(_WRITES_ONLY):
        return lambda args, result: nbytes_of((result,))
    if operation.startswith(_LOOKUPS):
        return lambda args, result: 2 * nbytes_of((result,))
    if operation.startswith("wanvram.") and operation.split(".")[1].endswith("_"):
        return lambda args, result: args[0].nbytes + nbytes_of(args)
    return lambda args, result: nbytes_of(args) + nbytes_of((result,))


def nbytes_of(values: Iterable[Any]) -> int:
    """Bytes of the tensors among an operation's arguments or results, in lists too; everything else has none."""
    total = 0
    for value in values:
        if isinstance(value, (list, tuple)):
            total += nbytes_of(value)
        else:
            total += getattr(value, "nbytes", 0)
    return total


@dataclass
class Clock:
    """Timelines in seconds since the start. `busy`: seconds of computation by category, and of `launch`es between them.

    A mark is a moment, in seconds.
    """

    gpu: GPU
    machine: Host = HOST
    cold: frozenset[str] = frozenset()  # libraries whose kernels were never compiled on this machine
    link: Link | None = None  # to the other GPUs of the run; None: the card's usual one
    copied: Copies = field(default_factory=Copies)
    exchanged_bytes: int = 0  # sent to other GPUs or received from them, whichever was more
    exchange_stalls: float = 0.0  # seconds that computation stood still for it
    busy: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*CATEGORIES, "launch"), 0.0))
    _host: float = 0.0
    _compute: float = 0.0
    _copies: float = 0.0
    _returns: float = 0.0
    _idle: tuple[float, float] = (0.0, 0.0)  # of the link to the device, before a copy of what is still being read
    _reader: float = 0.0
    _linked: float = 0.0
    _gathered: float = 0.0
    _encoder: float = 0.0
    _used: set[str] = field(default_factory=set)
    _planned: set[tuple[Any, Any]] | None = field(default_factory=set)  # shapes; None: all of them
    _read: float = 0.0  # when the piece that was read last lay in its pinned buffer

    def __post_init__(self) -> None:
        self.costs = Costs(self.gpu, self.machine)
        self._launch = self.gpu.efficiency.launch_seconds
        self._view = self.gpu.efficiency.view_seconds * self.costs.slowness
        self._pageable = min(self.machine.pageable_bytes, self.gpu.pcie_bytes)

    def now(self) -> float:
        """What the host would read on its clock."""
        return self._host

    def synchronize(self) -> None:
        """The host waits for the device: for the computation and for the copies that were started."""
        computed = max(self._host, self._compute)
        copied = max(self._copies, self._returns, self._gathered)
        self._stall(copied - computed)
        self._host = max(computed, copied)

    def timelines(self) -> tuple[float, ...]:
        """All of them, the computation's first, then the host's."""
        return (*(getattr(self, name) for name in _TIMELINES), *self._idle)

    def sums(self) -> tuple[float, ...]:
        return (self.exchanged_bytes, self.exchange_stalls, *astuple(self.copied), *self.busy.values())

    def advance(self, times: int, timelines: Sequence[float], sums: Sequence[float]) -> None:
        """Adds `times` the change of the timelines and the sums."""
        *moved, idle, until = (now + times * by for now, by in zip(self.timelines(), timelines, strict=True))
        for name, moment in zip(_TIMELINES, moved, strict=True):
            setattr(self, name, moment)
        self._idle = idle, until
        moved = [now + times * by for now, by in zip(self.sums(), sums, strict=True)]
        self.exchanged_bytes, self.exchange_stalls = round(moved.pop(0)), moved.pop(0)
        self.copied = Copies(round(moved.pop(0)), moved.pop(0), moved.pop(0))
        self.busy = dict(zip(self.busy, moved, strict=True))

    # --- computation -----------------------------------------------------------------------------------------------------

    def compute(self, price: Price, args: Arguments, result: Any) -> None:
        """One operation on the device, queued behind all earlier ones."""
        seconds, busy = self.costs.seconds(price.work(args, result)), self.busy
        self._host += price.dispatch
        if price.category == "convolution":
            self._plan(args[0].shape, args[1].shape)
        self._compute = max(self._compute, self._host) + self._launch + seconds
        busy[price.category] += seconds
        busy["launch"] += self._launch

    def view(self) -> None:
        """An operation that runs nothing: only the host is busy with it."""
        self._host += self._view

    def compute_on_host(self, price: Price, args: Arguments, result: Any) -> None:
        """One operation on host tensors, which the host does itself."""
        flops, _, nbytes = price.work(args, result)
        self._host += price.dispatch + max(flops / self.machine.flops, nbytes / self.machine.memory_bytes)

    # --- copies ----------------------------------------------------------------------------------------------------------

    def mark(self) -> float:
        """When everything computed so far is done."""
        return max(self._compute, self._host)

    def copies_done(self) -> float:
        """When the copies started so far are done: a mark."""
        return self._copies

    def prefetch(self, nbytes: int, *after: float | None, on_device: bool = False) -> float:
        """A copy from pinned memory beside the computation: after earlier ones, these marks, and what was just read.

        Where that is still being read, the copy is not in the queue yet, and a shorter one passes it. on_device: from the
        device's own memory.
        """
        ready = max((self._host, *(mark or 0.0 for mark in after)))
        read, self._read = self._read, 0.0
        seconds = nbytes / (self.costs.bandwidth / 2 if on_device else self.gpu.pcie_bytes)
        self.copied += Copies(nbytes, seconds)
        idle, until = self._idle
        if not read and max(idle, ready) + seconds <= until:
            self._idle = max(idle, ready) + seconds, until
            return self._idle[0]
        start = max(self._copies, ready)
        if read > start:
            self._idle = start, read
        self._copies = max(start, read) + seconds
        return self._copies

    def write_back(self, nbytes: int, after: float | None) -> float:
        """A copy into pinned memory beside the computation: after earlier ones. The link carries both directions at once."""
        seconds = nbytes / self.gpu.pcie_bytes
        self._returns = max(self._returns, self._host, after or 0.0) + seconds
        self.copied += Copies(nbytes, seconds)
        return self._returns

    def wait(self, mark: float) -> None:
        """Later computation waits for a mark."""
        computed = max(self._compute, self._host)
        self._stall(mark - computed)
        self._compute = max(computed, mark)

    def _stall(self, seconds: float) -> None:
        if seconds > 0.0:
            self.copied += Copies(stalled_seconds=seconds)

    def transfer(self, nbytes: int, *, pinned: bool) -> None:
        """A copy between host and device in the computation's order, which the host waits for."""
        rate = self.gpu.pcie_bytes if pinned else self._pageable
        self._host = self._compute = max(self._compute, self._host) + nbytes / rate

    def queue_copy(self, nbytes: int) -> None:
        """A copy between pinned memory and device in the computation's order, which the host does not wait for."""
        self._host += self.gpu.efficiency.dispatch_seconds
        self._compute = max(self._compute, self._host) + nbytes / self.gpu.pcie_bytes

    def host_waits(self, mark: float) -> None:
        """The host itself waits for a mark."""
        self._host = max(self._host, mark)

    def copy_on_host(self, nbytes: int) -> None:
        """The host itself copies between its tensors."""
        self._host += nbytes / self.machine.copy_bytes

    # --- other GPUs ------------------------------------------------------------------------------------------------------

    def start_exchange(self, nbytes: int, messages: int) -> float:
        """Behind earlier exchanges and everything computed so far; a mark. messages: other GPUs that are talked to."""
        self._host += messages * self.costs.slowness * MESSAGE_SECONDS
        start = max(self._linked, self._compute, self._host)
        self._linked = start + self._link().seconds(nbytes)
        self.exchanged_bytes += nbytes
        return self._linked

    def start_gather(self, nbytes: int, messages: int, after: float | None) -> float:
        """Weights from other GPUs beside the computation: after earlier ones and the mark `after`; a mark for `wait`.

        Over a bus one thing follows another: exchanges, gathers, and copies from the host.
        """
        self._host += messages * self.costs.slowness * MESSAGE_SECONDS
        link = self._link()
        start = max(self._gathered, self._host, after or 0.0, self._linked if link.shares_the_bus else 0.0)
        self._gathered = start + link.gather_seconds(nbytes)
        if link.shares_the_bus:
            self._copies, self._linked = max(self._copies, self._gathered), self._gathered
        self.exchanged_bytes += nbytes
        return self._gathered

    def _link(self) -> Link:
        self.link = self.link or link_of(self.gpu, None, 2)
        return self.link

    def wait_for_exchange(self, mark: float) -> None:
        """Later computation waits for it."""
        computed = max(self._compute, self._host)
        self.exchange_stalls += max(0.0, mark - computed)
        self._compute = max(computed, mark)

    # --- once ----------------------------------------------------------------------------------------------------------------

    def first_use(self, library: str) -> None:
        """The host loads a library's modules and makes its plans, while the device waits."""
        cost = self.machine.first_use.get(library)
        self._used.add(library)
        if cost is not None:
            self._host += cost.cold if library in self.cold else cost.warm

    def _plan(self, picture: Any, weight: Any) -> None:
        if self._planned is not None and (picture, weight) not in self._planned:
            self._planned.add((picture, weight))
            self._host += PLAN_SECONDS * self.costs.slowness

    def leave_out_plans(self) -> None:
        """As if every shape of a convolution had been seen before."""
        self._planned = None

    def cold_seconds(self) -> float:
        """What compiling costs this run and no later one."""
        costs = [
            self.machine.first_use[library] for library in self.cold & self._used if library in self.machine.first_use
        ]
        return sum(cost.cold - cost.warm for cost in costs)

    def pin(self, nbytes: int) -> None:
        """The host takes zeroed RAM and pins it."""
        self._host += nbytes / self.machine.pin_bytes

    def unpin(self, nbytes: int) -> None:
        self._host += nbytes / self.machine.unpin_bytes

    def load_from_disk(self, nbytes: int, component: str, readers: int = 1) -> None:
        """The host reads checkpoint files into `nbytes` of weights while nothing else happens. readers: processes that do."""
        size, reading = self._files(nbytes, component)
        self._host += self._reading(size, reading.taken, self.machine.cached_share, readers)

    def streamed_bytes(self, component: str) -> float:
        """Bytes of a component's files per second, where they are read in every pass and found as they are now."""
        size, reading = self._files(1, component)
        return size / self._reading(size, reading.used, self.machine.cached_share)

    def _files(self, nbytes: int, component: str) -> tuple[float, Reading]:
        """The bytes that are read for so many of weights, and how fast those of the page cache are."""
        factor = self.machine.stored.get(component)
        return (nbytes, self.machine.plain) if factor is None else (nbytes * factor, self.machine.converted)

    def _reading(self, size: float, cached_bytes: float, cached: float, readers: int = 1) -> float:
        """Seconds; cached: the share in the page cache. Several threads read, so the disk works while others convert."""
        return size * (cached / cached_bytes + (1 - cached) / min(self.machine.disk_bytes / readers, cached_bytes))

    def encode(self, pixels: int) -> None:
        """Frames for the encoder, a thread beside everything else."""
        self._encoder = max(self._encoder, self._host) + pixels / self.machine.encode_pixels

    def finish_encoding(self) -> None:
        self._host = max(self._host, self._encoder)

    # --- reading ahead ---------------------------------------------------------------------------------------------------

    def reader_waits(self, mark: float) -> None:
        """The reading thread may overwrite its buffer once the copy from it is done."""
        self._reader = max(self._reader, mark)

    def read_from_ram(self, nbytes: int) -> None:
        """The reading thread copies pageable memory into a pinned buffer; the next prefetch is of it."""
        self._read_ahead(nbytes / self.machine.copy_bytes)

    def read_from_disk(self, nbytes: int, component: str, kept_bytes: int | None = None, readers: int = 1) -> None:
        """The reading thread reads checkpoint files into a pinned buffer; the next prefetch is of it.

        kept_bytes: read before, with so many bytes of files since, which the page cache holds if it is larger.
        """
        again = kept_bytes is not None and kept_bytes <= self.machine.page_cache_bytes
        cached = 1.0 if again else self.machine.cached_share
        size, reading = self._files(nbytes, component)
        self._read_ahead(self._reading(size, reading.used, cached, readers))

    def _read_ahead(self, seconds: float) -> None:
        self._reader = self._read = max(self._reader, self._host) + seconds
