"""A series of configurations as a user runs it: fresh processes, kill -9 in the middle, resumed, reported, compared."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from wanvram.cli.main import main

MATRIX = """
base:
  name: tiny
  model_config: {device: simulated, load_strategy: block}
  request: {task: t2v-1.3B, size: 832*480, frame_num: 5, sample_steps: 2, base_seed: 1, weights: tiny}
axes:
  model_config.offload: [false, true]
include:
  - {name: tiny-long, request.frame_num: 9}
"""
NAMES = ["tiny-no_offload", "tiny-offload", "tiny-long"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "wanvram", "profile", *arguments]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not path.exists():
        assert process.poll() is None, "it ended before it was to be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_series_killed_in_the_middle_goes_on_where_it_was(tmp_path: Path) -> None:
    file, logs = tmp_path / "m.yaml", tmp_path / "logs"
    file.write_text(MATRIX)
    arguments = command(str(file), "-o", str(logs), "--json")
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(logs / NAMES[1] / "config.yaml", process)  # the second is at work
    children = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert (len(gone), alive) == (1, []), "the run dies with the series"
    first = logs / NAMES[0] / "record.json"
    before = (first.stat().st_mtime_ns, first.read_bytes())
    assert not (logs / NAMES[1] / "record.json").exists()

    result = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert [(run["name"], run["kept"]) for run in document["runs"]] == list(
        zip(NAMES, [True, False, False], strict=True)
    )
    assert (first.stat().st_mtime_ns, first.read_bytes()) == before
    assert all(run["record"]["peak"]["device_bytes"] > 0 for run in document["runs"])
    assert all("denoise" in (logs / name / "run.log").read_text() for name in NAMES), "what each run printed is kept"


def test_two_configurations_one_of_which_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, logs = tmp_path / "m.yaml", tmp_path / "logs"
    # 900 MiB hold the context and the tiny model of one, not the frames decoded at the other's size.
    limited = MATRIX.replace(
        "axes:\n  model_config.offload: [false, true]", "axes:\n  request.memory_limit_bytes: [2000000000, 900000000]"
    )
    file.write_text(limited.partition("include")[0])
    assert main(["profile", str(file), "-o", str(logs)]) == 3
    out = capsys.readouterr().out
    assert "predicted, fits" in out
    assert "out of memory" in out
    assert "2 run, 0 already done" in out
    assert main(["profile", str(file), "-o", str(logs)]) == 3
    assert "0 run, 2 already done" in capsys.readouterr().out
    assert main(["report", str(logs), "--format", "text"]) == 0
    assert main(["compare", str(logs), "--fail-if", "peak.device_bytes > 64GiB"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_an_edited_configuration_is_left_alone_while_the_others_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, logs = tmp_path / "m.yaml", tmp_path / "logs"
    file.write_text(MATRIX.partition("include")[0].replace("[false, true]", "[true]"))
    series = ["profile", str(file), "-o", str(logs)]
    assert main(series) == 0
    before = (logs / "tiny" / "record.json").read_bytes()
    file.write_text(
        file.read_text().replace("sample_steps: 2", "sample_steps: 3")
        + "include: [{name: new, request.frame_num: 9}]\n"
    )
    capsys.readouterr()
    assert main([*series, "--json"]) == 2
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert [(run["name"], run["kept"]) for run in document["runs"]] == [("new", False)]
    assert [(run["name"], run["differs"]) for run in document["changed"]] == [("tiny", ["request.sample_steps"])]
    assert document["exit_code"] == 2
    assert "tiny: changed: not run (request.sample_steps differs)" in captured.err
    assert (logs / "tiny" / "record.json").read_bytes() == before

    assert main(series) == 2
    out = capsys.readouterr().out
    assert "tiny: changed: not run (request.sample_steps differs); --force_changed" in out
    assert "0 run, 1 already done, 1 changed" in out
    file.write_text(file.read_text().partition("include")[0])
    assert main(series) == 2
    assert "0 run, 0 already done, 1 changed" in capsys.readouterr().out, "nothing is left to run, which is no error"
    assert main([*series, "--force-changed"]) == 0
    assert "1 run, 0 already done;" in capsys.readouterr().out


def test_a_bad_configuration_among_several_is_found_before_the_first_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(MATRIX)
    bad.write_text("name: bad\nrequest: {task: t2v-1.3B, size: 832*480, frame_num: 80}\n")
    assert main(["profile", str(good), str(bad), "-o", str(tmp_path / "logs")]) == 2
    assert "bad.yaml" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()
    assert main(["profile", str(good), "--gpu", "abacus", "-o", str(tmp_path / "logs")]) == 2
    assert not (tmp_path / "logs").exists()


def test_a_single_configuration_that_takes_too_long_is_a_recorded_failure(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    baseline = Path(__file__).parents[1] / "configs" / "baseline.yaml"
    flags = ["--device", "simulated", "--timeout", "1", "-o", str(directory)]
    result = subprocess.run(command(str(baseline), *flags), capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1, result.stderr
    record = json.loads((directory / "record.json").read_text())
    assert record["failure"]["message"] == "it was stopped after 1 s (--timeout)"
    assert "Traceback" not in result.stderr
