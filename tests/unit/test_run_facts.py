"""Facts about runs: what counts as fitting, what is noted of one, and which steps and frames are run, told and recorded."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from integration.test_strategies import PLAIN, build
from wanvram.config import Measurement, Request, RunConfig, Strategy
from wanvram.engine.devices import CpuDevice
from wanvram.engine.pipeline import Pipeline
from wanvram.engine.stage_progress import Done
from wanvram.errors import InputError
from wanvram.kept_state import KEPT_NAME
from wanvram.predict.simulate import simulated_device
from wanvram.record import ComponentRecord, Failure, RunRecord
from wanvram.recorder.recorder import Recorder
from wanvram.run import execute as module
from wanvram.run.execute import Output, assembled, check_measurement, device_kind, execute, make_device
from wanvram.spans import Memory, Span
from wanvram.specs import DIT, T5


def config(device: str = "simulated", weights: str = "random", **more: Any) -> RunConfig:
    request = more.pop("request", None) or Request.for_task("t2v-1.3B", size="832*480", frame_num=5, sample_steps=9)
    return RunConfig("x", "", device, request, more.pop("strategy", Strategy()), weights=weights, **more)


# --- the run -----------------------------------------------------------------------------------------------------------------


def test_a_seed_that_nobody_chose_has_31_bits_and_a_chosen_one_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.secrets, "randbelow", lambda end: end - 1)
    asked = config().request
    assert asked.base_seed == -1
    assert module._seeded(config()).request.base_seed == 2**31 - 1
    for seed in (0, 7, 2**40):
        chosen = config(request=replace(asked, base_seed=seed))
        assert module._seeded(chosen) is chosen


def made(budget: int | None, *peaks: tuple[int, int | None], failure: str | None = None) -> RunRecord:
    highs = [Memory(1, reserved, device) for reserved, device in peaks]
    stages = [Span(f"s{n}", "stage", None, high, high, high) for n, high in enumerate(highs)]
    record = RunRecord("cpu", False, {}, None, budget, [], stages, {}, {"peak_rss_bytes": 0, "pinned_bytes": 0})
    return replace(record, failure=failure and Failure(failure, "x"))


@pytest.mark.parametrize(
    ("record", "fits"),
    [
        (made(None, (5, 9)), None),
        (made(9, (5, 9), (1, 2)), True),
        (made(8, (1, 2), (5, 9)), False),
        (made(5, (5, None)), True),
        (made(4, (5, None)), False),
        (made(100, (5, 9), failure="oom"), False),
        (made(100, (5, 9), failure="interrupted"), None),
        (made(None, (5, 9), failure="oom"), None),
    ],
)
def test_a_run_fits_whose_every_stage_is_within_the_budget_to_the_byte(record: RunRecord, fits: bool | None) -> None:
    assert module._fits(record) is fits


def test_where_nothing_is_said_a_gpu_is_used_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, kind in ((True, "cuda"), (False, "simulated")):
        monkeypatch.setattr(module.torch.cuda, "is_available", lambda there=there: there)
        assert [device_kind(config(name)) for name in ("auto", "cpu", "cuda", "simulated")] == [
            *(kind, "cpu", "cuda", "simulated")
        ]


def test_full_size_weights_are_not_made_on_the_cpu() -> None:
    with pytest.raises(InputError, match="would take hours; use --weights tiny"):
        make_device(config("cpu"))
    assert isinstance(make_device(config("cpu", "tiny")), CpuDevice)


def test_a_snapshot_needs_cuda_and_a_trace_one_gpu() -> None:
    check_measurement(config("cpu", "tiny", measurement=Measurement(trace=True)))
    with pytest.raises(InputError, match="an allocator snapshot exists on CUDA only"):
        check_measurement(config("cpu", "tiny", measurement=Measurement(snapshot=True)))
    check_measurement(config("cuda", measurement=Measurement(snapshot=True)))
    with pytest.raises(InputError, match="a run on several GPUs is not traced"):
        check_measurement(config("cuda", strategy=Strategy(ulysses_size=2), measurement=Measurement(trace=True)))
    check_measurement(config("cuda", strategy=Strategy(ulysses_size=2)))


def test_only_a_whole_video_of_its_own_on_a_gpu_is_predicted_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Beside", lambda asked, predict: (asked, predict))
    run, predict = config("cuda"), lambda _: None
    video = Output(None, video=True)
    assert module._beside(run, video, predict) == (run, predict)
    assert module._beside(run, video, None) is None
    assert module._beside(run, Output(None), predict) is None
    assert module._beside(replace(run, weights="tiny"), video, predict) is None
    assert module._beside(replace(run, device="cpu"), video, predict) is None
    for known in ("resume", "predicted", "world"):
        assert module._beside(run, replace(video, **{known: SimpleNamespace()}), predict) is None


def test_of_several_processes_the_first_writes_what_is_made_and_each_its_own_files(tmp_path: Path) -> None:
    alone = Output(tmp_path, video=True)
    assert (alone.is_first, alone.file("a.json")) == (True, tmp_path / "a.json")
    for first in (True, False):
        world: Any = SimpleNamespace(me=SimpleNamespace(is_first=first), file=lambda name: f"own.{name}")
        among = replace(alone, world=world)
        assert (among.is_first, among.file("a.json")) == (first, tmp_path / "own.a.json")
        device = CpuDevice()
        assert (module._outputs(config("cpu", "tiny"), device, among) is not None) is first
    assert module._outputs(config("cpu", "tiny"), CpuDevice(), Output(None, video=True)) is None
    assert module._outputs(config("cpu", "tiny"), CpuDevice(), Output(tmp_path)) is None


def test_a_file_for_a_video_that_is_only_simulated_is_refused(tmp_path: Path) -> None:
    run = config()
    device = simulated_device(run)
    assert module._outputs(run, device, Output(tmp_path, video=True)) is None
    with pytest.raises(InputError, match="nothing is generated on the simulated device"):
        module._outputs(run, device, Output(tmp_path, video=True, save_file=tmp_path / "x.mp4"))


def test_what_stands_in_for_a_picture_that_nobody_gave_is_in_the_record() -> None:
    request = Request.for_task("i2v-14B", size="64*48", frame_num=5, sample_steps=1)
    record = execute(config("cpu", "tiny", request=request, strategy=Strategy(precision="fp32")), Output(None))
    assert any("a grey one of" in note for note in record.notes)


@pytest.mark.parametrize(
    ("device", "weights", "gpu", "where", "said"),
    [
        ("simulated", "random", "h200", "pinned", ["know no language"]),
        ("simulated", "random", "h200", "disk", ["know no language"]),
        ("simulated", "/checkpoint", None, "pinned", ["is not read on the simulated device"]),
        ("cpu", "tiny", None, "disk", ["know no language", "times mean nothing"]),
        ("cpu", "/checkpoint", "h200", "disk", ["gpu: h200 has no effect on cpu"]),
        ("cpu", "/checkpoint", None, "pinned", []),
    ],
)
def test_what_a_record_notes_of_weights_and_cards(
    device: str, weights: str, gpu: str | None, where: str, said: list[str]
) -> None:
    strategy = Strategy(precision="fp32", load_strategy="block", weights_in=where)
    run = config(device, weights, gpu=gpu, strategy=strategy)
    pipeline: Any = SimpleNamespace(device=SimpleNamespace(kind=device, name=device))
    notes = [note for note in module._notes(run, pipeline) if note not in run.notes()]
    assert len(notes) == len(said)
    assert all(text in note for text, note in zip(said, notes, strict=True))


def stub(*spans: Span, extend: Any = None) -> Any:
    """As much of a pipeline as a record is made of."""
    components = [ComponentRecord("dit", 1, 2, 3, 4)]
    recorder = SimpleNamespace(spans=list(spans))
    return SimpleNamespace(device=CpuDevice(), recorder=recorder, extend=extend, records=lambda: components)


def stage(
    name: str, component: str, kind: str = "stage", *, peak: int = 1, rss: int | None = None, pinned: int = 0
) -> Span:
    at, high = Memory(1, 1, None), Memory(peak, peak, None)
    return Span(name, kind, component, at, high, at, host_rss_bytes=rss, pinned_bytes=pinned)


def test_a_record_has_the_highest_ram_of_any_span_at_any_depth() -> None:
    inner = stage("step", "dit", "step", rss=9, pinned=7)
    outer = replace(stage("denoise", "dit", rss=5), children=[inner, stage("step", "dit", "step")])
    run = config("cpu", "tiny")
    for spans, host in (((outer, stage("decode", "vae", pinned=2)), (9, 7)), ((), (0, 0))):
        pipeline = stub(*spans)
        record = module._record(run, pipeline.device, pipeline, None, {})
        assert record.host == {"peak_rss_bytes": host[0], "pinned_bytes": host[1]}
        assert (record.simulated, record.fits, record.failure, record.attention) == (False, None, None, None)
        assert [c.name for c in record.components] == ["dit"]


def test_the_prompt_extender_comes_first_with_the_highest_of_its_own_stages() -> None:
    extender = ComponentRecord("prompt_extender", 5, 6, 7, 0)
    extend = SimpleNamespace(record=extender)
    spans = [
        *(stage("a", "prompt_extender", peak=21), stage("b", "prompt_extender", peak=11)),
        *(stage("load", "prompt_extender", "load", peak=99), stage("denoise", "dit", peak=99)),
    ]
    first, second = module._components(stub(*spans, extend=extend))
    assert (first, second.name) == (replace(extender, activation_bytes=20), "dit")
    assert module._components(stub(extend=extend))[0].activation_bytes == 0
    for none in (None, SimpleNamespace(record=None)):
        assert [c.name for c in module._components(stub(*spans, extend=none))] == ["dit"]


@pytest.mark.parametrize(
    ("failure", "first", "kept"), [(None, True, False), ("error", True, True), (None, False, True)]
)
def test_what_was_kept_goes_when_the_first_process_has_ended_well(
    failure: str | None, first: bool, kept: bool, tmp_path: Path
) -> None:
    (tmp_path / KEPT_NAME).write_text("kept")
    world: Any = None if first else SimpleNamespace(me=SimpleNamespace(is_first=False), file=lambda name: name)
    record = made(None, (5, 9), failure=failure)
    module._write_results(tmp_path, record, Output(tmp_path, world=world), None)
    assert (tmp_path / KEPT_NAME).exists() is kept
    assert (tmp_path / "record.json").exists()
    assert not (tmp_path / "timeline.json").exists()


# --- the stages --------------------------------------------------------------------------------------------------------------


BLOCKS = Measurement(log_interval=2)


def pipeline_of(run: RunConfig) -> Pipeline:
    device = simulated_device(run)
    return assembled(device, run, Recorder(device.meter, None, None)).pipeline


def test_of_equal_steps_a_simulation_makes_those_that_leave_something_else_behind() -> None:
    def run(steps: int) -> int:
        pipeline = pipeline_of(config())
        pipeline.config = replace(pipeline.config, request=replace(pipeline.config.request, sample_steps=steps))
        return pipeline._steps_to_run()

    assert [run(steps) for steps in (1, 3, 4, 5, 6, 7, 8, 9, 50)] == [1, 3, 4, 5, 6, 7, 4, 5, 6]


def test_a_simulated_run_tells_its_last_step_by_its_number_and_the_last_but_one_stands_for_the_others() -> None:
    told: list[Done] = []
    strategy = Strategy(load_strategy="block", offload=True, t5_cpu=True)
    request = replace(config().request, frame_num=1, sample_guide_scale=1.0)
    pipeline = pipeline_of(config("simulated", "tiny", request=request, strategy=strategy, measurement=BLOCKS))
    pipeline.tell = told.append
    with pipeline.device.session():
        pipeline.run(lambda index: nullcontext())
    (denoise,) = [span for span in pipeline.recorder.spans if span.part == "denoise"]
    assert [(step.name, step.repeats) for step in denoise.children] == [
        *(("step 0", 1), ("step 1", 1), ("step 2", 1), ("step 3", 5), ("step 8", 1))
    ]
    names = [f"block {number}" for number in range(DIT["tiny-t2v"].num_layers)]
    assert [[block.name for block in step.children] for step in denoise.children] == [names, [], names, [], names]
    assert [(done.number, done.total, done.left) for done in told if done.unit == "steps"] == [
        *((1, 9, 4), (2, 9, 3), (3, 9, 2), (4, 9, 1), (9, 9, 0))
    ]
    text, dit, vae = pipeline.records()
    assert (text.name, dit.name, vae.name) == ("text_encoder", "dit", "vae")
    assert (text.streamed_bytes, vae.streamed_bytes, text.base_bytes) == (0, 0, 0)
    assert 5 * dit.host_bytes > dit.streamed_bytes > 3 * dit.host_bytes > 0, "five passes, without the embedders"
    (decode,) = [span for span in pipeline.recorder.spans if span.part == "decode"]
    assert vae.activation_bytes == decode.activation_bytes > 0
    assert pipeline.resident() == []


def test_tiny_runs_tell_blocks_steps_and_frames_to_their_end() -> None:
    told: list[Done] = []
    pipeline = build(Pipeline, "t2v-1.3B", 5, PLAIN)
    pipeline.tell = told.append
    with pipeline.device.session():
        pipeline.run(lambda index: nullcontext())
    last = {(done.stage, done.unit): (done.number, done.total, done.left) for done in told}
    blocks = T5["tiny"].num_layers
    assert last == {
        ("encode_text", "blocks"): (blocks, blocks, 0),
        ("denoise", "steps"): (2, 2, 0),
        ("decode", "frames"): (5, 5, 0),
    }
    assert [name for name, _ in pipeline.resident()] == ["weights of text_encoder", "weights of vae", "weights of dit"]
    assert [done.left for done in told if done.unit == "steps"] == [1, 0]


def test_frames_to_encode_are_references_and_a_source_twice_in_every_tile() -> None:
    for tile, tiles in ((None, 1), (8, 2)):
        for task, frames in (("i2v-14B", 5), ("vace-1.3B", 1 + 2 * 5)):
            pipeline = build(Pipeline, task, 5, PLAIN | {"vae_tile": tile})
            assert pipeline._frames_to_encode() == frames * tiles
    without = build(Pipeline, "vace-1.3B", 5, PLAIN)
    without.inputs = replace(without.inputs, source=None)
    assert without._frames_to_encode() == 1 + 5


def test_the_negative_prompt_is_encoded_last_and_only_where_it_guides() -> None:
    for scale, count in ((5.0, 3), (1.0, 2)):
        request = replace(config().request, prompts=("a", "b"), sample_guide_scale=scale)
        pipeline = pipeline_of(config(request=request))
        pipeline.prompts = ["a", "b"]
        assert pipeline.texts() == ["a", "b", request.negative_prompt][:count]
