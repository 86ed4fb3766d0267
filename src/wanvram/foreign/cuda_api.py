"""`torch.cuda`, `torch.accelerator`, streams, events and generators of the simulated card: one table of names and stand-ins."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from wanvram.foreign.errors import Unsupported
from wanvram.foreign.fast_paths import without_modes
from wanvram.foreign.memory import META, ForeignMemory

__all__ = ["StandIns", "patched"]

_MISSING = object()


@contextmanager
def patched(changes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Sets attributes and puts back what was there, in reverse order, whatever happens."""
    with ExitStack() as stack:
        for owner, name, value in changes:
            before = vars(owner).get(name, _MISSING)
            setattr(owner, name, value)
            if before is _MISSING:
                stack.callback(delattr, owner, name)
            else:
                stack.callback(setattr, owner, name, before)
        yield


class CudaEvent:
    """torch.cuda.Event: a moment of the simulated clock."""

    memory: ForeignMemory

    def __init__(self, *_: Any, **__: Any) -> None:
        self._time: float | None = None

    def record(self, stream: Any = None) -> None:
        self._time = self.memory.clock.mark()

    def wait(self, stream: Any = None) -> None:
        if self._time is not None:
            self.memory.clock.wait(self._time)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.memory.synchronize()

    def elapsed_time(self, end: CudaEvent) -> float:
        """Milliseconds."""
        return ((end._time or 0.0) - (self._time or 0.0)) * 1e3


class CudaStream:
    """torch.cuda.Stream: a pool of its own in the allocator. number 0 is the default stream; None: a new one."""

    memory: ForeignMemory
    event: type[CudaEvent]
    count = 0
    device = torch.device("cuda", 0)
    device_type = 1
    device_index = 0

    def __init__(self, device: Any = None, priority: int = 0, *, number: int | None = None, **_: Any) -> None:
        if number is None:
            type(self).count += 1
            number = type(self).count
        self.stream_id = self.cuda_stream = number
        self.priority = priority
        self._before: list[int] = []

    def synchronize(self) -> None:
        """The host waits for this stream alone: for the copies, where it is not the default one."""
        if self.stream_id:
            self.memory.clock.host_waits(self.memory.clock.copies_done())
        else:
            self.memory.synchronize()

    def query(self) -> bool:
        return True

    def wait_stream(self, stream: Any) -> None:
        """Which stream waits changes no memory but under record_stream, where the computation waits for the copies."""
        if self.memory.timed and not self.stream_id:
            self.memory.clock.wait(self.memory.clock.copies_done())

    def wait_event(self, event: CudaEvent) -> None:
        event.wait()

    def record_event(self, event: Any = None) -> Any:
        event = event or self.event()
        event.record()
        return event

    def __enter__(self) -> CudaStream:
        self._before.append(self.memory.stream)
        self.memory.stream = self.stream_id
        return self

    def __exit__(self, *_: object) -> None:
        self.memory.stream = self._before.pop()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CudaStream) and other.stream_id == self.stream_id

    def __hash__(self) -> int:
        return hash(self.stream_id)


class CudaGenerator(torch.Generator):
    """torch.Generator that says it is of the device it was asked for; its numbers are the CPU's."""

    asked: torch.device

    def __new__(cls, device: Any = "cpu") -> CudaGenerator:
        made: CudaGenerator = super().__new__(cls, device="cpu")  # type: ignore[call-arg]
        made.asked = torch.device(device)
        return made

    def __init__(self, device: Any = "cpu") -> None:
        super().__init__()

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.asked


class StandIns:
    """Answers of the simulated card; `table()` says which names of PyTorch they stand for."""

    def __init__(self, memory: ForeignMemory, *, eager: bool = False) -> None:
        self.memory = memory
        self.eager = eager
        self.event: Any = type("Event", (CudaEvent,), {"memory": memory})
        self.stream_class: Any = type("Stream", (CudaStream,), {"memory": memory, "event": self.event})
        self.generator = torch.Generator()
        self.fraction = 1.0

    def table(self) -> list[tuple[Any, str, Any]]:
        """(owner, name, stand-in)."""
        named = {**self._cuda(), **self._memory()}
        places = [(module, named) for module in (torch.cuda, torch.cuda.memory, torch.cuda.random)]
        changes: list[tuple[Any, str, Any]] = []
        for module, answers in (*places, (torch.accelerator, self._accelerator())):
            changes += [(module, name, answer) for name, answer in answers.items() if hasattr(module, name)]
        for owner, name, said in _refused():
            plain = getattr(owner, name, None)
            if plain is not None:  # annotations join classes with None
                refusal: Any = _refusal(said)
                refused = type(name, (), {"__init__": refusal}) if isinstance(plain, type) else refusal
                changes.append((owner, name, refused))
        return [
            *changes,
            (torch, "Generator", CudaGenerator),
            (torch, "Stream", self.stream_class),
            (torch, "Event", self.event),
            (torch.Tensor, "record_stream", lambda tensor, stream: self.memory.record_stream(tensor)),
            (torch, "clear_autocast_cache", self.memory.casts.clear),
            (torch, "set_autocast_enabled", self.memory.casts.set_enabled),
            (torch.version, "cuda", "13.0"),
            (torch.backends.cuda, "is_built", lambda: True),
            (torch, "_has_compatible_shallow_copy_type", self._sets_data),
            (torch, "compile", self._compile),
            (torch.overrides, "has_torch_function", without_modes(torch.overrides.has_torch_function)),
        ]

    def _sets_data(self, tensor: torch.Tensor, other: torch.Tensor) -> bool:
        """Whether Module._apply sets `.data`: not between meta and a device, where it makes new parameters and parts tied ones."""
        return (self.memory.place_of(tensor) == META) == (self.memory.place_of(other) == META)

    def _compile(self, model: Any = None, **options: Any) -> Any:
        """torch.compile: refused when what is compiled is called, unless the run was told to stay eager."""
        if model is None:
            return lambda function: self._compile(function, **options)
        if self.eager:
            self.memory.said["torch.compile was run eagerly"] += 1
            return model
        if isinstance(model, torch.nn.Module):
            _refusal("torch.compile")()
        return _refusal("torch.compile")

    # --- devices and streams ---------------------------------------------------------------------------------------------

    def current_stream(self, *_: Any, **__: Any) -> CudaStream:
        current: CudaStream = self.stream_class(number=self.memory.stream)
        return current

    def set_stream(self, stream: CudaStream) -> None:
        self.memory.stream = stream.stream_id

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        with stream or nullcontext():
            yield

    def properties(self, *_: Any, **__: Any) -> Any:
        gpu = self.memory.gpu
        major, minor = gpu.compute_capability
        return SimpleNamespace(
            name=gpu.name,
            major=major,
            minor=minor,
            total_memory=self.memory.total_bytes,
            multi_processor_count=132,
            is_integrated=0,
            is_multi_gpu_board=0,
            warp_size=32,
            max_threads_per_multi_processor=2048,
            regs_per_multiprocessor=65536,
            shared_memory_per_block=49152,
            shared_memory_per_block_optin=101376,
            L2_cache_size=50 << 20,
            gcnArchName="",
            uuid="simulated",
        )

    def _cuda(self) -> dict[str, Callable[..., Any]]:
        memory = self.memory
        major, minor = memory.gpu.compute_capability
        seeded = lambda seed: self.generator.manual_seed(int(seed)) and None  # noqa: E731
        return {
            **dict.fromkeys(("init", "_lazy_init", "_lazy_call", "set_device", "ipc_collect"), _nothing),
            **dict.fromkeys(("is_available", "is_initialized"), lambda: True),
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            **dict.fromkeys(("device", "device_of"), _NullDevice),
            "get_device_name": lambda *args: memory.gpu.name,
            "get_device_capability": lambda *args: (major, minor),
            "get_device_properties": self.properties,
            "get_arch_list": lambda: [f"sm_{major}{minor}"],
            "is_bf16_supported": lambda *args, **kwargs: (major, minor) >= (8, 0),
            "is_tf32_supported": lambda: (major, minor) >= (8, 0),
            "can_device_access_peer": lambda *args: False,
            "synchronize": lambda *args: memory.synchronize(),
            "current_stream": self.current_stream,
            "default_stream": lambda *args: self.stream_class(number=0),
            "set_stream": self.set_stream,
            "stream": self.stream,
            "Stream": self.stream_class,
            "Event": self.event,
            "is_current_stream_capturing": lambda: False,
            "current_blas_handle": lambda: 0,
            **dict.fromkeys(("manual_seed", "manual_seed_all"), seeded),
            **dict.fromkeys(("seed", "seed_all"), lambda: self.generator.seed() and None),
            "initial_seed": lambda: self.generator.initial_seed(),
            "get_rng_state": lambda *args: self.generator.get_state(),
            "get_rng_state_all": lambda: [self.generator.get_state()],
            "set_rng_state": lambda state, *args: self.generator.set_state(state) and None,
            "set_rng_state_all": lambda states: self.generator.set_state(states[0]) and None,
            "utilization": lambda *args: 0,
        }

    # --- memory ----------------------------------------------------------------------------------------------------------

    def _memory(self) -> dict[str, Callable[..., Any]]:
        memory, allocator = self.memory, self.memory.allocator
        resets = ("reset_peak_memory_stats", "reset_max_memory_allocated", "reset_max_memory_cached")
        return {
            **dict.fromkeys(("reset_accumulated_memory_stats", "_record_memory_history"), _nothing),
            **dict.fromkeys(resets, lambda *args, **kwargs: memory.reset_peak()),
            "memory_allocated": lambda *args, **kwargs: allocator.allocated_bytes,
            "max_memory_allocated": lambda *args, **kwargs: allocator.peak_allocated_bytes,
            "memory_reserved": lambda *args, **kwargs: allocator.reserved_bytes,
            "max_memory_reserved": lambda *args, **kwargs: allocator.peak_reserved_bytes,
            "memory_cached": lambda *args, **kwargs: allocator.reserved_bytes,
            "max_memory_cached": lambda *args, **kwargs: allocator.peak_reserved_bytes,
            "empty_cache": lambda *args: allocator.empty_cache(),
            "memory_stats": self.stats,
            "memory_stats_as_nested_dict": self.nested_stats,
            "memory_summary": lambda *args, **kwargs: "\n".join(f"{k}: {v}" for k, v in self.stats().items()),
            "mem_get_info": lambda *args: (self.free_bytes(), memory.total_bytes),
            "set_per_process_memory_fraction": self.set_fraction,
            "get_per_process_memory_fraction": lambda *args: self.fraction,
            "list_gpu_processes": lambda *args: "",
            "get_allocator_backend": lambda: "native",
        }

    def free_bytes(self) -> int:
        return max(0, self.memory.total_bytes - self.memory.device_memory())

    def set_fraction(self, fraction: float, *_: Any) -> None:
        self.fraction = float(fraction)
        self.memory.cap(int(fraction * self.memory.total_bytes))

    def stats(self, *_: Any, **__: Any) -> dict[str, int]:
        """The counters of torch.cuda.memory_stats that memory reports read."""
        allocator = self.memory.allocator
        allocated = allocator.allocated_bytes, allocator.peak_allocated_bytes
        reserved = allocator.reserved_bytes, allocator.peak_reserved_bytes
        found: dict[str, int] = {}
        for name, (now, peak) in {"allocated": allocated, "active": allocated, "reserved": reserved}.items():
            found |= {f"{name}_bytes.all.current": now, f"{name}_bytes.all.peak": peak}
        return found | {"num_alloc_retries": allocator.alloc_retries, "num_ooms": self.memory.refused}

    def nested_stats(self, *_: Any) -> dict[str, Any]:
        """The same by name, pool and kind, as wanvram's own meter reads them."""
        nested: dict[str, Any] = {}
        for path, value in self.stats().items():
            *outer, last = path.split(".")
            inner = nested
            for name in outer:
                inner = inner.setdefault(name, {})
            inner[last] = value
        return nested

    def _accelerator(self) -> dict[str, Callable[..., Any]]:
        """torch.accelerator, whose names differ a little."""
        found = {**self._memory(), **self._cuda()}
        kept = (
            *("is_available", "device_count", "current_stream", "set_stream", "synchronize", "empty_cache"),
            *("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "memory_stats"),
            *("reset_peak_memory_stats", "reset_accumulated_memory_stats"),
        )
        return {name: found[name] for name in kept} | {
            "current_accelerator": lambda *args, **kwargs: torch.device("cuda"),
            **dict.fromkeys(("current_device_index", "current_device_idx"), lambda: 0),
            **dict.fromkeys(("set_device_index", "set_device_idx"), _nothing),
            "get_memory_info": found["mem_get_info"],
            "device_index": _NullDevice,
        }


def _nothing(*_: Any, **__: Any) -> None: ...


class _NullDevice:
    """torch.cuda.device: there is one."""

    def __init__(self, device: Any = 0) -> None:
        self.idx = 0

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def _refused() -> list[tuple[Any, str, str]]:
    """(owner, name, what it is) of what would be simulated wrongly."""
    found: list[tuple[Any, str, str]] = [
        (torch.cuda, "CUDAGraph", "a CUDA graph"),
        (torch.cuda, "graph", "a CUDA graph"),
        (torch.cuda, "make_graphed_callables", "a CUDA graph"),
        (torch.cuda, "MemPool", "torch.cuda.MemPool"),
        (torch.cuda.memory, "_dump_snapshot", "the allocator's snapshot (the run directory has one)"),
        (torch.cuda.memory, "_snapshot", "the allocator's snapshot (the run directory has one)"),
    ]
    distributed = sys.modules.get("torch.distributed")
    return [*found, *([(distributed, "init_process_group", "work over several GPUs")] if distributed else [])]


def _refusal(what: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise Unsupported(f"{what} is not simulated: what it does with memory is not known here; run without it")

    return refuse
