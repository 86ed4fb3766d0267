"""The bounds of benchmarks/residual_stream.py: a result fails exactly when one is missed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import residual_stream
from residual_stream import CASES, judge

from wanvram.cli.main import main as command
from wanvram.units import GIB

Row = dict[str, Any]


def run(case: str, stream: str, took: float, gib: float, **changes: Any) -> Row:
    peak = {"predicted": 9, "measured": 9}
    row: Row = {
        "kind": "run",
        "case": case,
        "stream": stream,
        "exit_code": 0,
        "above_bytes": int(gib * GIB),
        "stderr_tail": "",
    }
    row |= {"step": {"predicted": took, "measured": took}, "videos": ["as with the stream on the device"]}
    return row | {"stages": [{"stage": "denoise", "allocated": peak, "reserved": peak}] * 20} | changes


def equal(**changes: Any) -> Row:
    return {"kind": "equal", "task": "t2v-14B", "equal": True, "largest_difference": 0.0} | changes


def fine() -> list[Row]:
    return [
        equal(),
        run("14B-720P", "pinned", 1.05, 3.5),
        run("14B-720P", "device", 1.0, 4.5),
        run("14B-480P", "pinned", 1.0, 2.4),
    ]


def test_what_keeps_every_bound_just_has_no_breach() -> None:
    summary = judge(fine())
    assert summary["breaches"] == []
    assert summary["equal"] == ["t2v-14B"]
    assert summary["runs"]["14B-720P"] == {"gib": 3.5, "step": 1.05, "ratio": 1.05}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (equal(equal=False, largest_difference=0.1), "t2v-14B: velocities differ by 0.1"),
        (run("14B-720P", "pinned", 1.06, 3.5), "1.060 of the step with the stream on the device, at most 1.05"),
        (run("14B-720P", "pinned", 1.05, 3.5, videos=["another"]), "14B-720P: another video with the stream in RAM"),
        (run("14B-720P-161", "pinned", 1.0, 5.01), "5.010 GiB of the GPU, at most 5GiB"),
        (
            run("14B-480P", "pinned", 1.0, 2.4, exit_code=1, stderr_tail="no memory"),
            "failed with exit code 1: no memory",
        ),
        (run("14B-480P", "pinned", 1.0, 2.4, step={"predicted": 0.92, "measured": 1.0}), "0.920 s predicted"),
        (
            run(
                "14B-480P",
                "pinned",
                1.0,
                2.4,
                stages=[{q: {"predicted": 8, "measured": 9} for q in ("allocated", "reserved")}] * 5,
            ),
            "80 of 90 stage peaks to the byte",
        ),
    ],
)
def test_a_missed_bound_is_a_breach(changed: Row, said: str) -> None:
    assert any(said in breach for breach in judge([*fine(), changed])["breaches"])


@pytest.mark.parametrize("stream", ["pinned", "device"])
def test_a_command_is_one_that_the_command_line_takes(stream: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = CASES[1].words(stream, 1)
    words[words.index("--frame_num") + 1] = "5"
    assert command(["estimate", *words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["config"]["optimization"]["residual_in"] == stream
    assert said["fits"]


def test_equality_is_shown_on_tiny_models_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["x", "equal", "--tiny", "--tasks", "t2v-1.3B,flf2v-14B", "--out", str(tmp_path / "a.json")]
    )
    assert residual_stream.main() == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [(row["task"], row["equal"], row["finite"]) for row in rows] == [
        ("t2v-1.3B", True, True),
        ("flf2v-14B", True, True),
    ]
