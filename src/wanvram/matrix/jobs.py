"""One configuration of many: where it goes, and whether its result is already there. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wanvram.config import RunConfig, load_config
from wanvram.errors import InputError
from wanvram.planner.budget import usable_memory
from wanvram.record import RunRecord, dotted
from wanvram.simulate.gpus import DEFAULT_GPU, find_gpu
from wanvram.strict_yaml import MAX_WRITTEN_BYTES
from wanvram.units import parse_memory

__all__ = ["Job", "difference", "differing", "exit_code", "expected", "finished", "written_record"]

_MEDIA = ("video*", "image*")


@dataclass(frozen=True)
class Job:
    """vram_budget, ram: the planner chooses the strategy in the run's own process."""

    config: RunConfig
    directory: Path
    vram_budget: str | None = None
    ram: str | None = None

    @property
    def name(self) -> str:
        return self.config.name


def finished(job: Job, *, force: bool = False, force_changed: bool = False, retry: bool = False) -> RunRecord | None:
    """The record of a run of exactly this configuration; None if it must be run: never begun, killed, or interrupted.

    force: none counts as finished. force_changed: one of another configuration does not. retry: nor does one that failed for
    another reason than memory. Raises InputError if the directory holds something else and neither is given.
    """
    if job.directory.is_file():
        raise InputError(f"{job.directory} is a file; it must be a directory for the run '{job.name}'")
    if force or not job.directory.exists():
        return None
    config, record = _written_config(job.directory), written_record(job.directory)
    if config is None:
        if record is not None or any(any(job.directory.glob(pattern)) for pattern in _MEDIA):
            raise InputError(f"{job.directory} holds results without a config.yaml; --force replaces them")
        return None
    changed = _changes(job, config, record)
    if changed and force_changed:
        return None
    if changed:
        raise InputError(
            f"{job.directory} holds a run of another configuration ({differing(changed)}); --force_changed replaces such "
            "runs, -o DIR keeps them"
        )
    kind = record.failure.kind if record is not None and record.failure is not None else None
    return None if kind == "interrupted" or (retry and kind == "error") else record


def difference(job: Job) -> list[str]:
    """Dotted keys in which the job differs from the run in its directory; none if there is no run."""
    config = _written_config(job.directory)
    return [] if config is None else _changes(job, config, written_record(job.directory))


def differing(keys: Sequence[str]) -> str:
    """`request.sample_steps differs`."""
    shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
    return f"{shown} {'differs' if len(keys) == 1 else 'differ'}"


def _changes(job: Job, config: RunConfig, record: RunRecord | None) -> list[str]:
    """Dotted keys in which the configuration that was run differs from what the job asks for."""
    if _same_device(config, record, job.config.device):
        config = replace(config, device=job.config.device)
    before, after = dotted(config.to_dict()), dotted(expected(job, config).to_dict())
    return [key for key, value in before.items() if value != after[key]]


def _same_device(config: RunConfig, record: RunRecord | None, asked: str) -> bool:
    """`auto` is what the run found; where no record says it, and for what is asked now, what this machine has."""
    if "auto" not in (config.device, asked) or config.device == asked:
        return config.device == asked
    if config.device == "auto" and record is not None and record.device != "auto":
        return asked == ("simulated" if record.simulated else "cuda")
    from wanvram.machine.environment import cuda_usable  # reaches torch: only where `auto` has to be resolved

    here = "cuda" if cuda_usable() else "simulated"
    return here in (config.device, asked)


def exit_code(record: RunRecord) -> int:
    """0, 1 for a failed run, 3 when it does not fit the memory given."""
    if record.fits is False:
        return 3
    return 1 if record.failure is not None else 0


def expected(job: Job, found: RunConfig) -> RunConfig:
    """What the job's config.yaml says, with what a run decides itself taken from `found`: a seed drawn, a strategy planned."""
    config = replace(job.config, description=found.description)
    if config.request.base_seed < 0:
        config = replace(config, request=replace(config.request, base_seed=found.request.base_seed))
    if job.vram_budget is None:
        return config
    limit = found.memory_limit_bytes
    if job.vram_budget.strip().lower() != "auto":
        limit = usable_memory(parse_memory(job.vram_budget), find_gpu(found.gpu or DEFAULT_GPU))
    return replace(config, strategy=found.strategy, gpu=config.gpu or found.gpu, memory_limit_bytes=limit)


def _written_config(directory: Path) -> RunConfig | None:
    path = directory / "config.yaml"
    return load_config(path, MAX_WRITTEN_BYTES) if path.is_file() else None


def written_record(directory: Path) -> RunRecord | None:
    path = directory / "record.json"
    return RunRecord.read(path) if path.is_file() else None
