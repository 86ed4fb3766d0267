"""Facts about events, meters and spans: where metadata is cut off, whose bytes a card's are, whose seconds a span's are."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from unit.test_cuda_meter import FakeGpu, gpu
from unit.test_recorder import FakeMeter
from wanvram.machine.driver import DRIVER_BYTES
from wanvram.record import Failure
from wanvram.recorder import meters
from wanvram.recorder.events import EventLog, base_memory
from wanvram.recorder.interrupts import deferred
from wanvram.recorder.meters import OTHERS_BYTES, CpuMeter, CudaMeter
from wanvram.recorder.recorder import Recorder, repeated_seconds, with_device
from wanvram.run_events import RunEvent, StageBegan, StageEnded
from wanvram.spans import Memory, Span
from wanvram.units import GIB, MIB

__all__ = ["gpu"]  # a fixture
ONE = Memory(1, 1, None)


# --- events ------------------------------------------------------------------------------------------------------------------


def logged(metadata: Any, path: Path) -> Any:
    with EventLog(path / "e.json") as log:
        log.log("x", ONE, metadata)
    return json.loads((path / "e.json").read_text(encoding="utf-8"))[0]["metadata"]


def nested(levels: int, inside: Any) -> Any:
    for _ in range(levels):
        inside = {"a": inside}
    return inside


def test_few_brackets_are_written_however_deep_they_nest_and_a_hundred_only_ten_deep(tmp_path: Path) -> None:
    few = nested(98, 1)  # and the event's own
    assert logged(few, tmp_path) == few
    cut = nested(99, 1)
    assert logged(cut, tmp_path) == nested(10, str(nested(89, 1)))


@pytest.mark.parametrize("deep", [9, 10])
def test_many_brackets_are_written_where_they_are_not_too_deep(deep: int, tmp_path: Path) -> None:
    wide = nested(deep - 1, [[number] for number in range(200)])
    kept = wide if deep == 9 else nested(9, [str([number]) for number in range(200)])
    assert logged(wide, tmp_path) == kept


def test_integers_of_64_bits_are_numbers_and_larger_ones_in_what_is_rewritten_are_texts(tmp_path: Path) -> None:
    odd = {"a": 2**63 - 1, "b": 2**63, "c": -(2**63) + 1, "d": -(2**63), 2**63: 1, 2**63 - 1: 2, "e": {1}}
    assert logged(odd, tmp_path) == {
        "a": 2**63 - 1,
        "b": hex(2**63),
        "c": -(2**63) + 1,
        "d": hex(-(2**63)),
        hex(2**63): 1,
        str(2**63 - 1): 2,
        "e": "{1}",
    }


def test_a_base_of_64_bits_is_one_and_a_larger_one_is_none() -> None:
    assert base_memory({"base_memory": 2**63 - 1}) == 2**63 - 1
    assert base_memory({"base_memory": 2**63}) is None
    assert base_memory({"base_memory": "7"}) == 7
    assert base_memory({"other": 7}) is None


def test_of_a_base_that_is_none_80_characters_are_said(tmp_path: Path) -> None:
    with EventLog(tmp_path / "e.json") as log, pytest.warns(UserWarning, match=f" {'y' * 80} is not"):
        log.log("x", ONE, {"base_memory": "y" * 100})


def test_only_an_event_beside_a_trace_says_so(tmp_path: Path) -> None:
    with EventLog(tmp_path / "e.json") as log:
        events = [log.log("x", ONE), log.log("x", ONE, traced=True)]
    assert [event.get("traced") for event in events] == [None, True]
    assert "traced" not in events[0]


def names(path: Path) -> list[str]:
    return [event["name"] for event in json.loads(path.read_text())]


def test_a_log_replaces_goes_on_or_leaves_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    for name, how in (("a", {}), ("b", {}), ("c", {"goes_on": True}), ("d", {"keep_existing": True})):
        with EventLog(path, **how) as log:
            log.log(name, ONE)
    assert (names(path), names(tmp_path / "e-2.json")) == (["b", "c"], ["d"])
    path.write_text("no list of events")
    with EventLog(path, goes_on=True) as log:
        log.log("e", ONE)
    assert (path.read_text(), log.path.name, names(log.path)) == ("no list of events", "e-3.json", ["e"])


# --- the card ----------------------------------------------------------------------------------------------------------------


def stats(monkeypatch: pytest.MonkeyPatch, allocated: tuple[int, int], reserved: tuple[int, int]) -> None:
    both = {"allocated_bytes": allocated, "reserved_bytes": reserved}
    found = {name: {"all": dict(zip(("current", "peak"), pair, strict=True))} for name, pair in both.items()}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda _: found)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: reserved[0])


@pytest.mark.usefixtures("gpu")
def test_figures_are_the_allocator_s_and_nothing_before_its_first_block(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = CudaMeter(poll=False)
    stats(monkeypatch, (1, 2), (3, 4))
    assert (meter.read(), meter.peak()) == (Memory(1, 3, None), Memory(2, 4, None))
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda _: {})
    assert (meter.read(), meter.peak()) == (Memory(0, 0, None), Memory(0, 0, None))


@pytest.mark.usefixtures("gpu")
def test_a_meter_asks_its_own_card_and_one_of_which_nothing_is_said_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, asked.append)
    for meter in (CudaMeter(), CudaMeter(3, poll=False)):
        meter.reset_peak()
        meter.synchronize()
    assert asked == [0, 0, 3, 3]


def test_without_the_driver_s_library_it_is_what_cuda_says_of_the_card(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meters, "_nvml_gpu", lambda: None)
    meter = CudaMeter()
    stats(monkeypatch, (1, 1), (1 * GIB, 2 * GIB))
    gpu.idle = 3 * GIB
    assert meter.device_memory() == 3 * GIB
    assert meter.peak().device_bytes == 2 * GIB + 2 * GIB, "the peak with what lay beside it"
    assert meter.used_by_others() == 0
    gpu.idle = GIB // 2
    assert meter.device_memory() == GIB // 2, "less than is reserved: beside it nothing"
    assert meter.peak().device_bytes is None


def test_where_the_card_has_more_free_than_before_nothing_is_ours(gpu: FakeGpu) -> None:
    meter = CudaMeter(poll=False)
    gpu.tells, gpu.idle = False, 100 * MIB
    assert meter.device_memory() == 0
    assert meter.used_by_others() == 100 * MIB


@pytest.mark.parametrize(("more", "ours"), [(0, OTHERS_BYTES), (1, 0)])
def test_32_mib_beside_what_the_driver_tells_are_ours_and_a_byte_more_is_somebody_else_s(
    more: int, ours: int, gpu: FakeGpu
) -> None:
    assert OTHERS_BYTES == 32 * MIB
    meter = CudaMeter(poll=False)
    gpu.mine, gpu.others = GIB, OTHERS_BYTES + more
    assert meter.device_memory() == GIB + DRIVER_BYTES + ours


@pytest.mark.parametrize(("more", "counts"), [(0, True), (1, False)])
def test_a_polled_peak_may_be_64_mib_over_what_is_explained(more: int, counts: bool, gpu: FakeGpu) -> None:
    meter = CudaMeter()
    gpu.mine = 1 * GIB + 600 * MIB
    meter.device_memory()
    known = 2 * GIB + 600 * MIB + DRIVER_BYTES  # reserved at the peak, with what is beside it
    assert meter._poll is not None
    meter._poll._stop.set()
    meter._poll.take()
    meter._poll._highest = gpu.idle + known + 64 * MIB + more
    assert meter.peak().device_bytes == known + (64 * MIB if counts else 0)
    assert meter._poll.take() == 0, "a peak is told once"


@pytest.mark.usefixtures("gpu")
def test_a_context_of_before_hides_what_was_polled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    meter = CudaMeter()
    assert meter.peak().device_bytes is None


@pytest.mark.usefixtures("gpu")
def test_the_card_is_watched_by_one_thread_that_ends_with_its_meter_and_keeps_no_process() -> None:
    def watching() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "wanvram-nvml"]

    before = watching()
    unwatched = CudaMeter(poll=False)
    assert set(watching()) <= set(before)
    meter = CudaMeter()
    (thread,) = [t for t in watching() if t not in before]
    assert thread.daemon
    del meter, unwatched
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.usefixtures("gpu")
def test_pinned_memory_is_what_was_pinned_less_what_was_unpinned() -> None:
    meter = CudaMeter(poll=False)
    meter.pinned(5 * GIB)
    held = meter.tables.held_bytes
    meter.pinned(-4 * GIB)
    rss, pinned = meter.host()
    assert pinned == GIB
    assert 0 < meter.tables.held_bytes < held
    assert 0.5 < rss / psutil.Process().memory_info().rss < 2


# --- counted storages --------------------------------------------------------------------------------------------------------


def test_tensors_that_are_elsewhere_or_no_storage_are_not_counted() -> None:
    with CpuMeter() as meter:
        kept = [torch.empty(1000, device="meta"), torch.empty(0), torch.eye(3).to_sparse()]
        sparse = meter.read().allocated_bytes
        assert sparse < 1000
        kept.append(torch.ones(1000))
        assert meter.read().allocated_bytes == sparse + 4000


def test_tensors_of_before_are_not_counted_unless_asked_for() -> None:
    before = torch.ones(10**6)
    with CpuMeter() as meter:
        assert meter.read().allocated_bytes == 0
        after = torch.ones(10)
        assert meter.read().allocated_bytes == 40
    late = torch.ones(1000)
    assert meter.read().allocated_bytes == 40, "counted while it is entered"
    del before, after, late


def test_the_ram_of_a_run_on_the_cpu_is_the_process_s_and_none_of_it_is_pinned() -> None:
    meter = CpuMeter()
    rss, pinned = meter.host()
    assert 0.5 < rss / psutil.Process().memory_info().rss < 2
    assert (pinned, meter.caches) == (0, False)


# --- spans -------------------------------------------------------------------------------------------------------------------


class Observer:
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def begin(self, *span: Any) -> None:
        self.heard.append(span)

    def end(self) -> None:
        self.heard.append("end")


class Timed(FakeMeter):
    """Its clock is set by hand; it may fail."""

    at = 0.0
    fails = False

    def now(self, kind: str) -> float:
        return self.at

    def read(self) -> Memory:
        if self.fails:
            raise RuntimeError("the device is gone")
        return super().read()


def test_a_span_has_its_own_time_whatever_came_inside_it() -> None:
    meter = Timed()
    recorder = Recorder(meter, None, None)
    with recorder.span("denoise", kind="stage") as stage:
        meter.at = 3.0
        with recorder.span("step 0", kind="step") as step:
            meter.at = 5.0
        meter.at = 10.0
    assert (stage.seconds, step.seconds) == (10.0, 2.0)


def test_steps_and_loads_are_logged_and_shown_as_what_they_are(tmp_path: Path) -> None:
    told: list[RunEvent] = []
    observer = Observer()
    with EventLog(tmp_path / "e.json") as events:
        recorder = Recorder(FakeMeter(), events, told.append, observer)
        with recorder.span("load dit", kind="load", component="dit", part="dit_half") as load:
            pass
        with recorder.span("denoise", kind="stage", component="dit") as stage:
            with recorder.span("step 0", kind="step"):
                pass
            with recorder.span("block 0", kind="block"):
                assert [span.name for span in recorder.open_spans] == ["denoise", "block 0"]
    assert names(tmp_path / "e.json") == ["load dit: start", "load dit", "denoise: start", "step 0", "denoise"]
    assert told == [StageBegan("load dit"), StageBegan("denoise"), StageEnded("denoise", 0)]
    assert (load.part, stage.part, recorder.open_spans) == ("dit_half", "denoise", ())
    assert observer.heard == [
        ("load dit", "load", "dit"),
        "end",
        ("denoise", "stage", "dit"),
        ("step 0", "step", None),
        "end",
        ("block 0", "block", None),
        "end",
        "end",
    ]


def test_when_a_span_that_was_left_by_an_exception_ended_nobody_knows() -> None:
    meter = Timed()
    recorder = Recorder(meter, None, None)
    with recorder.span("denoise", kind="stage"):
        try:
            with recorder.span("step 0", kind="step") as step:
                raise MemoryError
        except MemoryError:
            meter.at = 7.0
    assert (step.seconds, step.end.device_bytes, step.host_rss_bytes) == (None, None, None)
    assert recorder.spans[0].seconds == 7.0


def failing(recorder: Recorder) -> None:
    with recorder.span("denoise", kind="stage", component="dit"), recorder.span("step 0", kind="step"):
        raise MemoryError


def test_of_a_device_that_is_gone_the_spans_of_before_are_kept() -> None:
    meter = Timed()
    observer = Observer()
    recorder = Recorder(meter, None, None, observer)
    with pytest.raises(MemoryError):
        failing(recorder)
    meter.use(50)
    meter.fails = True
    failure = recorder.finish_open(Failure("error", "x", stage="decode", component="vae"))
    assert (failure.stage, failure.component) == ("decode", "vae"), "it has its own"
    (denoise,) = recorder.spans
    assert [child.name for child in denoise.children] == ["step 0"]
    assert (denoise.seconds is None) is False
    assert observer.heard[-2:] == ["end", "end"]


def test_the_spans_of_a_thread_that_hangs_are_kept_without_asking_the_device() -> None:
    meter = Timed()
    recorder = Recorder(meter, None, None)
    with pytest.raises(MemoryError):
        failing(recorder)
    before = dict(meter.calls)
    recorder.abandon_open()
    assert meter.calls == before
    (denoise,) = recorder.spans
    assert (denoise.name, denoise.seconds, denoise.children[0].seconds) == ("denoise", None, None)
    assert recorder.open_spans == ()


def test_a_device_without_a_cache_has_the_driver_s_figure_as_it_was_read() -> None:
    for caches, device_bytes in ((True, 1100), (False, 100)):
        meter = FakeMeter()
        meter.caches = caches
        with Recorder(meter, None, None).span("stage", kind="stage") as stage:
            meter.use(1000)
            meter.use(-1000)
            meter.empty_cache()
        assert stage.peak.device_bytes == device_bytes


def test_a_driver_that_says_less_than_is_reserved_adds_nothing_to_the_peak() -> None:
    assert with_device(Memory(10, 30, 7), Memory(5, 10, 8)) == Memory(10, 30, 30)
    assert with_device(Memory(10, 30, None), Memory(5, 10, 8)) == Memory(10, 30, None)
    assert with_device(Memory(10, 30, 7), Memory(5, 10, None)) == Memory(10, 30, 7)


def test_repeats_of_what_was_not_timed_take_no_time() -> None:
    assert repeated_seconds([Span("block", "block", None, ONE, ONE, ONE, None, repeats=9)]) == 0.0


def test_an_interrupt_ends_a_run_where_its_next_span_begins() -> None:
    recorder = Recorder(FakeMeter(), None, None)
    reached: list[str] = []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a script ignores it

    def run() -> None:
        with deferred():
            os.kill(os.getpid(), signal.SIGINT)
            with recorder.span("step 1", kind="step"):
                reached.append("step 1")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert (reached, recorder.open_spans) == ([], ())
