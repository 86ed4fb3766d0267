"""A simulated run of foreign code as the record that `analyze`, `compare` and `report` read."""

from __future__ import annotations

import torch

from wanvram.foreign.session import SimulatedRun
from wanvram.record import WHOLE_RUN, Failure, RunRecord
from wanvram.spans import Memory, Span
from wanvram.units import human
from wanvram.version import __version__

__all__ = ["record_of"]


def record_of(run: SimulatedRun, name: str, description: str) -> RunRecord:
    """Stages are those the program named, and the whole run as one. name, description: of the configuration."""
    start = Memory(0, 0, run.gpu.context_bytes)
    peak = run.peak
    highest = Memory(peak.allocated_bytes, peak.reserved_bytes, peak.device_bytes)
    stages = [Span(s.name, "stage", None, s.start, s.peak, s.end) for s in run.entered]
    stages.append(Span(WHOLE_RUN, "stage", None, start, start.highest(highest), run.memory_now()))
    return RunRecord(
        device=run.memory.device_name,
        simulated=True,
        config={"name": name, "description": description, "foreign": True, "request": {"gpu": run.gpu.key}},
        fits=run.fits,
        budget_bytes=run.vram_bytes,
        components=[],
        stages=stages,
        environment={"wanvram": __version__, "torch": torch.__version__},
        host={"host_peak_bytes": run.memory.host_peak_bytes, "pinned_bytes": run.memory.pinned_bytes},
        failure=_failure(run),
        notes=[f"the figures are {peak.basis}", *run.gaps],
    )


def _failure(run: SimulatedRun) -> Failure | None:
    if run.failed:
        return Failure("error", run.failed, None)
    if run.fits:
        return None
    asked = run.refused_bytes
    text = f"{human(asked)} more were asked for than {run.gpu.name} has left of {human(run.vram_bytes)}"
    now = run.memory_now()
    return Failure("oom", text, None, None, asked, now.allocated_bytes, now.reserved_bytes)
