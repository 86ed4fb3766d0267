"""A CPU device whose own tensors are logged as they are born and die, for comparison with the simulated device's events."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wanvram.engine.devices import CpuDevice, SimulatedDevice
from wanvram.engine.peers import TorchPeers

__all__ = ["LoggedDevice", "simulated_events"]


class LoggedDevice(CpuDevice):
    """`births.events`: bytes of every storage born on the device, negative when it dies."""

    def __init__(self) -> None:
        super().__init__()
        self.births = Births()

    @contextmanager
    def session(self) -> Iterator[None]:
        with super().session(), self.births:
            yield

    def host_empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool = False) -> torch.Tensor:
        with self.births.on_host():
            return super().host_empty(shape, dtype, pinned=pinned)

    def download(self, tensor: torch.Tensor) -> torch.Tensor:
        with self.births.on_host():
            return super().download(tensor)

    @contextmanager
    def computing_on_host(self) -> Iterator[None]:  # type: ignore[override]
        with self.births.on_host():
            yield

    def peers(self, axis: str) -> TorchPeers:
        peers = _Telling(self.place, axis, self._exchanged)
        peers.births = self.births
        return peers

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        with self.births.on_device():
            return super().upload(host)

    def send(self, host: torch.Tensor, passage: torch.Tensor) -> torch.Tensor:
        with self.births.on_device():
            return super().send(host, passage)


class _Telling(TorchPeers):
    """Plain data is on the host, as tensors that gloo lets go of when it likes: two such deaths were seen in a later stage."""

    births: Births

    def told(self, value: Any) -> Any:
        with self.births.on_host():
            return super().told(value)


class Births(TorchDispatchMode):
    """What an operation on host tensors makes is on the host, too, as simulate.memory has it."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[int] = []
        self._host: set[int] = set()
        self._device: dict[int, int] = {}
        self._place: str | None = None

    @contextmanager
    def on_host(self) -> Iterator[None]:
        before, self._place = self._place, "host"
        yield
        self._place = before

    @contextmanager
    def on_device(self) -> Iterator[None]:
        before, self._place = self._place, "device"
        yield
        self._place = before

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as simulate.memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        host = self._place == "host"
        if self._place is None:
            host = any(t.untyped_storage()._cdata in self._host for t in _tensors((*args, *kwargs.values())))
        result = func(*args, **kwargs)
        for tensor in _tensors((result,)):
            self._register(tensor.untyped_storage(), host)
        return result

    def _register(self, storage: torch.UntypedStorage, host: bool) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if storage.device.type != "cpu" or key in self._host or key in self._device or nbytes == 0:
            return
        if host:
            self._host.add(key)
            weakref.finalize(storage, self._host.discard, key).atexit = False
        else:
            self._device[key] = nbytes
            self.events.append(nbytes)
            weakref.finalize(storage, self._die, key).atexit = False

    def _die(self, key: int) -> None:
        self.events.append(-self._device.pop(key))


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def simulated_events(device: SimulatedDevice, start: int) -> list[int]:
    """The same of a simulated device, from event `start` on: without what libraries take beside results."""
    assert device.memory.events is not None
    beside = ("before ",), " workspace"
    return [
        event.nbytes
        for event in device.memory.events[start:]
        if not event.operation.startswith(beside[0]) and not event.operation.endswith(beside[1])
    ]
