"""`wanvram simulate script.py` in a process of its own: streams, exit codes, files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from wanvram.foreign.script import run_script
from wanvram.record import RunRecord
from wanvram.report.terminal import summarize

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import subprocess, sys
import torch
print("arguments", *sys.argv[1:])
model = torch.nn.Linear(2048, 2048, device="cuda", dtype=torch.bfloat16)
with torch.no_grad():
    y = model(torch.zeros(64, 2048, device="cuda", dtype=torch.bfloat16))
print(f"{torch.cuda.max_memory_allocated()} bytes on {torch.cuda.get_device_name()}")
if "full" in sys.argv:
    torch.empty(100 << 30, dtype=torch.uint8, device="cuda")
if "wrapped" in sys.argv:
    try:
        torch.empty(100 << 30, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError as error:
        raise RuntimeError("the pipeline failed") from error
if "broken" in sys.argv:
    raise ValueError("a defect of its own")
if "status" in sys.argv:
    sys.exit(7)
if "child" in sys.argv:
    subprocess.run([sys.executable, "-c", "import torch"])
"""


def simulate(tmp_path: Path, *words: str, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, "-m", "wanvram", "simulate", "--gpu", "rtx4090", *flags, str(script), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def test_the_scripts_output_passes_through_and_the_report_goes_to_stderr(tmp_path: Path) -> None:
    done = simulate(tmp_path, "--steps", "4", "--json")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "arguments --steps 4 --json"
    assert second.endswith(" bytes on NVIDIA GeForce RTX 4090")
    assert done.stderr.startswith("simulated NVIDIA GeForce RTX 4090: fits in ")
    assert "script:5" in done.stderr


def test_with_json_the_document_alone_is_on_stdout_and_the_directory_has_timeline_and_snapshot(tmp_path: Path) -> None:
    done = simulate(tmp_path, flags=("--json", "-o", str(tmp_path / "run")))
    document = json.loads(done.stdout)
    assert "arguments" in done.stderr
    assert f"{document['peak']['allocated_bytes']} bytes on" in done.stderr
    assert document["fits"] is True
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "memory_viz.pickle",
        "record.json",
        "simulation.json",
        "timeline.json",
    ]
    again = simulate(tmp_path, flags=("-o", str(tmp_path / "run")))
    assert again.returncode == 2
    assert "give --force" in again.stderr


@pytest.mark.parametrize("word", ["full", "wrapped"])
def test_a_script_that_the_card_cannot_hold_exits_with_3(tmp_path: Path, word: str) -> None:
    done = simulate(tmp_path, word)
    assert done.returncode == 3
    assert "does NOT fit" in done.stderr
    assert "refused: 100.00 GiB more were asked for" in done.stderr


def test_a_script_that_fails_by_itself_exits_with_1_and_shows_its_own_traceback(tmp_path: Path) -> None:
    done = simulate(tmp_path, "broken")
    assert done.returncode == 1
    assert "ValueError: a defect of its own" in done.stderr
    assert "runpy" not in done.stderr
    assert "failed before it was known whether it fits" in done.stderr
    assert simulate(tmp_path, "status").returncode == 1


def test_of_a_script_that_fails_by_itself_nothing_says_that_it_fits(tmp_path: Path) -> None:
    done = simulate(tmp_path, "broken", flags=("--json", "-o", str(tmp_path / "run")))
    assert done.returncode == 1
    assert json.loads(done.stdout)["fits"] is None
    record = RunRecord.read(tmp_path / "run" / "record.json")
    assert record.fits is None
    assert "FAILED (error): ValueError: a defect of its own" in summarize(record)


def test_a_script_that_is_no_python_is_shown_as_python_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text("def f(:\n", encoding="utf-8")
    assert run_script(script, []) == 1
    assert capsys.readouterr().err.startswith(f'  File "{script}", line 1\n')


def test_a_child_process_is_refused_by_name(tmp_path: Path) -> None:
    done = simulate(tmp_path, "child")
    assert done.returncode == 2
    assert "the child process python" in done.stderr
    assert "is not simulated" in done.stderr


def test_a_script_that_is_not_there_is_bad_input(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "wanvram", "simulate", str(tmp_path / "none.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert "none.py is no file" in done.stderr


def test_a_simulated_run_is_compared_with_a_snapshot_of_the_same_script(tmp_path: Path) -> None:
    """The snapshot is that of the simulated allocator, in PyTorch's format: every figure is equal."""
    assert simulate(tmp_path, flags=("-o", str(tmp_path / "run"))).returncode == 0
    run, snapshot = tmp_path / "run", tmp_path / "snapshot.pickle"
    (run / "memory_viz.pickle").rename(snapshot)
    words = [sys.executable, "-m", "wanvram", "compare", str(run), str(snapshot)]
    done = subprocess.run([*words, "--json"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    (prediction,) = document["predictions"]
    errors = {name: error["error"] for name, error in prediction["errors"].items()}
    assert errors == dict.fromkeys(errors, 0.0)
    assert {"peak.allocated_bytes", "peak.reserved_bytes", "stages.run.peak_reserved_bytes"} <= errors.keys()
    failing = [*words, "--fail-if", "peak.allocated_bytes > +0%"]
    assert subprocess.run(failing, cwd=ROOT, capture_output=True, timeout=120, check=False).returncode == 0
    snapshot.write_bytes(b"\x80\x04 no snapshot")
    damaged = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert damaged.returncode == 2
    assert "snapshot.pickle" in damaged.stderr
