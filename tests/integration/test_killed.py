"""Four kills of benchmarks/hundred_kills.py, which makes a hundred: each operation once, each signal once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hundred_kills import OPERATIONS, SIGNALS, Scene, kill_once, signals_as_usual


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize(
    ("operation", "number"), list(zip(OPERATIONS, (SIGNALS[1], SIGNALS[0], SIGNALS[3], SIGNALS[2]), strict=True))
)
def test_what_is_killed_at_a_random_moment_leaves_whole_files_and_leads_to_the_same_result(
    operation: str, number: int, scene: Scene, tmp_path: Path
) -> None:
    with signals_as_usual():
        row = kill_once(scene, operation, number, random.Random(2), tmp_path)
    assert row["wrong"] == []
