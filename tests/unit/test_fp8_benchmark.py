"""The judge of benchmarks/fp8_products.py: each bound, just kept and just missed; its forward, on the tiny transformer."""

from __future__ import annotations

from typing import Any

import pytest
from attention_backends import CASES
from fp8_products import FORWARDS, PARTS, SHAPES, SINGLE, judge, numerics_here

Row = dict[str, Any]
PEAK = 1979e12


def called(share: float = 0.62, extra: int = 0, shape: tuple[int, int, int] = SHAPES[1]) -> Row:
    flops = 2.0 * shape[0] * shape[1] * shape[2]
    rate = {"flops": flops, "fp8_seconds": flops / (share * PEAK), "peak_flops": PEAK, "counted_share": 0.62}
    return {"part": "products", "kind": "call", "shape": list(shape), "extra_bytes": extra} | rate


def ran(precision: str, seconds: float, **changes: Any) -> Row:
    stages = [{"stage": "denoise", "allocated": 0, "reserved": 0, "device": 0}]
    row = {"part": "14B-720P", "kind": "run", "precision": precision, "failure": None, "step_seconds": seconds}
    return row | {"predicted_step_seconds": seconds, "nvml_bytes": 1, "stages": stages} | changes


def forward(precision: str, rms: float) -> Row:
    return {"part": "numerics", "kind": "forward", "model": "14B unit", "precision": precision, "rms": rms}


def breaches(*rows: Row) -> list[str]:
    found: list[str] = judge(rows)["breaches"]
    return found


def test_a_series_at_its_bounds_is_kept() -> None:
    rows = [
        called(),
        called(0.2, shape=SHAPES[3]),
        forward("bf16", 0.005),
        forward("fp8", 0.06),
        ran("same", 19.44),
        ran("fp8", 18.0),
    ]
    found = judge(rows)
    assert found["breaches"] == []
    assert found["share_of_peak"] == pytest.approx(0.62)
    assert found["times_bf16"] == {"14B unit": pytest.approx(12.0)}
    assert found["steps"]["14B-720P"]["times_as_fast"] == pytest.approx(1.08)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([called(0.55)], "0.550 of the peak"),
        ([called(extra=512)], "512 bytes beside the output"),
        ([forward("bf16", 0.005), forward("fp8", float("nan"))], "numerics 14B unit"),
        ([ran("same", 19.43), ran("fp8", 18.0)], "1.079 times as fast, at least 1.08"),
        ([ran("same", 19.0)], "never as fast"),
        (
            [ran("same", 20.0), ran("fp8", 18.0, predicted_step_seconds=17.0)],
            "fp8: a step of 18.000 s was predicted -5.6%",
        ),
        ([ran("same", 20.0), ran("fp8", 18.0, failure="no memory")], "fp8 failed: no memory"),
        (
            [ran("same", 20.0), ran("fp8", 18.0, stages=[{"stage": "denoise", "allocated": 512, "reserved": 0}])],
            "fp8: 0.00 of stage peaks to the byte",
        ),
    ],
)
def test_a_bound_that_is_missed_is_named(rows: list[Row], said: str) -> None:
    assert any(said in breach for breach in breaches(*rows)), breaches(*rows)


def test_every_part_has_what_runs_it() -> None:
    assert set(PARTS) == set(SINGLE) | {case.name for case in CASES}


def test_8_bit_products_are_ten_times_as_far_from_float32_as_bf16_where_the_blocks_matter() -> None:
    rows: list[Row] = []
    numerics_here(rows.append, FORWARDS[:1], "cpu")
    found = judge(rows)
    assert found["times_bf16"]["tiny random"] == pytest.approx(1.0, abs=0.1)
    assert 5 < found["times_bf16"]["tiny unit"] < 25
    assert found["forward_rms"]["tiny unit fp8"] < 0.15
