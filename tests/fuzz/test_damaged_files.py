"""Files damaged by chance: the verbs that read them answer with a sentence or a result, in bounded time and memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from report_runs import Recipe, write_run
from wanvram.record import Memory
from wanvram.recorder.events import EventLog
from wanvram.units import MIB

HERE = Path(__file__).parent
SECONDS = float(os.environ.get("WANVRAM_FUZZ_SECONDS", "20"))
SEED = int(os.environ.get("WANVRAM_FUZZ_SEED", "1"))
ADVICE = {"schema": 1, "advice": [{"change": "offload: true", "saved_bytes": 5 << 20, "seconds": 1.5}]}


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """run: a run's files; file: what stands alone; config: what is written by hand."""
    folder = tmp_path / "sources"
    run = write_run(folder / "run", Recipe(steps=2, events=3))
    (run / "advice.json").write_text(json.dumps(ADVICE))
    shutil.copytree(HERE.parent / "data" / "field", folder / "file")
    with EventLog(folder / "file" / "memory_events.json") as log:
        log.log("load dit", Memory(300 * MIB, 320 * MIB, 900 * MIB), {"base_memory": 100 * MIB})
        log.log("denoise", Memory(500 * MIB, 640 * MIB, 1200 * MIB))
    (folder / "config").mkdir()
    for path in (HERE.parent / "configs").glob("*.yaml"):
        if path.name != "matrix.yaml":
            shutil.copy(path, folder / "config")
    return folder


@pytest.mark.timeout(SECONDS * 2 + 300)
def test_a_damaged_file_of_any_kind_is_read_or_named(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, str(HERE / "child.py"), str(sources), str(out), str(SEED), str(SECONDS)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    last = (out / "last").read_text() if (out / "last").exists() else "nothing"
    assert result.returncode == 0, f"died at {last}: {result.stderr[-2000:]}"
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["failures"] == []
    assert found["count"] > 20
