"""What a configuration would take: the run itself on a simulated card. Only this module builds one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from wanvram.config import Measurement, RunConfig
from wanvram.engine.devices import SimulatedDevice
from wanvram.errors import InputError
from wanvram.knobs import EXCHANGE, EXPANDABLE_SEGMENTS, PRECISION
from wanvram.machine.driver import LATER_BYTES
from wanvram.machine.environment import describe_environment
from wanvram.planner.budget import beyond_card, usable_memory
from wanvram.predict.host import clock_of, is_here
from wanvram.predict.ranks import as_one_run, communication_note, communication_of, kinds_of, rank_record, rooms_of
from wanvram.record import Predicted, RunRecord, Times
from wanvram.recorder.recorder import Recorder, repeated_seconds
from wanvram.run.attention import attention_of, card_like
from wanvram.run.execute import Around, Output, check_measurement, device_kind, execute, run_on
from wanvram.run.products import check_products
from wanvram.run_events import TellRun
from wanvram.simulate.allocator import AllocatorSettings, CachingAllocator
from wanvram.simulate.gpus import DEFAULT_GPU, GPU, find_gpu
from wanvram.simulate.libraries import Libraries
from wanvram.simulate.links import exchanged, link_of, linked
from wanvram.simulate.memory import SimulatedMemory
from wanvram.simulate.timeline import Timeline

__all__ = ["predicted", "run_or_simulate", "simulate", "simulate_rank", "simulated_device"]

UNLIMITED_BYTES = 2**50


def simulated_device(
    config: RunConfig, *, rank: int = 0, keep_events: bool = False, unlimited: bool = False, timeline: bool = False
) -> SimulatedDevice:
    """The card that the configuration names, that of `rank` where there are several. Raises InputError for an unknown GPU, one that
    cannot compute in the precision, or cards without that link.

    unlimited: a card of 1 PiB and no cap, to learn what a run would take. timeline: the memory's observer is one, from the first
    allocation on, which peers make.
    """
    card: GPU = find_gpu(config.gpu or DEFAULT_GPU)
    link = None
    if config.gpus > 1:
        link = exchanged(link_of(card, config.link, config.gpus), card, EXCHANGE.of(config.strategy))
    gpu = card if link is None else linked(card, link, communication_of(config, link))
    if PRECISION.of(config.strategy) == "bf16" and gpu.compute_capability < (8, 0):
        raise InputError(
            f"precision: bf16 has no fast attention on {gpu.name} (compute capability under 8.0); use fp16"
        )
    check_products(config, gpu.name, gpu.compute_capability)
    settings = AllocatorSettings(EXPANDABLE_SEGMENTS.of(config.strategy))
    outside = gpu.context_bytes + sum(gpu.module_bytes.values())
    # A card with more memory than its name had: what is stated counts.
    stated = usable_memory(config.memory_limit_bytes or 0, gpu)
    usable = UNLIMITED_BYTES if unlimited else max(gpu.total_bytes, stated) - outside
    capped = config.memory_limit_bytes is not None and not unlimited
    limit = max(0, (config.memory_limit_bytes or 0) - outside - LATER_BYTES) if capped else None
    allocator = CachingAllocator(settings, total_bytes=usable, limit_bytes=limit)
    clock = clock_of(config, gpu)
    clock.link = link
    device = SimulatedDevice(SimulatedMemory(gpu, allocator, Libraries(gpu), clock=clock, keep_events=keep_events))
    if timeline:
        Timeline.attach(device.memory)
    device.attention = attention_of(config, card_like(gpu, here=is_here(gpu.key)))
    device.place = config.place(rank)
    if link is not None and link.copies:
        device.hold_addresses(map(len, rooms_of(config, rank)))
    return device


def run_or_simulate(
    config: RunConfig,
    output: Output,
    progress: TellRun | None = None,
    watch: Callable[[Recorder], AbstractContextManager[object]] | None = None,
) -> RunRecord:
    """What the configuration asks for: on a real device as run.execute does it, or simulated into the run directory."""
    if device_kind(config) != "simulated":
        return execute(config, output, progress, watch, predict=predicted)
    check_measurement(config)
    device = simulated_device(config, timeline=output.directory is not None)
    run = _Run(config, device, output.video, unlimited=False)
    around = Around(describe_environment(), run.complete, progress, watch, _timeline(device))
    return run_on(device, config, output, around)


def simulate(
    config: RunConfig,
    *,
    keep_events: bool = False,
    unlimited: bool = False,
    video: bool = False,
    timeline: bool = False,
) -> tuple[RunRecord, SimulatedMemory]:
    """Predicts without touching any file; also returns the simulated memory, whose events can be compared with a GPU's, of rank 0
    where there are several.

    unlimited: on a card without end, so that the peak is what the whole run takes. video: it is encoded and saved, too.
    timeline: the memory's observer is then a Timeline of everything the allocator did and for whom.
    """
    config = replace(config, device="simulated")
    device = simulated_device(config, keep_events=keep_events, unlimited=unlimited, timeline=timeline)
    run = _Run(config, device, video, unlimited)
    return run.into_no_file(Around({}, run.complete, timeline=_timeline(device))), device.memory


def _timeline(device: SimulatedDevice) -> Timeline | None:
    return device.memory.observer if isinstance(device.memory.observer, Timeline) else None


def simulate_rank(
    config: RunConfig, rank: int, *, unlimited: bool = False, video: bool = False, keep_events: bool = False
) -> tuple[RunRecord, SimulatedDevice]:
    """One of several ranks, alone."""
    config = replace(config, device="simulated")
    device = simulated_device(config, rank=rank, unlimited=unlimited, keep_events=keep_events)
    return _Run(config, device, video, unlimited).into_no_file(Around({}, lambda record: None)), device


def predicted(config: RunConfig) -> Predicted | None:
    """The figures of a video, from the start of the run."""
    return simulate(config, video=True)[0].prediction(0.0)


@dataclass(frozen=True)
class _Run:
    """A simulated run, and what is known of it once it has ended."""

    config: RunConfig
    device: SimulatedDevice
    video: bool
    unlimited: bool

    def into_no_file(self, around: Around) -> RunRecord:
        record = run_on(self.device, self.config, Output(None, video=self.video, keep_defects=False), around)
        if record.failure is not None and record.failure.kind == "interrupted":
            raise KeyboardInterrupt(record.failure.message)  # nobody reads this record: a plan or advice ends, too
        return record

    def complete(self, record: RunRecord) -> None:
        """The clock's times, with the steps that were not simulated and what the process takes before and after; notes of the card;
        all other ranks."""
        machine = self.device.clock.machine
        rest = self.device.clock.now() + repeated_seconds(record.stages) + machine.end_seconds
        record.times = Times(machine.start_seconds, machine.start_seconds + rest, machine.context_seconds + rest)
        record.notes += self._notes()
        if self.device.clock.link is not None:
            record.notes.append(communication_note(self.config, self.device.clock.link))
            self._add_ranks(record)

    def _add_ranks(self, record: RunRecord) -> None:
        config = replace(self.config, measurement=Measurement(profile_memory=False))
        first, *others = kinds_of(config)
        found = [rank_record(first, record, config, self.device)]
        for ranks in others:
            other, device = simulate_rank(config, ranks[0], unlimited=self.unlimited, video=self.video)
            found.append(rank_record(ranks, other, config, device))
        as_one_run(record, found)

    def _notes(self) -> list[str]:
        gpu, clock = self.device.memory.gpu, self.device.clock
        beyond = beyond_card(self.config.memory_limit_bytes or 0, gpu)
        notes = [beyond] if beyond is not None else []
        if cold := clock.cold_seconds():
            notes.append(f"kernels were never compiled on this machine: {cold:.0f} s of the first run are for that")
        if not gpu.measured:
            notes.append(
                f"{gpu.name}: library buffers, CUDA context and times are estimates, not measured on this card"
            )
        gaps = self.device.memory.libraries.gaps
        return notes + ([gaps] if gaps else [])
