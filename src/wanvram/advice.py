"""One change of strategy and what simulating it says: the record that advice.json holds, with its one writer and one reader. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wanvram.errors import InputError
from wanvram.foreign_text import why
from wanvram.record import write_json
from wanvram.strict_json import built

__all__ = ["FILE_NAME", "Advice", "read_advice", "write_advice"]

FILE_NAME = "advice.json"
BASIS = "differences between two simulated runs, of this configuration with and without the change; loading is not in the times"
_OLD_MARK = " (lossy)"  # that `change` ended with before 2026-11-28; `lossless` said it, too


@dataclass(frozen=True)
class Advice:
    """One change and what the whole simulated run says of it; what a file does not say is None.

    change: the flags. saved_bytes, saved_allocated_bytes: of the run's peak on the device, and of what tensors hold. seconds: added to
    the run, loading aside, negative if it is faster, None when times are unknown. lossless: the result stays the same up to
    rounding of reordered sums. base_device_bytes, peak_device_bytes, peak_stage_after: the run's peak without and with the change,
    and the stage that then owns it. fits: of a run that does not fit its card, which is compared without limit, whether it fits
    with the change.
    """

    change: str
    saved_bytes: int
    seconds: float | None = None
    lossless: bool = True
    base_device_bytes: int | None = None
    peak_device_bytes: int | None = None
    fits: bool | None = None
    knobs: dict[str, Any] = field(default_factory=dict)
    saved_allocated_bytes: int | None = None
    peak_stage_after: str | None = None

    @property
    def label(self) -> str:
        """The change, marked where the video is another after it."""
        return self.change if self.lossless else f"{self.change} (lossy)"


@dataclass(frozen=True)
class _Document:
    advice: list[Advice]


def write_advice(directory: Path, advices: Sequence[Advice]) -> Path:
    """advice.json of a run directory."""
    document = {"schema": 1, "basis": BASIS, "advice": [asdict(advice) for advice in advices]}
    write_json(directory / FILE_NAME, document)
    return directory / FILE_NAME


def read_advice(data: Any) -> tuple[Advice, ...]:
    """From the JSON of advice.json, with every value of its type. Raises InputError for a damaged one."""
    try:
        for item in data["advice"]:
            if item["change"].endswith(_OLD_MARK):
                item |= {"change": item["change"].removesuffix(_OLD_MARK), "lossless": False}
        return tuple(built(_Document, data).advice)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{FILE_NAME} is damaged: {why(error)}") from error
