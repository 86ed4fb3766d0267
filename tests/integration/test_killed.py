"""Four kills of benchmarks/hundred_kills.py, which makes a hundred: each operation once, each signal once."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hundred_kills import OPERATIONS, SIGNALS, Scene, kill_once, rows_made, signals_as_usual


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


def test_a_series_of_kills_goes_on_with_the_rows_of_its_own_seed_and_code_only(tmp_path: Path) -> None:
    header = {"seed": 1, "circumstances": {"source_sha256": "a"}}
    out = tmp_path / "kills.json"
    assert rows_made(out, header) == []
    out.write_text(json.dumps(header | {"rows": [{"number": 0}]}))
    assert rows_made(out, header) == [{"number": 0}]
    for other in ({"seed": 2}, {"circumstances": {"source_sha256": "b"}}):
        with pytest.raises(SystemExit, match="another seed or of other code"):
            rows_made(out, header | other)
