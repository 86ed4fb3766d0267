"""Spans, events and meters: peaks reach their parents, counted CPU memory is exact."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch

from wanvram.machine.host import available_ram_bytes, total_ram_bytes
from wanvram.record import Failure
from wanvram.recorder.events import EventLog
from wanvram.recorder.meters import CpuMeter, CudaMeter
from wanvram.recorder.recorder import Recorder
from wanvram.report.event_text import event_text
from wanvram.run_events import RunEvent, StageBegan, StageEnded
from wanvram.spans import Memory

MIB = 2**20


@dataclass
class FakeMeter:
    """A driver figure of reserved + 100; counts how often the slow things were asked for."""

    device_name = "fake"
    caches = True
    allocated: int = 0
    reserved: int = 0
    peak_allocated: int = 0
    peak_reserved: int = 0
    calls: dict[str, int] = field(default_factory=lambda: {"synchronize": 0, "device_memory": 0})

    def use(self, delta: int) -> None:
        self.allocated += delta
        self.reserved = max(self.reserved, self.allocated)
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def empty_cache(self) -> None:
        self.reserved = self.allocated

    def read(self) -> Memory:
        return Memory(self.allocated, self.reserved, None)

    def peak(self) -> Memory:
        return Memory(self.peak_allocated, self.peak_reserved, None)

    def reset_peak(self) -> None:
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def device_memory(self) -> int:
        self.calls["device_memory"] += 1
        return self.reserved + 100

    def synchronize(self) -> None:
        self.calls["synchronize"] += 1

    def now(self, kind: str) -> float:
        return time.perf_counter()

    def host(self) -> tuple[int, int]:
        return 5, 2


@pytest.fixture
def meter() -> FakeMeter:
    return FakeMeter()


@pytest.fixture
def recorder(meter: FakeMeter) -> Recorder:
    return Recorder(meter, None, None)


# --- spans ----------------------------------------------------------------------------------------------------------


def test_a_child_s_peak_is_its_own_and_reaches_every_parent(meter: FakeMeter, recorder: Recorder) -> None:
    with recorder.span("denoise", kind="stage", component="dit") as stage:
        meter.use(10)
        with recorder.span("step 0", kind="step") as first:
            meter.use(50)
            meter.use(-50)
        with recorder.span("step 1", kind="step") as second:
            meter.use(5)
            meter.use(-5)
    assert (first.start.allocated_bytes, first.peak.allocated_bytes, first.activation_bytes) == (10, 60, 50)
    assert second.peak.allocated_bytes == 15, "the first step's peak is not the second one's"
    assert (stage.start.allocated_bytes, stage.peak.allocated_bytes, stage.end.allocated_bytes) == (0, 60, 10)
    assert [child.name for child in stage.children] == ["step 0", "step 1"]
    assert recorder.spans == [stage]


def test_a_parent_s_peak_before_between_and_after_its_children_is_not_lost(
    meter: FakeMeter, recorder: Recorder
) -> None:
    for when in range(3):
        with recorder.span("stage", kind="stage") as stage:
            for position in range(3):
                if position == when:
                    meter.use(99)
                    meter.use(-99)
                if position < 2:
                    with recorder.span("step", kind="step") as step:
                        meter.use(1)
                        meter.use(-1)
                    assert step.activation_bytes == 1
        assert stage.activation_bytes == 99


def test_what_happens_between_two_stages_belongs_to_neither(meter: FakeMeter, recorder: Recorder) -> None:
    with recorder.span("one", kind="stage") as one:
        meter.use(1)
    meter.use(500)
    meter.use(-500)
    with recorder.span("two", kind="stage") as two:
        meter.use(1)
    assert (one.peak.allocated_bytes, two.peak.allocated_bytes) == (1, 2)


def test_a_block_neither_synchronizes_nor_asks_the_driver(meter: FakeMeter, recorder: Recorder) -> None:
    with recorder.span("stage", kind="stage"):
        before = dict(meter.calls)
        for index in range(40):
            with recorder.span(f"block {index}", kind="block") as block:
                meter.use(1)
        assert meter.calls == before
    assert block.seconds is None
    assert block.end.device_bytes is None
    assert recorder.spans[0].seconds is not None
    assert (recorder.spans[0].host_rss_bytes, recorder.spans[0].pinned_bytes) == (5, 2)


def test_a_block_costs_microseconds(recorder: Recorder) -> None:
    with recorder.span("stage", kind="stage"):
        start = time.perf_counter()
        for _ in range(1000):
            with recorder.span("block", kind="block"):
                pass
        each = (time.perf_counter() - start) / 1000
    assert each < 1e-3, f"{each * 1e6:.0f} us; about 20 us on a quiet core"


def test_the_driver_s_peak_counts_what_the_allocator_gave_back_before_the_end(
    meter: FakeMeter, recorder: Recorder
) -> None:
    with recorder.span("stage", kind="stage") as stage:
        meter.use(1000)
        meter.use(-1000)
        meter.empty_cache()
    assert stage.end.device_bytes == 100
    assert stage.peak.device_bytes == 1100


def test_a_failing_run_keeps_its_open_spans_and_the_failure_learns_its_stage(
    meter: FakeMeter, recorder: Recorder
) -> None:
    with recorder.span("load dit", kind="load", component="dit"):
        meter.use(10)
    with (  # noqa: PT012
        pytest.raises(MemoryError),
        recorder.span("denoise", kind="stage", component="dit"),
        recorder.span("step 0", kind="step", component="dit"),
        recorder.span("block 0", kind="block"),
    ):
        meter.use(77)
        raise MemoryError
    failure = recorder.finish_open(Failure("oom", "full"))
    assert (failure.stage, failure.component) == ("denoise", "dit")
    load, denoise = recorder.spans
    assert (load.name, denoise.name) == ("load dit", "denoise")
    assert denoise.children[0].children[0].name == "block 0"
    assert denoise.peak.allocated_bytes == 87
    assert denoise.seconds is not None
    assert recorder.finish_open(failure) == failure, "closing twice changes nothing"


def test_a_failure_between_stages_has_no_stage(recorder: Recorder) -> None:
    assert recorder.finish_open(Failure("error", "x")).stage is None


def test_an_exception_caught_inside_a_stage_does_not_shift_the_spans_after_it(
    meter: FakeMeter, recorder: Recorder
) -> None:
    with recorder.span("stage", kind="stage") as stage:
        try:
            with recorder.span("attempt", kind="step"):
                meter.use(50)
                raise MemoryError
        except MemoryError:
            meter.use(-50)
    assert recorder.spans == [stage]
    assert [child.name for child in stage.children] == ["attempt"]
    assert stage.activation_bytes == 50


def test_stages_report_progress_and_log_events(meter: FakeMeter, tmp_path: Path) -> None:
    told: list[RunEvent] = []
    with EventLog(tmp_path / "memory_events.json") as events:
        recorder = Recorder(meter, events, told.append)
        with recorder.span("decode", kind="stage", component="vae"), recorder.span("block 0", kind="block"):
            meter.use(3 * MIB)
    assert told == [StageBegan("decode"), StageEnded("decode", 3 * MIB)]
    assert [event_text(event) for event in told] == ["decode", "decode done, peak 3.0 MiB allocated"]
    logged = json.loads((tmp_path / "memory_events.json").read_text())
    assert [event["name"] for event in logged] == ["decode: start", "decode"]
    assert logged[1]["memory_log"] == "decode: peak_memory=3.00 MB"
    assert logged[1]["metadata"] == {"kind": "stage", "component": "vae"}
    assert logged[1]["device_bytes"] == 3 * MIB + 100


# --- meters ---------------------------------------------------------------------------------------------------------


def test_counted_cpu_memory_is_exact() -> None:
    meter = CpuMeter()
    with meter:
        a = torch.empty(MIB, dtype=torch.float32)
        assert meter.read().allocated_bytes == 4 * MIB
        b = a * 2
        view = b[:10]
        assert meter.read().allocated_bytes == 8 * MIB, "a view owns nothing"
        del b
        assert meter.read().allocated_bytes == 8 * MIB, "its storage lives as long as the view"
        del view
        assert meter.read().allocated_bytes == 4 * MIB
        assert meter.peak().allocated_bytes == 8 * MIB
        meter.reset_peak()
        assert meter.peak().allocated_bytes == 4 * MIB
    del a
    assert meter.read().allocated_bytes == 0
    memory = meter.read()
    assert memory.reserved_bytes == memory.allocated_bytes
    assert memory.device_bytes is not None
    assert memory.device_bytes > 10 * MIB


def test_a_tensor_that_grows_in_place_is_counted_at_its_new_size() -> None:
    meter = CpuMeter()
    with meter:
        out = torch.empty(0)
        torch.add(torch.ones(MIB // 4), 1, out=out)
        assert meter.read().allocated_bytes == MIB
        out.resize_(MIB)
        assert meter.read().allocated_bytes == 4 * MIB
        del out
    assert meter.read().allocated_bytes == 0


def test_memory_that_autograd_keeps_is_counted_until_the_backward_pass() -> None:
    meter = CpuMeter()
    with meter:
        w = torch.ones(256, 256, requires_grad=True)
        x = torch.ones(256, 256)
        y = (x @ w).exp().sum()
        assert meter.read().allocated_bytes >= 3 * 256 * 256 * 4, "exp keeps its output for the gradient"
        y.backward()
        assert meter.read().allocated_bytes <= 3 * 256 * 256 * 4 + 1024
        del w, x, y
    assert meter.read().allocated_bytes == 0


def test_weights_loaded_before_can_be_counted_so_that_using_them_is_no_allocation() -> None:
    layer = torch.nn.Linear(512, 512, bias=False)
    meter = CpuMeter(count_existing=True)
    with meter, torch.no_grad():
        before = meter.read().allocated_bytes
        assert before >= 512 * 512 * 4
        x = torch.ones(1, 512)
        layer(x)
        assert meter.read().allocated_bytes - before == x.nbytes


@pytest.mark.gpu
def test_the_cuda_meter_agrees_with_pytorch_and_the_driver_says_more() -> None:
    meter = CudaMeter()
    x = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    meter.reset_peak()
    y = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    del y
    assert meter.read() == Memory(torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), None)
    assert meter.peak() == Memory(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), None)
    assert meter.peak().allocated_bytes - meter.read().allocated_bytes == 64 * MIB
    device = meter.device_memory()
    assert device is not None
    assert 50 * MIB < device - torch.cuda.memory_reserved() < 3000 * MIB, "the CUDA context is part of it"
    assert meter.device_name == f"cuda:{torch.cuda.get_device_name()}"
    del x


@pytest.mark.gpu
def test_a_block_on_cuda_costs_less_than_a_fifth_of_a_millisecond() -> None:
    recorder = Recorder(CudaMeter(), None, None)
    torch.empty(1, device="cuda")
    with recorder.span("stage", kind="stage"):
        start = time.perf_counter()
        for _ in range(1000):
            with recorder.span("block", kind="block"):
                pass
        each = (time.perf_counter() - start) / 1000
    assert each < 2e-4, f"{each * 1e6:.0f} us"


CGROUP_2 = ("memory.max", "memory.current", "memory.stat", "inactive_file")
CGROUP_1 = (
    "memory/memory.limit_in_bytes",
    "memory/memory.usage_in_bytes",
    "memory/memory.stat",
    "total_inactive_file",
)


@pytest.mark.parametrize("names", [CGROUP_2, CGROUP_1])
@pytest.mark.parametrize(("used", "left"), [(60, 70), (200, 0), (10, 100)])
def test_what_a_container_already_uses_is_not_available_but_its_file_pages_are(
    names: tuple[str, str, str, str], used: int, left: int, tmp_path: Path
) -> None:
    limit, current, statistics, inactive = names
    (tmp_path / limit).parent.mkdir(exist_ok=True)
    (tmp_path / limit).write_text("100\n")
    assert available_ram_bytes(tmp_path) == 100
    (tmp_path / current).write_text(f"{used}\n")
    (tmp_path / statistics).write_text(f"anon 5\n{inactive} 30\nactive_file 7\n")
    assert available_ram_bytes(tmp_path) == left


def test_a_container_without_a_limit_has_the_host_s_memory(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    assert available_ram_bytes(tmp_path) > MIB


@pytest.mark.parametrize("names", [CGROUP_2, CGROUP_1])
def test_the_ram_of_a_container_is_its_limit_and_of_one_without_the_host_s(
    names: tuple[str, str, str, str], tmp_path: Path
) -> None:
    limit = tmp_path / names[0]
    limit.parent.mkdir(exist_ok=True)
    limit.write_text("100\n")
    assert total_ram_bytes(tmp_path) == 100
    limit.write_text("max\n")
    assert total_ram_bytes(tmp_path) == psutil.virtual_memory().total
