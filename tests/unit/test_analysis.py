"""Analysis of a run: definitions checked by hand on small streams of numbers, with and without a timeline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from wanvram.analysis.peak import component_of, describe_moment, module_of, owners, shape_of, stage_of, unusable
from wanvram.analysis.stages import analyze_run, steady_growth
from wanvram.errors import InputError
from wanvram.record import ComponentRecord, RunRecord
from wanvram.report.analysis_text import run_text
from wanvram.spans import Memory, Span
from wanvram.timeline_record import TimelineRecord, TimelineSegment, read_timeline
from wanvram.units import MIB


def span(
    name: str, kind: str, component: str | None, figures: Sequence[tuple[int, int]], children: Sequence[Span] = ()
) -> Span:
    """figures: (allocated, reserved) in MiB at start, peak and end; the device has 100 MiB more. Two seconds."""
    start, peak, end = (Memory(a * MIB, r * MIB, (r + 100) * MIB) for a, r in figures)
    return Span(name, kind, component, start, peak, end, seconds=2.0, children=list(children))


def step(number: int, end: int, *, blocks: Sequence[int] = (), repeats: int = 1) -> Span:
    inside = [span(f"block {i}", "block", "dit", [(50, 90), (peak, 90), (50, 90)]) for i, peak in enumerate(blocks)]
    result = span(f"step {number}", "step", "dit", [(45, 90), (80, 90), (end, 90)], inside)
    result.repeats = repeats
    return result


def record(steps: Sequence[Span] = (), *, simulated: bool = False) -> RunRecord:
    """Text encoder in and out, then the DiT: 40 of weights, 80 of 90 MiB at the peak; decode with the DiT still there."""
    stages = [
        span("load text_encoder", "load", "text_encoder", [(0, 0), (35, 40), (30, 40)]),
        span("encode_text", "stage", "text_encoder", [(30, 40), (34, 42), (31, 42)]),
        span("load dit", "load", "dit", [(1, 2), (41, 44), (41, 44)]),
        span("denoise", "stage", "dit", [(41, 44), (80, 90), (43, 90)], steps),
        span("decode", "stage", "vae", [(43, 90), (60, 92), (42, 92)]),
    ]
    stages[3].seconds = 12.0
    components = [ComponentRecord("dit", 10, 40 * MIB, 0, 39 * MIB)]
    return RunRecord("cuda:x", simulated, {}, None, None, components, stages, {}, {})


def group(nbytes: int, component: str | None, operation: str, shape: list[int] | None, **other: Any) -> dict[str, Any]:
    values = {"count": 1, "stage": "denoise", "module": None, "dtype": "bfloat16" if shape else None}
    return {"bytes": nbytes, "component": component, "operation": operation, "shape": shape} | values | other


ALIVE = [
    group(40 * MIB, "dit", "weights", [20], count=2, stage="load dit", dtype="uint8"),
    group(24 * MIB, "dit", "aten.mm.default", [75, 5], count=2, module="dit.Block.forward:12 > Linear.forward:7"),
    group(12 * MIB, "dit", "aten.add.Tensor", [75, 5], module="dit.Block.forward:15 > Linear.forward:9"),
    group(3 * MIB, None, "cublas workspace", None),
    group(1 * MIB, None, "(other)", None, stage=None, count=9),
]
SEGMENTS = [
    {"bytes": 70 * MIB, "blocks": [[0, 40 * MIB, "active"], [40 * MIB, 2 * MIB, "inactive"], [42 * MIB, 28 * MIB, "active"]]},
    {"bytes": 16 * MIB, "blocks": [[0, 12 * MIB, "active"], [12 * MIB, 4 * MIB, "inactive"]]},
    {"bytes": 14 * MIB, "blocks": [[0, 14 * MIB, "inactive"]]},
]  # fmt: skip
MOMENT = {"x": 11, "allocated_bytes": 80 * MIB, "reserved_bytes": 100 * MIB, "stage": "denoise", "component": "dit"}


def timeline(**changes: Any) -> TimelineRecord:
    return read_timeline(document() | changes)


def document() -> dict[str, Any]:
    """Points in MiB of the run of `record`, with a dip to 35 in denoise that no span saw and 100 reserved at the peak."""
    points = [(0, 0, 0), (1, 35, 40), (2, 30, 40), (3, 34, 42), (4, 31, 42), (5, 1, 2), (6, 41, 44), (10, 35, 50)]
    points += [(11, 80, 100), (12, 43, 90), (13, 60, 92), (14, 42, 92)]
    bounds = {
        "load text_encoder": (0, 2),
        "encode_text": (2, 4),
        "load dit": (5, 6),
        "denoise": (6, 12),
        "decode": (12, 14),
    }
    stages = [
        {"name": s.name, "component": s.component, "kind": s.kind, "start": bounds[s.name][0], "end": bounds[s.name][1]}
        for s in record().stages
    ]
    moments = [MOMENT | {"label": label, "alive": ALIVE, "segments": SEGMENTS} for label in ("peak", "peak of denoise")]
    return {
        "schema": 1,
        "axis": "events",
        "points": [[x, a * MIB, r * MIB, None] for x, a, r in points],
        "stages": [*stages, {"name": "step 0", "component": "dit", "kind": "step", "start": 6, "end": 12}],
        "weights": [
            {"component": "text_encoder", "bytes": 30 * MIB, "start": 1, "end": 5},
            {"component": "dit", "bytes": 40 * MIB, "start": 6, "end": 15},
        ],
        "moments": moments,
    }


# --- who owns a moment -----------------------------------------------------------------------------------------------


def test_owners_add_up_to_everything_alive_by_component_stage_module_and_shape() -> None:
    found = describe_moment(timeline().moments[0])
    assert [(o.name, o.bytes // MIB, o.count) for o in found.by_component] == [
        ("weights of dit", 40, 2),
        ("activations of dit", 36, 3),
        ("libraries", 3, 1),
        ("(other)", 1, 9),
    ]
    assert [(o.name, o.bytes // MIB) for o in found.by_module] == [
        ("weights of dit", 40),
        ("dit.Block.forward > Linear.forward", 36),
        ("libraries", 3),
        ("(other)", 1),
    ]
    assert [(o.name, o.bytes // MIB) for o in found.by_shape][:3] == [
        ("[20] uint8", 40),
        ("[75, 5] bfloat16", 36),
        ("cublas workspace", 3),
    ]
    assert [(o.name, o.bytes // MIB, o.count) for o in found.by_stage] == [
        ("load dit", 40, 2),
        ("denoise", 39, 4),
        ("(other)", 1, 9),
    ]
    assert (found.weights_bytes, found.by_component[0].share) == (40 * MIB, 0.5)
    for name in (component_of, stage_of, module_of, shape_of):
        assert sum(owner.bytes for owner in owners(timeline().moments[0].alive, name)) == found.allocated_bytes


def test_reserved_but_unusable_is_split_by_what_could_give_it_back_and_by_the_largest_activation() -> None:
    found = unusable(timeline().moments[0])
    assert found is not None
    assert (found.inactive_bytes, found.holes, found.largest_hole_bytes) == (20 * MIB, 3, 14 * MIB)
    assert (found.free_segment_bytes, found.pinned_bytes) == (14 * MIB, 6 * MIB)
    assert (found.largest_allocation_bytes, found.too_small_bytes) == (12 * MIB, 6 * MIB)
    assert found.reason == (
        "20.0 MiB of 100.0 MiB reserved are not allocated: 6.0 MiB in holes beside live blocks and 14.0 MiB in free "
        "segments, which emptying the cache would give back. That is 3 pieces, the largest of 14.0 MiB. 6.0 MiB are in "
        "pieces too small for the largest activation alive, 12.0 MiB."
    )


def test_a_full_segment_map_has_no_holes_and_a_missing_one_no_answer() -> None:
    segment = TimelineSegment(4 * MIB, ((0, 4 * MIB, "active"),))
    full = replace(timeline().moments[0], segments=(segment,), reserved_bytes=4 * MIB)
    found = unusable(full)
    assert found is not None
    assert (found.inactive_bytes, found.reason) == (0, "All 4.0 MiB reserved are allocated.")
    assert unusable(replace(full, segments=())) is None


def test_a_group_of_no_block_is_no_largest_activation() -> None:
    """A file may say so."""
    peak = timeline().moments[0]
    found = unusable(replace(peak, alive=(replace(peak.alive[1], bytes=5, count=0),)))
    assert found is not None
    assert found.largest_allocation_bytes == 5


# --- fragmentation and fluctuation -----------------------------------------------------------------------------------


def test_fragmentation_is_the_share_of_reserved_that_is_not_allocated() -> None:
    assert Memory(30, 40, None).fragmentation == 0.25
    assert Memory(0, 0, None).fragmentation == 0.0


def test_with_a_timeline_fragmentation_and_fluctuation_see_what_the_spans_did_not() -> None:
    with_points = analyze_run(record(), timeline())
    without = analyze_run(record(), None)
    denoise, coarse = with_points.stages[3], without.stages[3]
    assert (denoise.fragmentation.start, denoise.fragmentation.at_peak) == (3 / 44, 20 / 100)
    assert (denoise.fragmentation.highest, denoise.fragmentation.end) == (47 / 90, 47 / 90)
    assert denoise.fluctuation_bytes == (80 - 35) * MIB
    assert (coarse.fragmentation.at_peak, coarse.fluctuation_bytes) == (10 / 90, (80 - 41) * MIB)
    assert with_points.fragmentation_at_peak == without.fragmentation_at_peak == 32 / 92, "decode: 60 of 92"
    assert with_points.fragmentation_highest == 50 / 92


# --- stages and phases -----------------------------------------------------------------------------------------------


def test_the_three_moments_of_the_specification_come_from_their_spans() -> None:
    moments = analyze_run(record([step(0, 43, blocks=[70, 78]), step(1, 43)]), None).moments
    assert moments.before_forward == Memory(41 * MIB, 44 * MIB, 144 * MIB)
    assert moments.inside_blocks == Memory(78 * MIB, 90 * MIB, 190 * MIB)
    assert (moments.highest_block, moments.block_activation_bytes) == ("block 1", 37 * MIB)
    assert moments.after_decode == Memory(42 * MIB, 92 * MIB, 192 * MIB)


def test_of_several_prompts_the_first_start_the_highest_block_and_the_last_decode_count() -> None:
    run = record([step(0, 43, blocks=[70])])
    run.stages[3].name, run.stages[4].name = "denoise 0", "decode 0"  # their parts stay denoise and decode
    later = span("denoise 1", "stage", "dit", [(42, 92), (80, 92), (44, 92)], [step(0, 43, blocks=[75, 74])])
    run.stages += [later, span("decode 1", "stage", "vae", [(44, 92), (61, 92), (45, 93)])]
    run.stages[5].part, run.stages[6].part = "denoise", "decode"
    moments = analyze_run(run, None).moments
    assert (moments.before_forward, moments.after_decode) == (run.stages[3].start, run.stages[6].end)
    assert (moments.highest_block, moments.block_activation_bytes) == ("block 0", 33 * MIB)


def test_without_block_spans_nothing_is_said_about_blocks() -> None:
    moments = analyze_run(record([step(0, 43)]), None).moments
    assert (moments.inside_blocks, moments.highest_block, moments.block_activation_bytes) == (None, None, None)


def test_loading_says_what_was_added_and_what_was_needed_for_a_moment() -> None:
    encoder, dit = analyze_run(record(), None).loading
    assert (encoder.component, encoder.added_bytes, encoder.transient_bytes) == ("text_encoder", 30 * MIB, 5 * MIB)
    assert (dit.component, dit.added_bytes, dit.transient_bytes) == ("dit", 40 * MIB, 0)


def test_a_switch_says_what_was_given_back_and_what_stays() -> None:
    (switch,) = analyze_run(record(), timeline()).switches
    assert (switch.leaving, switch.entering) == ("text_encoder", "dit")
    assert (switch.given_back_allocated_bytes, switch.given_back_reserved_bytes) == (30 * MIB, 40 * MIB)
    assert switch.resident == {}, "the encoder's weights ended at 5, where the load starts"
    encoder, *others = timeline().weights
    longer = replace(timeline(), weights=(replace(encoder, end=9), *others))
    assert analyze_run(record(), longer).switches[0].resident == {"text_encoder": 30 * MIB}
    assert analyze_run(record(), None).switches[0].resident is None


def test_shares_of_time_add_up_measured_or_predicted() -> None:
    measured = analyze_run(record(), None).stages
    assert [(s.seconds, s.time_share) for s in measured] == [(2.0, 0.1)] * 3 + [(12.0, 0.6), (2.0, 0.1)]
    assert analyze_run(record(simulated=True), None).stages == measured


def test_the_bottleneck_names_stage_weights_and_the_largest_of_the_rest() -> None:
    run = record()
    del run.stages[4]  # decode has the higher device figure, denoise the owners
    lines = timeline(stages=[s for s in document()["stages"] if s["name"] != "decode"])
    found = analyze_run(run, lines).bottleneck
    assert found is not None
    assert (found.stage, found.component, found.weights_bytes) == ("denoise", "dit", 40 * MIB)
    assert [o.name for o in found.top][:2] == [
        "weights of dit",
        "[75, 5] bfloat16 of dit.Block.forward > Linear.forward",
    ]
    assert found.statement == (
        "The peak is in denoise (dit): 80.0 MiB allocated, 90.0 MiB reserved, 190.0 MiB on the device. "
        "40.0 MiB are weights (dit 40.0 MiB). Largest of the rest: "
        "3 x [75, 5] bfloat16 of dit.Block.forward > Linear.forward, 36.0 MiB; cublas workspace, 3.0 MiB."
    )


def test_without_a_timeline_the_bottleneck_is_what_was_there_and_what_came_on_top() -> None:
    found = analyze_run(record(), None).bottleneck
    assert found is not None
    assert (found.stage, found.weights_bytes, found.top) == ("decode", None, ())
    assert found.statement == (
        "The peak is in decode (vae): 60.0 MiB allocated, 92.0 MiB reserved, 192.0 MiB on the device. "
        "43.0 MiB were there when it began, and 17.0 MiB came on top."
    )


# --- growth ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([10, 20, 30] + [40] * 10 + [10], (False, 0)),
        ([10, 20, 30] + [40 + 7 * i for i in range(10)] + [10], (True, 7)),
        ([10, 20, 30] + [40 + 6 * (i // 2) for i in range(21)] + [10], (True, 3)),
        ([10, 20, 30] + [40] * 5 + [90] * 5 + [10], (False, 0)),
        ([10, 20, 30, 40, 44, 41, 43, 40, 44, 42, 41, 44, 40, 10], (False, 0)),
        ([10, 20, 30] + [90 - 7 * i for i in range(10)] + [10], (False, 0)),
        ([10, 17, 24, 31, 38, 45, 52], (None, 0)),
    ],
    ids=["level", "7 a step", "6 every other step", "one late allocation", "noise", "falling", "too few steps"],
)
def test_growth_is_a_leak_only_if_it_is_steady(ends: list[int], expected: tuple[bool | None, int]) -> None:
    assert steady_growth(ends) == expected


def test_a_leak_over_the_denoising_steps_is_reported_in_bytes_per_step() -> None:
    (found,) = analyze_run(record([step(i, 50 + 2 * i) for i in range(12)]), None).growth
    assert (found.stage, found.leak, found.bytes_per_step, len(found.allocated_bytes)) == ("denoise", True, 2 * MIB, 12)


def test_folded_steps_count_when_measured_but_one_simulated_step_proves_nothing_about_others() -> None:
    steps = [step(0, 50), step(1, 52), step(2, 52, repeats=47), step(49, 43)]
    assert analyze_run(record(steps), None).growth[0].leak is False
    (predicted,) = analyze_run(record(steps, simulated=True), None).growth
    assert (predicted.leak, len(predicted.allocated_bytes), predicted.steps) == (None, 4, 50)


@pytest.mark.parametrize(
    ("repeats", "says"),
    [
        (47, "cannot be told, since only 4 of 50 steps were simulated, and the others repeat one of them."),
        (1, "4 steps are too few to tell."),
    ],
)
def test_growth_that_cannot_be_told_says_whether_steps_were_few_or_few_were_simulated(repeats: int, says: str) -> None:
    steps = [step(0, 50), step(1, 52), step(2, 52, repeats=repeats), step(49, 43)]
    run = record(steps, simulated=True)
    assert f"\nGrowth in denoise: {says}\n" in run_text(run, analyze_run(run, None), ())


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_analysis_is_json() -> None:
    data = json.loads(json.dumps(analyze_run(record([step(0, 43), step(1, 43)]), timeline()).to_json()))
    assert data["schema"] == 1
    assert data["peak"] == {"allocated_bytes": 80 * MIB, "reserved_bytes": 92 * MIB, "device_bytes": 192 * MIB}
    assert data["stages"][3]["fragmentation"]["at_peak"] == 0.2
    assert data["inference"] == ["encode_text", "denoise", "decode"]
    assert [moment["label"] for moment in data["peaks"]] == ["peak", "peak of denoise"]
    assert data["peaks"][0]["by_stage"][0] == {"name": "load dit", "bytes": 40 * MIB, "count": 2, "share": 0.5}
    assert data["growth"][0]["steps"] == 2


def test_a_run_that_recorded_nothing_has_an_analysis_of_nothing() -> None:
    found = analyze_run(RunRecord("cpu", False, {}, None, None, [], [], {}, {}), None)
    assert (found.peak, found.bottleneck, found.stages, found.growth) == (None, None, (), ())


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"stages": []},
        {"points": []},
        {"points": [[0]]},
        {"moments": [{"label": "peak"}]},
        {"weights": [{}]},
        {"points": None},
    ],
    ids=["schema", "another run", "no points", "short points", "empty moment", "weights", "null"],
)
def test_a_damaged_timeline_is_an_input_error(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"timeline(\.json)? is damaged|timeline\.json is no timeline of schema 1"):
        analyze_run(record(), timeline(**change))
