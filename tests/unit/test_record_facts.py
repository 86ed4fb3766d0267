"""What a record must say of a run: whose time a step is, which peak belongs to which stage, what RAM it took."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from unit.test_recorder import FakeMeter
from wanvram.config import Measurement, Request, RunConfig, Strategy
from wanvram.errors import InputError
from wanvram.predict.simulate import simulate
from wanvram.record import RunRecord
from wanvram.recorder.events import EventLog
from wanvram.recorder.recorder import Recorder, repeated_seconds, with_device
from wanvram.run.execute import Output, execute
from wanvram.run.progress import StageProgress
from wanvram.spans import Memory, Span, folded

NONE = Memory(0, 0, None)


def span(name: str, seconds: float | None = None, *, repeats: int = 1, pinned: int = 0, rss: int | None = None) -> Span:
    return Span(name, "step", "dit", NONE, NONE, NONE, seconds, rss, pinned, repeats=repeats)


def record(*stages: Span) -> RunRecord:
    return RunRecord("cpu", False, {}, None, None, [], list(stages), {}, {"peak_rss_bytes": 0, "pinned_bytes": 0})


def denoise(*steps: Span) -> Span:
    return Span("denoise", "stage", "dit", NONE, NONE, NONE, children=list(steps))


def test_one_slow_step_and_a_span_that_stands_for_49_give_the_fast_one() -> None:
    assert record(denoise(span("0", 9.0), span("1", 1.0, repeats=49))).step_seconds() == 1.0
    assert record(denoise(span("0", 1.0), span("1", 9.0))).step_seconds() == 5.0, "of two the mean"


def test_spans_that_differ_in_pinned_memory_stay_apart_and_what_is_joined_keeps_its_highest_rss() -> None:
    joined = folded([span("a", rss=5), span("b", rss=9), span("c", rss=7), span("d", pinned=1, rss=1)])
    assert [(s.name, s.repeats, s.host_rss_bytes, s.pinned_bytes) for s in joined] == [("a", 3, 9, 0), ("d", 1, 1, 1)]
    assert folded([span("a"), span("b", rss=3)])[0].host_rss_bytes == 3, "one of two is known"


def test_a_record_with_a_span_that_never_happened_is_damaged() -> None:
    data = record(denoise(span("0", 1.0))).to_json()
    data["stages"][0]["repeats"] = 0
    with pytest.raises(InputError, match="repeats of 'denoise' is outside"):
        RunRecord.from_json(data)


def test_time_counts_the_repeats_inside_of_what_is_itself_repeated() -> None:
    inner = span("block", 2.0, repeats=3)
    outer = replace(span("step", 10.0, repeats=2), children=[inner])
    assert repeated_seconds([outer]) == 10.0 + 2 * 2.0


def test_the_device_is_waited_for_before_a_span_begins_and_before_it_ends() -> None:
    meter = FakeMeter()
    recorder = Recorder(meter, None, None)
    order: list[str] = []
    meter.synchronize = lambda: order.append("wait")  # type: ignore[method-assign]
    meter.now = lambda kind: order.append("clock") or 0.0  # type: ignore[assignment,func-returns-value]
    with recorder.span("denoise", kind="stage"):
        order.append("work")
    assert order == ["wait", "clock", "work", "wait", "clock"], "else it would get the time of what came before"
    order.clear()
    with recorder.span("block 0", kind="block"):
        order.append("work")
    assert "wait" not in order


def test_what_the_driver_said_at_the_peak_is_never_lowered_by_what_it_says_at_the_end() -> None:
    peak, end = Memory(10, 30, 900), Memory(5, 10, 200)
    assert with_device(peak, end).device_bytes == 900
    assert with_device(replace(peak, device_bytes=100), end).device_bytes == 30 + 190
    assert with_device(peak, replace(end, reserved_bytes=30)) == peak


def test_a_surrogate_in_a_name_is_kept_as_an_escape(tmp_path: Path) -> None:
    path = tmp_path / "memory_events.json"
    log = EventLog(path)
    log.log("a\udcffb", Memory(1, 2, None), {})
    log.close()
    assert json.loads(path.read_text(encoding="utf-8"))[0]["name"] == "a\\udcffb"


# --- whole runs --------------------------------------------------------------------------------------------------------------


def tiny(**request: object) -> RunConfig:
    asked = Request.for_task("t2v-1.3B", size="64*64", frame_num=5, sample_steps=2, base_seed=3, **request)
    return RunConfig("x", "", "cpu", asked, Strategy(precision="fp32"), weights="tiny")


def test_the_rss_of_a_run_on_the_cpu_is_over_its_weights_and_that_of_no_span_is_higher(tmp_path: Path) -> None:
    made = execute(tiny(), Output(tmp_path / "run"))
    assert made.failure is None
    spans = [s for stage in made.stages for s in stage.walk()]
    assert made.host["peak_rss_bytes"] == max(s.host_rss_bytes or 0 for s in spans)
    assert made.host["peak_rss_bytes"] > sum(c.base_bytes for c in made.components) > 0
    assert made.host["peak_rss_bytes"] < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def simulated(steps: int, **strategy: object) -> RunRecord:
    request = Request.for_task("t2v-1.3B", size="832*480", frame_num=81, sample_steps=steps)
    config = RunConfig("x", "", "simulated", request, Strategy(**strategy), Measurement(profile_memory=False))  # type: ignore[arg-type]
    made, _ = simulate(config)
    assert made.failure is None
    return made


def test_what_denoising_leaves_to_decoding_repeats_every_four_steps_and_not_every_two() -> None:
    """The steps that are left out matter to decoding's reserved memory: 8 MiB of 832x480 between 4 and 6 of UniPC's steps."""
    reserved = {
        steps: next(s.peak.reserved_bytes for s in simulated(steps, offload=True).stages if s.part == "decode")
        for steps in (4, 6, 8, 10)
    }
    assert reserved[4] == reserved[8]
    assert reserved[6] == reserved[10]
    assert reserved[6] - reserved[4] == 8 * 2**20


def test_the_note_about_weights_on_no_disk_is_of_real_runs_only(tmp_path: Path) -> None:
    def said(made: RunRecord) -> bool:
        return any("generated weights are on no disk" in note for note in made.notes)

    assert not said(simulated(4, load_strategy="block", weights_in="disk", offload=True))
    config = replace(tiny(), strategy=Strategy(precision="fp32", load_strategy="block", weights_in="disk"))
    assert said(execute(config, Output(tmp_path / "run")))


def test_of_two_videos_a_finished_latent_waits_on_the_host() -> None:
    """16 x 21 x 60 x 104 float32, 8 MiB: denoising the second begins with no more on the device than the first did."""
    request = Request.for_task("t2v-1.3B", size="832*480", frame_num=81, sample_steps=4, prompts=("a", "b", "c"))
    config = RunConfig("x", "", "simulated", request, Strategy(offload=True), Measurement(profile_memory=False))
    made, _ = simulate(config)
    starts = [s.start.allocated_bytes for s in made.stages if s.part == "denoise"]
    assert len(starts) == 3
    assert starts[2] - starts[1] < 2**20
    assert starts[1] - starts[0] < 2**20


def test_each_half_of_the_vae_counts_with_its_own_parameters_and_the_larger_host_bytes() -> None:
    request = Request.for_task("vace-1.3B", size="832*480", frame_num=5, sample_steps=2)
    config = RunConfig("x", "", "simulated", request, Strategy(offload=True), Measurement(profile_memory=False))
    made, _ = simulate(config)
    (vae,) = [c for c in made.components if c.name == "vae"]
    assert vae.parameters == 126_892_531, "the official file's, encoder and decoder together"


# --- progress ----------------------------------------------------------------------------------------------------------------


def test_progress_is_told_at_most_every_two_seconds_and_at_the_end_of_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    from wanvram.engine.stage_progress import Done

    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    told: list[int] = []
    progress = StageProgress(lambda event: told.append(event.done), simulated=False)  # type: ignore[union-attr]
    for number in range(1, 11):
        now[0] += 0.75
        progress(Done("denoise", number, 10, "steps", 10 - number))
    assert told == [3, 6, 9, 10]
