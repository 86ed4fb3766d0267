"""The structure docs/architecture.md promises: imports point down only, and plain data loads without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH_FREE = (
    "wanvram",
    "wanvram.analysis",
    "wanvram.cli.main",
    "wanvram.config",
    "wanvram.errors",
    "wanvram.record",
    "wanvram.report",
    "wanvram.simulate.allocator",
    "wanvram.simulate.card",
    "wanvram.simulate.card_table",
    "wanvram.simulate.convolutions",
    "wanvram.simulate.gpus",
    "wanvram.simulate.libraries",
    "wanvram.specs",
    "wanvram.tasks",
    "wanvram.units",
)


def run(*command: str) -> str:
    """Standard output and error of a command in the repository's root; the test fails with both if the command does."""
    result = subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    return output


def test_every_import_points_down_a_layer() -> None:
    lint_imports = Path(sys.executable).parent / "lint-imports"
    assert "0 broken" in run(str(lint_imports), "--no-logo", "--no-cache")


def test_the_command_line_and_plain_data_load_without_torch() -> None:
    code = f"import sys, {', '.join(TORCH_FREE)}; assert 'torch' not in sys.modules, 'torch was imported'"
    run(sys.executable, "-c", code)
