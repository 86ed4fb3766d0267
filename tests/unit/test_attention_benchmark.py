"""The judge of benchmarks/attention_backends.py: each bound, just kept and just missed."""

from __future__ import annotations

from typing import Any

import attention_backends as module
import pytest
from attention_backends import CASES, GIB, SHAPES, judge

Row = dict[str, Any]
CASE = CASES[2]  # 14B 720P
SHAPE = SHAPES[2]


def called(backend: str, **changes: Any) -> Row:
    row = {"part": "kernels", "kind": "call", "backend": backend, "shape": list(SHAPE), "seconds": 0.2, "error": 2.3e-3}
    return row | {"extra_bytes": 0, "registry_extra_bytes": 0} | changes


def ran(backend: str, **changes: Any) -> Row:
    stages = [{"stage": "denoise", "allocated": 0, "reserved": 0}] * 20
    row = {"part": CASE.name, "kind": "run", "backend": backend, "failure": None, "step_seconds": CASE.most_seconds}
    row |= {"predicted_step_seconds": CASE.most_seconds, "nvml_bytes": int(CASE.most_gib * GIB), "stages": stages}
    return row | {"first_over_steady": 1.0} | changes


def alone(backend: str, seconds: float) -> Row:
    return {"part": CASE.name, "kind": "alone", "backend": backend, "seconds": seconds}


def series(**changes: Any) -> list[Row]:
    return [ran(backend, **(changes if backend == "fa4" else {})) for _ in range(3) for backend in ("cudnn", "fa4")]


def breaches(*rows: Row) -> list[str]:
    found = judge(rows)["breaches"]
    assert isinstance(found, list)
    return found


def test_a_series_at_its_bounds_is_kept() -> None:
    warm = {"part": "warm", "caches": "filled", "backend": "fa4", "first_over_steady": 2.0}
    assert breaches(*series(), called("cudnn"), called("fa4", error=2.3e-3 * 1.1), warm) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"step_seconds": 19.8, "predicted_step_seconds": 19.8}, "a step takes 19.800 s"),
        ({"nvml_bytes": int(4.76 * GIB)}, "4.76 GiB of device memory"),
        ({"predicted_step_seconds": 21.0}, "was predicted +6.6%"),
        (
            {
                "stages": [
                    {"stage": "a", "allocated": 0, "reserved": 512},
                    {"stage": "b", "allocated": 0, "reserved": 0},
                ]
            },
            "0.5 of stage peaks",
        ),
        ({"failure": "out of memory"}, "fa4 failed: out of memory"),
    ],
)
def test_a_bound_of_whole_runs_that_is_missed_is_named(changes: Row, said: str) -> None:
    assert any(said in text for text in breaches(*series(**changes)))


def test_a_slow_card_is_judged_by_what_products_and_attention_take_alone() -> None:
    slow = series(step_seconds=21.0, predicted_step_seconds=21.0)
    assert breaches(*slow, alone("fa4", 20.5)) == []
    assert any("1.025 times" in text for text in breaches(*slow, alone("fa4", 20.4)))


def test_two_rounds_are_too_few() -> None:
    assert sum("at least 3" in text for text in breaches(*series()[:4])) == 2


def test_memory_beside_the_registry_s_and_a_larger_error_are_named() -> None:
    found = breaches(called("cudnn"), called("fa4", error=2.6e-3, extra_bytes=512))
    assert [text.partition(":")[0] for text in found] == ["kernels fa4 40x75600x75600"] * 2


def test_a_forward_farther_from_float32_than_cudnn_s_is_named() -> None:
    rows = [
        {"part": "numerics", "backend": name, "rms": rms}
        for name, rms in (("cudnn", 1.0), ("fa4", 1.11), ("flash", 1.09))
    ]
    assert [text.partition(":")[0] for text in breaches(*rows)] == ["numerics fa4"]


def test_a_slow_warm_start_is_named() -> None:
    rows = [
        {"part": "warm", "caches": state, "backend": "fa4", "first_over_steady": 2.1} for state in ("empty", "filled")
    ]
    assert len(breaches(*rows)) == 1


def test_every_part_has_what_runs_it() -> None:
    assert set(module.PARTS) == {*module.SINGLE, *(case.name for case in CASES), "warm"}
