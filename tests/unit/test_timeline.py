"""Timelines: every byte at a peak has an owner, the sum is the peak, the segment map is the allocator's, and nothing is disturbed."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from wanvram.analysis.stages import analyze_run
from wanvram.engine.devices import SimulatedDevice
from wanvram.errors import InputError, OutOfMemory
from wanvram.models.t5 import T5Encoder
from wanvram.record import Failure, RunRecord
from wanvram.recorder.recorder import Recorder
from wanvram.simulate.allocator import AllocatorSettings, CachingAllocator
from wanvram.simulate.gpus import GPUS
from wanvram.simulate.libraries import Libraries
from wanvram.simulate.memory import SimulatedMemory
from wanvram.simulate.timeline import MAX_GROUPS, MAX_POINTS, Timeline
from wanvram.specs import T5
from wanvram.timeline_record import AliveBlocks, read_timeline
from wanvram.units import MIB

SETTINGS = [AllocatorSettings(), AllocatorSettings(expandable_segments=True)]


class Script:
    """A hand-made run: allocator calls by name, told to a timeline as SimulatedMemory tells them."""

    def __init__(self, settings: AllocatorSettings | None = None) -> None:
        self.allocator = CachingAllocator(settings, total_bytes=2**35)
        self.timeline = Timeline(self.allocator, outside_bytes=1000)
        self.handles: dict[Any, int] = {}

    def take(self, name: Any, nbytes: int, operation: str = "aten.mm.default") -> None:
        self.handles[name] = self.allocator.malloc(nbytes)
        self.timeline.malloc(self.handles[name], operation, torch.empty(nbytes, dtype=torch.uint8, device="meta"))

    def give(self, *names: Any) -> None:
        for name in names:
            self.allocator.free(self.handles[name])
            self.timeline.free(self.handles.pop(name))

    def result(self) -> dict[str, Any]:
        return written(self.timeline)


def written(timeline: Timeline) -> dict[str, Any]:
    """As timeline.json has it; what is read of it is what was written."""
    record = timeline.record()
    result = json.loads(json.dumps(record.to_json()))
    assert read_timeline(result) == record
    return dict(result)


def moment(result: dict[str, Any], label: str) -> dict[str, Any]:
    return next(m for m in result["moments"] if m["label"] == label)


def check_sums(result: dict[str, Any]) -> None:
    """Owners add up to allocated, segments to reserved, active blocks to allocated; at every moment, to the byte."""
    assert result["moments"]
    for m in result["moments"]:
        assert sum(group["bytes"] for group in m["alive"]) == m["allocated_bytes"], m["label"]
        assert sum(segment["bytes"] for segment in m["segments"]) == m["reserved_bytes"], m["label"]
        blocks = [block for segment in m["segments"] for block in segment["blocks"]]
        assert sum(size for _, size, state in blocks if state == "active") == m["allocated_bytes"], m["label"]
        assert sum(size for _, size, _ in blocks) == m["reserved_bytes"], m["label"]
        assert sum(w["bytes"] for w in result["weights"] if w["start"] <= m["x"] < w["end"]) == sum(
            group["bytes"] for group in m["alive"] if group["operation"] == "weights"
        )


def loaded_script() -> Script:
    """load: 30 MiB scratch beside 40 MiB of weights; denoise: 3 + 3 + 12 MiB, one of the 3 gone before the 12 come."""
    run = Script()
    run.timeline.begin("load dit", "load", "dit")
    run.take("scratch", 30 * MIB)
    run.take("weights", 40 * MIB)
    run.give("scratch")
    run.timeline.end()
    run.timeline.begin("denoise", "stage", "dit")
    run.timeline.begin("step 0", "step", None)
    run.take("a", 3 * MIB)
    run.take("b", 3 * MIB)
    run.give("a")
    run.take("big", 12 * MIB)
    run.give("big")
    run.timeline.end()
    run.timeline.end()
    return run


# --- hand-made streams -----------------------------------------------------------------------------------------------


def test_stages_and_steps_lie_where_the_spans_were_and_a_peak_has_the_owners_it_had() -> None:
    result = loaded_script().result()
    check_sums(result)
    assert result["stages"] == [
        {"name": "load dit", "component": "dit", "kind": "load", "start": 0, "end": 3},
        {"name": "denoise", "component": "dit", "kind": "stage", "start": 3, "end": 8},
        {"name": "step 0", "component": None, "kind": "step", "start": 3, "end": 8},
    ]
    load, denoise = moment(result, "peak of load dit"), moment(result, "peak of denoise")
    assert (load["x"], load["allocated_bytes"], load["reserved_bytes"]) == (2, 70 * MIB, 70 * MIB)
    assert [(g["operation"], g["bytes"]) for g in load["alive"]] == [
        ("weights", 40 * MIB),
        ("aten.mm.default", 30 * MIB),
    ]
    assert denoise["x"] == 7
    assert [(g["operation"], g["bytes"], g["component"], g["stage"], g["shape"]) for g in denoise["alive"]] == [
        ("weights", 40 * MIB, "dit", "load dit", [40 * MIB]),
        ("aten.mm.default", 12 * MIB, "dit", "denoise", [12 * MIB]),
        ("aten.mm.default", 3 * MIB, "dit", "denoise", [3 * MIB]),
    ]
    assert moment(result, "peak") == load | {"label": "peak"}


def test_holes_are_where_the_allocator_left_them() -> None:
    """The scratch's 30 MiB segment serves everything of the step: a, b and big in a row, then a is given back."""
    denoise = moment(loaded_script().result(), "peak of denoise")
    segments = {segment["bytes"]: segment["blocks"] for segment in denoise["segments"]}
    assert segments == {
        30 * MIB: [
            [0, 3 * MIB, "inactive"],
            [3 * MIB, 3 * MIB, "active"],
            [6 * MIB, 12 * MIB, "active"],
            [18 * MIB, 12 * MIB, "inactive"],
        ],
        40 * MIB: [[0, 40 * MIB, "active"]],
    }


def test_a_malloc_and_the_segment_it_needed_are_one_point_and_a_segment_given_back_is_its_own() -> None:
    run = Script()
    run.take("a", MIB)
    run.give("a")
    run.allocator.empty_cache()
    run.timeline.outside(500)
    assert run.result()["points"] == [
        [0, 0, 0, 1000],
        [1, MIB, 2 * MIB, 1000 + 2 * MIB],
        [2, 0, 2 * MIB, 1000 + 2 * MIB],
        [3, 0, 0, 1000],
        [4, 0, 0, 1500],
    ]


def test_weights_are_what_survives_a_load_span_for_as_long_as_it_lives() -> None:
    run = Script()
    run.timeline.begin("load dit", "load", "dit")
    for name in ("w1", "w2", "scratch"):
        run.take(name, 2 * MIB)
    run.give("scratch")
    run.timeline.end()
    run.take("x", MIB)
    run.give("w1", "w2")
    run.timeline.begin("load vae", "load", "vae")
    run.take("v", 4 * MIB)
    run.timeline.end()
    assert run.result()["weights"] == [
        {"component": "dit", "bytes": 2 * MIB, "start": 1, "end": 2},
        {"component": "dit", "bytes": 4 * MIB, "start": 2, "end": 6},
        {"component": "dit", "bytes": 2 * MIB, "start": 6, "end": 7},
        {"component": "vae", "bytes": 4 * MIB, "start": 8, "end": 9},
    ]


def test_what_a_load_that_broke_off_had_loaded_is_weights_too() -> None:
    script = Script()
    script.timeline.begin("load dit", "load", "dit")
    script.take("a", 8 * MIB)
    script.take("b", 16 * MIB)
    script.give("a", "b")  # the exception that ended it freed them before the span was closed
    script.timeline.end()
    peak = moment(script.result(), "peak of load dit")
    assert [(g["component"], g["operation"], g["bytes"]) for g in peak["alive"]] == [
        ("dit", "weights", 16 * MIB),
        ("dit", "weights", 8 * MIB),
    ]


def test_pages_mapped_for_a_malloc_that_failed_are_reserved_all_the_same() -> None:
    run = Script(AllocatorSettings(expandable_segments=True))
    run.allocator.total_bytes = 50 * MIB
    run.timeline.begin("denoise", "stage", "dit")
    for name in ("a", "b", "c"):
        run.take(name, 10 * MIB)
    run.give("b")
    with pytest.raises(OutOfMemory):
        run.take("too large", 45 * MIB)
    run.timeline.end()
    last = run.result()["points"][-1]
    assert last[1:3] == [20 * MIB, run.allocator.reserved_bytes]


def test_equal_tensors_of_one_place_are_one_group_and_those_of_another_stage_are_not() -> None:
    run = Script()
    for stage, count in (("encode_text", 2), ("denoise", 3)):
        run.timeline.begin(stage, "stage", None)
        for number in range(count):
            run.take((stage, number), 600)
        run.timeline.end()
    groups = moment(run.result(), "peak")["alive"]
    assert [(g["stage"], g["count"], g["bytes"]) for g in groups] == [("denoise", 3, 3072), ("encode_text", 2, 2048)]


def test_a_buffer_that_a_library_keeps_belongs_to_no_component() -> None:
    run = Script()
    run.timeline.begin("denoise", "stage", "dit")
    for operation, shared in (("cublas workspace", True), ("wanvram.conv3d.default workspace", False)):
        run.timeline.malloc(run.allocator.malloc(MIB), operation, shared=shared)
    groups = moment(run.result(), "peak")["alive"]
    assert {g["operation"]: g["component"] for g in groups} == {
        "cublas workspace": None,
        "wanvram.conv3d.default workspace": "dit",
    }


def test_more_groups_than_fit_are_merged_without_losing_a_byte() -> None:
    run = Script()
    for number in range(MAX_GROUPS + 50):
        run.take(number, 512 * (number + 1))
    result = run.result()
    check_sums(result)
    groups = moment(result, "peak")["alive"]
    assert len(groups) == MAX_GROUPS
    assert (groups[-1]["operation"], groups[-1]["count"]) == ("(other)", 51)
    assert groups[-1]["bytes"] == sum(512 * (number + 1) for number in range(51))


def test_a_long_run_keeps_every_stages_extremes_within_the_limit_of_points() -> None:
    run, rng = Script(), random.Random(1)
    for stage in range(4):
        run.timeline.begin(f"stage {stage}", "stage", None)
        for number in range(4000):
            run.take(number, rng.randrange(1, 8 * MIB))
            if number >= 20:
                run.give(number - 20)
        run.give(*list(run.handles))
        run.timeline.end()
    full = run.timeline._series()
    result = run.result()
    assert 2000 < len(result["points"]) <= MAX_POINTS
    for entry in result["stages"]:
        start, end = entry["start"], entry["end"]
        kept = [p for p in result["points"] if start <= p[0] <= end]
        assert (kept[0][0], kept[-1][0]) == (start, end)
        assert max(p[1] for p in kept) == full[0, start : end + 1].max()
        assert min(p[1] for p in kept) == full[0, start : end + 1].min()
        assert max(p[2] for p in kept) == full[1, start : end + 1].max()
        allocated, reserved = full[:2, start : end + 1]
        fragmentation = (reserved - allocated)[reserved > 0] / reserved[reserved > 0]
        assert max(1 - p[1] / p[2] for p in kept if p[2]) == pytest.approx(fragmentation.max(), abs=1e-12)
    assert all(full[0, p[0]] == p[1] and full[1, p[0]] == p[2] for p in result["points"])


def test_a_timeline_of_nothing_is_one_point() -> None:
    result = Script().result()
    assert (result["points"], result["weights"]) == ([[0, 0, 0, 1000]], [])
    assert moment(result, "peak")["alive"] == []


def test_an_allocator_already_in_use_is_refused() -> None:
    allocator = CachingAllocator()
    allocator.malloc(1)
    with pytest.raises(InputError, match="before anything is allocated"):
        Timeline(allocator)


@pytest.mark.parametrize("settings", SETTINGS, ids=["default", "expandable"])
@pytest.mark.parametrize("seed", range(5))
def test_the_map_and_the_points_are_the_allocators_own_at_any_time(settings: AllocatorSettings, seed: int) -> None:
    run, rng = Script(settings), random.Random(seed)
    states = []
    for number in range(300):
        run.take(number, int(2 ** rng.uniform(8, 25)))
        states.append((len(run.timeline._kinds), run.allocator.segments(), run.allocator.reserved_bytes))
        while len(run.handles) > rng.randrange(5, 60):
            run.give(rng.choice(list(run.handles)))
        if number % 70 == 69:
            run.allocator.empty_cache()
    blocks = run.timeline._blocks()
    series = run.timeline._series()
    for x, views, reserved in states:
        expected = sorted(cells for view in views for cells in _mapped(view.blocks))
        assert sorted([list(cell) for cell in s.blocks] for s in run.timeline._map(blocks, x)) == expected
        assert series[1, x] == reserved


def _mapped(blocks: tuple[tuple[int, int, str], ...]) -> list[list[list[Any]]]:
    """An allocator's blocks as the stretches between unmapped ones, with offsets."""
    stretches: list[list[tuple[int, int, str]]] = [[]]
    for block in blocks:
        if block[2] == "unmapped":
            stretches.append([])
        else:
            stretches[-1].append(block)
    words = {"allocated": "active", "free": "inactive"}
    return [[[a - part[0][0], size, words[state]] for a, size, state in part] for part in stretches if part]


# --- the simulated device --------------------------------------------------------------------------------------------


def simulated(settings: AllocatorSettings, limit_bytes: int | None = None) -> SimulatedMemory:
    gpu = GPUS["h200"]
    allocator = CachingAllocator(settings, total_bytes=gpu.total_bytes, limit_bytes=limit_bytes)
    return SimulatedMemory(gpu, allocator, Libraries(gpu), keep_events=True)


def two_prompts(memory: SimulatedMemory, timeline: Timeline | None) -> tuple[Recorder, Failure | None]:
    """A tiny text encoder loaded, run twice and released, under the recorder; an OutOfMemory ends it."""
    device, recorder = SimulatedDevice(memory), Recorder(memory, None, None, timeline)
    failure = None

    def observed(blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
        for number, block in enumerate(blocks):
            with recorder.span(f"block {number}", kind="block", component="text_encoder"):
                yield block

    try:
        with device.session():
            with recorder.span("load text_encoder", kind="load", component="text_encoder"):
                encoder = _loaded(device)
            with recorder.span("encode_text", kind="stage", component="text_encoder"):
                contexts = []
                for number, tokens in enumerate((40, 300)):
                    with recorder.span(f"prompt {number}", kind="step", component="text_encoder"):
                        rows = device.upload(device.host_empty((tokens, encoder.spec.dim), torch.bfloat16))
                        contexts.append(encoder(rows, walk=observed))
                        del rows
            del encoder
            device.empty_cache()
    except OutOfMemory as error:
        failure = recorder.finish_open(Failure("oom", str(error)))
    return recorder, failure


def _loaded(device: SimulatedDevice) -> T5Encoder:
    """Every parameter a tensor of its own on the device."""
    with device.building(), torch.device("meta"):
        encoder = T5Encoder(T5["tiny"], torch.bfloat16)
    for module in encoder.modules():
        for name, parameter in module.named_parameters(recurse=False):
            weight = device.empty(tuple(parameter.shape), parameter.dtype)
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
    return encoder


def record_of(recorder: Recorder, failure: Failure | None) -> RunRecord:
    return RunRecord("simulated:h200", True, {}, None, None, [], recorder.spans, {}, {}, failure)


@pytest.mark.parametrize("settings", SETTINGS, ids=["default", "expandable"])
def test_a_simulated_run_is_the_same_with_a_timeline_and_its_peaks_are_the_recorders(
    settings: AllocatorSettings,
) -> None:
    plain = simulated(settings)
    two_prompts(plain, None)
    memory = simulated(settings)
    timeline = Timeline.attach(memory)
    recorder, _ = two_prompts(memory, timeline)
    assert memory.events == plain.events
    result = written(timeline)
    check_sums(result)
    for span in recorder.spans:
        found = moment(result, f"peak of {span.name}")
        assert (found["allocated_bytes"], found["component"]) == (span.peak.allocated_bytes, "text_encoder")
    at = {point[0]: point[1:] for point in result["points"]}
    spans = [span for stage in recorder.spans for span in stage.walk() if span.kind != "block"]
    for entry, span in zip(result["stages"], spans, strict=True):
        assert entry["name"] == span.name
        for figures, x in ((span.start, entry["start"]), (span.end, entry["end"])):
            assert at[x] == [figures.allocated_bytes, figures.reserved_bytes, figures.device_bytes], (span.name, x)
    (weights,) = [w for w in result["weights"] if w["start"] <= result["stages"][1]["start"] < w["end"]]
    assert weights["bytes"] == recorder.spans[0].end.allocated_bytes
    analysis = analyze_run(record_of(recorder, None), read_timeline(result))
    assert sum(owner.bytes for owner in analysis.peaks[0].by_component) == recorder.spans[1].peak.allocated_bytes


def test_the_place_of_a_tensor_is_the_model_code_that_asked_and_its_caller() -> None:
    memory = simulated(AllocatorSettings())
    timeline = Timeline.attach(memory)
    two_prompts(memory, timeline)
    places = {re.sub(r":\d+", "", owner.module or ""): owner.operation for owner in timeline._owner_list()}
    assert places["t5.T5Block.forward > T5FeedForward.forward"] == "aten.mm.default"
    assert places["t5.T5Encoder.encode > T5Block.forward"] == "aten.add.Tensor"
    for owner in timeline._owner_list():
        assert owner.module is None or re.search(r":\d+$", owner.module)
        assert owner.place == AliveBlocks(1, 1, module=owner.module).place, "told and read are one name"
    assert not any("comp>" in place or "genexpr>" in place or "devices" in place for place in places)


@pytest.mark.parametrize("settings", SETTINGS, ids=["default", "expandable"])
def test_a_run_out_of_memory_has_a_timeline_up_to_its_end(settings: AllocatorSettings) -> None:
    memory = simulated(settings, limit_bytes=22 * MIB)  # the pools' first segments, but no cuBLAS workspace
    timeline = Timeline.attach(memory)
    recorder, failure = two_prompts(memory, timeline)
    assert failure is not None
    assert failure.stage == "encode_text"
    result = written(timeline)
    check_sums(result)
    assert [entry["name"] for entry in result["stages"]] == ["load text_encoder", "encode_text", "prompt 0"]
    assert moment(result, "peak of encode_text")["allocated_bytes"] == recorder.spans[-1].peak.allocated_bytes
    assert result["points"][-1][2] == recorder.spans[-1].end.reserved_bytes
    assert analyze_run(record_of(recorder, failure), read_timeline(result)).bottleneck is not None
