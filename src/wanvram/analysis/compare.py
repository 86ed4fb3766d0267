"""Runs beside each other: every figure of a record under a dotted name, differences, and conditions that fail a build. No torch.

Names: `peak.device_bytes`, `stages.denoise.peak_allocated_bytes`, `components.dit.base_bytes`, `fragmentation.at_peak`, `seconds`.
"""

from __future__ import annotations

import difflib
import json
import operator as op
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from wanvram.errors import InputError
from wanvram.record import RunRecord, dotted
from wanvram.spans import Span
from wanvram.units import human, parse_bytes

__all__ = [
    "Comparison",
    "FailCondition",
    "Key",
    "PredictionError",
    "Violation",
    "compare",
    "judge",
    "metrics",
    "parse_condition",
    "working_seconds",
]

Number = int | float
Key = tuple[str, ...]  # ("peak", "device_bytes"), ("stages", "denoise", "seconds"), ("seconds",)
_UNCOMPARED = ("name", "description")
_COMPONENT_FIGURES = ("parameters", "base_bytes", "host_bytes", "activation_bytes", "streamed_bytes")
_RANK_FIGURES = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_device_bytes", "seconds")
_PEAK_FIGURES = ("allocated_bytes", "reserved_bytes", "device_bytes")
_PREDICTED = (*_PEAK_FIGURES, *_RANK_FIGURES, "base_bytes")
MAX_CONDITION = 500  # characters
_CONDITION = re.compile(r"\s*(\S.*?)\s*(>=|<=|>|<)\s*([+-]?)\s*([0-9]+(?:\.[0-9]+)?)\s*(%|[A-Za-z]*)\s*")
_HELP = "write for example 'peak.reserved_bytes > +2%', 'peak.device_bytes > 8GiB' or 'seconds > +10'"
_OPERATORS = {">": op.gt, ">=": op.ge, "<": op.lt, "<=": op.le}


def metrics(record: RunRecord) -> dict[Key, Number | None]:
    """Every figure; None where it is unknown. A stage that ran twice gives its higher bytes and the sum of its seconds.

    `seconds` leaves loading out, which has no time on the simulated device.
    """
    result: dict[Key, Number | None] = {}
    for key, value in _figures(record):
        result[key] = _joined(key, result.get(key), value)
    return result


def _figures(record: RunRecord) -> Iterator[tuple[Key, Number | None]]:
    peak, where = record.peak(), record.peak_span()
    if peak is not None and where is not None:
        for name in _PEAK_FIGURES:
            yield ("peak", name), getattr(peak, name)
        yield ("fragmentation", "at_peak"), where.peak.fragmentation
    for span in record.stages:
        for name, value in _stage(span).items():
            yield ("stages", span.name, name), value
    for rank in record.ranks:
        for number, span in product(rank.ranks, rank.stages):
            for name in _RANK_FIGURES:
                yield ("ranks", f"{number} {span.name}", name), _stage(span)[name]
    for component in record.components:
        for name in _COMPONENT_FIGURES:
            yield ("components", component.name, name), getattr(component, name)
    for name, value in record.host.items():
        yield ("host", name), value
    yield ("seconds",), working_seconds(record)


def working_seconds(record: RunRecord) -> float | None:
    """Of the stages without loading, which predictions do not time; None where none was timed."""
    timed = [span.seconds for span in record.stages if span.kind == "stage" and span.seconds is not None]
    return sum(timed) if timed else None


def _stage(span: Span) -> dict[str, Number | None]:
    return {
        "start_allocated_bytes": span.start.allocated_bytes,
        **{f"peak_{name}": getattr(span.peak, name) for name in _PEAK_FIGURES},
        "activation_bytes": span.activation_bytes,
        "seconds": span.seconds,
    }


def _joined(key: Key, first: Number | None, second: Number | None) -> Number | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second if key[-1] == "seconds" else max(first, second)


@dataclass(frozen=True)
class PredictionError:
    """One figure, predicted and measured. error: (predicted - measured) / measured, None where nothing was measured."""

    key: Key
    predicted: Number
    measured: Number
    error: float | None


@dataclass(frozen=True)
class Comparison:
    """figures: for every key one value per run, None where a run has none. changed: configuration keys that differ.

    predictions: (index predicted, index measured, figures) of runs of one configuration.
    """

    labels: tuple[str, ...]
    records: tuple[RunRecord, ...]
    changed: dict[str, tuple[Any, ...]]
    figures: dict[Key, tuple[Number | None, ...]]
    predictions: tuple[tuple[int, int, tuple[PredictionError, ...]], ...]

    def difference(self, key: Key, run: int) -> Number | None:
        """What the run has more than the first."""
        first, value = self.figures[key][0], self.figures[key][run]
        return None if first is None or value is None else value - first

    def names(self, group: str) -> list[str]:
        """Stages or components of any run, in the order of the runs."""
        return list(dict.fromkeys(key[1] for key in self.figures if key[0] == group and len(key) == 3))

    def to_json(self) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for key, values in self.figures.items():
            place = figures
            for part in key[:-1]:
                place = place.setdefault(part, {})
            differences = [self.difference(key, run) for run in range(len(values))]
            place[key[-1]] = {"values": list(values), "differences": differences}
        return {
            "schema": 1,
            "runs": [_described(*pair) for pair in zip(self.labels, self.records, strict=True)],
            "changed": {key: list(values) for key, values in self.changed.items()},
            **figures,
            "predictions": [
                {
                    "predicted": self.labels[p],
                    "measured": self.labels[m],
                    "errors": {
                        ".".join(e.key): {"predicted": e.predicted, "measured": e.measured, "error": e.error}
                        for e in errors
                    },
                }
                for p, m, errors in self.predictions
            ],
        }


def _described(label: str, record: RunRecord) -> dict[str, Any]:
    figures = {name: getattr(record, name) for name in ("device", "simulated", "fits")}
    return {"label": label, **figures, "failure": record.failure.kind if record.failure else None}


def compare(labels: Sequence[str], records: Sequence[RunRecord], pairs: Sequence[tuple[int, int]] = ()) -> Comparison:
    """The runs beside each other; differences count from the first. pairs: (predicted, measured) of one configuration."""
    each = [metrics(record) for record in records]
    keys = dict.fromkeys(key for figures in each for key in figures)
    return Comparison(
        tuple(labels),
        tuple(records),
        _changed([dotted(record.config) for record in records]),
        {key: tuple(figures.get(key) for figures in each) for key in keys},
        tuple((p, m, tuple(_errors(each[p], each[m]))) for p, m in pairs),
    )


def _changed(settings: Sequence[dict[str, Any]]) -> dict[str, tuple[Any, ...]]:
    keys = dict.fromkeys(key for one in settings for key in one if key not in _UNCOMPARED)
    rows = {key: tuple(one.get(key) for one in settings) for key in keys}
    return {key: values for key, values in rows.items() if len({json.dumps(v, sort_keys=True) for v in values}) > 1}


def _errors(predicted: dict[Key, Number | None], measured: dict[Key, Number | None]) -> Iterator[PredictionError]:
    for key, truth in measured.items():
        guess = predicted.get(key)
        if guess is not None and truth is not None and key[-1] in _PREDICTED:
            yield PredictionError(key, guess, truth, (guess - truth) / truth if truth else None)


@dataclass(frozen=True)
class FailCondition:
    """figure OP limit. relative: the limit counts from the first run's figure; share: it is a part of that, or of 1."""

    text: str
    key: Key
    operator: str
    amount: float
    relative: bool
    share: bool

    def violations(self, comparison: Comparison) -> list[Violation]:
        """Every run but the first that meets the condition; the first itself if it is alone.

        Runs that failed are left to `judge`. Raises InputError if a figure is unknown.
        """
        values = self._values(comparison)
        if self.relative and len(values) == 1:
            raise InputError(f"--fail-if '{self.text}' compares with the first run; give two runs")
        result: list[Violation] = []
        for run in range(1, len(values)) if len(values) > 1 else [0]:
            if comparison.records[run].failure is not None:
                continue
            value, first = values[run], values[0]
            if value is None or (self.relative and first is None):
                missing = comparison.labels[run if value is None else 0]
                raise InputError(f"--fail-if '{self.text}': {missing} has no {'.'.join(self.key)}")
            limit = self._limit(first or 0)
            if _OPERATORS[self.operator](value, limit):
                text = f"{_shown(self.key, value)} {self.operator} {_shown(self.key, limit)}"
                result.append(Violation(self.text, comparison.labels[run], value, limit, text))
        return result

    def _values(self, comparison: Comparison) -> tuple[Number | None, ...]:
        if self.key in comparison.figures:
            return comparison.figures[self.key]
        names = [".".join(key) for key in comparison.figures]
        close = difflib.get_close_matches(".".join(self.key), names, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(close)}?" if close else f"; there are for example {', '.join(names[:4])}"
        raise InputError(f"--fail-if '{self.text}': no run has a figure {'.'.join(self.key)}{hint}")

    def _limit(self, first: Number) -> float:
        if not self.relative:
            return self.amount
        return first * (1 + self.amount) if self.share else first + self.amount


@dataclass(frozen=True)
class Violation:
    """A condition that a run meets. value and limit are None for a run that failed."""

    condition: str
    label: str
    value: Number | None
    limit: Number | None
    text: str


def parse_condition(text: str) -> FailCondition:
    """`peak.reserved_bytes > +2%`: with a sign counted from the first run, without one absolute. Raises InputError."""
    match = _CONDITION.fullmatch(text) if len(text) <= MAX_CONDITION else None
    if match is None:
        raise InputError(f"--fail-if '{text[:80]}' is not understood; {_HELP}")
    name, operator, sign, digits, unit = match.groups()
    key = _key(name)
    if unit == "%" and not sign and key[0] != "fragmentation":
        raise InputError(f"--fail-if '{text}': a share of what? With a sign, +{digits}%, it counts from the first run")
    if unit == "%":
        amount = float(digits) / 100
    elif key[-1].endswith("_bytes"):
        amount = parse_bytes(digits + unit)
    elif unit == "" or (unit == "s" and key[-1] == "seconds"):
        amount = float(digits)
    else:
        raise InputError(f"--fail-if '{text}': {name} is not counted in {unit}; {_HELP}")
    return FailCondition(text, key, operator, -amount if sign == "-" else amount, bool(sign), unit == "%")


def judge(comparison: Comparison, conditions: Sequence[FailCondition]) -> list[Violation]:
    """Everything that fails a build. With any condition, so does a run that failed: its figures stop where it did."""
    if not conditions:
        return []
    broken = [
        Violation("the run failed", label, None, None, f"{record.failure.kind}: {record.failure.message}")
        for label, record in zip(comparison.labels, comparison.records, strict=True)
        if record.failure
    ]
    return broken + [violation for condition in conditions for violation in condition.violations(comparison)]


def _key(name: str) -> Key:
    """The name of a stage may itself hold dots and spaces."""
    group, _, rest = name.partition(".")
    if group in ("stages", "ranks", "components") and "." in rest:
        inner, _, figure = rest.rpartition(".")
        return group, inner, figure
    return (group, rest) if rest else (group,)


def _shown(key: Key, value: Number) -> str:
    if key[-1].endswith("_bytes"):
        return f"{human(round(value))} ({round(value):,} bytes)"
    return f"{value:,.4g}"
