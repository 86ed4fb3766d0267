"""Runs compared figure by figure, and the conditions that fail a build."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from report_runs import Recipe, write_run
from wanvram.analysis.compare import FailCondition, compare, judge, metrics, parse_condition
from wanvram.cli.main import main
from wanvram.errors import InputError
from wanvram.record import ComponentRecord, Failure, RankRecord, RunRecord
from wanvram.report.compare import comparison_text, read_runs, runs_table
from wanvram.spans import Memory, Span
from wanvram.units import GIB, MIB


def record(name: str = "a", *, factor: int = 1, seconds: float = 2.0, device: int | None = 0) -> RunRecord:
    """load (100 MiB stay) and denoise (peak 300 MiB, 400 reserved), times `factor`; device None: the driver is not asked."""

    def memory(allocated: int, reserved: int) -> Memory:
        used = None if device is None else (reserved * factor + 600) * MIB
        return Memory(allocated * factor * MIB, reserved * factor * MIB, used)

    empty, loaded, peak = memory(0, 0), memory(100, 100), memory(300, 400)
    stages = [
        Span("load dit", "load", "dit", empty, loaded, loaded, 9.0),
        Span("denoise", "stage", "dit", loaded, peak, loaded, seconds),
    ]
    config = {"name": name, "optimization": {"offload": factor > 1}, "request": {"size": "832*480"}}
    return RunRecord("simulated:h200", True, config, None, None, [], stages, {}, {})


def judged(text: str, *records: RunRecord) -> list[str]:
    comparison = compare([f"run{i}" for i in range(len(records))], records)
    return [v.label for v in judge(comparison, [parse_condition(text)])]


# --- figures -------------------------------------------------------------------------------------------------------------


def test_every_figure_has_a_dotted_name() -> None:
    found = metrics(record())
    assert found["peak", "reserved_bytes"] == 400 * MIB
    assert found["peak", "device_bytes"] == 1000 * MIB
    assert found["stages", "denoise", "activation_bytes"] == 200 * MIB
    assert found["fragmentation", "at_peak"] == 0.25
    assert found["seconds",] == 2.0, "loading is left out"


def test_a_stage_that_ran_twice_gives_its_higher_bytes_and_the_sum_of_its_seconds() -> None:
    twice = record()
    higher = Memory(500 * MIB, 600 * MIB, None)
    twice.stages.append(Span("denoise", "stage", "dit", higher, higher, higher, 3.0))
    assert metrics(twice)["stages", "denoise", "peak_allocated_bytes"] == 500 * MIB
    assert metrics(twice)["stages", "denoise", "seconds"] == 5.0


def test_a_record_with_text_for_a_number_is_damaged() -> None:
    damaged = record().to_json()
    damaged["host"] = {"peak_rss_bytes": "many"}
    with pytest.raises(InputError, match=r"the record is damaged: host.peak_rss_bytes is 'many'"):
        RunRecord.from_json(damaged)


def test_only_changed_keys_are_named_and_differences_count_from_the_first() -> None:
    comparison = compare(["a", "b"], [record("a"), record("b", factor=2)])
    assert comparison.changed == {"optimization.offload": (False, True)}
    assert comparison.difference(("peak", "allocated_bytes"), 1) == 300 * MIB
    document = comparison.to_json()
    assert document["stages"]["denoise"]["peak_allocated_bytes"]["differences"] == [0, 300 * MIB]
    assert document["peak"]["reserved_bytes"]["values"] == [400 * MIB, 800 * MIB]


def test_a_prediction_beside_its_measurement_has_signed_errors() -> None:
    predicted, measured = record(seconds=1.8), record(seconds=2.0)
    measured.simulated = False
    comparison = compare(["p", "m"], [predicted, measured], [(0, 1)])
    errors = {e.key: e.error for e in comparison.predictions[0][2]}
    assert errors["stages", "denoise", "seconds"] == pytest.approx(-0.1)
    assert errors["peak", "device_bytes"] == 0.0
    rows = [line.split() for line in comparison_text(comparison).splitlines()]
    assert ["stages", "denoise", "seconds", "1.80", "2.00", "-10.00"] in rows


def test_a_seed_drawn_anew_is_a_difference_only_if_there_is_no_other() -> None:
    def text(*settings: dict[str, object]) -> str:
        records = [replace(record(), config={"name": f"{i}", "request": s}) for i, s in enumerate(settings)]
        return comparison_text(compare(["one", "two"], records))

    assert "base_seed" in text({"base_seed": 1}, {"base_seed": 2})
    both = text({"base_seed": 1, "frame_num": 81}, {"base_seed": 2, "frame_num": 161})
    assert "frame_num" in both
    assert "base_seed" not in both


def test_many_runs_are_compared_in_tables_that_a_terminal_can_show() -> None:
    labels = [f"run{number}" for number in range(12)]
    text = comparison_text(compare(labels, [record("a", factor=number + 1) for number in range(12)]))
    assert max(map(len, text.splitlines())) <= 150
    heads = [line for line in text.splitlines() if line.startswith("peak, MiB")]
    assert [head.split()[2:][1::3] for head in heads] == [list("BCDE"), list("FGHI"), list("JKL")]
    assert text.count("denoise") == 3 * comparison_text(compare(labels[:2], [record(), record(factor=2)])).count(
        "denoise"
    )


def test_a_condition_that_is_too_long_is_refused_whole() -> None:
    with pytest.raises(InputError, match="is not understood"):
        parse_condition("peak.reserved_bytes > 1" + "0" * 600)


def test_the_text_of_two_runs_is_exact() -> None:
    text = comparison_text(compare(["a", "b"], [record("a"), record("b", factor=2)]))
    assert text.startswith(
        """\
A: a (predicted, simulated:h200)
B: b (predicted, simulated:h200)

changed                   A     B
---------------------------------
optimization.offload  false  true

peak, MiB        A        B     B-A       %
-------------------------------------------
allocated    300.0    600.0  +300.0  +100.0
reserved     400.0    800.0  +400.0  +100.0
device     1,000.0  1,400.0  +400.0   +40.0

stage, peak allocated MiB      A      B     B-A       %
-------------------------------------------------------
load dit                   100.0  200.0  +100.0  +100.0
denoise                    300.0  600.0  +300.0  +100.0
"""
    )
    assert "time s" not in text, "what is equal is left out"


# --- conditions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("peak.reserved_bytes > +2%", ["run1"]),
        ("peak.reserved_bytes > +100%", []),
        ("peak.reserved_bytes >= +100%", ["run1"]),
        ("peak.reserved_bytes > +399MiB", ["run1"]),
        ("peak.reserved_bytes > +400MiB", []),
        ("peak.device_bytes > 8GiB", []),
        ("peak.device_bytes>1.3GiB", ["run1"]),
        ("peak.device_bytes < 8GiB", ["run1"]),
        ("stages.denoise.peak_allocated_bytes > 599 MiB", ["run1"]),
        ("stages.load dit.peak_allocated_bytes > 199 MiB", ["run1"]),
        ("fragmentation.at_peak > 24%", ["run1"]),
        ("fragmentation.at_peak > 0.25", []),
        ("seconds > +10%", []),
        ("seconds > 1.9s", ["run1"]),
        ("seconds < -0.5", []),
        ("peak.allocated_bytes > 629145599", ["run1"]),
    ],
)
def test_a_condition_judges_the_runs_after_the_first(text: str, expected: list[str]) -> None:
    assert judged(text, record("a"), record("b", factor=2)) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("peak.reserved_bytes", "is not understood"),
        ("peak.reserved_bytes > ", "is not understood"),
        ("peak.reserved_bytes > +2% or True", "is not understood"),
        ("__import__('os').system('x') > 1", "no run has a figure"),
        ("peak.reserved_bytes > 2%", "a share of what"),
        ("peak.reserved_bytes > 2s", "is not an amount of memory"),
        ("seconds > 8GiB", "not counted in GiB"),
        ("peak.reservd_bytes > 1GiB", "did you mean peak.reserved_bytes"),
        ("stages.decode.seconds > 1", "no run has a figure stages.decode.seconds"),
    ],
)
def test_a_condition_that_means_nothing_is_a_sentence(text: str, says: str) -> None:
    with pytest.raises(InputError, match="--fail-if") if "amount" not in says else pytest.raises(InputError) as caught:
        judged(text, record("a"), record("b"))
    assert says in str(caught.value)


def test_a_figure_one_run_lacks_cannot_be_judged() -> None:
    with pytest.raises(InputError, match=r"run1 has no peak\.device_bytes"):
        judged("peak.device_bytes > 8GiB", record("a"), record("b", device=None))


def test_one_run_alone_is_judged_by_absolute_limits_only() -> None:
    assert judged("peak.reserved_bytes > 1MiB", record()) == ["run0"]
    with pytest.raises(InputError, match="give two runs"):
        judged("peak.reserved_bytes > +2%", record())


@pytest.mark.parametrize("which", [0, 1])
def test_a_run_that_failed_does_not_pass_because_its_figures_are_small(which: int) -> None:
    records = [record("a"), record("b")]
    records[which].failure = Failure("oom", "no room")
    both = [parse_condition(text) for text in ("peak.reserved_bytes > +2%", "seconds > 100")]
    assert len(judge(compare(["a", "b"], records), both)) == 1, "said once, whatever the conditions"
    assert judged("peak.reserved_bytes > +2%", *records) == [f"run{which}"]


def test_a_condition_reads_its_parts() -> None:
    assert parse_condition(" stages.x.y.seconds <= -5% ") == FailCondition(
        " stages.x.y.seconds <= -5% ", ("stages", "x.y", "seconds"), "<=", -0.05, True, True
    )
    assert parse_condition("peak.device_bytes > 8GB").amount == 8 * GIB


# --- figures and conditions at their edges ----------------------------------------------------------------------------------


def with_more(**more: Any) -> RunRecord:
    """With a component, two GPUs that are alike, and what the host took."""
    made = record(**more)
    ranks = [RankRecord((0, 2), "cuda:x", made.stages, {"pinned_bytes": 7})]
    components = [ComponentRecord("dit", 5, 100 * MIB, 3, 4, 6)]
    return replace(made, ranks=ranks, components=components, host={"peak_rss_bytes": 9, "pinned_bytes": 8})


def test_ranks_components_and_the_host_have_their_figures_too() -> None:
    found = metrics(with_more())
    assert {key[1] for key in found if key[0] == "ranks"} == {"0 load dit", "0 denoise", "2 load dit", "2 denoise"}
    assert {key[2]: value for key, value in found.items() if key[:2] == ("ranks", "2 denoise")} == {
        "peak_allocated_bytes": 300 * MIB, "peak_reserved_bytes": 400 * MIB, "peak_device_bytes": 1000 * MIB, "seconds": 2.0,
    }  # fmt: skip
    assert {key[2]: value for key, value in found.items() if key[0] == "components"} == {
        "parameters": 5, "base_bytes": 100 * MIB, "host_bytes": 3, "activation_bytes": 4, "streamed_bytes": 6,
    }  # fmt: skip
    assert (found["host", "peak_rss_bytes"], found["host", "pinned_bytes"]) == (9, 8)


def test_the_names_of_a_group_are_its_own_in_the_order_of_the_runs() -> None:
    other = with_more()
    other.components.append(ComponentRecord("vae", 1, 2, 3, 4))
    comparison = compare(["a", "b"], [with_more(), other])
    assert comparison.names("stages") == ["load dit", "denoise"]
    assert comparison.names("components") == ["dit", "vae"]
    assert comparison.names("peak") == []
    assert comparison.difference(("components", "vae", "base_bytes"), 1) is None, "the first run has none"
    assert comparison.figures["components", "vae", "base_bytes"] == (None, 2)


def test_a_run_without_stages_has_no_peak_and_no_seconds() -> None:
    assert metrics(replace(record(), stages=[])) == {("seconds",): None}


def test_a_stage_whose_second_time_is_unknown_keeps_the_known_one() -> None:
    twice = record()
    twice.stages += [replace(twice.stages[1], seconds=None), replace(twice.stages[1], seconds=3.0)]
    assert metrics(twice)["stages", "denoise", "seconds"] == 5.0
    assert metrics(record(seconds=0.0))["seconds",] == 0.0


def test_names_and_descriptions_and_what_is_only_written_otherwise_are_no_change() -> None:
    first, second = record("a"), record("b")
    second.config |= {"description": "d", "optimization": {"offload": False, "x": None}}
    assert compare(["a", "b"], [first, second]).changed == {}
    second.config["optimization"]["x"] = 0
    assert compare(["a", "b"], [first, second]).changed == {"optimization.x": (None, 0)}


def test_the_document_of_a_comparison_has_its_schema_its_runs_and_the_errors() -> None:
    predicted, measured = record(seconds=1.0), failed_at_start(replace(record(), simulated=False, fits=False))
    document = compare(["p", "m"], [predicted, measured], [(0, 1)]).to_json()
    assert document["schema"] == 1
    assert document["runs"][1] == {
        "label": "m", "device": "simulated:h200", "simulated": False, "fits": False, "failure": "error",
    }  # fmt: skip
    assert document["runs"][0]["failure"] is None
    errors = document["predictions"][0]["errors"]
    assert errors["stages.load dit.peak_allocated_bytes"] == {"predicted": 100 * MIB, "measured": 0, "error": None}
    assert errors["stages.denoise.seconds"]["error"] == -0.5
    assert not any(name.endswith(("activation_bytes", "parameters")) for name in errors), "what is not predicted"


def failed_at_start(made: RunRecord) -> RunRecord:
    nothing = Memory(0, 0, None)
    made.stages[0] = replace(made.stages[0], start=nothing, peak=nothing, end=nothing)
    return replace(made, failure=Failure("error", "it broke"))


def said(text: str, *records: RunRecord) -> list[str]:
    comparison = compare([f"run{i}" for i in range(len(records))], records)
    return [v.text for v in judge(comparison, [parse_condition(text)])]


def test_a_violation_says_figure_and_limit_in_their_unit() -> None:
    both = record("a"), record("b", factor=2, seconds=2500.0)
    assert said("peak.reserved_bytes > +2%", *both) == [
        f"800.0 MiB ({800 * MIB:,} bytes) > 408.0 MiB ({408 * MIB:,} bytes)"
    ]
    assert said("seconds >= +10", *both) == ["2,500 >= 12"]
    assert said("fragmentation.at_peak <= 25%", *both) == ["0.25 <= 0.25"]
    assert said("peak.device_bytes < 8GiB", both[0], failed_at_start(record())) == ["error: it broke"]


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("peak.allocated_bytes >= 300MiB", True),
        ("peak.allocated_bytes > 300MiB", False),
        ("peak.allocated_bytes <= 300MiB", True),
        ("peak.allocated_bytes < 300MiB", False),
        ("seconds < -10%", False),
        ("seconds <= -0%", True),
        ("stages.load dit.start_allocated_bytes > +10%", False),
        ("stages.load dit.start_allocated_bytes >= +10%", True),
        ("stages.load dit.start_allocated_bytes > +0.5", False),
    ],
)
def test_a_limit_that_is_reached_is_met_only_by_the_signs_that_say_so(text: str, met: bool) -> None:
    assert bool(judged(text, record("a"), record("b"))) is met


def test_a_condition_of_500_characters_is_read_and_one_of_501_is_not() -> None:
    text = "seconds > 1" + " " * 489
    assert parse_condition(text).amount == 1.0
    with pytest.raises(InputError, match="is not understood") as caught:
        parse_condition(text.replace(" > ", " ? ") + " ")
    assert f"'{text[:80].replace(' > ', ' ? ')}' is" in str(caught.value)
    with pytest.raises(InputError, match="is not understood"):
        parse_condition(text + " ")


def test_of_an_unknown_figure_the_three_closest_are_named_or_four_there_are() -> None:
    def hint(text: str) -> str:
        with pytest.raises(InputError) as caught:
            judged(text, record(), record())
        return str(caught.value).split("no run has a figure ")[1]

    closest = "peak.allocated_bytes or peak.reserved_bytes or stages.denoise.peak_allocated_bytes"
    assert hint("peak.alocated_bytes > 1") == f"peak.alocated_bytes; did you mean {closest}?"
    first = "peak.allocated_bytes, peak.reserved_bytes, peak.device_bytes, fragmentation.at_peak"
    assert hint("zzz > 1") == f"zzz; there are for example {first}"
    assert hint("secxy > 1") == "secxy; did you mean seconds?", "half of it is alike"
    assert hint("peak.xyzuvwklmn > 1").startswith("peak.xyzuvwklmn; there are for example"), "less than half is alike"


def test_the_first_run_of_a_figure_that_only_others_have_is_named() -> None:
    with pytest.raises(InputError, match=r"run0 has no peak\.device_bytes"):
        judged("peak.device_bytes > +1%", record("a", device=None), record("b"))
    assert judged("peak.device_bytes > 1", record("a", device=None), record("b")) == ["run1"], (
        "nothing asks for the first"
    )


def test_a_key_keeps_the_dots_of_a_stage_and_of_nothing_else() -> None:
    keys = [
        parse_condition(f"{name} > +1").key
        for name in ("components.a.b.parameters", "ranks.0 x.seconds", "host.a.b", "stages.x")
    ]
    assert keys == [("components", "a.b", "parameters"), ("ranks", "0 x", "seconds"), ("host", "a.b"), ("stages", "x")]


# --- the verb ------------------------------------------------------------------------------------------------------------


def test_the_exit_code_is_1_when_memory_grew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write_run(tmp_path / "before", Recipe())
    after = write_run(tmp_path / "after", Recipe(factor=1.1))
    limit = ["--fail-if", "peak.reserved_bytes > +2%"]
    assert main(["compare", str(before), str(before / "record.json"), *limit]) == 0
    assert "FAIL" not in capsys.readouterr().out
    assert main(["compare", str(before), str(after), *limit]) == 1
    assert "FAIL baseline (2): peak.reserved_bytes > +2%: " in capsys.readouterr().out
    assert main(["compare", str(before), str(after), "--fail-if", "peak.x > 1"]) == 2


def test_json_is_one_document_with_the_violations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predicted = write_run(tmp_path / "p", Recipe(factor=0.99))
    measured = write_run(tmp_path / "m", Recipe(simulated=False))
    flags = ["--json", "--fail-if", "peak.allocated_bytes > +0.1%"]
    assert main(["compare", str(predicted), str(measured), *flags]) == 1
    document = json.loads(capsys.readouterr().out)
    assert [run["simulated"] for run in document["runs"]] == [True, False]
    (prediction,) = document["predictions"]
    assert prediction["errors"]["stages.decode.peak_allocated_bytes"]["error"] < 0
    assert document["violations"][0]["label"] == document["runs"][1]["label"]


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1}', '{"schema": 9}', "[" * 100_000])
def test_a_file_that_is_no_record_is_a_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"x\.json"):
        read_runs([path])


def test_the_table_of_many_runs_says_what_came_out_of_each() -> None:
    failed = RunRecord("cpu", False, {}, False, None, [], [], {}, {}, Failure("error", "it broke"))
    text = runs_table([("good", record()), ("bad", failed)])
    assert [line.split() for line in text.splitlines()[2:4]] == [
        ["good", "predicted", "300.0", "400.0", "1,000.0", "denoise", "-", "2.00", "s"],
        ["bad", "FAILED", "-", "-", "-", "-", "-", "-"],
    ]
    assert text.endswith("bad: it broke")
