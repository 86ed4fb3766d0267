"""Facts about records, spans and their analysis at the edges: what is nothing, what is the first of equals, what is the last."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from unit.test_analysis import MOMENT, document, record, span, step, timeline
from wanvram.analysis.peak import component_of, describe_moment, owners, stage_of, unusable, weights_at
from wanvram.analysis.stages import analyze_run, steady_growth
from wanvram.errors import DamagedError, InputError
from wanvram.record import (
    MAX_RECORD_BYTES,
    ComponentRecord,
    Failure,
    Predicted,
    RankRecord,
    RunRecord,
    Times,
    dotted,
    write_atomically,
)
from wanvram.spans import Copies, Memory, Span, folded, with_moments
from wanvram.timeline_record import (
    AliveBlocks,
    BlockState,
    TimelineMoment,
    TimelineSegment,
    WeightsStretch,
    read_timeline,
)
from wanvram.units import MIB

NOTHING = Memory(0, 0, None)


def empty(*stages: Span, **more: Any) -> RunRecord:
    return RunRecord(**({"device": "cuda:x", "simulated": False, "config": {}, "stages": [*stages], "host": {}} | more))


def stage(name: str, seconds: float | None = None, *, peak: Memory = NOTHING, **more: Any) -> Span:
    return Span(name, "stage", more.pop("component", "dit"), NOTHING, peak, NOTHING, seconds, **more)


# --- spans and copies --------------------------------------------------------------------------------------------------------


def test_of_two_moments_each_figure_is_the_higher_one_and_one_unknown_device_does_not_count() -> None:
    assert Memory(1, 9, 5).highest(Memory(2, 8, 6)) == Memory(2, 9, 6)
    assert Memory(1, 1, None).highest(Memory(1, 1, 6)) == Memory(1, 1, 6).highest(Memory(1, 1, None)) == Memory(1, 1, 6)
    assert NOTHING.highest(NOTHING).device_bytes is None


def test_what_decides_is_the_device_also_when_it_says_nothing_is_used_and_else_what_is_reserved() -> None:
    assert [Memory(1, 2, device).deciding_bytes for device in (7, 0, None)] == [7, 0, 2]
    assert Memory(0, 1, None).fragmentation == 1.0


def test_copies_count_from_nothing_and_of_their_time_what_was_waited_for_is_not_hidden() -> None:
    assert Copies() == Copies(0, 0.0, 0.0)
    assert Copies().hidden_share is None
    assert Copies(8, 4.0).hidden_share == 1.0
    assert Copies(8, 4.0, 1.0).hidden_share == 0.75
    assert Copies(8, 4.0, 5.0).hidden_share == 0.0, "at most all of it"
    assert Copies(8, 4.0, 1.0) + Copies(2, 1.0, 3.0) == Copies(10, 5.0, 4.0)
    assert Copies(8, 4.0, 1.0) - Copies(2, 1.0, 1.0) == Copies(6, 3.0, 0.0)


def test_spans_are_nested_twenty_deep_and_no_deeper() -> None:
    def nested(depth: int) -> list[dict[str, Any]]:
        made = stage("x")
        for _ in range(depth):
            made = stage("x", children=[made])
        return [made.to_json()]

    (found,) = with_moments(nested(19))
    assert (found["start"], len(found["children"])) == (
        {"allocated_bytes": 0, "reserved_bytes": 0, "device_bytes": None},
        1,
    )
    with pytest.raises(DamagedError, match="nested more than 20 deep"):
        with_moments(nested(20))


def test_a_span_of_which_little_is_told_happened_once_made_one_video_and_pinned_nothing() -> None:
    data = Span("denoise", "stage", None, NOTHING, NOTHING, NOTHING).to_json()
    assert (data["part"], data["repeats"], data["videos"], data["pinned_bytes"]) == ("denoise", 1, 1, 0)
    assert (data["seconds"], data["host_rss_bytes"], data["notes"], data["children"]) == (None, None, [], [])
    older = {key: value for key, value in data.items() if key not in ("part", "videos", "repeats", "pinned_bytes")}
    assert RunRecord.from_json(empty().to_json() | {"stages": [older]}).stages[0].to_json() == data


@pytest.mark.parametrize(
    ("component", "part", "planned"),
    [
        ("vae", "vae", "vae_encoder"),
        ("vae", "vae_encoder", "vae_encoder"),
        ("vae", "encode_video", "vae_encoder"),
        ("vae", "decode", "vae_decoder"),
        ("vae", "vae_decoder", "vae_decoder"),
        ("dit", "vae", "dit"),
        (None, "save", "save"),
    ],
)
def test_a_plan_names_the_halves_of_the_vae_apart(component: str | None, part: str, planned: str) -> None:
    assert stage(part, component=component).planned == planned


def test_a_mean_of_folded_spans_is_unknown_if_one_of_them_is_and_weighs_each_by_how_many_it_stands_for() -> None:
    assert folded([stage("a", 3.0, repeats=3), stage("b", 7.0)])[0].seconds == 4.0
    assert folded([stage("a", 2.0, repeats=3), stage("b", 7.0, repeats=2)])[0].seconds == 4.0
    assert folded([stage("a", 3.0), stage("b")])[0].seconds is None
    assert folded([stage("a"), stage("b", 3.0)])[0].seconds is None
    assert folded([stage("a", notes=["mine"]), stage("b"), stage("c")])[0].notes == [
        "mine",
        "the same memory through c",
    ]
    apart = [stage("a"), stage("b", peak=Memory(1, 1, None)), stage("c")]
    assert [s.name for s in folded(apart)] == ["a", "b", "c"], "only neighbours"


def test_fluctuation_is_that_of_all_moments_inside() -> None:
    inside = Span("step", "step", None, Memory(5, 5, None), Memory(90, 90, None), Memory(2, 2, None))
    outer = Span(
        "x", "stage", None, Memory(10, 10, None), Memory(50, 50, None), Memory(20, 20, None), children=[inside]
    )
    assert (outer.fluctuation_bytes, outer.activation_bytes) == (88, 40)


# --- records -----------------------------------------------------------------------------------------------------------------


def test_a_record_of_before_there_were_ranks_or_streaming_has_none() -> None:
    made = empty(stage("denoise"), components=[ComponentRecord("dit", 1, 2, 3, 4)])
    made.ranks = [RankRecord((0,), "cuda:x", made.stages, {})]
    data = json.loads(json.dumps(made.to_json()))
    for key in ("streamed_bytes", "copy_seconds", "hidden_share"):
        del data["components"][0][key]
    for key in ("exchanged_bytes", "exchange_seconds", "failure", "communication_bytes"):
        del data["ranks"][0][key]
    again = RunRecord.from_json(data)
    assert again.components == [ComponentRecord("dit", 1, 2, 3, 4, 0, 0.0, None)]
    assert again.ranks == [RankRecord((0,), "cuda:x", made.stages, {}, 0, 0.0, None, None)]
    assert again.to_json() == made.to_json() | {"ranks": [again.ranks[0].to_json()]}
    del data["ranks"]
    assert RunRecord.from_json(data).gpus == 1


@pytest.mark.parametrize(
    ("ranks", "name"),
    [((0,), "0"), ((4,), "4"), ((0, 1), "0-1"), ((1, 2, 3), "1-3"), ((1, 3), "1, 3"), ((0, 2, 3), "0, 2, 3")],
)
def test_ranks_that_follow_each_other_are_named_by_the_first_and_the_last(ranks: tuple[int, ...], name: str) -> None:
    assert RankRecord(ranks, "cuda:x", [], {}).name == name


def test_a_record_of_nothing_has_a_peak_of_nothing() -> None:
    data = empty().to_json()
    assert data["peak"] == {
        "allocated_bytes": 0,
        "reserved_bytes": 0,
        "device_bytes": None,
        "stage": None,
        "component": None,
    }
    assert data["fragmentation"] == {"at_peak": 0.0, "stages": {}}
    assert data["videos"] == {"together": 1, "own_seconds": [], "seconds_each": None}
    assert RankRecord((0,), "cuda:x", [], {}).to_json()["peak"] is None


def test_the_stage_of_the_peak_is_the_devices_and_on_the_cpu_that_of_tensors() -> None:
    stages = [
        stage("tensors", peak=Memory(9, 9, 10)),
        stage("device", peak=Memory(5, 5, 20)),
        stage("known", peak=Memory(7, 7, None)),
    ]
    gpu, cpu = empty(*stages).peak_span(), empty(*stages, device="cpu").peak_span()
    assert gpu is not None
    assert cpu is not None
    assert (gpu.name, cpu.name) == ("device", "tensors")
    assert (empty().cached, empty(device="cpu").cached) == (True, False)


def test_a_video_has_its_share_of_what_was_made_together() -> None:
    both = [stage("denoise", 30.0, videos=2), stage("decode", 4.0), stage("save", 1.0)]
    second = [stage("decode 2", 5.0, part="decode"), stage("save 2", 2.0, part="save")]
    made = empty(*both, *second, stage("encode_text", 100.0))
    assert made.video_seconds() == [20.0, 22.0]
    assert (made.together, made.seconds_each()) == (2, None)
    assert replace(made, times=Times(1.0, 80.0)).seconds_each() == 40.0
    assert replace(made, times=Times(1.0, 80.0), failure=Failure("oom", "full")).seconds_each() is None
    assert empty(*both).video_seconds() == [20.0], "the other was not decoded"
    unknown = [replace(both[0], seconds=None), *both[1:]]
    assert empty(*unknown).video_seconds() == [None]
    halves = [stage("denoise", 8.0, component="high"), stage("denoise", 9.0, component="low")]
    assert empty(*halves, *both[1:]).video_seconds() == [22.0], "two transformers take turns in one video"
    assert empty(times=Times(1.0, 80.0)).seconds_each() is None


def test_a_step_is_one_of_as_many_videos_as_are_made_together() -> None:
    def denoise(videos: int, seconds: float) -> Span:
        return stage("denoise", videos=videos, children=[stage("step", seconds), stage("step", None)])

    assert (
        empty(denoise(4, 8.0), denoise(1, 2.0), stage("decode", 1.0, children=[stage("tile", 99.0)])).step_seconds()
        == 8.0
    )
    assert empty(denoise(1, 2.0), stage("save", videos=7)).together == 1
    assert empty(stage("decode", children=[stage("tile", 99.0)])).step_seconds() is None


def test_what_a_plan_said_adds_what_is_left_to_what_has_passed() -> None:
    made = empty(stage("denoise", peak=Memory(1, 2, 3)), host={"pinned_bytes": 4}, times=Times(None, None, 10.0))
    assert made.prediction(2.5) == Predicted(3, 2, 1, 4, 12.5)
    unknown = replace(made, times=Times()).prediction(2.5)
    assert unknown is not None
    assert unknown.seconds is None
    assert replace(made, failure=Failure("oom", "full")).prediction(2.5) is None
    assert replace(made, stages=[]).prediction(2.5) is None
    assert replace(made, stages=[stage("denoise", peak=Memory(1, 2, None))]).prediction(2.5) is None


@pytest.mark.parametrize("key", ["repeats", "videos"])
@pytest.mark.parametrize(("number", "fine"), [(0, False), (1, True), (1_000_000, True), (1_000_001, False)])
def test_a_span_stands_for_one_to_a_million(key: str, number: int, fine: bool) -> None:
    data = empty(stage("denoise", children=[stage("step")])).to_json()
    data["stages"][0]["children"][0][key] = number
    if fine:
        assert RunRecord.from_json(data).to_json() == data
        return
    with pytest.raises(InputError, match=rf"{key} of 'step' is outside 1\.\.1000000"):
        RunRecord.from_json(data)


@pytest.mark.parametrize("section", ["model_config", "optimization", "logging", "request"])
def test_a_section_of_the_configuration_may_be_missing_and_is_no_list(section: str) -> None:
    assert RunRecord.from_json(empty().to_json()).config == {}
    with pytest.raises(InputError, match=f"config.{section} is no section"):
        RunRecord.from_json(empty(config={section: []}).to_json())


def test_only_a_record_that_says_so_is_of_other_peoples_code() -> None:
    assert [empty(config=config).foreign for config in ({"foreign": True}, {"foreign": 1}, {})] == [True, False, False]


def test_a_record_of_64_mib_is_looked_at_and_a_larger_one_is_refused_for_its_size(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.touch()
    said = []
    for size in (64 * MIB, 64 * MIB + 1):
        os_truncate(path, size)
        with pytest.raises(InputError) as caught:
            RunRecord.read(path)
        said.append(str(caught.value))
    assert MAX_RECORD_BYTES == 64 * MIB
    assert "64 MiB" not in said[0]
    assert said[0] != said[1]


def os_truncate(path: Path, size: int) -> None:
    """Without writing: the file is all holes."""
    with path.open("r+b") as file:
        file.truncate(size)


def test_a_configuration_has_dotted_keys_at_any_depth() -> None:
    assert dotted({"a": {"b": {"c": 1}, "d": []}, "e": {}}) == {"a.b.c": 1, "a.d": []}


def test_what_is_written_is_for_people_too(tmp_path: Path) -> None:
    empty(notes=["猫"]).write(tmp_path / "record.json")
    text = (tmp_path / "record.json").read_text(encoding="utf-8")
    assert text.startswith('{\n "schema": 1,\n')
    assert text.endswith("]\n}\n") or text.endswith("\n}\n")
    assert '"猫"' in text
    write_atomically(tmp_path / "lines", "a\nb\n")
    assert (tmp_path / "lines").read_bytes() == b"a\nb\n"


# --- who owns a moment -------------------------------------------------------------------------------------------------------


def blocks(nbytes: int, component: str | None = "dit", operation: str = "aten.mm", **more: Any) -> AliveBlocks:
    return AliveBlocks(
        nbytes,
        more.pop("count", 1),
        component,
        more.pop("stage", "denoise"),
        None,
        operation,
        more.pop("shape", None),
        None,
    )


def at(*segments: Sequence[tuple[int, BlockState]], alive: Sequence[AliveBlocks] = ()) -> TimelineMoment:
    """Segments of blocks in MiB, each as long as its blocks."""
    made = []
    for parts in segments:
        starts = [sum(size for size, _ in parts[:i]) * MIB for i in range(len(parts))]
        drawn = tuple((start, size * MIB, state) for start, (size, state) in zip(starts, parts, strict=True))
        made.append(TimelineSegment(sum(size for _, size, _ in drawn), drawn))
    return TimelineMoment("peak", 0, MIB, sum(s.bytes for s in made), "denoise", "dit", tuple(alive), tuple(made))


def test_the_ten_largest_owners_of_each_kind_are_kept() -> None:
    alive = [blocks(n, f"c{n:02}", f"op{n:02}", stage=f"s{n:02}", shape=(n,)) for n in range(1, 12)]
    found = describe_moment(at([(1, "active")], alive=alive))
    assert [owner.bytes for owner in found.by_component] == list(range(11, 1, -1))
    assert len(found.by_stage) == len(found.by_module) == len(found.by_shape) == 10


def test_owners_of_nothing_have_no_share_and_equal_ones_come_by_name() -> None:
    found = owners([blocks(0, "b"), blocks(0, "a", count=2)], component_of)
    assert [(o.name, o.bytes, o.count, o.share) for o in found] == [
        ("activations of a", 0, 2, 0.0),
        ("activations of b", 0, 1, 0.0),
    ]
    assert [o.share for o in owners([blocks(1, "a"), blocks(3, "b")], component_of)] == [0.75, 0.25]


def test_what_belongs_to_no_component_is_a_librarys_or_outside_of_them() -> None:
    assert component_of(blocks(1, None)) == "libraries"
    assert component_of(blocks(1, None, shape=(1,))) == "outside the components"
    assert stage_of(blocks(1, stage=None)) == "outside the stages"


def test_weights_are_on_the_device_from_their_start_until_just_before_their_end() -> None:
    found = replace(
        timeline(),
        weights=(WeightsStretch("dit", 3, 5, 9), WeightsStretch("dit", 4, 7, 20), WeightsStretch("vae", 1, 0, 99)),
    )
    assert [weights_at(found, x).get("dit") for x in (4, 5, 7, 8, 9, 20)] == [None, 3, 7, 7, 4, None]
    assert weights_at(found, 8) == {"dit": 7, "vae": 1}


def test_a_hole_as_large_as_the_largest_activation_is_not_too_small() -> None:
    alive = [blocks(8 * MIB, count=2), blocks(2 * MIB), blocks(90 * MIB, operation="weights")]
    found = unusable(at([(5, "active"), (4, "inactive"), (3, "inactive")], alive=alive))
    assert found is not None
    assert (found.largest_allocation_bytes, found.too_small_bytes) == (4 * MIB, 3 * MIB)


def test_where_everything_is_in_use_there_is_no_hole_of_any_size() -> None:
    found = unusable(at([(4, "active")]))
    assert found is not None
    assert (found.holes, found.inactive_bytes, found.largest_hole_bytes, found.largest_allocation_bytes) == (0, 0, 0, 0)


def test_one_piece_is_said_as_one_and_only_the_kind_of_hole_that_there_is() -> None:
    def reason(*segments: Sequence[tuple[int, BlockState]]) -> str:
        found = unusable(at(*segments))
        assert found is not None
        return found.reason

    assert reason([(4, "inactive")]) == (
        "4.0 MiB of 4.0 MiB reserved are not allocated: 4.0 MiB in free segments, which emptying the cache would give back. "
        "That is 1 piece of 4.0 MiB."
    )
    assert reason([(1, "active"), (2, "inactive"), (1, "active"), (3, "inactive")]) == (
        "5.0 MiB of 7.0 MiB reserved are not allocated: 5.0 MiB in holes beside live blocks. "
        "That is 2 pieces, the largest of 3.0 MiB."
    )


# --- stages ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steady", "expected"),
    [
        ([1, 2, 3], (None, 0)),
        ([1, 2, 3, 4], (True, 1)),
        ([1, 2, 2, 4], (False, 0)),
        ([1, 2, 3, 3, 4], (True, 1)),
        ([3, 1, 2, 2, 3, 4], (False, 0)),
        ([2, 1, 1, 2, 3, 4], (True, 0)),
        ([1, 5, 2, 3, 4, 5], (False, 0)),
        ([1, 2, 3, 4, 4, 5], (True, 1)),
        ([1, 4, 4, 4, 5, 4], (False, 0)),
        ([0] * 4 + [1] * 4 + [2] * 4 + [3], (True, 0)),
        ([0] * 4 + [1] * 4 + [2] * 5 + [3], (False, 0)),
        ([0] * 6 + [1] * 6 + [2] * 6, (False, 0)),
    ],
)
def test_four_steps_are_judged_and_at_least_three_and_a_quarter_of_them_must_grow(
    steady: list[int], expected: tuple[bool | None, int]
) -> None:
    assert steady_growth([9, 9, 9, *steady, 0]) == expected


def test_of_a_step_that_stands_for_more_than_ten_thousand_ten_thousand_are_judged() -> None:
    def growth(*repeats: int) -> tuple[int, int]:
        (found,) = analyze_run(record([step(i, 50, repeats=n) for i, n in enumerate(repeats)]), None).growth
        return len(found.allocated_bytes), found.steps

    assert growth(20_000) == (10_000, 20_000)
    assert growth(9_999, 5) == (10_000, 10_004)
    assert growth(1, 1) == (2, 2)
    assert analyze_run(record([step(0, 50)]), None).growth == (), "one step alone tells nothing"


def test_blocks_and_other_spans_inside_a_stage_are_no_steps() -> None:
    inside = span("block 0", "block", "dit", [(1, 2), (3, 4), (1, 2)])
    assert analyze_run(record([inside, inside, inside]), None).growth == ()


def test_a_point_on_the_edge_of_a_stage_is_in_it() -> None:
    found = analyze_run(record(), timeline()).stages
    assert [s.fragmentation.start for s in found][1:3] == [10 / 40, 1 / 2]
    assert [s.fragmentation.end for s in found][:2] == [10 / 40, 11 / 42]
    assert found[0].fluctuation_bytes == 35 * MIB


def test_a_stage_between_two_points_is_damage() -> None:
    stages = document()["stages"]
    stages[1] = stages[1] | {"start": 2.25, "end": 2.75}
    with pytest.raises(InputError, match=r"the timeline is damaged: it has no point in stage 'encode_text'"):
        analyze_run(record(), timeline(stages=stages))


def test_the_moment_of_a_stage_is_the_one_inside_it() -> None:
    def stated(x: int) -> bool:
        run = record()
        del run.stages[4]
        moments = [m | {"x": x} for m in document()["moments"]]
        lines = timeline(stages=[s for s in document()["stages"] if s["name"] != "decode"], moments=moments)
        found = analyze_run(run, lines).bottleneck
        assert found is not None
        return "are weights" in found.statement

    assert [stated(x) for x in (5, 6, 12, 13)] == [False, True, True, False]


def test_without_any_time_no_stage_has_a_share_of_it() -> None:
    run = record()
    for each in run.stages:
        each.seconds = 0.0
    assert {s.time_share for s in analyze_run(run, None).stages} == {None}
    run.stages[0].seconds, run.stages[1].seconds = 3.0, None
    assert [s.time_share for s in analyze_run(run, None).stages] == [1.0, None, 0.0, 0.0, 0.0]


def test_nothing_analyzed_is_not_fragmented() -> None:
    found = analyze_run(empty(), None)
    assert (found.fragmentation_at_peak, found.fragmentation_highest, found.peaks, found.loading) == (0.0, 0.0, (), ())


def test_a_load_that_gives_back_more_than_it_adds_needed_what_was_over_its_start() -> None:
    run = record()
    run.stages[0] = span("load text_encoder", "load", "text_encoder", [(40, 40), (70, 80), (10, 80)])
    first = analyze_run(run, None).loading[0]
    assert (first.added_bytes, first.transient_bytes) == (-30 * MIB, 30 * MIB)


def test_only_from_a_stage_to_a_load_is_a_switch() -> None:
    run = record()
    run.stages = [run.stages[2], run.stages[0], run.stages[1], run.stages[3], run.stages[4], run.stages[2]]
    (switch,) = analyze_run(run, None).switches
    assert (switch.leaving, switch.entering) == ("vae", "dit")


def test_the_bottleneck_lists_five_owners_and_tells_two_of_the_rest() -> None:
    run = record()
    del run.stages[4]
    alive = [{**document()["moments"][0]["alive"][1], "bytes": n * MIB, "count": 1, "shape": [n]} for n in range(2, 9)]
    stages = [s for s in document()["stages"] if s["name"] != "decode"]
    lines = read_timeline(
        document()
        | {"stages": stages, "moments": [MOMENT | {"label": "peak of denoise", "alive": alive, "segments": []}]}
    )
    found = analyze_run(run, lines).bottleneck
    assert found is not None
    assert [owner.bytes // MIB for owner in found.top] == [8, 7, 6, 5, 4]
    assert found.statement.count(" MiB;") == 1
    assert "are weights" not in found.statement
    assert "Largest of the rest: [8] bfloat16 of" in found.statement, "one alone has no number before it"


def test_a_stage_without_a_component_or_a_device_figure_is_told_without_them() -> None:
    alone = Span("save", "stage", None, Memory(MIB, MIB, None), Memory(2 * MIB, 3 * MIB, None), Memory(MIB, MIB, None))
    found = analyze_run(empty(alone), None).bottleneck
    assert found is not None
    assert found.statement == (
        "The peak is in save: 2.0 MiB allocated, 3.0 MiB reserved. 1.0 MiB were there when it began, and 1.0 MiB came on top."
    )
