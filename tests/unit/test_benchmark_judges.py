"""The promise judged from outside: a case, a refusal and a series fail exactly when a bound is missed; the watcher of the GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import batches
import keep_promise
import nvml_watch
import promise_requests
import pytest
from provenance import environment_of_a_person, header, prediction_of

from wanvram.tasks import TASKS
from wanvram.units import parse_memory

ROOT = Path(__file__).parents[2]
MIB = 2**20
GIB = 2**30
CARD = 80 * GIB
Row = dict[str, Any]


# --- what is judged ----------------------------------------------------------------------------------------------------------


def kept(**changes: Any) -> Row:
    """A row of a run that keeps every bound, just; changes of `watch` are given by its keys."""
    watch = {
        "exit_code": 0,
        "timed_out": False,
        "before_bytes": 600 * MIB,
        "before_spread_bytes": 0,
        "after_bytes": 600 * MIB,
        "above_bytes": 4 * GIB,
        "first_use_seconds": 9.0,
        "seconds": 20.0,
        "stderr_tail": "",
    }
    row: Row = {
        "index": 0,
        "rerun_of": None,
        "task": "t2v-14B",
        "media": [],
        "drawn_frames": None,
        "budget_bytes": 4 * GIB,
        "predicted_device_bytes": 4 * GIB - 8 * MIB,
        "recorded": True,
        "failure": None,
        "named_budget": None,
        "trouble": "",
    }
    of_watch = {key: value for key, value in changes.items() if key in watch}
    row |= {key: value for key, value in changes.items() if key not in watch}
    return row | ({} if "watch" in changes else {"watch": watch | of_watch})


def refused(**changes: Any) -> Row:
    told = "wanvram: it does not fit 2.00 GiB: the dit needs a budget of 3.10 GiB even with every lossless saving"
    row = {"exit_code": 3, "recorded": False, "above_bytes": 0, "after_bytes": 600 * MIB, "stderr_tail": told}
    return kept(
        **row | {"predicted_device_bytes": None, "named_budget": "3.10GiB", "first_use_seconds": None} | changes
    )


def test_a_run_at_its_bounds_is_kept() -> None:
    assert keep_promise.judge_case(kept()) == ("kept", [])
    assert keep_promise.judge_case(kept(predicted_device_bytes=int(4 * GIB * 1.005))) == ("kept", [])


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"above_bytes": 4 * GIB + 1, "predicted_device_bytes": 4 * GIB}, "exceeds the budget by 1 bytes"),
        ({"predicted_device_bytes": 4 * GIB - 8 * MIB - 1}, "8388609 bytes too few"),
        ({"predicted_device_bytes": int(4 * GIB * 1.0051)}, "+0.510%"),
        ({"above_bytes": GIB, "predicted_device_bytes": int(GIB * 0.9949)}, "-0.510%"),
        ({"predicted_device_bytes": None}, "no prediction"),
        ({"above_bytes": 0, "predicted_device_bytes": 0}, "nothing measured"),
        ({"exit_code": 1}, "exit code 1"),
        ({"exit_code": -9, "recorded": False, "predicted_device_bytes": None}, "exit code -9"),
        ({"exit_code": -9, "timed_out": True, "recorded": False, "predicted_device_bytes": None}, "killed after its time"),
        ({"exit_code": 3, "failure": "oom: 2 MiB are missing"}, "oom: 2 MiB are missing"),
        ({"failure": "error: something"}, "error: something"),
        ({"before_spread_bytes": 2 * MIB}, "somebody else used the GPU"),
        ({"after_bytes": 598 * MIB}, "somebody else used the GPU"),
        ({"watch": None, "trouble": "the watcher ended with -9"}, "the watcher ended with -9"),
    ],
)  # fmt: skip
def test_a_run_that_misses_one_bound_is_broken_for_that(changes: Row, word: str) -> None:
    verdict, breaches = keep_promise.judge_case(kept(**changes))
    assert verdict == "broken"
    assert len(breaches) == 1
    assert word in breaches[0]


def test_a_refusal_that_touches_nothing_and_names_a_budget_is_counted_apart() -> None:
    assert keep_promise.judge_case(refused()) == ("refused", [])
    summary = keep_promise.judge([kept(), refused(), refused(rerun_of=0, **again())], CARD, 1)
    assert (summary["ran"], summary["refused"], summary["typed_again"], summary["kept"]) == (1, 1, 1, 2)
    assert summary["breaches"] == []


def again() -> Row:
    """What is different in a refused case that was typed again and ran."""
    return {"exit_code": 0, "recorded": True, "above_bytes": 4 * GIB, "predicted_device_bytes": 4 * GIB}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"above_bytes": 64 * MIB}, "after the GPU was used"),
        ({"named_budget": None, "stderr_tail": "wanvram: no"}, "names no budget"),
        ({"rerun_of": 0}, "named before is refused"),
    ],
)
def test_a_refusal_that_misses_one_bound_is_broken_for_that(changes: Row, word: str) -> None:
    verdict, breaches = keep_promise.judge_case(refused(**changes))
    assert verdict == "broken"
    assert len(breaches) == 1
    assert word in breaches[0]


def test_a_refusal_for_host_memory_names_no_budget_of_the_card() -> None:
    told = "the dit needs 31.00 GiB of host RAM, but --ram is 16.00 GiB; give more of either"
    assert keep_promise.judge_case(refused(named_budget=None, stderr_tail=told)) == ("refused", [])


def test_a_series_needs_its_cases_its_tasks_and_one_refusal_in_five_typed_again() -> None:
    rows = [kept(index=index, task=task) for index, task in enumerate(sorted(TASKS))]
    assert keep_promise.judge(rows, CARD, 7)["breaches"] == []
    assert keep_promise.judge(rows, CARD, 8)["breaches"] == ["7 cases ran, at least 8 must"]
    assert keep_promise.judge([*rows[:6], kept()], CARD, 7)["breaches"] == [f"no case ran of {rows[6]['task']}"]
    five = [refused(index=index) for index in range(5)]
    assert keep_promise.judge([*rows, *five], CARD, 7)["breaches"] == ["0 of 5 refused cases were typed again"]
    assert keep_promise.judge([*rows, *five, refused(rerun_of=0, **again())], CARD, 7)["breaches"] == []
    beyond = [refused(index=index, named_budget="80.10GiB") for index in range(5)]
    assert keep_promise.judge([*rows, *beyond], CARD, 7)["breaches"] == []


def test_a_case_typed_again_is_no_case_of_its_own() -> None:
    summary = keep_promise.judge([refused(), refused(rerun_of=0, **again())], CARD, 1)
    assert summary["ran"] == 0
    assert summary["breaches"] == ["0 cases ran, at least 1 must"]


def test_the_summary_counts_what_went_wrong_and_gives_ranges() -> None:
    over = kept(index=1, above_bytes=4 * GIB + 1, predicted_device_bytes=4 * GIB + 1)
    rows = [kept(), over, kept(index=2, exit_code=1), kept(index=3, watch=None, trouble="gone")]
    summary = keep_promise.judge(rows, CARD, 1)
    assert (summary["kept"], summary["exceeded"], summary["failed"], summary["died"]) == (1, 1, 1, 1)
    assert summary["under_bytes"] == [0, 8 * MIB]
    assert summary["error"] == [pytest.approx(-8 / 4096), 0]
    assert len(summary["breaches"]) == 3


# --- calls that add up -------------------------------------------------------------------------------------------------------


def document(path: Path, rows: list[Row], **changes: Any) -> Path:
    data = {
        "benchmark": "keep_promise",
        "started": "2026-11-28T12:00:00+00:00",
        "commit": "abc",
        "source_sha256": "f00",
        "torch": "2.11.0",
        "seed": 1,
        "calls": [{"first": rows[0]["index"], "count": len(rows), "seconds": 500.0}],
        "limit_seconds": 4.0,
        "card": "NVIDIA H100",
        "card_bytes": CARD,
        "driver": "580",
        "not_started": [9],
    }
    path.write_text(json.dumps(data | changes | {"rows": rows}))
    return path


def add(tmp_path: Path, files: list[Path], least: int) -> tuple[int, dict[str, Any]]:
    target = tmp_path / "sum.json"
    args = keep_promise.parser().parse_args(["add", *map(str, files), "-o", str(target), "--least", str(least)])
    return args.function(args), json.loads(target.read_text())


def test_calls_of_one_seed_and_code_add_up_with_every_row_of_each(tmp_path: Path) -> None:
    first = document(tmp_path / "a.json", [kept(), kept(index=1, exit_code=1)])
    second = document(tmp_path / "b.json", [kept(index=1), kept(index=9)], not_started=[])
    code, data = add(tmp_path, [first, second], 2)
    assert code == 1  # the failed first run of case 1 is not forgotten
    assert [row["index"] for row in data["rows"]] == [0, 1, 1, 9]
    assert data["run_more_than_once"] == [1]
    assert data["not_started"] == []
    assert "a.json, b.json" in data["note"]
    assert len(data["calls"]) == 2


def test_calls_of_another_seed_or_code_do_not_add_up(tmp_path: Path) -> None:
    first = document(tmp_path / "a.json", [kept()])
    for key, value in (("seed", 2), ("source_sha256", "bad"), ("card_bytes", 1)):
        other = document(tmp_path / "b.json", [kept(index=1)], **{key: value})
        with pytest.raises(SystemExit, match=key):
            add(tmp_path, [first, other], 1)


def test_too_few_cases_in_all_end_with_exit_code_1(tmp_path: Path) -> None:
    files = [document(tmp_path / f"{n}.json", [kept(index=n, task=sorted(TASKS)[n])]) for n in range(6)]
    assert add(tmp_path, files, 6)[0] == 0
    assert add(tmp_path, files, 7)[0] == 1


# --- a series ----------------------------------------------------------------------------------------------------------------


def run_series(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Callable[..., Row], *words: str
) -> tuple[int, Row]:
    """The verb `run` on two cards of which nothing is asked, with made-up cases."""
    monkeypatch.setitem(sys.modules, "pynvml", CountedNvml(lambda count: 0))
    monkeypatch.setattr(keep_promise, "run_case", case)
    monkeypatch.setattr(keep_promise, "write_media", lambda case, directory: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    out = tmp_path / "out.json"
    args = keep_promise.parser().parse_args(["run", "--seed", "1", "--out", str(out), *words])
    return args.function(args), json.loads(out.read_text())


def made_up(case: promise_requests.Case, directory: Path, gpu: str | None, *, budget: str | None = None) -> Row:
    """Case 3 ends the benchmark's own code, odd cases are refused, and keep what they name."""
    time.sleep(0.01)
    assert directory.name == str(case.index)
    if case.index == 3:
        raise OSError("no space left on device")
    row = kept() if budget or case.index % 2 == 0 else refused()
    row |= {"index": case.index, "task": case.task, "size": case.size, "frames": case.frames, "budget": case.budget}
    row |= {"gpu": gpu, "rerun_of": case.index if budget else None}
    row["verdict"], row["breaches"] = keep_promise.judge_case(row)
    return row


def test_two_lanes_deal_from_one_queue_and_a_case_that_is_lost_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, data = run_series(tmp_path, monkeypatch, made_up, "--count", "16", "--lanes", "2")
    assert code == 1
    assert data["summary"]["breaches"] == ["case 3: no report of the case: OSError: no space left on device"]
    assert sorted(row["index"] for row in data["rows"] if row["rerun_of"] is None) == list(range(16))
    assert {row.get("gpu") for row in data["rows"]} == {"0", "1", None}
    assert data["summary"]["typed_again"] == 2  # the first and the sixth of seven
    assert data["not_started"] == []
    assert (data["seed"], data["calls"][0]["count"], data["card_bytes"]) == (1, 16, CARD)
    assert len(data["source_sha256"]) == 64


def test_cases_for_which_there_was_no_time_are_named_and_too_few_are_a_breach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, data = run_series(tmp_path, monkeypatch, made_up, "--first", "20", "--count", "3", "--seconds", "0")
    assert (code, data["not_started"], data["rows"]) == (1, [20, 21, 22], [])
    assert data["summary"]["breaches"] == ["0 cases ran, at least 1 must"]


def test_a_series_without_a_breach_ends_with_exit_code_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, data = run_series(tmp_path, monkeypatch, made_up, "--first", "4", "--count", "4", "--least", "2")
    assert (code, data["summary"]["breaches"]) == (0, [])
    assert {row["gpu"] for row in data["rows"]} == {None}


def draw(index: int) -> promise_requests.Case:
    return promise_requests.draw(1, index, CARD)


# --- a case from its words to its row ----------------------------------------------------------------------------------------

FAKE_NVML = """
import os
from pathlib import Path
from types import SimpleNamespace

NVML_CLOCK_SM = 1
class NVMLError(Exception): ...

def nvmlInit(): ...
def nvmlDeviceGetCount(): return 2
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetUUID(handle): return f"GPU-000{handle}-x"
def nvmlDeviceGetName(handle): return b"NVIDIA H100"
def nvmlDeviceGetComputeRunningProcesses(handle): return []
def nvmlSystemGetDriverVersion(): return "580"
def nvmlDeviceGetClockInfo(handle, which): return 1980
def nvmlDeviceGetPowerUsage(handle): raise NVMLError("not supported")
def nvmlDeviceGetMemoryInfo(handle):
    used = int(Path(os.environ["FAKE_NVML_USED"]).read_text() or 0) if handle == 1 else 7
    return SimpleNamespace(total=80 * 2**30, used=used, free=80 * 2**30 - used)
"""


@pytest.fixture
def fake_nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pynvml for other processes, whose GPU 1 uses what the file FAKE_NVML_USED says."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/pynvml.py").write_text(FAKE_NVML)
    used = tmp_path / "used"
    used.write_text(str(600 * MIB))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "fake"), str(ROOT / "src")]))
    monkeypatch.setenv("FAKE_NVML_USED", str(used))


USES_A_GPU = """
import os, sys, time
def use(mib):  # whole or not at all: somebody reads all the time
    open(os.environ["FAKE_NVML_USED"] + ".new", "w").write(str(mib * 2**20))
    os.replace(os.environ["FAKE_NVML_USED"] + ".new", os.environ["FAKE_NVML_USED"])
    time.sleep(0.2)
use(1600); use(1100); use(600)
print("said on stdout"); print("said on stderr", file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.usefixtures("fake_nvml")
def test_the_watcher_reports_the_peak_of_the_gpu_that_the_command_sees(tmp_path: Path) -> None:
    out = tmp_path / "watch.json"
    command = [sys.executable, nvml_watch.__file__, "--out", str(out), "--", sys.executable, "-c", USES_A_GPU]
    ended = subprocess.run(command, env=environment_of_a_person("GPU-0001"))
    assert ended.returncode == 3
    report = json.loads(out.read_text())
    assert (report["before_bytes"], report["peak_bytes"], report["above_bytes"]) == (600 * MIB, 1600 * MIB, 1000 * MIB)
    assert (report["after_bytes"], report["before_spread_bytes"], report["exit_code"]) == (600 * MIB, 0, 3)
    assert (report["stdout_tail"], report["stderr_tail"]) == ("said on stdout", "said on stderr")
    assert report["gpu"]["uuid"] == "GPU-0001-x"
    assert (report["highest_sm_clock_mhz"], report["highest_power_watt"]) == (1980, None)
    assert 0.6 < report["seconds"] < 60
    assert 0 < report["first_use_seconds"] < report["seconds"]
    assert report["ram_peak_bytes"] > MIB


@pytest.mark.usefixtures("fake_nvml")
def test_the_watcher_kills_a_command_that_takes_too_long(tmp_path: Path) -> None:
    out = tmp_path / "watch.json"
    command = [sys.executable, nvml_watch.__file__, "--out", str(out), "--timeout", "0.3", "--", "sleep", "60"]
    ended = subprocess.run(command, env=environment_of_a_person("1"))
    report = json.loads(out.read_text())
    assert ended.returncode == 137
    assert (report["exit_code"], report["timed_out"]) == (-9, True)


class CountedNvml(SimpleNamespace):
    """A GPU that is not quiet for its first readings, and three cards."""

    NVML_CLOCK_SM = 1
    NVMLError = RuntimeError

    def __init__(self, used: Callable[[int], int]) -> None:
        super().__init__(used=used, count=0)

    def nvmlInit(self) -> None: ...
    def nvmlDeviceGetCount(self) -> int:
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> bytes:
        return f"GPU-{handle}00{handle}".encode()

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"card {handle}"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580"

    def nvmlDeviceGetClockInfo(self, handle: int, which: int) -> int:
        raise RuntimeError("not supported")

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return 350_000

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        self.count += 1
        return SimpleNamespace(total=CARD, used=self.used(self.count))


def test_a_command_starts_once_the_gpu_is_quiet() -> None:
    report = nvml_watch.watch(["true"], env={}, nvml=CountedNvml(lambda count: GIB if count < 20 else 5 * MIB))
    assert (report["before_bytes"], report["above_bytes"], report["exit_code"]) == (5 * MIB, 0, 0)
    assert report["gpu"] | {"sm_clock_mhz": None, "power_watt": 350.0} == report["gpu"]


def test_the_gpu_watched_is_the_first_that_the_command_sees() -> None:
    nvml = CountedNvml(lambda count: 0)
    assert [nvml_watch.gpu_of(nvml, visible) for visible in (None, "2,0", "GPU-1", " 1")] == [0, 2, 1, 1]
    for visible in ("", "-1", "3", "GPU-9", "MIG-1"):
        with pytest.raises(ValueError, match="names none of the 3 GPUs"):
            nvml_watch.gpu_of(nvml, visible)


@pytest.mark.parametrize(("visible", "name"), [("0", "card 0"), ("2,1", "card 2"), ("", None), ("MIG-1", None)])
def test_a_result_names_the_card_that_it_is_of(visible: str, name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", CountedNvml(lambda count: 0))  # type: ignore[arg-type]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu = header("fit_card.py")["gpu"]
    assert (gpu and (gpu["name"], gpu["driver"], gpu["power_watt"])) == (name and (name, "580", 350.0))


@pytest.mark.usefixtures("fake_nvml")
def test_a_drawn_case_runs_from_its_words_to_its_row(tmp_path: Path) -> None:
    """On the simulated device, which takes nothing of the GPU: only that is missed."""
    cases = [case for case in map(draw, range(400)) if case.task == "vace-1.3B" and len(case.media) > 1]
    case = min((case for case in cases if case.budget_bytes > 20 * GIB), key=lambda case: case.expected_seconds)
    promise_requests.write_media(case, tmp_path)
    row = keep_promise.run_case(case, tmp_path, "1", words=["--device", "simulated", "--gpu", "h100"])
    assert row["watch"]["exit_code"] == 0, row["watch"]["stderr_tail"]
    assert row["breaches"] == ["no prediction, or nothing measured"]
    assert row["recorded"]
    assert row["own_budget_bytes"] == case.budget_bytes
    assert 0 < row["predicted_device_bytes"] <= case.budget_bytes
    assert row["strategy"]["precision"] == (case.precision or "fp16")
    assert row["watch"]["visible"] == "1"
    assert json.loads(json.dumps(row)) == json.loads(json.dumps(row | {"media": [vars(m) for m in case.media]}))


@pytest.mark.usefixtures("fake_nvml")
def test_a_budget_that_is_too_small_is_refused_and_named(tmp_path: Path) -> None:
    case = next(case for case in map(draw, range(400)) if case.task == "t2v-1.3B" and case.frames == 1)
    row = keep_promise.run_case(case, tmp_path, "1", budget="0.5GiB", words=["--device", "simulated"])
    assert row["watch"]["exit_code"] == 3
    assert row["named_budget"] is not None
    assert 0.5 < parse_memory(row["named_budget"]) / 2**30 < 2.5
    assert row["breaches"] == ["the budget that was named before is refused"]


def test_the_prediction_is_read_from_the_record_under_either_name() -> None:
    assert prediction_of({"predicted": {"seconds": 1.0}}) == {"seconds": 1.0}
    assert prediction_of({"prediction": {"device_bytes": 5}}) == {"device_bytes": 5}
    assert prediction_of({"predicted": None}) == {}


# --- videos made together ----------------------------------------------------------------------------------------------------


def batch(name: str, step: float, predicted: float | None = None, **changes: Any) -> Row:
    """A row of benchmarks/batches.py that keeps every bound."""
    peaks = {quantity: {"predicted": 9, "measured": 9, "error": 0.0} for quantity in batches.BOUNDS}
    case = next(case for case in batches.CASES if case.name == name)
    steps = {"measured": step, "predicted": step if predicted is None else predicted}
    row: Row = {"group": case.group, "name": name, "beside": case.beside, "exit_code": 0, "together": 1, "steps": steps}
    return row | {"latents": {"prompt 0, seed 1": "a"}, "stages": [{"stage": "denoise"} | peaks]} | changes


def test_batches_that_keep_every_bound_have_no_breach() -> None:
    rows = [batch("apart", 1.0), batch("together", 2.0, together=2)]
    rows += [batch("one-after-the-other", 1.0), batch("scale-1", 0.5)]
    summary = batches.judge(rows)
    assert summary["breaches"] == []
    assert summary["latents_compared"] == 1
    assert summary["step_ratios"]["scale-1"] == {"predicted": 0.5, "measured": 0.5}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (batch("together", 2.0, latents={"prompt 0, seed 1": "b"}), "the latents of apart and together differ"),
        (batch("together", 2.0, latents={}), "the latents of apart and together differ"),
        (batch("together", 2.0, exit_code=1, stderr_tail="no GPU"), "failed with exit code 1: no GPU"),
        (batch("four-pictures", 2.0, 1.2, together=4), "0.300 predicted, 0.500 measured"),
        (batch("scale-1", 0.6), "one pass takes no half of two"),
        (
            batch("together", 2.0, stages=[{"stage": "decode"} | {q: {"error": -0.02} for q in batches.BOUNDS}]),
            "decode: reserved -2.000% off",
        ),
    ],
)
def test_a_batch_that_misses_a_bound_is_a_breach(changed: Row, said: str) -> None:
    rows = [batch(name, 1.0) for name in ("apart", "one-picture", "one-after-the-other")]
    assert any(said in breach for breach in batches.judge([*rows, changed])["breaches"])
