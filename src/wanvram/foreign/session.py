"""`with simulated_gpu("rtx4090") as gpu:` - PyTorch code inside meets a card that is not there; what it took is asked of `gpu`.

Owns: entering and leaving, so that everything is as before, also after exceptions; the figures of a run.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from wanvram.errors import InputError, OutOfMemory
from wanvram.foreign.buffers import ForeignBuffers, Registered
from wanvram.foreign.cuda_api import StandIns, patched
from wanvram.foreign.facade import Facade
from wanvram.foreign.files import file_stand_ins
from wanvram.foreign.kernels import whole_operations
from wanvram.foreign.measured import MeasuredTable
from wanvram.foreign.memory import CUDA, ForeignMemory
from wanvram.foreign.owners import ForeignTimeline
from wanvram.simulate.allocator import AllocatorSettings, CachingAllocator
from wanvram.simulate.clock import Clock
from wanvram.simulate.gpus import DEFAULT_GPU, GPU, find_gpu
from wanvram.spans import Memory
from wanvram.timeline_record import TimelineRecord
from wanvram.units import human, parse_memory

__all__ = ["ForeignPeak", "ForeignStage", "SimulatedRun", "register_operation", "simulated_gpu"]

_REGISTERED: dict[str, Registered] = {}
_open: list[SimulatedRun] = []


def register_operation(name: str, *, result: Any = None, taken: Any = None) -> None:
    """States what an operation returns and takes, where that is not known: `register_operation("mylib.gemm.default", ...)`.

    result: the arguments -> meta tensors; None: by the operation's own meta kernel. taken: the arguments -> bytes on the card for
    the length of the call; None: nothing beside the result.
    """
    _REGISTERED[name] = Registered(result, taken or (lambda *args: 0))


@dataclass(frozen=True)
class ForeignPeak:
    """Bytes. device: reserved, CUDA context and libraries. low, high: between these reserved lies, where kernels leave it open.

    basis: "exact rules", "rule" (the allocator and PyTorch's rules on a card that was never measured), "measured" (rules, and what
    libraries took in a harvested table) or "estimated".
    """

    allocated_bytes: int
    reserved_bytes: int
    device_bytes: int
    low_bytes: int
    high_bytes: int
    basis: str


@dataclass(frozen=True)
class ForeignStage:
    """A `with gpu.stage(name):` of the run, or all of one name together: start of the first, end of the last, highest peaks."""

    name: str
    start: Memory
    peak: Memory
    end: Memory
    calls: int = 1

    @property
    def start_allocated_bytes(self) -> int:
        return self.start.allocated_bytes

    @property
    def peak_allocated_bytes(self) -> int:
        return self.peak.allocated_bytes

    @property
    def peak_reserved_bytes(self) -> int:
        return self.peak.reserved_bytes

    def again(self, other: ForeignStage) -> ForeignStage:
        """With a later one of the same name."""
        return ForeignStage(self.name, self.start, self.peak.highest(other.peak), other.end, self.calls + other.calls)


class SimulatedRun:
    """What the code inside took so far. fits: False once an allocation was refused that the program did not survive; None where it
    failed for another reason, which `failed` says.
    """

    def __init__(self, memory: ForeignMemory, timeline: ForeignTimeline, vram_bytes: int) -> None:
        self.memory = memory
        self.gpu: GPU = memory.gpu
        self.vram_bytes = vram_bytes
        self._timeline = self.allocations = timeline
        self.entered: list[ForeignStage] = []  # every stage by itself, in the order in which they began
        self.fits: bool | None = True
        self.failed = ""
        self.refused_bytes = 0

    def refuse(self, error: OutOfMemory) -> None:
        """The program ended because the card is full."""
        self.fits, self.refused_bytes = False, error.requested_bytes

    def fail(self, why: str) -> None:
        """The program ended before its end: what it would have taken then is not known."""
        self.fits, self.failed = None, why

    @property
    def peak(self) -> ForeignPeak:
        highest = self._timeline.peaks()
        allocated, reserved = highest.allocated_bytes, highest.reserved_bytes
        ranged = self.memory.buffers.ranged
        low = max(0, reserved - max(ranged.values(), default=0))
        high = reserved + self.memory.buffers.above_bytes
        measured = self.gpu.measured
        table = self.memory.buffers.measured
        known = "measured" if table is not None and table.used else "exact rules" if measured else "rule"
        unknown = ranged or self.memory.untaken or (table is not None and table.missed)
        basis = "estimated" if unknown else known
        device = max(self.memory.peak_device_bytes, self.memory.device_memory())
        return ForeignPeak(allocated, reserved, device, low, high, basis)

    @property
    def stages(self) -> tuple[ForeignStage, ...]:
        merged: dict[str, ForeignStage] = {}
        for stage in self.entered:
            merged[stage.name] = merged[stage.name].again(stage) if stage.name in merged else stage
        return tuple(merged.values())

    @property
    def gaps(self) -> tuple[str, ...]:
        """What the figures do not know, in sentences; none: everything that ran has a rule."""
        return tuple(_gaps(self.memory))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Names a part of the run for `stages`, the timeline and the owners. Does not touch PyTorch's peak counters."""
        start, first, place = self.memory_now(), self._timeline.begun(), len(self.entered)
        self.entered.append(ForeignStage(name, start, start, start))
        self._timeline.begin(name, "stage", None)
        try:
            yield
        finally:
            self._timeline.end()
            peak = start.highest(self._timeline.peaks(first))
            self.entered[place] = ForeignStage(name, start, peak, self.memory_now())

    def memory_now(self) -> Memory:
        allocator = self.memory.allocator
        return Memory(allocator.allocated_bytes, allocator.reserved_bytes, self.memory.device_memory())

    def timeline(self) -> TimelineRecord:
        """Every allocation with its owner; what `timeline.json` of a run directory holds."""
        return self._timeline.record()

    def report(self) -> str:
        """Peak, owners, stages and gaps as text."""
        from wanvram.foreign.report import report_text

        return report_text(self)

    def check(self, module: torch.nn.Module) -> None:
        """Raises InputError that names the parameters and buffers of a module that are not on the card."""
        named = [*module.named_parameters(), *module.named_buffers()]
        missing = [name for name, tensor in named if self.memory.place_of(tensor) != CUDA]
        if missing:
            raise InputError(f"{len(missing)} of {len(named)} tensors are not on cuda: {', '.join(missing[:3])}")


def _checked_moves(run: SimulatedRun) -> list[tuple[Any, str, Any]]:
    """Module.to and Module.cuda that look, after a move to the card, whether everything is there."""

    def checked(plain: Any) -> Any:
        def move(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            moved = plain(module, *args, **kwargs)
            given = [*args, *kwargs.values()]
            if plain.__name__ == "cuda" or any(str(value).startswith("cuda") for value in given):
                run.check(module)
            return moved

        return move

    return [(torch.nn.Module, name, checked(getattr(torch.nn.Module, name))) for name in ("to", "cuda")]


def _gaps(memory: ForeignMemory) -> Iterator[str]:
    if not memory.allocator.peak_reserved_bytes:
        yield "nothing was put on the card"
    for name, count in memory.untaken.items():
        yield f"{name}: {count} calls, of which what is taken beside the results is not known"
    for kind, nbytes in memory.buffers.ranged.items():
        yield f"{kind}: cuDNN's workspace is a rule, up to {human(nbytes)} for one call"
    if (table := memory.buffers.measured) is not None:
        for name, count in table.missed.items():
            yield f"{name}: {count} calls with arguments that the measured table has not; their workspace is by rule"
    if said_of_them := memory.buffers.gaps:
        yield said_of_them
    for place, count in memory.assumed.items():
        yield f"{place}: {count} times values were read that only a GPU would know; zeros were taken"
    for said, count in memory.said.items():
        yield f"{said} ({count} times)"
    if not memory.gpu.measured:
        yield f"{memory.gpu.name}: library buffers and CUDA context are estimates, not measured on this card"


@contextmanager
def _in_threads(facade: Facade, memory: ForeignMemory) -> Iterator[None]:
    """PyTorch's modes are per thread, so each that starts inside enters them, too."""
    plain, plain_start = threading.Thread.run, threading.Thread.start

    def start(thread: threading.Thread) -> None:
        memory.shared = True
        plain_start(thread)

    def run(thread: threading.Thread) -> None:
        if memory.closed:
            plain(thread)
            return
        with memory, facade:
            plain(thread)

    with patched([(threading.Thread, "start", start), (threading.Thread, "run", run)]):
        yield


@contextmanager
def simulated_gpu(
    gpu: str = DEFAULT_GPU,
    *,
    vram: str | int | None = None,
    expandable: bool = False,
    compile_eagerly: bool = False,
    measured: str | os.PathLike[str] | None = None,
) -> Iterator[SimulatedRun]:
    """PyTorch inside the block has this card as `cuda`, and everything is as it was after it.

    vram: what the process may use of it, with context and libraries. expandable: the allocator's segments. compile_eagerly: what
    torch.compile is asked for runs eagerly. measured: a table of `wanvram harvest`, counted in place of rules. Raises InputError for
    an unknown card, a table of another architecture, and inside another simulation. Inside, torch.OutOfMemoryError is raised where the
    card is full.
    """
    if _open:
        raise InputError("one GPU is simulated at a time: this is inside another simulated_gpu")
    import_module("torch._dynamo")  # PyTorch's meta kernels do at their first use, and must not find the stand-ins then
    card = find_gpu(gpu)
    table = None if measured is None else MeasuredTable.read(Path(measured))
    if table is not None:
        table.check_card(card)
    limit = None if vram is None else parse_memory(vram) if isinstance(vram, str) else vram
    outside = card.context_bytes + sum(card.module_bytes.values())
    total = card.total_bytes if limit is None else limit
    allocator = CachingAllocator(AllocatorSettings(expandable), total_bytes=max(0, total - outside))
    memory = ForeignMemory(card, allocator, ForeignBuffers(card, _REGISTERED, table), Clock(card))
    memory.total_bytes = total
    timeline = ForeignTimeline.attach(memory)
    memory.where = timeline.where
    run = SimulatedRun(memory, timeline, total)
    facade = Facade(memory)
    with ExitStack() as stack:
        _open.append(run)
        stack.callback(_open.clear)
        stack.callback(memory.close)
        stack.enter_context(patched([*StandIns(memory, eager=compile_eagerly).table(), *_checked_moves(run)]))
        stack.enter_context(patched(file_stand_ins(facade)))
        stack.enter_context(whole_operations(memory))
        stack.enter_context(_in_threads(facade, memory))
        stack.enter_context(memory)
        stack.enter_context(facade)
        stack.callback(gc.collect)
        yield run
