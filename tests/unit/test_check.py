"""`wanvram check`: what it sees of a GPU through NVML (a made-up one here), its warnings, and whom it may end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from wanvram.cli import check
from wanvram.cli.main import main
from wanvram.errors import InputError
from wanvram.machine import checks as module
from wanvram.machine.checks import own_gpu_process, run_checks, warm_up
from wanvram.report.check import check_text
from wanvram.units import GIB, MIB


class FakeNvml:
    """One H200 as NVML describes it. processes: (pid, bytes or None)."""

    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, *processes: tuple[int, int | None], used: int = 0, busy: int = 0, reasons: int = 1) -> None:
        self.processes, self.used, self.busy, self.reasons = processes, used, busy, reasons

    def nvmlInit(self) -> None: ...

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.1"

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA H200"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=140 * GIB, used=self.used, free=140 * GIB - self.used)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=self.busy)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        return self.reasons

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        raise self.NVMLError("not supported")

    def nvmlDeviceGetClockInfo(self, handle: int, clock: int) -> int:
        return 345

    def nvmlDeviceGetMaxClockInfo(self, handle: int, clock: int) -> int:
        return 1980

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.processes]


OPERATION_US = module.operation_us  # the fixture below replaces it


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine, and torch as if it could use the made-up GPU; the host is idle."""
    for name in module._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module.psutil, "getloadavg", lambda: (0.1, 0.1, 0.1))
    monkeypatch.setattr(module, "operation_us", lambda: 2.0)
    monkeypatch.setattr(module, "LEAST_FREE_DISK", 0)
    monkeypatch.setattr(module, "LEAST_FREE_RAM_SHARE", 0.0)


def found(*processes: tuple[int, int | None], **more: Any) -> dict[str, Any]:
    return run_checks(nvml=FakeNvml(*processes, **more))


def test_an_idle_gpu_has_nothing_against_it_and_unknown_figures_are_none() -> None:
    checks = found(used=300 * MIB)
    assert checks["warnings"] == []
    (gpu,) = checks["gpus"]
    assert (gpu["name"], gpu["free_bytes"], gpu["temperature_c"]) == ("NVIDIA H200", 140 * GIB - 300 * MIB, None)
    assert json.loads(json.dumps(checks)) == checks
    text = check_text(checks)
    assert "345 of 1980 MHz" in text
    assert text.endswith("Nothing here would falsify a measurement.\n")


def test_a_host_that_issues_work_slowly_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "operation_us", lambda: 5.93)
    checks = found()
    assert checks["warnings"] == [
        "the host issues work slowly (5.9 us an operation): small tiles and short videos take longer than predicted"
    ]
    assert "an operation is issued in 5.9 us" in check_text(checks)


def test_what_an_operation_costs_the_host_is_measured() -> None:
    assert 0.1 < OPERATION_US() < 1000


def test_another_process_on_the_gpu_is_named_and_our_own_is_not() -> None:
    checks = found((os.getpid(), GIB), (1, 3 * GIB), (2**22 + 1, None), used=4 * GIB, busy=97)
    texts = "\n".join(checks["warnings"])
    assert str(os.getpid()) not in texts
    assert "also used by process 1 (" in texts
    assert f"also used by process {2**22 + 1} ((not visible from here), an unknown amount)" in texts
    assert "is busy (97 %)" in texts
    assert next(p["own"] for p in checks["gpus"][0]["processes"]) is True


def test_memory_of_processes_nobody_can_see_is_found() -> None:
    assert "20.00 GiB in use by processes that are not visible" in found(used=20 * GIB)["warnings"][0]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1", "turns the allocator's cache off"),
        ("CUDA_LAUNCH_BLOCKING", "1", "makes every kernel wait"),
        ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128", "sets max_split_size_mb"),
        ("PYTORCH_ALLOC_CONF", "backend:cudaMallocAsync", "sets backend:cudaMallocAsync"),
        ("CUDA_LAUNCH_BLOCKING", "0", None),
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", None),
    ],
)
def test_settings_that_change_what_is_measured_are_warned_of(
    name: str, value: str, says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    checks = found()
    assert checks["variables"] == {name: value}
    assert [says in warning for warning in checks["warnings"] if says] == ([True] if says else [])


def test_a_slowed_gpu_a_busy_host_and_a_full_disk_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.psutil, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    monkeypatch.setattr(module, "LEAST_FREE_DISK", 2**60)
    monkeypatch.setattr(module, "LEAST_FREE_RAM_SHARE", 2.0)
    texts = "\n".join(found(reasons=0x60)["warnings"])
    for part in ("slowed down by temperature:", "the host is busy", "on the disk of", "host RAM are free"):
        assert part in texts, part


def test_a_machine_without_a_gpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()

    def missing() -> None:
        raise nvml.NVMLError("no driver")

    monkeypatch.setattr(nvml, "nvmlInit", missing)
    checks = run_checks(nvml=nvml)
    assert (checks["driver"], checks["gpus"]) == (None, [])
    assert checks["warnings"] == [
        "no NVIDIA GPU answers: nothing can be measured here; --device simulated predicts instead"
    ]


def test_a_torch_that_cannot_use_the_gpu_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    assert "cannot use the GPU" in found()["warnings"][0]


# --- at the edges --------------------------------------------------------------------------------------------------------


class Asked(FakeNvml):
    """Remembers what was asked of the driver, with which sensor and clock."""

    def __init__(self, *processes: tuple[int, int | None], graphics: Sequence[int] = (), **more: Any) -> None:
        super().__init__(*processes, **more)
        self.asked: list[tuple[str, int, int]] = []
        self.graphics = graphics

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        self.asked.append(("temperature", handle, sensor))
        return 41

    def nvmlDeviceGetClockInfo(self, handle: int, clock: int) -> int:
        self.asked.append(("clock", handle, clock))
        return 345

    def nvmlDeviceGetMaxClockInfo(self, handle: int, clock: int) -> int:
        self.asked.append(("most", handle, clock))
        return 1980

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=7) for pid in self.graphics]


def test_the_driver_is_asked_for_the_gpus_own_temperature_and_the_clock_of_its_processors() -> None:
    nvml = Asked(busy=12)
    (gpu,) = run_checks(nvml=nvml)["gpus"]
    assert nvml.asked == [
        ("temperature", 0, pynvml.NVML_TEMPERATURE_GPU), ("clock", 0, pynvml.NVML_CLOCK_SM), ("most", 0, pynvml.NVML_CLOCK_SM),
    ]  # fmt: skip
    assert (gpu["index"], gpu["temperature_c"], gpu["sm_clock_mhz"], gpu["max_sm_clock_mhz"]) == (0, 41, 345, 1980)
    assert (gpu["utilization_percent"], gpu["slowed_by"], gpu["total_bytes"]) == (12, [], 140 * GIB)


def test_a_driver_that_does_not_tell_how_busy_a_gpu_is_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FakeNvml, "nvmlDeviceGetUtilizationRates")
    monkeypatch.delattr(FakeNvml, "nvmlDeviceGetCurrentClocksThrottleReasons")
    checks = found((1, GIB))
    assert (checks["gpus"][0]["utilization_percent"], checks["gpus"][0]["slowed_by"]) == (None, [])
    assert [text for text in checks["warnings"] if "busy" in text or "slowed" in text] == []


def test_a_process_that_computes_and_draws_is_one_and_one_that_only_draws_counts_too() -> None:
    (gpu,) = run_checks(nvml=Asked((1, GIB), (2**22 + 1, 0), graphics=(1, os.getpid())))["gpus"]
    assert [(p["pid"], p["gpu"], p["used_bytes"]) for p in gpu["processes"]] == [
        (1, 0, GIB), (2**22 + 1, 0, 0), (os.getpid(), 0, 7),
    ]  # fmt: skip
    unseen, own = gpu["processes"][1:]
    assert (unseen["name"], unseen["user"], unseen["own"]) == ("(not visible from here)", None, False)
    assert (own["user"], own["own"]) == (module.psutil.Process().username(), True)


@pytest.mark.parametrize(("over", "said"), [(0, False), (MIB, True)])
def test_two_per_cent_of_a_gpu_and_64_mib_are_the_drivers_own(over: int, said: bool) -> None:
    used = int(140 * GIB * 0.02) + 64 * MIB + over
    assert any("in use by processes that are not visible" in text for text in found(used=used)["warnings"]) is said


HOST = {"ram_available_bytes": 50 * GIB, "ram_total_bytes": 100 * GIB, "disk_free_bytes": 50 * GIB, "disk": "/d"}
HOST |= {"load_average": 1.0, "cpu_count": 4, "operation_us": 2.0}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"disk_free_bytes": 5 * GIB}, ""),
        ({"disk_free_bytes": 5 * GIB - 1}, "only 5,120.0 MiB are free on the disk of /d"),
        ({"ram_available_bytes": 10 * GIB}, ""),
        ({"ram_available_bytes": 9 * GIB}, "only 9.00 GiB of host RAM are free: weights may be swapped out"),
        ({"load_average": 4.0}, ""),
        (
            {"load_average": 4.1},
            "the host is busy (4.1 processes wait for 4 CPU cores): loading and launching kernels take longer",
        ),
        ({"load_average": 1.0, "cpu_count": None}, ""),
        ({"load_average": 1.1, "cpu_count": None}, "the host is busy (1.1 processes wait for 1 CPU cores)"),
        ({"operation_us": 4.0}, ""),
        ({"operation_us": 4.1}, "the host issues work slowly (4.1 us an operation)"),
    ],
)
def test_a_host_at_its_limit_is_fine_and_beyond_it_is_warned_of(
    change: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the limits as they are
    warnings = module._host_warnings(HOST | change)
    assert len(warnings) == bool(says)
    assert "".join(warnings).startswith(says)


def test_the_load_is_that_of_the_last_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.psutil, "getloadavg", lambda: (0.5, 70.0, 80.0))
    assert found()["host"]["load_average"] == 0.5


def test_the_disk_of_a_folder_that_is_yet_to_be_made_is_that_of_the_nearest_there_is(tmp_path: Path) -> None:
    checks = run_checks(tmp_path / "none" / "yet", nvml=FakeNvml())
    assert checks["host"]["disk"] == str(tmp_path)
    assert found()["host"]["disk"] == str(Path.cwd())


@pytest.mark.parametrize(("value", "said"), [("", False), ("0", True), ("1", True)])
def test_forbidding_tf32_is_a_setting_too(value: str, said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", value)
    assert any("precision of matrix products" in text for text in found()["warnings"]) is said


def test_an_option_of_the_allocator_in_another_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "max_split_size_mb")
    assert found()["warnings"] == []


def test_without_cuda_nothing_is_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    assert warm_up() is None


def test_warming_up_multiplies_until_the_time_is_over_and_reads_the_clock_before_and_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, clocks, made = [100.0], [300, 1900], []

    def product(*_: Any) -> None:
        now[0] += 0.25
        made.append(now[0])

    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    for name, value in {
        "clock_rate": lambda: clocks.pop(0),
        "synchronize": lambda: made.append(0),
        "empty_cache": lambda: made.append(-1),
    }.items():
        monkeypatch.setattr(module.torch.cuda, name, value)
    monkeypatch.setattr(module.torch, "ones", lambda *shape, **_: shape)
    monkeypatch.setattr(module.torch, "mm", product)
    assert warm_up() == {"seconds": 1.0, "sm_clock_before_mhz": 300, "sm_clock_after_mhz": 1900}
    assert made == [100.25, 0, 100.5, 0, 100.75, 0, 101.0, 0, -1], "each is waited for, and what it took is given back"


# --- ending a process ----------------------------------------------------------------------------------------------------


@pytest.fixture
def sleeper() -> Any:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def test_a_process_is_ended_only_after_a_yes(sleeper: Any, capsys: pytest.CaptureFixture[str]) -> None:
    checks = found((sleeper.pid, 2 * GIB))
    asked: list[str] = []
    ended: list[int] = []
    assert not check.terminate(sleeper.pid, checks, lambda question: bool(asked.append(question)), ended.append)
    assert (ended, sleeper.poll()) == ([], None)
    assert f"End process {sleeper.pid} (" in asked[0]
    assert "2.00 GiB on GPU 0" in asked[0]
    assert check.terminate(sleeper.pid, checks, lambda _: True, ended.append)
    assert ended == [sleeper.pid]
    assert "goes on" in capsys.readouterr().err


def test_ending_asks_the_process_and_waits_for_it() -> None:
    says_so = "import signal, sys, time; signal.signal(15, lambda *_: (print('asked'), sys.exit()));"
    says_so += "print('ready', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", says_so], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        check._end(process.pid)
        assert process.stdout.read() == "asked\n", "SIGTERM, never SIGKILL"


def test_a_process_that_is_not_the_users_or_not_on_the_gpu_is_never_ended(sleeper: Any) -> None:
    with pytest.raises(InputError, match="no process of that number uses a GPU"):
        own_gpu_process(sleeper.pid, found())
    with pytest.raises(InputError, match="this command itself"):
        own_gpu_process(os.getpid(), found((os.getpid(), 1)))
    checks = found((sleeper.pid, 1))
    checks["gpus"][0]["processes"][0] |= {"own": False, "user": "somebody"}
    with pytest.raises(InputError, match="it belongs to somebody, not to you; nothing was ended"):
        own_gpu_process(sleeper.pid, checks)


@pytest.mark.parametrize("answer", ["", "n\n", "yess\n", "ja\n"])
def test_anything_but_yes_is_no(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
    assert not check._ask("?")


# --- the verb and the record ---------------------------------------------------------------------------------------------


def test_the_verb_prints_text_or_one_document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    assert main(["check"]) == 0
    assert "torch " in capsys.readouterr().out
    assert main(["check", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["terminated"], document["warm_up"]) == (1, None, None)
    assert main(["check", "--terminate", "1"]) == 2
    assert "nothing was ended" in capsys.readouterr().err


def test_a_measuring_run_stores_the_checks_in_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from wanvram.config import load_config
    from wanvram.predict.simulate import run_or_simulate
    from wanvram.run.execute import Output

    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    config = load_config(Path(__file__).parents[1] / "configs" / "baseline.yaml")
    request = replace(config.request, frame_num=1, sample_steps=1)
    strategy = replace(config.strategy, precision="fp32")
    config = replace(config, device="cpu", weights="tiny", request=request, strategy=strategy)
    measured = run_or_simulate(config, Output(tmp_path / "cpu"))
    assert "warnings" in measured.environment["checks"]
    simulated = run_or_simulate(replace(config, device="simulated"), Output(tmp_path / "simulated"))
    assert "checks" not in simulated.environment
