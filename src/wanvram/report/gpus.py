"""What each of several GPUs took, as the rows of every report. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from wanvram.foreign_text import shown
from wanvram.knobs import SIZES
from wanvram.record import RunRecord, highest_stage
from wanvram.report.translations import Texts
from wanvram.units import human, mib_cell, seconds

__all__ = ["GPU_HEADS", "gpu_cells", "gpu_rows", "sharing_lines"]

GPU_HEADS = (
    "gpus",
    "allocated_mib",
    "reserved_mib",
    "device_mib",
    "talk_mib",
    "pinned_mib",
    "sent_mib",
    "waited",
    "peak_in",
)


def sharing_lines(record: RunRecord, texts: Texts) -> list[str]:
    """How many GPUs make the video together, along which axes, and what their processes pin of the host's RAM; nothing of one."""
    if not record.ranks:
        return []
    strategy = record.config.get("optimization", {})
    sizes = [f"{knob.name} {shown(strategy[knob.name], 20)}" for knob in SIZES if strategy.get(knob.name, 1) != 1]
    pinned = sum(rank.host.get("pinned_bytes", 0) * len(rank.ranks) for rank in record.ranks)
    return [texts("shared_by", gpus=record.gpus, sizes=" x ".join(sizes) or "-", pinned=human(pinned))]


def gpu_rows(record: RunRecord) -> Iterator[dict[str, Any]]:
    """Figures of every rank or kind of rank, bytes and seconds; None where one is unknown."""
    for rank in record.ranks:
        peak = rank.peak()
        where = highest_stage(rank.stages, cached=record.cached)
        yield {
            "gpus": rank.name,
            "allocated_bytes": peak.allocated_bytes if peak else None,
            "reserved_bytes": peak.reserved_bytes if peak and record.cached else None,
            "device_bytes": peak.device_bytes if peak else None,
            "communication_bytes": rank.communication_bytes,
            "pinned_bytes": rank.host.get("pinned_bytes"),
            "exchanged_bytes": rank.exchanged_bytes,
            "exchange_seconds": rank.exchange_seconds,
            "stage": where.name if where else None,
        }


def gpu_cells(record: RunRecord) -> Iterator[list[str]]:
    """As text, below GPU_HEADS."""
    for row in gpu_rows(record):
        number, *sizes, waited, stage = row.values()
        yield [number, *map(mib_cell, sizes), seconds(waited), stage or "-"]
