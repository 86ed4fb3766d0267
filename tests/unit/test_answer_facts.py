"""Facts about what reports say at the edges: the answer, the rank of a run, the tables of Markdown and of the terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from unit.test_gpu_reports import PREDICTED
from wanvram.advice import Advice
from wanvram.command_line import MAX_COMMAND
from wanvram.record import AttentionChoice, AttentionUse, ComponentRecord, Failure, RunRecord, Times
from wanvram.report.findings import answer, best_first, card_of, ranked, ranks, smallest_card, together
from wanvram.report.markdown import markdown_report
from wanvram.report.runs import Run
from wanvram.report.terminal import listed, show, summarize, table, videos_line
from wanvram.report.timeline import coarse_timeline
from wanvram.report.translations import Texts
from wanvram.spans import Memory, Span
from wanvram.timeline_record import OTHER, WEIGHTS, AliveBlocks, TimelineMoment
from wanvram.units import GIB, MIB

EN = Texts()
REQUEST = {"task": "t2v-1.3B", "size": "832*480", "frame_num": 81}


def mib(allocated: int, reserved: int, device: int | None) -> Memory:
    return Memory(allocated * MIB, reserved * MIB, None if device is None else device * MIB)


PEAK = mib(300, 400, 1000)


def stage(name: str = "denoise", *, start: int = 100, peak: Memory = PEAK, **more: Any) -> Span:
    begin = mib(start, start, None if peak.device_bytes is None else 700)
    return Span(
        name,
        more.pop("kind", "stage"),
        more.pop("component", "dit"),
        begin,
        peak,
        begin,
        more.pop("seconds", 2.0),
        **more,
    )


def record(*stages: Span, **more: Any) -> RunRecord:
    given = {
        "device": "cuda:x",
        "simulated": False,
        "config": {"name": "x", "request": REQUEST},
        "stages": [*stages] or [stage()],
    }
    return RunRecord(**(given | more))


def run(label: str = "x", made: RunRecord | None = None, *, alive: Sequence[AliveBlocks] = (), **more: Any) -> Run:
    made = made or record()
    timeline = coarse_timeline(made)
    if alive:
        moment = TimelineMoment("peak", 0, 300 * MIB, 400 * MIB, "denoise", "dit", tuple(alive), ())
        timeline = replace(timeline, moments=(moment,))
    return Run(label, made, timeline, bool(alive), **more)


def used(mebibytes: int, label: str = "x", *, step: float | None = None, **more: Any) -> Run:
    """A run with that peak on the device in MiB."""
    steps = [] if step is None else [Span("step 0", "step", "dit", mib(1, 1, 1), mib(2, 2, 2), mib(1, 1, 1), step)]
    return run(label, record(stage(peak=mib(300, 400, mebibytes), children=steps), **more))


def failed(made: Run, kind: str = "oom") -> Run:
    return replace(made, record=replace(made.record, failure=Failure(kind, "It broke.", "denoise")))


# --- the headline ------------------------------------------------------------------------------------------------------------


def headline(made: RunRecord) -> str:
    return answer(run("x", made), EN).headline


def test_the_figure_of_the_headline_is_the_devices_or_what_is_reserved_and_on_the_cpu_what_tensors_take() -> None:
    unknown = stage(peak=mib(300, 400, None))
    assert headline(record()).startswith("This run needed 1,000.0 MiB of device memory; the smallest")
    assert headline(record(unknown)).startswith("This run needed 400.0 MiB of reserved memory; the smallest")
    assert headline(record(stage(peak=mib(300, 300, None)), device="cpu")) == "This run needed 300.0 MiB of memory."
    assert headline(record(simulated=True)).startswith("This run will need 1,000.0 MiB of device memory;")


def test_what_is_spare_or_too_much_is_said_without_a_sign() -> None:
    fits = record(fits=True, budget_bytes=1500 * MIB)
    assert "it fits the budget of 1,500.0 MiB with 500.0 MiB to spare; " in headline(fits)
    assert "it does not fit the budget of 900.0 MiB: 100.0 MiB too much; " in headline(
        record(fits=False, budget_bytes=900 * MIB)
    )
    assert "budget" not in headline(record(fits=True))


@pytest.mark.parametrize("card", [4, 6, 8, 10, 12, 16, 24, 32, 48, 80])
def test_a_card_is_held_by_itself_up_to_98_per_cent(card: int) -> None:
    most = int(card * GIB * 0.98)
    assert smallest_card(most) == card
    assert smallest_card(most + 1) != card


def test_what_no_card_holds_is_said_with_the_largest_card() -> None:
    assert headline(used(90_000).record).endswith("; no standard card up to 80 GB holds it.")


def test_only_a_run_that_ended_on_a_card_has_a_smallest_card() -> None:
    assert card_of(record()) == 4
    assert card_of(record(device="cpu")) is None
    assert card_of(record(failure=Failure("error", "x"))) is None
    assert card_of(replace(record(), stages=[])) is None


@pytest.mark.parametrize(
    ("message", "said"), [("Full.", "Full."), ("Full!", "Full!"), ("Full? ", "Full?"), ("full", "full.")]
)
def test_the_sentence_of_a_failure_ends_once(message: str, said: str) -> None:
    made = record(failure=Failure("error", message))
    assert headline(made) == f"The run failed in no stage: {said} Its peak until then: 1,000.0 MiB of device memory."
    assert headline(replace(made, stages=[])) == f"The run failed in no stage: {said}"
    assert headline(replace(made, stages=[], failure=None)) == "Nothing was recorded."


# --- the owner ---------------------------------------------------------------------------------------------------------------


def owner(*alive: AliveBlocks, **more: Any) -> str:
    return answer(run("x", record(stage(**more)), alive=alive), EN).owner


def test_a_stage_that_adds_as_much_as_was_there_is_mostly_weights() -> None:
    assert (
        owner(start=150)
        == "denoise (dit) owns the peak: 150.0 MiB already there, mostly weights, plus 150.0 MiB of activations."
    )
    assert (
        owner(start=149) == "denoise (dit) owns the peak: 151.0 MiB of activations on top of 149.0 MiB already there."
    )
    assert owner(component=None).startswith("denoise (no component) owns the peak")


def test_the_largest_group_is_one_that_is_known_and_of_a_load_none_is_told() -> None:
    rest, known = AliveBlocks(90, 5, operation=OTHER), AliveBlocks(9 * MIB, 3, "dit", operation=WEIGHTS)
    assert owner(rest, known).endswith("The largest group alive then: 9.0 MiB, 3 x weights of dit.")
    assert "largest group" not in owner(rest)
    assert "largest group" not in owner(known, kind="load")
    assert owner(AliveBlocks(9 * MIB, 3, operation=WEIGHTS)).endswith("3 x libraries.")


# --- advice ------------------------------------------------------------------------------------------------------------------


def change(*advice: Advice, made: Run | None = None) -> str:
    return answer(replace(made or run(), advice=advice), EN).change


@pytest.mark.parametrize(
    ("seconds", "cost"),
    [
        (0.0, "at no cost in time"),
        (0.0049, "at no cost in time"),
        (0.005, "for 0.01 s more per run"),
        (-0.0049, "at no cost in time"),
        (-0.005, "and takes 0.01 s less per run"),
        (None, "at an unknown cost in time"),
    ],
)
def test_what_is_shown_as_no_time_costs_none(seconds: float | None, cost: str) -> None:
    said = change(Advice("tile", 100 * MIB, seconds))
    assert said == f"To lower it: tile lowers the peak by 100.0 MiB (10 %) {cost} (simulated)."


def test_a_lossy_change_is_told_only_if_it_saves_more_than_the_best_lossless_one() -> None:
    best, as_much = Advice("tile", 100 * MIB, 0.0), Advice("fp8", 100 * MIB, 0.0, lossless=False)
    assert "fp8" not in change(best, as_much)
    assert "fp8 lowers the peak by 100.0 MiB" in change(best, replace(as_much, saved_bytes=100 * MIB + 1))
    assert change(as_much, replace(as_much, change="fp4", saved_bytes=1)).count("Lossy") == 1


def test_nobody_is_told_to_change_other_peoples_code() -> None:
    assert change() == "What lowers it: `wanvram analyze DIR --advice` simulates every change and says what each saves."
    assert change(made=run("x", record(config={"foreign": True}))) == ""


def test_only_of_a_run_out_of_memory_is_it_said_what_it_would_need_without_limit() -> None:
    advice = Advice("tile", 250 * MIB, 0.0, base_device_bytes=1000 * MIB)
    assert change(advice, made=failed(run())).startswith(
        "On a card without limit this run would need 1,000.0 MiB; with tile 750.0 MiB (25 % less), at no cost in time"
    )
    assert change(advice, made=failed(run(), "error")).startswith(
        "To lower it: tile lowers the peak by 250.0 MiB (25 %)"
    )
    assert "(-)" in change(replace(advice, base_device_bytes=None), made=failed(run(), "error"))
    assert "(-)" in change(replace(advice, base_device_bytes=0))


# --- several runs ------------------------------------------------------------------------------------------------------------


def test_of_equal_peaks_the_faster_step_is_better_and_an_unknown_one_is_last() -> None:
    runs = [
        used(900, "slow", step=3.0),
        used(900, "unknown"),
        used(900, "fast", step=1.0),
        used(800, "low"),
        failed(used(1)),
    ]
    assert [(peak // MIB, best.label) for peak, best in best_first(runs)] == [
        (800, "low"), (900, "fast"), (900, "slow"), (900, "unknown"),
    ]  # fmt: skip
    assert ranks(runs) == [3, 4, 2, 1, None]
    assert ranks([used(900, step=1.0), used(900, step=1.0), used(950)]) == [1, 1, 3]


def test_what_several_runs_have_in_common_is_one_sentence_each() -> None:
    assert together([used(900), used(800)], EN) == (
        "Of 2 runs the lowest peak is 800.0 MiB; the smallest standard card that holds it has 4 GB. The highest is 900.0 MiB."
    )
    assert together([used(900), used(900), used(800)], EN).endswith("The highest is 900.0 MiB, shared by 2 runs.")
    assert together([used(800), used(800)], EN).startswith("Of 2 runs 2 share the lowest peak, 800.0 MiB; ")
    assert ranked([used(800)], EN).startswith("One run, with a peak of 800.0 MiB; ")
    assert ranked([used(800), failed(used(1))], EN) == (
        "Of 2 runs the lowest peak is 800.0 MiB; the smallest standard card that holds it has 4 GB. Failed runs: 1."
    )
    assert ranked([failed(used(1)), failed(used(2))], EN) == "None of the 2 runs came to its end."


def test_only_runs_on_a_card_are_said_to_need_one() -> None:
    assert ranked([used(800, device="cpu"), used(900, device="cpu")], EN) == (
        "Of 2 runs the lowest peak is 800.0 MiB. The highest is 900.0 MiB."
    )
    assert "smallest standard card" in ranked([used(800, device="cpu"), used(900)], EN)


# --- Markdown ----------------------------------------------------------------------------------------------------------------


def lines(*runs: Run) -> list[str]:
    return markdown_report(runs).splitlines()


def test_the_table_of_runs_has_a_card_where_there_is_one_and_a_verdict_where_a_budget_was_given() -> None:
    runs = [used(800, "a", fits=True), used(90_000, "b", fits=False), failed(used(700, "c"))]
    runs += [used(900, "d", device="cpu", step=1.5)]
    cells = {line.split(" | ")[1]: line for line in lines(*runs) if re.match(r"\| \d* \| [a-d] ", line)}
    assert cells["a"].endswith("|  | denoise | 4 GB | fits |")
    assert cells["b"].endswith("| denoise | over 80 GB | does not fit |")
    assert cells["c"].endswith("| denoise | - | failed |")
    assert cells["d"].endswith("| 1.50 s | denoise |  |  |")


def test_a_run_that_recorded_nothing_has_empty_cells() -> None:
    nothing = run("none", replace(record(), stages=[]))
    assert "|  | none | measured |  |  |  |  |  |  |  |" in lines(nothing, run("y"))
    assert "|  | none | measured |  |  |  |  |  |" in lines(
        *(replace(r, record=replace(r.record, device="cpu")) for r in (nothing, run("y")))
    )


def test_columns_of_figures_are_aligned_to_the_right() -> None:
    made = record(stage(), stage("decode"), components=[ComponentRecord("dit", 5, MIB, 0, 0)])
    rules = [line for line in lines(run("x", made), run("y", made)) if line.startswith("| -")]
    assert rules[:3] == [
        "| ---: | --- | --- | ---: | ---: | ---: | ---: | --- | --- | --- |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    several = lines(run("p", PREDICTED))
    at = several.index("### GPUs")
    assert several[at + 3 : at + 6] == [
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        "| 0 | 500.0 | 550.0 | 1,500.0 | 566.0 | 300.0 | 70.0 | 1.50 s | denoise |",
        "| 1-3 | 700.0 | 750.0 | 1,700.0 | 566.0 | 300.0 | 70.0 | 1.50 s | denoise |",
    ]
    assert "### GPUs" not in lines(run())


def test_a_stage_whose_time_is_unknown_has_an_empty_cell_and_a_load_has_no_activation() -> None:
    found = lines(run("x", record(stage("load dit", kind="load", seconds=None), stage(seconds=0.0))))
    assert "| load dit | dit | 100.0 |  | 1,000.0 | 400.0 | 300.0 | 25.0% |  |" in found
    assert "| denoise | dit | 100.0 | 200.0 | 1,000.0 | 400.0 | 300.0 | 25.0% | 0.00 s |" in found


def test_several_videos_have_a_table_of_their_times_and_a_single_one_has_none() -> None:
    def made(count: int) -> RunRecord:
        stages = [stage("denoise", seconds=30.0, videos=count)]
        stages += [
            stage(f"{part} {n}", part=part, seconds=1.5 if n else None)
            for n in range(count)
            for part in ("decode", "save")
        ]
        return record(*stages, times=Times(1.0, 80.0))

    found = lines(run("x", made(2)))
    at = found.index("### Videos")
    assert found[at + 2 : at + 8] == [
        "2 videos, 2 together: 40.0 s a video of 80.0 s in all", "",
        "| video | own time |", "| ---: | ---: |", "| 1 |  |", "| 2 | 18.0 s |",
    ]  # fmt: skip
    assert "### Videos" not in lines(run("x", made(1)))
    assert videos_line(made(1), EN) == []
    assert len(videos_line(made(2), EN)) == 1


def predicted_and_measured(p: Memory, m: Memory, *more: Span) -> list[str]:
    a, b = run("p", record(stage(peak=p), *more, simulated=True)), run("m", record(stage(peak=m)))
    found = lines(a, b)
    at = next(i for i, line in enumerate(found) if line.startswith("## Predicted against measured"))
    return [
        line
        for line in found[at + 4 : found.index("", at + 4)]
        if line.startswith("| denoise") or line.startswith("| extra")
    ]


def test_errors_are_signed_and_a_figure_that_one_of_both_lacks_has_none() -> None:
    assert predicted_and_measured(mib(303, 396, 1000), mib(300, 400, 1000)) == [
        "| denoise: peak device | 1,000.0 | 1,000.0 | +0.0 | +0.00% |",
        "| denoise: peak reserved | 396.0 | 400.0 | -4.0 | -1.00% |",
        "| denoise: peak allocated | 303.0 | 300.0 | +3.0 | +1.00% |",
    ]
    for p, m in ((None, 9), (9, None), (None, None)):
        figures = predicted_and_measured(mib(303, 396, p), mib(0, 400, m), stage("extra", peak=mib(1, 1, p)))
        assert figures == [
            "| denoise: peak reserved | 396.0 | 400.0 | -4.0 | -1.00% |",
            "| denoise: peak allocated | 303.0 | 0.0 | +303.0 |  |",
        ], "and no stage that only one has"


def test_a_prediction_or_a_measurement_of_nothing_has_no_errors() -> None:
    full, empty = record(), record(simulated=True)
    empty.stages = []
    for p, m in ((empty, full), (replace(full, simulated=True), replace(empty, simulated=False))):
        found = lines(run("p", p), run("m", m))
        assert "## Predicted against measured: p, m" in found
        assert not any(line.startswith("| whole run") for line in found)


def test_the_table_of_advice_has_only_columns_that_are_known() -> None:
    plain = Advice("tile", 100 * MIB, None)
    found = lines(replace(run(), advice=(plain,)))
    at = found.index("### What changes would save")
    assert found[at + 2 : at + 5] == [
        "| change | saves MiB | added time per run |",
        "| --- | ---: | ---: |",
        "| tile | 100.0 |  |",
    ]
    left = replace(plain, peak_device_bytes=900 * MIB, seconds=1.0)
    found = lines(replace(run(), advice=(replace(plain, saved_bytes=1), left)))
    assert found[at + 2 : at + 6] == [
        "| change | saves MiB | leaves MiB | added time per run |", "| --- | ---: | ---: | ---: |",
        "| tile | 100.0 | 900.0 | 1.00 s |", "| tile | 0.0 | - |  |",
    ]  # fmt: skip
    found = lines(replace(run(), advice=(replace(plain, fits=True), replace(plain, saved_bytes=1))))
    assert found[at + 4 : at + 6] == ["| tile | 100.0 |  | yes |", "| tile | 0.0 |  |  |"]


def test_a_setting_of_300_characters_is_whole_and_a_longer_one_is_cut() -> None:
    text = markdown_report([run("x", record(config={"a": "x" * 300, "b": "y" * 301}, notes=["n" * 301]))])
    assert "x" * 300 in text
    assert f"- `b`: {'y' * 299}…\n" in text
    assert f"- {'n' * 299}…\n" in text


def test_ten_groups_are_listed_and_no_rest_is_made_up() -> None:
    groups = [AliveBlocks(n * MIB, 1, "dit", operation=f"op{n}") for n in range(1, 11)]
    assert not any(" other " in line for line in lines(run(alive=groups)))
    assert "| 1.0 | 1 | dit | op1 |  |  |  |" in lines(run(alive=groups))
    assert "| 1.0 | 1 |  | other |  |  |  |" in lines(run(alive=[*groups, AliveBlocks(MIB, 1, operation="op0")]))
    assert "| 9.0 | 4 |  | other |  |  |  |" in lines(run(alive=[AliveBlocks(9 * MIB, 4, operation=OTHER)]))


def test_a_timeline_that_is_another_runs_is_said_to_be_borrowed() -> None:
    said = "Curve, weights and what was alive are of this run's prediction; the tables are measured."
    groups = [AliveBlocks(MIB, 1, "dit", operation="op")]
    assert said in lines(run(alive=groups, borrowed=True))
    assert said not in lines(run(alive=groups))
    assert said not in lines(run(borrowed=True)), "nothing of it is shown"


# --- the terminal ------------------------------------------------------------------------------------------------------------


def test_only_a_prediction_that_ends_well_says_how_long_all_of_it_takes() -> None:
    timed = record(simulated=True, times=Times(1.0, 80.0))
    assert "Time: 80.0 s in all, from the command to its end\n" in summarize(timed)
    assert "Time: 0.00 s in all" in summarize(replace(timed, times=Times(0.0, 0.0)))
    for other in (
        replace(timed, simulated=False),
        replace(timed, times=Times()),
        replace(timed, failure=Failure("error", "x")),
    ):
        assert "in all" not in summarize(other)


def test_why_a_stage_is_the_highest_is_told_by_what_it_added() -> None:
    assert "150.0 MiB activation: mostly weights and tensors already there" in summarize(record(stage(start=150)))
    assert "151.0 MiB activation: mostly activations of the stage" in summarize(record(stage(start=149)))
    libraries = stage("libraries", kind="load", component=None)
    assert "\n      200.0 MiB of libraries' workspaces, before any weights\n" in summarize(record(libraries))


def test_one_kind_of_attention_is_told_once_and_two_are_told_apart() -> None:
    def said(own: str, cross: str, basis: str = "asked") -> str:
        choice = AttentionChoice("auto", own, basis, AttentionUse(own, ""), AttentionUse(cross, ""))
        return summarize(record(attention=choice))

    assert "\nAttention: flash2 (asked for, or planned)\n" in said("flash2", "flash2")
    assert "\nAttention: flash3 among the video's tokens, math to the prompt's (auto)\n" in said(
        "flash3", "math", "table"
    )


def test_a_run_without_a_name_and_one_of_other_code_have_a_first_line() -> None:
    assert summarize(record(config={"request": REQUEST})).startswith("run: t2v-1.3B 832*480 81 frames\n")
    assert summarize(record(config={"foreign": True, "description": "mine"})).startswith("run: mine\n")
    assert summarize(record(config={"foreign": True, "name": "n"})).startswith("n: -\n")


def test_what_was_alive_is_told_of_any_failure_and_what_would_fit_only_without_memory() -> None:
    alive = (("a", MIB), ("b", 2 * MIB), ("a", MIB), ("a", MIB))
    text = summarize(record(failure=Failure("error", "x", alive=alive)))
    assert "alive when it failed:\n         3.0 MiB  3 x a\n         2.0 MiB  b\n" in text
    assert "make it fit" not in text
    assert "make it fit" in summarize(record(failure=Failure("oom", "x")))
    assert "alive when" not in summarize(record(failure=Failure("oom", "x")))


def test_of_equal_moments_the_first_stage_comes_first_and_an_inner_one_names_it() -> None:
    inner = stage("step 0", kind="step", children=[stage("block 0", kind="block"), stage("block 1", kind="block")])
    text = summarize(record(stage("a", children=[inner]), stage("b"), stage("c"), stage("d")))
    assert re.findall(r"300\.0 MiB  (.*)", text) == ["a / step 0 / block 0", "b", "c"]


def test_a_limit_that_was_given_is_asked_for_in_whole_mebibytes() -> None:
    text = summarize(record(budget_bytes=5 * MIB + 1000, fits=False, failure=Failure("oom", "x")))
    assert " --vram 5MiB\n" in text
    assert MAX_COMMAND > 1000


def test_a_table_has_names_on_the_left_figures_on_the_right_and_a_rule_as_wide_as_its_first_line() -> None:
    assert table([["name", "n"], ["a", "10"], ["longer", "1"]]) == "name     n\n----------\na       10\nlonger   1"
    assert table([["名", "n"], ["a", "1"]]) == "名  n\n-----\na   1", "a Chinese character is two columns wide"
    assert table([["ａ", "n"], ["é", "1"]]) == "ａ  n\n-----\né   1", "so is a wide letter, an accent is not"
    assert listed(["a", "b"], []) == ""
    assert listed(["a", "b"], iter([["c", "d"]])) == "a  b\n----\nc  d"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def bold(text: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    show(text, stream)
    assert re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()) == text
    return re.findall(r"\x1b\[1m(.*?)\x1b\[0m", stream.getvalue())


def test_the_first_line_and_what_stands_over_a_rule_are_bold(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bold("one\ntwo\nhead\n----\nthree\ntitle\n==\n", monkeypatch) == ["one", "head", "title"]
    assert bold("one\ntwo\n-\n", monkeypatch) == ["one"], "a single sign is no rule"
    assert bold("one\ntwo\n-a\n", monkeypatch) == ["one"]


def test_what_is_shown_nowhere_and_what_is_shown_in_a_file_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    show("one\n", stream)
    assert stream.getvalue() == "one\n"
    monkeypatch.setattr("sys.stdout", None)  # as without a console
    show("one\n")
