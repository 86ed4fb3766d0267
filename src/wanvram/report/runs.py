"""Run directories read for a report: record.json, and timeline.json and advice.json where they exist. No torch.

Everything in them is untrusted: sizes are bounded, numbers are checked to be numbers, text stays text.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wanvram.advice import FILE_NAME, Advice, read_advice
from wanvram.errors import InputError
from wanvram.foreign_text import shown, why
from wanvram.input_files import read_text, state_of, whole
from wanvram.record import MAX_RECORD_BYTES, RunRecord, dotted
from wanvram.report.timeline import coarse_timeline
from wanvram.strict_json import strict_json
from wanvram.timeline_record import TimelineRecord, read_timeline

__all__ = ["Run", "asked", "find_runs", "pairs", "read_run"]

MAX_FILE_BYTES = MAX_RECORD_BYTES  # a timeline has under 4 MB
MAX_RUNS = 500
MOST_DIFFERENT = 0.01  # of the allocated peak, for a timeline to be shown with another run's figures

# What a prediction and a measurement of the same thing may differ in. `tiny` weights are another model, so they count.
_FREE_KEYS = {
    "name",
    "description",
    "model_config.device",
    "request.gpu",
    "request.base_seed",
    "request.prompt",
    "request.negative_prompt",
}


@dataclass(frozen=True)
class Run:
    """One run as a report needs it.

    exact: the timeline was recorded, not rebuilt from the stages. borrowed: it is that of the run's prediction.
    """

    label: str
    record: RunRecord
    timeline: TimelineRecord
    exact: bool
    advice: tuple[Advice, ...] = ()
    borrowed: bool = False

    def settings(self) -> dict[str, Any]:
        """The configuration as dotted keys, and what attention came to."""
        attention = self.record.attention
        uses = {} if attention is None else {"self": attention.self_attention, "cross": attention.cross_attention}
        return dotted(self.record.config) | {f"attention.{name}": use.backend for name, use in uses.items()}


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """Each path is a run directory, or a directory of run directories. Labels are made unique.

    A measured run without a timeline borrows that of its prediction among them, if their peaks agree within 1 %.
    Raises InputError for a path without a run, a damaged file, or more than 500 runs.
    """
    directories = [directory for path in paths for directory in _directories(path)]
    if len(directories) > MAX_RUNS:
        raise InputError(f"{len(directories)} runs are too many for one report; give at most {MAX_RUNS}")
    runs: list[Run] = []
    for directory in directories:
        runs.append(read_run(directory, {run.label: run.record.simulated for run in runs}))
    for predicted, measured in pairs(runs):
        runs[measured] = _borrowed(runs[measured], runs[predicted])
    return runs


def _borrowed(measured: Run, predicted: Run) -> Run:
    a, b = measured.record.peak(), predicted.record.peak()
    if measured.exact or not predicted.exact or a is None or b is None or measured.record.failure:
        return measured
    if abs(a.allocated_bytes - b.allocated_bytes) > MOST_DIFFERENT * a.allocated_bytes:
        return measured
    return replace(measured, timeline=predicted.timeline, borrowed=True)


def _directories(path: Path) -> list[Path]:
    state = state_of(path)
    if state is None or not stat.S_ISDIR(state.st_mode):
        raise InputError(f"{shown(path)} is no run directory; `wanvram profile` writes one")
    if state_of(path / "record.json") is not None:
        return [path]
    inside = sorted(child.parent for child in path.glob("*/record.json"))
    if not inside:
        raise InputError(
            f"{shown(path)} holds no record.json, nor does any directory in it; `wanvram profile` writes one"
        )
    return inside


def read_run(directory: Path, taken: Mapping[str, bool] | None = None) -> Run:
    """The run in a directory. taken: labels of other runs, and whether they are simulated; what tells it apart is added to one
    that exists already: predicted or measured, else the directory's name.

    Raises InputError naming the damaged file.
    """
    try:
        record = RunRecord.from_json(_load(directory / "record.json"))
        exact = state_of(directory / "timeline.json") is not None
        timeline = read_timeline(_load(directory / "timeline.json")) if exact else coarse_timeline(record)
        advised = directory / FILE_NAME
        advice = read_advice(_load(advised)) if state_of(advised) else ()
    except InputError as error:
        raise InputError(f"{shown(directory)} holds no readable run: {error}") from error
    return Run(_label(record, directory, taken or {}), record, timeline, exact, advice)


def _label(record: RunRecord, directory: Path, taken: Mapping[str, bool]) -> str:
    base = str(record.config.get("name") or directory.name)
    candidates = [base, f"{base} ({whole(directory).name})"]
    if taken.get(base, record.simulated) != record.simulated:
        candidates.insert(1, f"{base} ({'predicted' if record.simulated else 'measured'})")
    candidates += [f"{base} ({number})" for number in range(2, MAX_RUNS + 2)]
    return next(label for label in candidates if label not in taken)


def _load(path: Path) -> Any:
    text = read_text(path, MAX_FILE_BYTES)
    try:
        return strict_json(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path.name} is no valid JSON: {why(error)}") from error


def asked(record: RunRecord) -> tuple[str, str, str]:
    """Task, size and frames, as text."""
    request = record.config.get("request") or {}
    task, size, frames = (shown(request.get(key) or "-", 60) for key in ("task", "size", "frame_num"))
    return task, size, frames


def pairs(runs: Sequence[Run]) -> list[tuple[int, int]]:
    """(predicted, measured) indices of runs with the same configuration; each measured run with its first prediction."""
    keys = [_key(run) for run in runs]
    predicted: dict[str, int] = {}
    for index, run in enumerate(runs):
        if run.record.simulated:
            predicted.setdefault(keys[index], index)
    measured = (m for m, run in enumerate(runs) if not run.record.simulated and run.record.device != "cpu")
    return [(predicted[keys[m]], m) for m in measured if keys[m] in predicted]


def _key(run: Run) -> str:
    settings = {k: v for k, v in run.settings().items() if k not in _FREE_KEYS and not k.startswith("logging.")}
    settings = {k: v for k, v in settings.items() if v not in (None, False, [])}  # older records lack newer knobs
    weights = "tiny" if settings.get("request.weights") == "tiny" else "full size"
    return json.dumps(settings | {"request.weights": weights}, sort_keys=True)
