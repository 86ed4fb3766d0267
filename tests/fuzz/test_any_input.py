"""Inputs of every kind, damaged by chance or made by hypothesis: a sentence or a result, in bounded time and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fuzz.sources import write_sources

HERE = Path(__file__).parent
SECONDS = float(os.environ.get("WANVRAM_FUZZ_SECONDS", "56"))  # of all kinds together
SEED = int(os.environ.get("WANVRAM_FUZZ_SEED", "1"))
SHARES = {"run,file": 0.25, "yaml,card": 0.1, "flags": 0.15, "checkpoint": 0.2, "media": 0.1, "service": 0.1}
LEAST = {"checkpoint": 3}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "sources"
    write_sources(folder)
    return folder


def tried(sources: Path, out: Path, kinds: str, seconds: float, *flags: str) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "child.py"), str(sources), str(out), str(SEED), "--kinds", kinds]
    env = os.environ | {
        "MALLOC_ARENA_MAX": "2",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [*command, "--seconds", str(seconds), *flags],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        env=env,
        check=False,
    )
    last = (out / "last").read_text() if (out / "last").exists() else "nothing"
    assert result.returncode == 0, f"died at {last}: {result.stderr.decode(errors='replace')[-2000:]}"
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.timeout(SECONDS * 2 + 300)
@pytest.mark.parametrize("kinds", SHARES)
def test_an_input_of_any_kind_is_read_or_named(kinds: str, sources: Path, tmp_path: Path) -> None:
    found = tried(sources, tmp_path / "out", kinds, SECONDS * SHARES[kinds])
    assert found["failures"] == []
    assert found["count"] >= LEAST.get(kinds, 8)


@pytest.mark.timeout(SECONDS * 2 + 300)
def test_the_smallest_text_or_command_line_that_hypothesis_finds_is_read_or_named(
    sources: Path, tmp_path: Path
) -> None:
    found = tried(sources, tmp_path / "out", "yaml,card,flags", SECONDS * 0.1, "--hypothesis")
    assert found["failures"] == []
    assert found["count"] >= 20
