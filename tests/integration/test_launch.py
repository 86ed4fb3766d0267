"""Several processes make one video on the CPU: started by --gpus or torchrun, ended together, each with its record."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from wanvram.errors import DeviceError
from wanvram.machine.launched import Launched
from wanvram.run.world import joined

ROOT = Path(__file__).parents[2]
WANVRAM = [sys.executable, "-m", "wanvram"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
TINY = ["--weights", "tiny", "--prompt", "a cat", "--base_seed", "1"]
SHORT = [*TINY, "--frame_num", "5", "--sample_steps", "3"]
LONG = [*TINY, "--frame_num", "9", "--sample_steps", "50", "--sample_solver", "dpm++"]
MOST_SECONDS = 15  # from the end of one process to the end of all
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


def run(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **more)


def record_of(directory: Path, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (directory / ("record.json" if rank == 0 else f"record.rank{rank}.json")).read_text()
    )
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The video of one process."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    ended = run([*WANVRAM, "generate", *SHORT, "-o", str(directory)])
    assert ended.returncode == 0, ended.stderr
    return (directory / "video.mp4").read_bytes()


def test_two_processes_make_the_video_of_one_and_the_first_alone_speaks_and_writes(
    tmp_path: Path, alone: bytes
) -> None:
    directory = tmp_path / "run"
    ended = run([*WANVRAM, "generate", *SHORT, "--gpus", "2", "-o", str(directory), "--json"])
    assert ended.returncode == 0, ended.stderr
    record = json.loads(ended.stdout)  # one document
    assert record == record_of(directory)
    assert record["config"]["optimization"]["cfg_size"] == 2
    assert [rank["ranks"] for rank in record["ranks"]] == [[0], [1]]
    assert all(rank["failure"] is None and rank["exchanged_bytes"] > 0 for rank in record["ranks"])
    assert record["peak"]["allocated_bytes"] == max(rank["peak"]["allocated_bytes"] for rank in record["ranks"])
    assert record["ranks"][1]["stages"] == record_of(directory, 1)["stages"]
    assert (directory / "video.mp4").read_bytes() == alone
    names = {path.name for path in directory.iterdir()}
    assert {"memory_events.json", "memory_events.rank1.json"} <= names
    assert not {name for name in names if "rank1" in name} - {"memory_events.rank1.json", "record.rank1.json"}


def test_the_official_command_line_under_torchrun_shares_the_sequence(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    flags = [*SHORT, "--ulysses_size", "2", "-o", str(directory)]
    ended = run([*TORCHRUN, "2", str(ROOT / "generate.py"), *flags])
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("Wrote") == len([path for path in directory.iterdir() if path.is_file()])
    assert record_of(directory)["config"]["optimization"]["ulysses_size"] == 2


def test_official_sharing_of_weights_needs_no_sizes_and_makes_the_video_of_one_process(
    tmp_path: Path, alone: bytes
) -> None:
    directory = tmp_path / "run"
    flags = [*SHORT, "--ring_size", "1", "--dit_fsdp", "--t5_fsdp", "-o", str(directory)]
    ended = run([*TORCHRUN, "2", str(ROOT / "generate.py"), *flags])
    assert ended.returncode == 0, ended.stderr
    chosen, (first, second) = record_of(directory)["config"]["optimization"], record_of(directory)["ranks"]
    assert (chosen["dit_fsdp"], chosen["t5_fsdp"], chosen["cfg_size"]) == (True, True, 2)
    assert (directory / "video.mp4").read_bytes() == alone
    assert first["exchanged_bytes"] > 0 < second["exchanged_bytes"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--ulysses_size", "3"],
            "cfg_size 1 x ring_size 1 x ulysses_size 3 share the work of 3 GPUs, and 2 were asked for",
        ),
        (["--device", "simulated"], "device: simulated takes one process"),
    ],
)
def test_processes_that_do_not_fit_the_sizes_are_refused_in_one_sentence(
    flags: list[str], said: str, tmp_path: Path
) -> None:
    ended = run([*TORCHRUN, "2", "-m", "wanvram", "generate", *SHORT, *flags, "-o", str(tmp_path / "run")])
    assert ended.returncode == 1  # torchrun's own
    assert ended.stderr.count(f"wanvram: {said}") == 1
    assert not (tmp_path / "run").exists()


def test_a_size_that_contradicts_the_number_of_gpus_is_exit_code_2(tmp_path: Path) -> None:
    ended = run([*WANVRAM, "generate", *SHORT, "--gpus", "4", "--ulysses_size", "2", "-o", str(tmp_path / "run")])
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)


def test_a_profile_of_several_processes_is_one_run_of_a_series(tmp_path: Path) -> None:
    request = "{task: t2v-1.3B, size: 128*80, frame_num: 5, sample_steps: 2, base_seed: 1, weights: tiny}"
    (tmp_path / "two.yaml").write_text(
        f"name: two\nmodel_config: {{precision: fp32, device: cpu}}\nrequest: {request}\n"
    )
    flags = ["--gpus", "2", "--timeout", "200", "-o", str(tmp_path / "run")]
    ended = run([*WANVRAM, "profile", str(tmp_path / "two.yaml"), *flags])
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert len(record_of(tmp_path / "run")["ranks"]) == 2


# --- ends before the time ----------------------------------------------------------------------------------------------------


class Started:
    """A long run of two processes, seen from outside once it denoises."""

    def __init__(self, directory: Path, *flags: str) -> None:
        self.directory = directory
        command = [*WANVRAM, "generate", *LONG, "--gpus", "2", "-o", str(directory), *flags]
        self.agent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.ranks = self._until(self._processes, lambda found: len(found) == 2)
        self._until(lambda: self._events(1), lambda text: "step" in text)

    def _until(self, look: Callable[[], Any], enough: Callable[[Any], bool]) -> Any:
        deadline = time.monotonic() + 120
        while not enough(found := look()):
            assert time.monotonic() < deadline
            assert self.agent.poll() is None, self.agent.communicate()
            time.sleep(0.1)
        return found

    def _processes(self) -> dict[int, psutil.Process]:
        found = {}
        for child in psutil.Process(self.agent.pid).children():
            try:
                found[int(child.environ()["RANK"])] = child
            except (KeyError, psutil.Error):
                continue
        return found

    def _events(self, rank: int) -> str:
        path = self.directory / f"memory_events.rank{rank}.json"
        return path.read_text() if path.exists() else ""

    def ends(self) -> tuple[float, str]:
        """Seconds until all have ended, and what was said."""
        start = time.monotonic()
        said = "".join(self.agent.communicate(timeout=60))
        psutil.wait_procs(list(self.ranks.values()), timeout=30)
        seconds = time.monotonic() - start
        assert not [process for process in self.ranks.values() if process.is_running()]
        return seconds, said


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    run = Started(tmp_path / "run", "--keep_every", "1")
    yield run
    for process in [*run.ranks.values(), run.agent]:
        if process.is_running() if isinstance(process, psutil.Process) else process.poll() is None:
            process.kill()


@POSIX
@pytest.mark.parametrize("lost", [0, 1])
def test_when_a_process_is_killed_the_other_ends_with_a_record_that_says_which_and_why(
    started: Started, lost: int
) -> None:
    started.ranks[lost].kill()
    seconds, said = started.ends()
    assert seconds < MOST_SECONDS
    assert started.agent.returncode == 1
    failure = record_of(started.directory, 1 - lost)["failure"]
    assert (failure["kind"], failure["rank"], failure["component"]) == ("error", lost, "dit")
    assert failure["message"].startswith(f"rank {lost} (process {started.ranks[lost].pid} of ")
    assert "ended without a word" in failure["message"]
    assert ("rank 0 was ended by SIGKILL" if lost == 0 else "rank 1 (process") in said
    if lost == 1:
        ranks = record_of(started.directory)["ranks"]
        assert [rank["ranks"] for rank in ranks] == [[0]]


@POSIX
def test_a_process_that_stands_still_is_lost_like_one_that_is_gone(started: Started) -> None:
    started.ranks[1].send_signal(signal.SIGSTOP)
    seconds, _ = started.ends()
    assert seconds < MOST_SECONDS
    failure = record_of(started.directory)["failure"]
    assert failure["rank"] == 1
    assert "has said nothing for" in failure["message"]


@POSIX
def test_when_the_launcher_is_killed_its_processes_end_too_and_say_so(started: Started) -> None:
    started.agent.kill()
    seconds, _ = started.ends()
    assert seconds < MOST_SECONDS
    for rank in (0, 1):
        assert "launcher" in record_of(started.directory, rank)["failure"]["message"]


@POSIX
def test_an_interrupted_run_of_two_goes_on_as_one_and_makes_the_same_video(started: Started, tmp_path: Path) -> None:
    started.agent.send_signal(signal.SIGINT)
    seconds, said = started.ends()
    assert seconds < MOST_SECONDS
    assert [record_of(started.directory, rank)["failure"]["kind"] for rank in (0, 1)] == ["interrupted"] * 2
    assert "interrupted by the user" in said
    one, whole = ["--gpus", "1"], [*WANVRAM, "generate", *LONG]
    assert run([*whole, "-o", str(tmp_path / "whole")]).returncode == 0
    ended = run([*WANVRAM, "generate", "--resume", str(started.directory), *one])
    assert ended.returncode == 0, ended.stderr
    assert sum(record_of(started.directory)["resumed"]["steps"]) > 0
    assert record_of(started.directory)["ranks"] == []
    assert (started.directory / "video.mp4").read_bytes() == (tmp_path / "whole" / "video.mp4").read_bytes()


# What befalls rank 1 alone, in a program that is otherwise the command.
TROUBLE = """
import sys
import time
from wanvram.engine import denoising
from wanvram.engine.devices import CpuDevice
from wanvram.engine.pipeline import Pipeline
from wanvram.errors import DeviceError, OutOfMemory
from wanvram.machine.launched import launched
from wanvram.run import execute

def full(self, *args, **kwargs):
    raise OutOfMemory("CUDA out of memory: 5 B asked for", requested_bytes=5, allocated_bytes=3, reserved_bytes=4)

def refused(config):
    raise DeviceError("this card has a cold")

def hang(self, *args, **kwargs):  # as in a library that waits for a peer
    time.sleep(1000)

def defect(self, *args, **kwargs):
    raise ZeroDivisionError("a defect")

if launched().rank == 1:
    what = sys.argv.pop(1)
    if what in ("full", "hang"): Pipeline._steps = full
    if what == "defect": Pipeline._steps = defect
    if what == "refused": execute.make_device = refused
    if what == "card": CpuDevice.name = "cpu of another kind"
elif sys.argv.pop(1) == "hang":
    Pipeline._steps = hang
from wanvram.cli.main import main
sys.exit(main(["generate", *sys.argv[1:]]))
"""


def troubled(tmp_path: Path, what: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    (tmp_path / "program.py").write_text(TROUBLE)
    directory = tmp_path / "run"
    flags = [*SHORT, "--cfg_size", "2", "-o", str(directory)]
    return run([*TORCHRUN, "2", str(tmp_path / "program.py"), what, *flags]), directory


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("full", "oom", "rank 1: CUDA out of memory: 5 B asked for"),
        ("defect", "error", "rank 1: the run stopped at something"),
    ],
)
def test_what_befalls_one_process_is_the_runs_failure_with_its_figures(
    what: str, kind: str, message: str, tmp_path: Path
) -> None:
    ended, directory = troubled(tmp_path, what)
    assert ended.returncode == 1
    first, second = record_of(directory)["failure"], record_of(directory, 1)["failure"]
    assert (first["kind"], first["rank"], first["stage"]) == (kind, 1, "denoise")
    assert (second["kind"], second["rank"], second["stage"]) == (kind, 1, "denoise")
    assert first["message"].startswith(message)
    assert first["requested_bytes"] == second["requested_bytes"]
    assert [rank["failure"]["kind"] for rank in record_of(directory)["ranks"]] == [kind, kind]


def test_a_process_that_hangs_when_another_has_failed_is_ended_by_its_watchdog_with_a_record(tmp_path: Path) -> None:
    ended, directory = troubled(tmp_path, "hang")
    assert ended.returncode == 1
    failure = record_of(directory)["failure"]
    assert (failure["kind"], failure["rank"], failure["stage"]) == ("oom", 1, "denoise")
    assert [stage["name"] for stage in record_of(directory)["stages"]][-1] == "denoise"
    assert record_of(directory, 1)["failure"]["message"] == "CUDA out of memory: 5 B asked for"


def test_a_process_whose_card_cannot_be_used_is_named_by_the_first(tmp_path: Path) -> None:
    ended, directory = troubled(tmp_path, "refused")
    assert ended.returncode == 1
    assert ended.stderr.count("wanvram: rank 1: this card has a cold") == 1
    assert not directory.exists()


def test_unequal_cards_make_the_video_together_and_the_record_says_so(tmp_path: Path, alone: bytes) -> None:
    ended, directory = troubled(tmp_path, "card")
    assert ended.returncode == 0, ended.stderr
    assert any("cpu (rank 0), cpu of another kind (rank 1)" in note for note in record_of(directory)["notes"])
    assert (directory / "video.mp4").read_bytes() == alone


def test_a_process_that_never_comes_is_named(monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(unused_tcp_port))
    with (
        pytest.raises(DeviceError, match="of 3 processes rank 1, 2 did not come within 1 s"),
        joined(Launched(0, 3, 0), 1.0),
    ):
        raise AssertionError("nobody else is here")


@pytest.fixture
def unused_tcp_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
        return port
