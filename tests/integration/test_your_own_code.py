"""docs/your-own-code.md: its three examples run, as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OWN, DIFFUSERS, CI = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "docs" / "your-own-code.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


def run(folder: Path, name: str, text: str, *command: str) -> subprocess.CompletedProcess[str]:
    (folder / name).write_text(text, encoding="utf-8")
    words = [sys.executable, *command]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=280, check=False)


def test_the_module_of_ones_own_is_reported_with_stages_and_gaps(tmp_path: Path) -> None:
    done = run(tmp_path, "own.py", OWN, "own.py")
    assert done.returncode == 0, done.stderr
    assert "simulated NVIDIA GeForce RTX 4060 8GB: fits in 8.00 GiB" in done.stdout
    assert "stage forward: allocated" in done.stdout
    assert "not known: NVIDIA GeForce RTX 4060 8GB: library buffers and CUDA context are estimates" in done.stdout


def test_the_diffusers_model_is_simulated_from_its_configuration(tmp_path: Path) -> None:
    done = run(tmp_path, "flux.py", DIFFUSERS, "-m", "wanvram", "simulate", "--gpu", "rtx4090", "flux.py", "2")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d+ MiB reserved\n", done.stdout)
    whole = run(tmp_path, "flux.py", DIFFUSERS, "-m", "wanvram", "simulate", "--gpu", "rtx4060", "flux.py", "19")
    assert whole.returncode == 3
    assert "does NOT fit" in whole.stderr


def test_the_test_for_ci_passes_and_has_its_peak(tmp_path: Path) -> None:
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=r.xml", "test_encoder.py")
    done = run(tmp_path, "test_encoder.py", CI, *command)
    assert done.returncode == 0, done.stdout
    assert "vram_peak_bytes" in (tmp_path / "r.xml").read_text(encoding="utf-8")
