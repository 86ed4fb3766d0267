"""The figures of a simulated run of foreign code as text and as JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from wanvram.foreign.measured import MeasuredTable
from wanvram.foreign_text import shown
from wanvram.units import human

if TYPE_CHECKING:
    from wanvram.foreign.session import ForeignStage, SimulatedRun

__all__ = ["report_text", "run_json"]

_OWNERS = 10


def owners(run: SimulatedRun) -> list[tuple[str, int]]:
    """(function:line, bytes) at the peak, largest first."""
    moment = run.timeline().moments[0]
    shares: Counter[str] = Counter()
    for group in moment.alive:
        shares[group.module or group.operation or "?"] += group.bytes
    return shares.most_common(_OWNERS)


def report_text(run: SimulatedRun) -> str:
    peak = run.peak
    verdicts = {True: "fits in", False: "does NOT fit in", None: "failed before it was known whether it fits"}
    lines = [
        f"simulated {run.gpu.name}: {verdicts[run.fits]} {human(run.vram_bytes)}",
        f"peak  device {human(peak.device_bytes)}  reserved {human(peak.reserved_bytes)}  "
        f"allocated {human(peak.allocated_bytes)}  ({peak.basis})",
    ]
    if run.refused_bytes:
        lines.append(f"refused: {human(run.refused_bytes)} more were asked for")
    if peak.low_bytes != peak.high_bytes:
        lines.append(f"      reserved between {human(peak.low_bytes)} and {human(peak.high_bytes)}")
    for stage in run.stages:
        calls = f", {stage.calls} times" if stage.calls > 1 else ""
        lines.append(f"stage {stage.name}: allocated {human(stage.peak_allocated_bytes)}{calls}")
    if run.memory.buffers.measured is not None:
        lines.append(measured_line(run.memory.buffers.measured))
    lines += ["at the peak:", *(f"  {human(nbytes):>12}  {name}" for name, nbytes in owners(run))]
    lines += [f"gap: {gap}" for gap in run.gaps]
    return "\n".join(lines) + "\n"


def measured_line(table: MeasuredTable) -> str:
    """What of a harvested table was counted."""
    device = table.device
    calls = ", ".join(f"{count} of {name.removesuffix('.default')}" for name, count in table.used.items())
    where = f"on {shown(device.gpu, 60)}, torch {shown(device.torch, 30)}, cuDNN {device.cudnn}"
    return f"as measured {where}: {calls or 'no call, none has the measured arguments'}"


def _stage_json(stage: ForeignStage) -> dict[str, Any]:
    return {
        "name": stage.name,
        "calls": stage.calls,
        "start_allocated_bytes": stage.start_allocated_bytes,
        "peak_allocated_bytes": stage.peak_allocated_bytes,
        "peak_reserved_bytes": stage.peak_reserved_bytes,
        "peak_device_bytes": stage.peak.device_bytes,
    }


def run_json(run: SimulatedRun) -> dict[str, Any]:
    """One document: bytes are integers."""
    table = run.memory.buffers.measured
    return {
        "schema": 1,
        "device": f"simulated:{run.gpu.key}",
        "fits": run.fits,
        "vram_bytes": run.vram_bytes,
        "refused_bytes": run.refused_bytes,
        "peak": asdict(run.peak),
        "stages": [_stage_json(stage) for stage in run.stages],
        "owners": [{"module": name, "bytes": nbytes} for name, nbytes in owners(run)],
        "host": {"peak_bytes": run.memory.host_peak_bytes, "pinned_bytes": run.memory.pinned_bytes},
        "operations": run.memory.operations,
        "measured": None if table is None else {"device": asdict(table.device), "used": dict(table.used)},
        "gaps": list(run.gaps),
    }
