"""The judge of benchmarks/several_gpus.py: every bound is missed exactly when a figure misses it."""

from __future__ import annotations

from typing import Any

import pytest
from several_gpus import breaches_of, ways

Row = dict[str, Any]
MIB = 2**20


def layout(**changes: Any) -> Row:
    """Two GPUs with Ulysses that keep every bound, just."""
    row = {"figure": "layout", "case": "14B-720P", "way": "ulysses", "gpus": 2, "exit_code": 0, "stderr": ""}
    row |= {"speedup": 1.88, "above_bytes": [3600 * MIB, 3500 * MIB], "step_error": 0.07, "stages": 20}
    row |= {"predicted_device_bytes": [3600 * MIB, 3500 * MIB], "equal_allocated": 19, "equal_reserved": 19}
    return row | changes


def test_figures_that_keep_every_bound_are_no_breach() -> None:
    assert breaches_of([layout(), layout(way="ring", speedup=1.85), layout(way="cfg", speedup=1.93)]) == []
    assert (
        breaches_of([layout(way="one", gpus=1, speedup=1.0, above_bytes=[5000 * MIB, 0], predicted_device_bytes=[])])
        == []
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"speedup": 1.87}, "1.87 times as fast, not 1.88"),
        ({"way": "cfg", "speedup": 1.92}, "not 1.93"),
        ({"above_bytes": [3700 * MIB, 0]}, "bytes of a GPU, more than"),
        ({"predicted_device_bytes": [3680 * MIB, 3500 * MIB]}, "rank 0: "),
        ({"step_error": -0.08}, "a step is predicted -8.0%"),
        ({"exit_code": 1, "stderr": "it failed"}, "exit code 1: it failed"),
        ({"equal_reserved": 18}, "equal_reserved: 18 of 20 stages"),
    ],
)
def test_each_bound_of_a_layout_is_named_when_it_is_missed(change: Row, said: str) -> None:
    assert any(said in breach for breach in breaches_of([layout(**change)]))


def test_a_promise_a_fault_and_frames_are_judged() -> None:
    promise = {"figure": "promise", "index": 3, "kept": False, "budget_bytes": 5, "above_bytes": [6, 6], "exit_code": 0}
    fault = {"figure": "fault", "index": 1, "seconds": 16.0, "alive": 0, "left_bytes": [0, 0]}
    same = {"figure": "same", "case": "1.3B-480P", "way": "cfg", "equal": False}
    assert len(breaches_of([promise, fault, same])) == 3
    fine = [promise | {"kept": True}, fault | {"seconds": 15.0}, same | {"equal": True}, same | {"way": "ring"}]
    assert breaches_of(fine) == []


def test_frames_of_reordered_sums_may_be_as_far_away_as_float32_s() -> None:
    rows = [{"figure": "same", "case": "x", "way": "one in float32", "mean_apart": 0.5, "equal": False}]
    rows += [
        {"figure": "same", "case": "x", "way": way, "mean_apart": 0.5, "equal": False} for way in ("ulysses", "ring")
    ]
    assert breaches_of(rows) == []
    rows[1]["mean_apart"] = 0.51
    assert breaches_of(rows) == ["x ulysses: frames are 0.5100 apart, float32's 0.5000"]


def test_every_way_uses_all_gpus() -> None:
    for count in (2, 4, 8):
        for name, flags in ways(count).items():
            sizes = [int(flags[i + 1]) for i, flag in enumerate(flags) if flag.endswith("_size")]
            product = 1
            for size in sizes:
                product *= size
            assert name == "one" or product == count
