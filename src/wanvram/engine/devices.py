"""The three kinds of device, and every movement of data between host and device; `cuda` itself is in engine/cuda.py.

`cuda` and `cpu` hold real tensors, `simulated` holds meta tensors watched by simulate.memory. Models and stages use only
this interface, so one pipeline runs on all three.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch

from wanvram.engine.peers import Exchanged, Peers, TorchPeers
from wanvram.engine.repeats import Standing
from wanvram.record import AttentionChoice
from wanvram.recorder.meters import CpuMeter, Meter
from wanvram.sharing import ADDRESS_BYTES, ALONE, WORLD, Place
from wanvram.simulate.memory import SimulatedMemory
from wanvram.simulate.peers import SimulatedPeers
from wanvram.spans import Copies
from wanvram.units import MIB

__all__ = ["CpuDevice", "Device", "SimulatedDevice"]

MEMORY_IS = "the caller's"  # read by simulate.timeline
# PyTorch's threads spin for a while after each copy: 14 of them burnt 55 s of processor beside a tiled decode of 4 s.
COPIED_ALONE_BYTES = 32 * MIB


class Placing:
    """Where tensors are: on the device, at `torch_device`, or on the host, pinned or not."""

    torch_device: torch.device

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.torch_device)

    def host_empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool = False) -> torch.Tensor:
        raise NotImplementedError

    def host_room(self) -> int | None:
        """Bytes of RAM that can be taken without swapping; None where the host is not this machine's."""
        return None

    def building(self) -> AbstractContextManager[None]:
        """Around the construction of a model on meta, whose parameters are not memory yet."""
        return nullcontext()

    def computing_on_host(self) -> AbstractContextManager[None]:
        """Around computation on host tensors, so that a simulated device books them there."""
        return nullcontext()

    def generator(self, seed: int) -> torch.Generator | None:
        return torch.Generator(self.torch_device).manual_seed(seed)

    def empty_cache(self) -> None:
        """Gives cached, unused memory back to the driver."""

    def hold_to_limit(self) -> None:
        """The libraries are loaded: what is left of the limit is the allocator's."""


class Copying:
    """Every movement between host and device, and who waits for it. A mark is a moment in the order of one of them."""

    copies_beside = False  # copies run beside the computation, so that a thread may read ahead

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        """Host tensor -> new device tensor."""
        raise NotImplementedError

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        """Device tensor -> new host tensor; blocks until the data are there."""
        raise NotImplementedError

    def on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a device tensor holds now, to be read on the host. Nothing is allocated on the device; on the CPU it is the tensor."""
        return tensor.cpu()

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Copies between host and device, ordered with the computation."""
        destination.copy_(source)

    def prefetch(self, destination: torch.Tensor, source: torch.Tensor, *after: Any) -> Any:
        """Starts a host-to-device copy once these marks have passed; returns the mark of its completion."""
        self.copy(destination, source)
        return None

    def write_back(self, destination: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        """The other way, into pinned memory, beside the computation and what is prefetched."""
        self.copy(destination, source)
        return None

    def mark(self) -> Any:
        """A mark in the computation's order, to give to `prefetch` or `write_back`."""
        return None

    def wait(self, mark: Any) -> None:
        """Lets later computation wait for a mark of a copy."""

    def reader_waits(self, mark: Any) -> None:
        """Stops the calling thread until a mark of a copy has passed."""

    def host_waits(self, mark: Any) -> None:
        """The host itself waits until a mark has passed."""
        self.reader_waits(mark)

    def send(self, host: torch.Tensor, passage: torch.Tensor) -> torch.Tensor:
        """Host tensor -> new device tensor by way of pinned memory, which must stay as it is until a later mark has passed."""
        return self.upload(host)

    def receive(self, passage: torch.Tensor, tensor: torch.Tensor) -> Any:
        """Starts a device tensor's copy into pinned memory, in the computation's order; returns the mark of its completion."""
        passage.copy_(tensor)
        return None

    def copy_on_host(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Copies between host tensors, of which the last dimension is dense."""
        if source.nbytes > COPIED_ALONE_BYTES or (source.dtype, source.shape) != (destination.dtype, destination.shape):
            destination.copy_(source)
        else:
            np.copyto(destination.view(torch.uint8).numpy(), source.view(torch.uint8).numpy())


class Measuring:
    """What a run took. `meter` measures memory."""

    meter: Meter
    repeats_itself = False  # equal steps take equally long and leave the same: one of them stands for all

    def standing(self) -> Standing | None:
        """Where it stands, if what is done next follows from that: of no real device."""
        return None

    def stand_for(self, times: int, timelines: Sequence[float], sums: Sequence[float]) -> float:
        """Books `times` as much as changed these so; returns the seconds of computation."""
        return 0.0

    def later(self, mark: Any, seconds: float) -> Any:
        """The mark of what is left out, from that of what stands for it."""
        return mark

    @contextmanager
    def session(self) -> Iterator[None]:
        """Everything that touches the device happens inside; meters that need a dispatch mode enter it here."""
        with torch.no_grad():
            yield

    def copies(self) -> Copies:
        """Prefetching since the start: bytes, how long it took and how long computation waited for it."""
        return Copies()


class Booking:
    """What a real run does beside the device, for where it is not done: then its time is booked."""

    def generated_weights(self) -> None:
        """Weights would be generated on the device here: where nothing is computed, the first kernel is booked."""

    def loaded_weights(self, destination: torch.Tensor, component: str, *, readers: int = 1) -> None:
        """Weights would be read from a checkpoint into `destination` here: where nothing is read, the time is booked.

        readers: ranks that read as much from the same disk meanwhile, this one among them.
        """

    def read_from_disk(self, nbytes: int, component: str, kept_bytes: int | None, *, readers: int = 1) -> None:
        """Weights would be read from files into a pinned buffer here: where nothing is read, the time is booked.

        kept_bytes: they were read before, with so many others since; None: for the first time.
        """

    def video_sink(self) -> Any:
        """Stands for the writer of a video where nothing is written; None where one has to be given."""
        return None


class Device(Placing, Copying, Measuring, Booking):
    """What a pipeline needs of a device. `kind` and `name` say in records which it was; nothing in engine/ asks for them."""

    kind: str
    name: str
    computes_half = True  # float16 products are as good as any
    attention: AttentionChoice | None = None  # what computes the transformer's; None: PyTorch decides
    place: Place = ALONE  # among the GPUs of a run, set once before it begins
    _weight_peers: Peers | None = None

    def peers(self, axis: str) -> Peers:
        """The ranks of an axis (sharing) of `place`. Whoever set a place with others has made torch.distributed's group."""
        return TorchPeers(self.place, axis, self._exchanged)

    def connect(self, *, weights: bool) -> None:
        """Once, when the other ranks are there: takes what exchanges take outside the allocator, so that it is known from the start.

        weights: shares of them are gathered, too.
        """
        peers = self.peers(WORLD)
        peers.gather(self.empty((peers.count,), torch.uint8), [1] * peers.count)
        del peers
        if weights:
            self.weight_peers()
        self.empty_cache()
        self.hold_to_limit()

    def weight_peers(self) -> Peers:
        """All ranks, by connections of their own: weights must not stand in the way of what the computation exchanges.

        All ranks ask for them first at the same place of their runs: the first message connects, outside the allocator.
        """
        if self._weight_peers is None:
            self._weight_peers = peers = self._weight_connections()
            self.wait(self.gather_beside(peers, self.empty((peers.count,), torch.uint8), self.mark()))
            self.hold_to_limit()
        return self._weight_peers

    def _weight_connections(self) -> Peers:
        return self.peers(WORLD)

    def gather_beside(self, peers: Peers, whole: torch.Tensor, after: Any) -> Any:
        """Starts gathering equal runs of bytes in place once `after` (a mark) has passed; returns the mark of its completion."""
        peers.gather(whole, [whole.nbytes // peers.count] * peers.count)
        return None

    def exchanged(self) -> Exchanged:
        """With other ranks since the start."""
        return self._exchanged.settle()

    def repeated(self, times: int, before: Exchanged) -> None:
        """What was exchanged since `before` stands for so many times more, where equal steps are not run."""

    @cached_property
    def _exchanged(self) -> Exchanged:
        return Exchanged()


class CpuDevice(Device):
    """Real tensors in RAM: tests and small demonstrations. Host and device are the same memory."""

    kind = "cpu"
    name = "cpu"
    torch_device = torch.device("cpu")
    meter: CpuMeter
    computes_half = False

    def __init__(self) -> None:
        self.meter = CpuMeter()

    @contextmanager
    def session(self) -> Iterator[None]:
        with torch.no_grad(), self.meter:
            yield

    def host_empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool = False) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        return host.clone()

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()


class SimulatedDevice(Device):
    """Meta tensors and an allocator model: sizes and lifetimes without data. Host tensors are meta tensors too."""

    kind = "simulated"
    torch_device = torch.device("meta")
    repeats_itself = True

    def __init__(self, memory: SimulatedMemory) -> None:
        self.memory = memory
        self.meter = memory
        self.clock = memory.clock
        self.name = memory.device_name

    @contextmanager
    def session(self) -> Iterator[None]:
        with torch.no_grad(), self.memory:
            yield

    def hold_addresses(self, members: Iterable[int]) -> None:
        """Of rooms with so many members, where ranks exchange by copies: what they leave in PyTorch's allocator."""
        with self.session():
            self._addresses = [self.empty((ADDRESS_BYTES * n,), torch.uint8) for n in members for _ in range(2)]

    def host_empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool = False) -> torch.Tensor:
        with self.memory.on_host(pinned):
            return torch.empty(shape, dtype=dtype, device="meta")

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        result = torch.empty(host.shape, dtype=host.dtype, device="meta")
        self.clock.transfer(result.nbytes, pinned=self.memory.is_pinned(host))
        return result

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        with self.memory.on_host():
            result = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        self.clock.transfer(result.nbytes, pinned=False)
        return result

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        _check_shapes(destination, source)
        host = destination if self.memory.is_host(destination) else source
        if self.memory.is_host(host):
            self.clock.transfer(source.nbytes, pinned=self.memory.is_pinned(host))
        else:
            destination.copy_(source)

    def prefetch(self, destination: torch.Tensor, source: torch.Tensor, *after: Any) -> Any:
        _check_shapes(destination, source)
        return self.clock.prefetch(source.nbytes, *after, on_device=not self.memory.is_host(source))

    def write_back(self, destination: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        _check_shapes(destination, source)
        return self.clock.write_back(source.nbytes, after)

    def mark(self) -> Any:
        return self.clock.mark()

    def wait(self, mark: Any) -> None:
        if mark is not None:
            self.clock.wait(mark)

    def copies(self) -> Copies:
        return self.clock.copied

    def reader_waits(self, mark: Any) -> None:
        """Only the thread that reads weights waits so; here it is a timeline of the clock."""
        if mark is not None:
            self.clock.reader_waits(mark)

    def host_waits(self, mark: Any) -> None:
        if mark is not None:
            self.clock.host_waits(mark)

    def send(self, host: torch.Tensor, passage: torch.Tensor) -> torch.Tensor:
        result = torch.empty(host.shape, dtype=host.dtype, device="meta")
        self.clock.copy_on_host(result.nbytes)
        self.clock.queue_copy(result.nbytes)
        return result

    def receive(self, passage: torch.Tensor, tensor: torch.Tensor) -> Any:
        _check_shapes(passage, tensor)
        self.clock.queue_copy(passage.nbytes)
        return self.clock.mark()

    def copy_on_host(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Into a pinned buffer the reading thread copies, beside the computation; anything else the host itself."""
        _check_shapes(destination, source)
        if self.memory.is_pinned(destination):
            self.clock.read_from_ram(source.nbytes)
        else:
            self.clock.copy_on_host(source.nbytes)

    def peers(self, axis: str) -> Peers:
        return SimulatedPeers(self.place, axis, self.memory)

    def gather_beside(self, peers: Peers, whole: torch.Tensor, after: Any) -> Any:
        return self.clock.start_gather(whole.nbytes // peers.count * (peers.count - 1), peers.count - 1, after)

    def standing(self) -> Standing | None:
        state = self.memory.state()
        return None if state is None else Standing(state, self.clock.timelines(), self.clock.sums())

    def stand_for(self, times: int, timelines: Sequence[float], sums: Sequence[float]) -> float:
        self.clock.advance(times, timelines, sums)
        return times * timelines[0]

    def later(self, mark: Any, seconds: float) -> Any:
        return mark + seconds

    def exchanged(self) -> Exchanged:
        return Exchanged(self.clock.exchanged_bytes, self.clock.exchange_stalls)

    def repeated(self, times: int, before: Exchanged) -> None:
        self.clock.exchanged_bytes += times * (self.clock.exchanged_bytes - before.nbytes)
        self.clock.exchange_stalls += times * (self.clock.exchange_stalls - before.seconds)

    def read_from_disk(self, nbytes: int, component: str, kept_bytes: int | None, *, readers: int = 1) -> None:
        self.clock.read_from_disk(nbytes, component, kept_bytes, readers)

    def generated_weights(self) -> None:
        self.memory.load_library("kernels")

    def loaded_weights(self, destination: torch.Tensor, component: str, *, readers: int = 1) -> None:
        on_host = self.memory.is_host(destination)
        self.clock.load_from_disk(destination.nbytes, component, readers)
        if not on_host:
            self.memory.load_library("kernels")
            self.clock.transfer(destination.nbytes, pinned=False)

    def video_sink(self) -> SimulatedSink:
        return SimulatedSink(self)

    def generator(self, seed: int) -> torch.Generator | None:
        return None

    def building(self) -> AbstractContextManager[None]:
        return self.memory.ignoring()

    def computing_on_host(self) -> AbstractContextManager[None]:
        return self.memory.on_host()

    def empty_cache(self) -> None:
        gc.collect()
        self.memory.allocator.empty_cache()


class SimulatedSink:
    """Books the encoding of frames, uint8 [t,H,W,3], beside the computation."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._clock = device.clock

    def write(self, frames: torch.Tensor) -> None:
        self._clock.encode(frames.shape[0] * frames.shape[1] * frames.shape[2])

    def finish(self) -> None:
        self._clock.finish_encoding()


def _check_shapes(destination: torch.Tensor, source: torch.Tensor) -> None:
    if destination.shape != source.shape:
        raise AssertionError(f"copy of {tuple(source.shape)} into {tuple(destination.shape)}")
