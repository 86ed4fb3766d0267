"""Runs with torch.profiler's trace and the allocator's snapshot: where they are found, what they say, what their failure costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from wanvram.analysis.snapshot import DeviceHistory, read_snapshot
from wanvram.cli.main import main
from wanvram.engine.pipeline import Pipeline

ROOT = Path(__file__).parents[2]
BASELINE = ROOT / "tests" / "configs" / "baseline.yaml"


def configuration(folder: Path, *, steps: int = 5, frames: int = 1, precision: str = "fp32", **logging: Any) -> Path:
    """Of a size that tiny weights alone have."""
    document = yaml.safe_load(BASELINE.read_text())
    document["logging"] |= logging
    document["model_config"]["precision"] = precision
    document["request"] |= {"sample_steps": steps, "frame_num": frames, "size": "80*128", "weights": "tiny"}
    path = folder / "config.yaml"
    path.write_text(json.dumps(document))
    return path


def profile_tiny(config: Path, directory: Path, *more: str) -> int:
    model = ["--weights", "tiny", "--device", "cpu"]
    return main(["profile", str(config), *model, "-o", str(directory), *more])


def specification_command(path: Path) -> subprocess.CompletedProcess[str]:
    """spec.md 5.2."""
    command = [sys.executable, "Wan-Test/analyze_trace_file.py", str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traced")
    assert profile_tiny(configuration(folder, trace=True), folder / "run") == 0
    return folder / "run"


def test_the_trace_of_a_run_is_where_the_specification_s_command_looks_for_it(traced: Path) -> None:
    result = specification_command(traced / "trace.json")
    assert result.returncode == 0, result.stderr
    assert "cpu: peak" in result.stdout
    assert "ProfilerStep#2" in result.stdout
    (original,) = (traced / "trace").glob("*.pt.trace.json")
    assert original.samefile(traced / "trace.json"), "gigabytes are not written twice"


def test_of_a_run_that_was_not_traced_the_command_says_so_and_shows_its_record(tmp_path: Path, traced: Path) -> None:
    (tmp_path / "record.json").write_bytes((traced / "record.json").read_bytes())
    result = specification_command(tmp_path / "trace.json")
    assert result.returncode == 0, result.stderr
    assert "was not traced" in result.stderr
    assert (
        "The peak is in " in result.stdout
    )  # of the whole process: which stage it is depends on what ran in it before


def test_replacing_a_run_takes_its_traces_too(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert profile_tiny(configuration(tmp_path, trace=True), run) == 0
    (before,) = (run / "trace").iterdir()
    assert profile_tiny(configuration(tmp_path, trace=True), run, "--force") == 0
    (after,) = (run / "trace").iterdir()
    assert before != after
    assert after.samefile(run / "trace.json")


def test_the_trace_is_of_five_steps_of_its_own_whatever_the_run_has(tmp_path: Path) -> None:
    """The measured run has one step, no pause between its stages, and the figures that it has untraced."""
    assert profile_tiny(configuration(tmp_path, steps=1), tmp_path / "untraced") == 0
    assert profile_tiny(configuration(tmp_path, steps=1, trace=True), tmp_path / "run") == 0
    untraced, record = (json.loads((tmp_path / name / "record.json").read_text()) for name in ("untraced", "run"))
    assert [(s["name"], s["activation_bytes"]) for s in record["stages"]] == [
        (s["name"], s["activation_bytes"]) for s in untraced["stages"]
    ]
    assert any("trace.json is of a pass of its own" in note for note in record["notes"])
    trace = (tmp_path / "run" / "trace.json").read_text()
    assert {f"ProfilerStep#{number}" in trace for number in (2, 3, 4)} == {True}


def test_a_trace_path_alone_asks_for_a_trace(tmp_path: Path) -> None:
    assert profile_tiny(configuration(tmp_path, trace_path="traces/x"), tmp_path / "run") == 0
    (trace,) = (tmp_path / "run" / "traces" / "x").iterdir()
    assert trace.samefile(tmp_path / "run" / "trace.json")
    assert profile_tiny(configuration(tmp_path, trace_path="traces/x"), tmp_path / "run", "--force") == 0
    (again,) = (tmp_path / "run" / "traces" / "x").iterdir()
    assert again != trace, "a replaced run takes its traces with it"


def test_on_the_simulated_device_a_note_says_that_there_is_no_trace(tmp_path: Path) -> None:
    config = configuration(tmp_path, trace_path="traces/x")
    assert (
        main(["profile", str(config), "--weights", "tiny", "--device", "simulated", "-o", str(tmp_path / "run")]) == 0
    )
    notes = json.loads((tmp_path / "run" / "record.json").read_text())["notes"]
    assert "no trace was written: nothing runs on the simulated device; --device cuda or cpu traces" in notes


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("Can't create directory")])
def test_a_trace_that_cannot_be_written_costs_neither_the_run_nor_its_record(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", full)
    assert profile_tiny(configuration(tmp_path, trace=True), tmp_path / "run") == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["failure"] is None
    assert any("no trace was written" in note for note in record["notes"])
    assert sum(stage["kind"] == "stage" for stage in record["stages"]) == 4
    assert not (tmp_path / "run" / "trace.json").exists()


def test_an_interrupted_run_is_not_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "decode_all", interrupted)
    assert profile_tiny(configuration(tmp_path, trace=True), tmp_path / "run") == 1
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert "no trace was written: the run failed" in record["notes"]


# --- the allocator's snapshot, on CUDA -----------------------------------------------------------------------------------------

# Mixed sizes around every rule of the allocator (512 B, 1 MiB, 10 MiB, 20 MiB), two streams, blocks split and joined,
# cached memory given back in the middle, and one request refused under a cap.
CHURN = """
import json, pickle, random, sys, torch
from pathlib import Path
from wanvram.recorder.tracing import allocator_snapshot
random.seed(3)
torch.cuda.init()
side = torch.cuda.Stream()
free, total = torch.cuda.mem_get_info()
torch.cuda.set_per_process_memory_fraction(3 * 2**30 / total)
with allocator_snapshot(Path(sys.argv[1])):
    alive = []
    for turn in range(4000):
        if alive and random.random() < (0.48 if turn < 2500 else 0.6):
            del alive[random.randrange(len(alive))]
        else:
            size = int(2 ** random.uniform(3, 24.5)) + random.randrange(512)
            with torch.cuda.stream(side if random.random() < 0.2 else torch.cuda.current_stream()):
                alive.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            if random.random() < 0.1:
                alive[-1].record_stream(side)
        if turn % 1000 == 999:
            torch.cuda.empty_cache()
    try:
        torch.empty(4 * 2**30, dtype=torch.uint8, device="cuda")
    except torch.cuda.OutOfMemoryError:
        pass
    x = torch.randn(1024, 1024, device="cuda")
    (x @ x).sum().item()  # cuBLAS takes its workspace from the same allocator
    now = torch.cuda.memory_allocated()
stats = {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved(), "now": now}
print(json.dumps(stats))
"""


def in_a_fresh_process(command: list[str], *, expandable: bool) -> str:
    """One whose allocator has no past."""
    env = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:{expandable}"}
    result = subprocess.run(
        [sys.executable, *command], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def assert_conserved(history: DeviceHistory, peak_allocated: int) -> None:
    """What was alive at the peak, added up, is PyTorch's own figure; with the holes it is what was reserved."""
    assert history.complete
    assert history.peak_allocated_bytes == peak_allocated
    assert sum(group.bytes for group in history.peak.alive) == peak_allocated
    assert peak_allocated + sum(hole.bytes for hole in history.peak.holes) == history.peak.reserved_bytes
    assert sum(segment.size for segment in history.peak.segments) == history.peak.reserved_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("expandable", [False, True])
def test_what_is_alive_at_the_peak_adds_up_to_max_memory_allocated_whatever_was_allocated(
    tmp_path: Path, expandable: bool
) -> None:
    path = tmp_path / "snapshot.pickle"
    stats = json.loads(in_a_fresh_process(["-c", CHURN, str(path)], expandable=expandable))
    snapshot = read_snapshot(path)
    assert_conserved(snapshot.main, stats["peak"])
    assert snapshot.main.peak_reserved_bytes == stats["reserved"]
    assert snapshot.main.allocated_bytes == stats["now"]
    assert [refusal.requested_bytes for refusal in snapshot.main.out_of_memory] == [4 << 30]


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["tiny", "random"])
def test_the_snapshot_of_a_run_on_cuda_adds_up_to_the_peak_of_its_record(tmp_path: Path, weights: str) -> None:
    config = configuration(tmp_path, steps=2, frames=5, precision="fp16", snapshot=True)
    config.write_text(config.read_text().replace("80*128", "480*832"))
    run = tmp_path / "run"
    model = ["--device", "cuda", "--weights", weights]
    in_a_fresh_process(["-m", "wanvram", "profile", str(config), *model, "-o", str(run)], expandable=False)
    record = json.loads((run / "record.json").read_text())
    assert record["failure"] is None
    history = read_snapshot(run / "snapshot.pickle").main
    assert_conserved(history, record["peak"]["allocated_bytes"])
    assert history.peak_reserved_bytes == record["peak"]["reserved_bytes"]
