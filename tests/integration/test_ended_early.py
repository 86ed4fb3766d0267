"""Runs that end early, or whose reader does: each leaves its record, and nothing else behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BASELINE = Path(__file__).parents[1] / "configs" / "baseline.yaml"
PROFILE = [sys.executable, "-m", "wanvram", "profile"]
SIMULATED = [str(BASELINE), "--device", "simulated", "--weights", "tiny"]


def failure_of(directory: Path) -> dict[str, object] | None:
    failure: dict[str, object] | None = json.loads((directory / "record.json").read_text())["failure"]
    return failure


@pytest.mark.parametrize("live", [[], ["--live"]])
@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-", "2>&1 >/dev/null | true"])
def test_a_run_whose_progress_nobody_reads_goes_on_to_its_record(live: list[str], where: str, tmp_path: Path) -> None:
    command = f'set -o pipefail; "$@" {where}'
    flags = [*SIMULATED, *live, "-o", str(tmp_path / "run")]
    ended = subprocess.run(["bash", "-c", command, "bash", *PROFILE, *flags], capture_output=True, timeout=120)
    assert ended.returncode == 0
    assert failure_of(tmp_path / "run") is None
    assert json.loads((tmp_path / "run" / "memory_events.json").read_text())


def test_a_series_whose_progress_nobody_reads_is_run(tmp_path: Path) -> None:
    flags = [*SIMULATED, "--timeout", "100", "-o", str(tmp_path / "run")]
    ended = subprocess.run(
        ["bash", "-c", '"$@" 2>/dev/full', "bash", *PROFILE, *flags], capture_output=True, timeout=120
    )
    assert ended.returncode == 0
    assert failure_of(tmp_path / "run") is None
