"""A matrix file's combinations, and a series of runs: fresh processes, resumed, with every way to fail as a result.

The processes here are small Python scripts in place of `wanvram profile`; tests/integration runs the real one.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from wanvram.config import RunConfig, load_config
from wanvram.errors import InputError, OutputError
from wanvram.matrix import runner
from wanvram.matrix.grid import expand, is_matrix, load_configurations
from wanvram.matrix.jobs import Job, difference, exit_code, finished
from wanvram.matrix.progress import Lines, describe
from wanvram.matrix.runner import LOG, Outcome, run_all
from wanvram.record import Failure, RunRecord
from wanvram.request import Request

CONFIGS = Path(__file__).parents[1] / "configs"
BASE = "base: {name: b, request: {task: t2v-1.3B, size: 832*480}}\n"
AXES = "axes: {model_config.precision: [fp32, fp16], model_config.offload: [false, true]}\n"


def matrix(folder: Path, text: str) -> Path:
    path = folder / "m.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def names(path: Path) -> list[str]:
    return [config.name for config in expand(path)]


# --- the file ------------------------------------------------------------------------------------------------------------


def test_every_combination_is_a_configuration_the_last_axis_fastest(tmp_path: Path) -> None:
    configs = expand(matrix(tmp_path, BASE + AXES))
    assert [c.name for c in configs] == ["b-fp32-no_offload", "b-fp32-offload", "b-fp16-no_offload", "b-fp16-offload"]
    chosen = [(c.strategy.precision, c.strategy.offload) for c in configs]
    assert chosen == [("fp32", False), ("fp32", True), ("fp16", False), ("fp16", True)]
    assert configs[3].description == "[precision fp16, offload true]"


def test_excluded_combinations_go_and_included_ones_come(tmp_path: Path) -> None:
    text = BASE + AXES + "exclude: [{model_config.precision: fp32, model_config.offload: false}]\n"
    text += "include: [{request.frame_num: 161}, {name: mine, model_config.offload: true, request.size: 480*832}]\n"
    path = matrix(tmp_path, text)
    assert names(path) == ["b-fp32-offload", "b-fp16-no_offload", "b-fp16-offload", "b-frame_num=161", "mine"]
    assert expand(path)[3].request.frame_num == 161
    assert (expand(path)[4].strategy.precision, expand(path)[4].request.size) == ("bf16", "480*832")


def test_an_axis_of_one_value_counts_for_all_and_is_not_in_the_names(tmp_path: Path) -> None:
    text = BASE + "name: n\naxes: {request.frame_num: [5, 9], request.sample_steps: [2]}\n"
    assert names(matrix(tmp_path, text)) == ["n-frame_num=5", "n-frame_num=9"]
    assert [c.request.sample_steps for c in expand(matrix(tmp_path, text))] == [2, 2]


def test_true_and_one_are_different_values(tmp_path: Path) -> None:
    text = BASE + "axes: {optimization.batch_size: [1]}\nexclude: [{optimization.batch_size: true}]\n"
    assert len(expand(matrix(tmp_path, text))) == 1


def test_the_base_may_be_a_file_beside_the_matrix(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text((CONFIGS / "baseline.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    (config,) = expand(matrix(tmp_path, "base: b.yaml\naxes: {model_config.offload: [true]}\n"))
    assert config.request == load_config(CONFIGS / "baseline.yaml").request
    assert config.strategy.offload


BAD = {
    "no base": ("axes: {model_config.offload: [true]}", "base: is missing"),
    "no axes": (BASE, "axes: must map"),
    "empty axis": (BASE + "axes: {model_config.offload: []}", "at least one value"),
    "a value twice": (BASE + "axes: {model_config.offload: [true, true]}", "twice"),
    "no dotted key": (BASE + "axes: {offload: [true]}", "model_config.precision"),
    "unknown knob": (BASE + "axes: {model_config.ofload: [true]}", "did you mean offload"),
    "unknown key": (BASE + AXES + "excludes: []", "allowed: name"),
    "exclude of no axis": (BASE + AXES + "exclude: [{request.size: x}]", "not one of the axes"),
    "everything excluded": (
        BASE + "axes: {model_config.offload: [true]}\nexclude: [{model_config.offload: true}]",
        "leaves no",
    ),
    "too many": (BASE + f"axes: {{request.sample_steps: {list(range(1, 600))}}}", "at most 500"),
    "a combination that cannot be": (
        BASE + "axes: {model_config.precision: [fp32], optimization.weight_storage: [fp8]}",
        "the combination precision fp32, weight_storage fp8",
    ),
    "a name that leaves the folder": (BASE + "axes: {model_config.offload: [true]}\nname: ../../x\n", None),
    "an included name that leaves the folder": (BASE + AXES + "include: [{name: ../x, request.frame_num: 5}]", "name"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_matrix_is_a_sentence_with_the_file(case: str, tmp_path: Path) -> None:
    text, expected = BAD[case]
    path = matrix(tmp_path, text)
    if expected is None:
        assert all("/" not in name for name in names(path))
        return
    with pytest.raises(InputError, match=r"m\.yaml: ") as caught:
        expand(path)
    assert expected in str(caught.value)


def test_two_configurations_of_one_name_are_refused() -> None:
    path = CONFIGS / "baseline.yaml"
    with pytest.raises(InputError, match="'baseline' was already used"):
        load_configurations([path, path])


def test_the_repositorys_configurations_and_matrix_load_together_and_open_with_a_question() -> None:
    paths = sorted(CONFIGS.glob("*.yaml"))
    assert all(path.read_text(encoding="utf-8").startswith("# Question: ") for path in paths)
    assert [path.stem for path in paths if is_matrix(path)] == ["matrix"]
    configs = load_configurations(paths)
    assert {
        "baseline",
        "memory_opt",
        "t2v-1.3B-fp32",
        "t2v_1.3B_480p_5s_baseline",
        "offload",
        "ten_seconds",
        "card_8gib",
    } <= {c.name for c in configs}
    assert len(configs) > len(paths)


# --- a series ------------------------------------------------------------------------------------------------------------

WRITES_A_RECORD = """
    import json, sys, pathlib, shutil
    from wanvram.config import load_config
    from wanvram.record import Failure, RunRecord
    config, directory = load_config(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2])
    shutil.copy(sys.argv[1], directory / "config.yaml")
    failure = Failure("oom", "no room", stage="decode") if "oom" in config.name else None
    print(f"[   0.1 s] working on {config.name}", flush=True)
    record = RunRecord("cpu", False, config.to_dict(), None if failure is None else False, None, [], [], {}, {}, failure)
    record.write(directory / "record.json")
"""
CRASHES = "import sys; print('RuntimeError: it broke'); sys.exit(1)"
PREPARES_AND_KILLS_ITSELF = """
import os, sys
from pathlib import Path
from wanvram.run.directory import run_directory
run_directory(Path(sys.argv[2]), force=True).__enter__()
print("so far so good", flush=True)
os.kill(os.getpid(), 9)
"""
KILLS_ITSELF = "import os; print('so far so good', flush=True); os.kill(os.getpid(), 9)"
REFUSES_THE_BUDGET = "import sys; print('wanvram: nothing fits 1 GiB', file=sys.stderr); sys.exit(3)"
SLEEPS = "import time; time.sleep(60)"
WRITES_WHEN_INTERRUPTED = WRITES_A_RECORD.replace(
    'print(f"',
    """import time
    try: time.sleep(60)
    except KeyboardInterrupt: failure = Failure("interrupted", "x", stage="denoise")
    print(f\"""",
)


class Seen:
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        self.started_names: list[str] = []
        self.messages: list[tuple[str, str]] = []
        self.outcomes: list[Outcome] = []

    def started(self, number: int, count: int, name: str) -> None:
        self.started_names.append(name)

    def message(self, name: str, text: str) -> None:
        self.messages.append((name, text))

    def finished(self, number: int, count: int, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The script that stands in for `wanvram profile`; rewrite it with `write`."""
    path = tmp_path / "child.py"
    monkeypatch.setattr(
        runner, "_command", lambda job, config: [sys.executable, str(path), str(config), str(job.directory)]
    )
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
    write(path, WRITES_A_RECORD)
    return path


def write(path: Path, script: str) -> None:
    path.write_text(textwrap.dedent(script), encoding="utf-8")


def config(name: str) -> RunConfig:
    return RunConfig(name, "", "simulated", Request.for_task("t2v-1.3B", size="832*480", base_seed=1))


def jobs(folder: Path, *wanted: str) -> list[Job]:
    return [Job(config(name), folder / "logs" / name) for name in wanted]


@pytest.mark.usefixtures("child")
def test_each_run_has_its_directory_its_log_and_its_record(tmp_path: Path) -> None:
    seen = Seen()
    outcomes = run_all(jobs(tmp_path, "a", "b"), seen)
    assert [o.job.name for o in outcomes] == seen.started_names == ["a", "b"]
    assert all(o.record.failure is None and o.exit_code == 0 and o.seconds for o in outcomes)
    assert (tmp_path / "logs" / "b" / LOG).read_text() == "[   0.1 s] working on b\n"
    assert ("a", "working on a") in seen.messages


@pytest.mark.usefixtures("child")
def test_only_what_is_missing_runs_and_what_is_there_stays_as_it_is(tmp_path: Path) -> None:
    run_all(jobs(tmp_path, "a", "oom"), Seen())
    record = tmp_path / "logs" / "a" / "record.json"
    before = record.stat().st_mtime_ns
    seen = Seen()
    outcomes = run_all(jobs(tmp_path, "a", "oom", "c"), seen)
    assert seen.started_names == ["c"], "a run out of memory is a result, too"
    assert [o.seconds is None for o in outcomes] == [True, True, False]
    assert record.stat().st_mtime_ns == before
    assert [o.exit_code for o in outcomes] == [0, 3, 0]


@pytest.mark.usefixtures("child")
def test_a_run_killed_before_its_record_is_run_again_and_one_interrupted_too(tmp_path: Path) -> None:
    run_all(jobs(tmp_path, "a", "b"), Seen())
    (tmp_path / "logs" / "a" / "record.json").unlink()
    other = tmp_path / "logs" / "b" / "record.json"
    record = RunRecord.read(other)
    record.failure = Failure("interrupted", "by the user")
    record.write(other)
    seen = Seen()
    run_all(jobs(tmp_path, "a", "b"), seen)
    assert seen.started_names == ["a", "b"]


@pytest.mark.usefixtures("child")
def test_a_directory_of_another_configuration_is_refused_before_anything_runs(tmp_path: Path) -> None:
    run_all(jobs(tmp_path, "a"), Seen())
    (changed,) = jobs(tmp_path, "a")
    changed = replace(changed, config=replace(changed.config, gpu="rtx4060"))
    seen = Seen()
    with pytest.raises(InputError, match=r"another configuration \(request.gpu differs\); --force_changed"):
        run_all([*jobs(tmp_path, "new"), changed], seen)
    assert seen.started_names == []
    assert [o.seconds is None for o in run_all([changed], seen, force=True)] == [False]


@pytest.mark.usefixtures("child")
def test_of_a_series_only_the_changed_runs_can_be_replaced(tmp_path: Path) -> None:
    run_all(jobs(tmp_path, "a", "b"), Seen())
    same, changed = jobs(tmp_path, "a", "b")
    changed = replace(changed, config=replace(changed.config, gpu="rtx4060"))
    outcomes = run_all([same, changed, *jobs(tmp_path, "new")], Seen(), force_changed=True)
    assert [outcome.seconds is None for outcome in outcomes] == [True, False, False]


@pytest.mark.usefixtures("child")
def test_a_run_on_whatever_was_there_is_one_of_the_device_it_found(tmp_path: Path) -> None:
    (job,) = jobs(tmp_path, "a")
    found = replace(job, config=replace(job.config, device="auto"))
    run_all([found], Seen())
    record = RunRecord.read(job.directory / "record.json")
    record.simulated = True
    record.write(job.directory / "record.json")
    assert [o.seconds for o in run_all([job], Seen())] == [None], "simulated is asked for, and it was simulated"
    with pytest.raises(InputError, match=r"model_config.device differs"):
        run_all([replace(job, config=replace(job.config, device="cuda"))], Seen())


@pytest.mark.usefixtures("child")
@pytest.mark.parametrize(("usable", "same"), [(False, "simulated"), (True, "cuda")])
def test_what_auto_means_here_is_no_difference(
    usable: bool, same: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanvram.machine.environment.cuda_usable", lambda: usable)
    (job,) = jobs(tmp_path, "a")
    auto = replace(job, config=replace(job.config, device="auto"))
    for device in ("simulated", "cuda", "cpu"):
        run_all([replace(job, config=replace(job.config, device=device))], Seen(), force=True)
        assert difference(auto) == ([] if device == same else ["model_config.device"])


def test_a_run_of_auto_that_left_no_record_counts_as_one_of_this_machine(
    tmp_path: Path, child: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanvram.machine.environment.cuda_usable", lambda: False)
    write(child, CRASHES)
    (job,) = jobs(tmp_path, "a")
    run_all([replace(job, config=replace(job.config, device="auto"))], Seen())
    assert difference(job) == []


def test_somebodys_video_without_a_configuration_is_not_deleted(tmp_path: Path) -> None:
    (job,) = jobs(tmp_path, "a")
    job.directory.mkdir(parents=True)
    (job.directory / "video.mp4").write_bytes(b"precious")
    with pytest.raises(InputError, match="--force"):
        finished(job)


def test_a_drawn_seed_and_a_planned_strategy_are_no_difference(tmp_path: Path) -> None:
    (job,) = jobs(tmp_path, "a")
    drawn = replace(
        job, config=replace(job.config, request=replace(job.config.request, base_seed=-1)), vram_budget="8GiB"
    )
    written = replace(
        job.config,
        gpu="rtx4060",
        memory_limit_bytes=int(7.84 * 2**30),
        strategy=replace(job.config.strategy, offload=True),
    )
    from wanvram.simulate.gpus import find_gpu

    written = replace(written, memory_limit_bytes=find_gpu("rtx4060").total_bytes)
    job.directory.mkdir(parents=True)
    (job.directory / "config.yaml").write_text(yaml.safe_dump(written.to_dict()))
    record = RunRecord("cpu", False, written.to_dict(), None, None, [], [], {}, {})
    record.write(job.directory / "record.json")
    assert finished(drawn) is not None
    with pytest.raises(InputError, match="memory_limit_bytes"):
        finished(replace(drawn, vram_budget="4GiB"))


@pytest.mark.parametrize(
    ("script", "kind", "says"),
    [
        (CRASHES, "error", "RuntimeError: it broke"),
        (KILLS_ITSELF, "error", "ended by SIGKILL; the host may have run out of memory; last it said: so far so good"),
        (PREPARES_AND_KILLS_ITSELF, "error", "last it said: so far so good"),
        (REFUSES_THE_BUDGET, "oom", "nothing fits 1 GiB"),
        ("", "error", "it printed nothing"),
    ],
)
def test_a_run_that_leaves_no_record_gets_one_that_says_why(
    script: str, kind: str, says: str, tmp_path: Path, child: Path
) -> None:
    write(child, script)
    (outcome,) = run_all(jobs(tmp_path, "a"), Seen())
    written = RunRecord.read(tmp_path / "logs" / "a" / "record.json")
    assert written.failure is not None
    assert (written.failure.kind, outcome.exit_code) == (kind, 3 if kind == "oom" else 1)
    assert says in written.failure.message


def test_a_budget_that_was_refused_is_not_planned_again(tmp_path: Path, child: Path) -> None:
    write(child, REFUSES_THE_BUDGET)
    (job,) = jobs(tmp_path, "a")
    planned = [replace(job, vram_budget="1GiB")]
    assert [(o.exit_code, o.seconds is None) for o in run_all(planned, Seen())] == [(3, False)]
    assert [(o.exit_code, o.seconds is None) for o in run_all(planned, Seen())] == [(3, True)]
    with pytest.raises(InputError, match="memory_limit_bytes"):
        run_all([replace(job, vram_budget="2GiB")], Seen())


def test_one_failure_does_not_stop_the_others_and_is_run_again_only_when_asked(tmp_path: Path, child: Path) -> None:
    write(child, "import sys\nif 'bad' in sys.argv[2]: sys.exit('it broke')\n" + textwrap.dedent(WRITES_A_RECORD))
    outcomes = run_all(jobs(tmp_path, "a", "bad", "c"), Seen())
    assert [o.exit_code for o in outcomes] == [0, 1, 0]
    write(child, WRITES_A_RECORD)
    assert [o.exit_code for o in run_all(jobs(tmp_path, "a", "bad", "c"), Seen())] == [0, 1, 0]
    again = run_all(jobs(tmp_path, "a", "bad", "c"), Seen(), retry=True)
    assert [(o.exit_code, o.seconds is None) for o in again] == [(0, True), (0, False), (0, True)]


@pytest.mark.parametrize("script", [SLEEPS, WRITES_WHEN_INTERRUPTED], ids=["no record", "a record when interrupted"])
def test_a_run_that_takes_too_long_is_stopped_and_keeps_what_it_had(script: str, tmp_path: Path, child: Path) -> None:
    write(child, script)
    start = time.monotonic()
    (outcome,) = run_all(jobs(tmp_path, "a"), Seen(), timeout=1.5)
    assert time.monotonic() - start < 15
    failure = outcome.record.failure
    assert failure is not None
    assert (failure.kind, failure.message) == ("error", "it was stopped after 1.5 s (--timeout)")
    assert failure.stage == ("denoise" if script is WRITES_WHEN_INTERRUPTED else None)


@pytest.mark.usefixtures("child")
def test_a_second_series_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with (
        runner._only_one_in({tmp_path / "logs"}),
        pytest.raises(InputError, match="another wanvram profile is writing to"),
    ):
        run_all(jobs(tmp_path, "a"), Seen())


@pytest.mark.usefixtures("child")
def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(OutputError, match="cannot write to"):
        run_all(jobs(tmp_path, "a"), Seen())


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells a child of its parent's death on Linux only")
def test_a_run_dies_with_the_process_that_started_it() -> None:
    child = "import os, time; from wanvram.matrix.runner import die_with_parent; die_with_parent(os.getppid());"
    child += "print(os.getpid(), flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline and "Z" not in state(pid):
        time.sleep(0.02)
    process.stdout.close()
    assert not Path(f"/proc/{pid}").exists() or "Z" in state(pid)


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_plain_lines_name_the_run_and_what_came_out(capsys: pytest.CaptureFixture[str]) -> None:
    record = RunRecord("cpu", False, {}, False, None, [], [], {}, {}, Failure("oom", "no room"))
    outcome = Outcome(Job(config("a"), Path("x")), record, 3.0)
    assert (describe(outcome), exit_code(record)) == ("3.00 s, oom: no room", 3)
    lines = Lines(sys.stdout)
    lines.started(1, 2, "a")
    lines.message("a", "denoise")
    lines.finished(1, 2, outcome)
    out = capsys.readouterr().out.splitlines()
    assert [line.partition("] ")[2] for line in out] == ["1/2 a: started", "  denoise", "1/2 a: 3.00 s, oom: no room"]
