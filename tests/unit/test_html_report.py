"""The HTML report without a browser: what is in the file, what reads it, how it is asked for. See tests/browser for the page itself."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path
from string import Formatter
from typing import Any

import pytest

from report_runs import Recipe, write_run
from wanvram.advice import Advice
from wanvram.analysis.peak import weights_at
from wanvram.cli import report
from wanvram.errors import InputError
from wanvram.record import Failure
from wanvram.report.findings import alike, answer, best_first, ranks, smallest_card, together
from wanvram.report.html import MAX_BYTES, html_report
from wanvram.report.markdown import markdown_report
from wanvram.report.runs import Run, find_runs, pairs, read_run
from wanvram.report.timeline import coarse_timeline, thinned
from wanvram.report.translations import GLOSSARY, TEXTS, Texts
from wanvram.spans import Memory
from wanvram.timeline_record import read_timeline
from wanvram.units import GIB, MIB

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028&amp;"


def page_data(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return dict(json.loads(found.group(1)))


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    report.prepare_parser(parser)
    return report.run(parser.parse_args(arguments))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return read_run(write_run(tmp_path / "run"))


def test_the_file_names_no_address_outside_and_forbids_everything_but_its_own_scripts(run: Run) -> None:
    page = html_report([run])
    assert re.findall(r'(?:src|href)="[^"#]', page.split("<script>")[0]) == []
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert re.fullmatch(
        r"default-src 'none'; script-src 'sha256-\S+' 'sha256-\S+'; style-src 'sha256-\S+'; "
        r"base-uri 'none'; form-action 'none'",
        policy.group(1),
    )
    assert "innerHTML" not in page


def test_hostile_text_cannot_leave_its_place_and_arrives_unchanged(tmp_path: Path) -> None:
    page = html_report([read_run(write_run(tmp_path, Recipe(HOSTILE, prompt=HOSTILE)))])
    assert "<img" not in page
    assert page.count("</script>") == 3
    run = page_data(page)["runs"][0]
    assert (run["label"], run["settings"]["request.prompt"]) == (HOSTILE, HOSTILE)


def test_the_answer_says_how_much_whether_it_fits_who_owns_it_and_what_to_change(tmp_path: Path) -> None:
    said = answer(read_run(write_run(tmp_path, Recipe(budget_bytes=6 * GIB))), Texts())
    assert said.headline == (
        "This run will need 6,162.0 MiB of device memory; it does not fit the budget of 6.00 GiB: 18.0 MiB too much; "
        "the smallest standard card that holds it has 8 GB."
    )
    assert said.owner == (
        "decode (vae) owns the peak: 3,858.0 MiB of activations on top of 1,276.0 MiB already there. "
        "The largest group alive then: 1,929.0 MiB, 1 x [1, 96, 4, 480, 832] float16 of decoder.up.0."
    )
    assert said.change == (
        "What lowers it: `wanvram analyze DIR --advice` simulates every change and says what each saves."
    )


def test_what_advice_computed_is_the_change_proposed(run: Run) -> None:
    advised = replace(run, advice=(Advice("a", 5 * MIB, None), Advice("offload: true", 900 * MIB, 3.5)))
    assert answer(advised, Texts()).change == (
        "To lower it: offload: true lowers the peak by 900.0 MiB (15 %) for 3.50 s more per run (simulated)."
    )
    assert page_data(html_report([advised]))["runs"][0]["advice"][0]["seconds"] == 3.5


def test_a_lossless_change_is_advised_before_a_lossy_one_that_saves_more_and_that_is_named_lossy(run: Run) -> None:
    lossy = Advice("--precision bf16", 2000 * MIB, -4.0, lossless=False)
    lossless = Advice("--offload_model True", 900 * MIB, 0)
    assert answer(replace(run, advice=(lossy, lossless)), Texts()).change == (
        "To lower it: --offload_model True lowers the peak by 900.0 MiB (15 %) at no cost in time (simulated). "
        "Lossy, the video changes: --precision bf16 lowers the peak by 2,000.0 MiB (32 %) and takes 4.00 s less per run "
        "(simulated)."
    )
    small = replace(lossy, saved_bytes=5 * MIB)
    assert "Lossy" not in answer(replace(run, advice=(small, lossless)), Texts()).change
    assert answer(replace(run, advice=(small,)), Texts()).change.startswith(
        "Lossy, the video changes: --precision bf16"
    )


def test_a_change_whose_cost_is_unknown_says_so(run: Run) -> None:
    said = answer(replace(run, advice=(Advice("x", 900 * MIB, None),)), Texts()).change
    assert said.endswith("(15 %) at an unknown cost in time (simulated).")


def test_a_failed_run_opens_with_its_failure(run: Run) -> None:
    failed = replace(run.record, failure=Failure("oom", "8.00 GiB are full.", stage="decode"), fits=False)
    assert answer(replace(run, record=failed), Texts()).headline == (
        "Out of memory in decode: 8.00 GiB are full. Its peak until then: 6,162.0 MiB of device memory."
    )
    page = page_data(html_report([replace(run, record=failed)]))
    assert page["runs"][0]["card"] is None
    bare = replace(failed, failure=Failure("oom", "tried to allocate 9.0 MiB", stage="decode"))
    assert "allocate 9.0 MiB. Its peak" in answer(replace(run, record=bare), Texts()).headline
    empty = replace(failed, stages=[], components=[])
    page = html_report([replace(run, record=empty, timeline=coarse_timeline(empty), exact=False)])
    assert page_data(page)["runs"][0]["peak"] is None


def test_the_limit_drawn_is_the_budget_or_else_the_card_that_was_full(run: Run) -> None:
    def limit(**changes: Any) -> Any:
        return page_data(html_report([replace(run, record=replace(run.record, **changes))]))["runs"][0]["limit"]

    full = Failure("oom", "Full.", stage="decode")
    card = {"name": "NVIDIA GeForce RTX 4060 8GB", "bytes": int(8 * GIB * 0.98)}
    assert limit(device="simulated:rtx4060") is None
    assert limit(device="simulated:rtx4060", failure=full) == card
    assert limit(device="simulated:rtx4060", failure=full, budget_bytes=6 * GIB) == {"name": None, "bytes": 6 * GIB}
    assert limit(device="simulated:rtx4060", failure=Failure("error", "Lost.")) is None
    assert limit(device="simulated:<b>", failure=full) is None
    real = {"device": "cuda:NVIDIA T4", "simulated": False, "failure": full}
    assert limit(**real, environment={"gpu_total_bytes": 16 * GIB}) == {"name": "NVIDIA T4", "bytes": 16 * GIB}
    assert limit(**real, environment={"gpu_total_bytes": "<b>"}) is None


@pytest.mark.parametrize(
    ("used", "card"), [(0, 4), (int(7.84 * GIB), 8), (int(7.85 * GIB), 10), (78 * GIB, 80), (79 * GIB, None)]
)
def test_a_card_holds_98_percent_of_its_nominal_memory(used: int, card: int | None) -> None:
    assert smallest_card(used) == card


def test_twenty_large_runs_stay_under_two_megabytes_and_keep_their_peaks(tmp_path: Path) -> None:
    large = read_run(write_run(tmp_path, Recipe(steps=10, events=260)))
    groups = large.timeline.moments[0].alive * 20
    moments = tuple(replace(moment, alive=groups) for moment in large.timeline.moments)
    large = replace(large, timeline=replace(large.timeline, moments=moments))
    runs = [replace(large, label=f"run {i}") for i in range(20)]
    page = html_report(runs)
    assert len(page.encode()) < MAX_BYTES
    for run in page_data(page)["runs"]:
        assert run["shortened"]
        assert max(run["timeline"]["points"][1]) == 5134 * MIB
        assert sum(group[0] for group in run["timeline"]["moments"][0]["alive"]) == sum(g.bytes for g in groups)


def test_thinning_keeps_the_highest_of_every_figure(run: Run) -> None:
    thin = thinned(run.timeline, points=10, groups=3, blocks=0)
    assert len(thin.points) == 10
    for i in (1, 2, 3):
        assert max(p[i] or 0 for p in thin.points) == max(p[i] or 0 for p in run.timeline.points)
    assert [group.operation for group in thin.moments[0].alive][-1] == "(other)"
    assert sum(g.bytes for g in thin.moments[0].alive) == 5134 * MIB
    assert thin.moments[0].segments == ()


def test_the_weights_on_the_device_are_those_whose_time_includes_the_moment(tmp_path: Path) -> None:
    timeline = read_run(write_run(tmp_path, Recipe(offload=True))).timeline
    assert weights_at(timeline, timeline.moments[0].x) == {"vae": 280 * MIB}


def test_a_run_without_a_timeline_is_drawn_from_its_stages(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, Recipe(timeline=False)))
    assert not run.exact
    assert max(point[1] for point in run.timeline.points) == 5134 * MIB
    assert [stage.name for stage in run.timeline.stages][-1] == "decode"
    assert run.timeline.moments == ()


def test_a_measured_run_without_a_timeline_borrows_that_of_a_prediction_that_came_true(tmp_path: Path) -> None:
    real = Recipe("real", simulated=False, timeline=False)
    recipes = Recipe(), real, replace(real, name="far off", factor=1.02)
    predicted, true, wrong = find_runs([write_run(tmp_path / r.name, r) for r in recipes])
    assert (true.borrowed, true.timeline) == (True, predicted.timeline)
    assert (wrong.borrowed, wrong.timeline.moments) == (False, ())
    said = TEXTS["en"]["borrowed"]
    assert [said in markdown_report([run]) for run in (predicted, true, wrong)] == [False, True, False]


def test_of_a_prediction_and_its_measurement_the_measurement_counts(tmp_path: Path) -> None:
    recipes = Recipe("dream"), Recipe("real", simulated=False, factor=1.01), Recipe("small", offload=True)
    runs = find_runs([write_run(tmp_path / r.name, r) for r in recipes])
    assert [run.label for _, run in best_first(runs)] == ["small", "real"]


def test_a_prediction_pairs_with_the_measurement_of_the_same_configuration_only(tmp_path: Path) -> None:
    recipes = Recipe("a"), Recipe("b", offload=True), Recipe("c", simulated=False, prompt="other words")
    runs = find_runs([write_run(tmp_path / r.name, r) for r in recipes])
    assert pairs(runs) == [(0, 2)]


def test_a_directory_of_runs_is_all_its_runs_and_equal_names_are_told_apart(tmp_path: Path) -> None:
    for directory in ("b", "a"):
        write_run(tmp_path / directory, Recipe("same"))
    assert [run.label for run in find_runs([tmp_path])] == ["same", "same (b)"]
    write_run(tmp_path / "c", Recipe("same", simulated=False))
    assert [run.label for run in find_runs([tmp_path])] == ["same", "same (b)", "same (measured)"]


def with_step(run: Run, seconds: float) -> Run:
    """The run with one denoising step of so many seconds."""
    stages = [
        replace(s, children=[replace(s, name="step 0", kind="step", seconds=seconds)]) if s.name == "denoise" else s
        for s in run.record.stages
    ]
    return replace(run, label=f"{seconds:g} s", record=replace(run.record, stages=stages))


def test_of_runs_with_the_same_peak_the_fastest_is_the_best(run: Run) -> None:
    runs = [with_step(run, 2.0), with_step(run, 1.0), run]
    assert [best.label for _, best in best_first(runs)] == ["1 s", "2 s", run.label]
    assert ranks(runs) == [2, 1, 3]
    assert together(runs, Texts("en")).startswith("Of 3 runs 3 share the lowest peak, 6,162.0 MiB; the smallest ")
    same = [replace(run, label=f"{i}") for i in range(5)]
    assert together(same, Texts("en")) == (
        "Of 5 runs 5 share the lowest peak, 6,162.0 MiB; the smallest standard card that holds it has 8 GB."
    )
    assert ranks(same) == [1] * 5
    assert "| 1 | 1 s | predicted | 6,162.0 | 5,562.0 | 5,134.0 | 1.00 s | decode |" in markdown_report(runs)


def test_several_runs_that_share_the_highest_peak_are_counted_and_the_table_has_their_names(tmp_path: Path) -> None:
    recipes = Recipe("a"), Recipe("b"), Recipe("lean", offload=True)
    runs = find_runs([write_run(tmp_path / r.name, r) for r in recipes])
    assert together(runs, Texts("en")).endswith("The highest is 6,162.0 MiB, shared by 2 runs.")
    assert ranks(runs) == [2, 2, 1]


def asked_for(run: Run, task: str, frames: int, label: str) -> Run:
    request = run.record.config["request"] | {"task": task, "frame_num": frames}
    return replace(run, label=label, record=replace(run.record, config=run.record.config | {"request": request}))


def test_only_runs_of_the_same_task_size_and_frames_are_ranked_against_each_other(run: Run, tmp_path: Path) -> None:
    lean = find_runs([write_run(tmp_path / "lean", Recipe("lean", offload=True))])[0]
    large = asked_for(run, "t2v-14B", 81, "large")
    short = asked_for(lean, "t2v-1.3B", 17, "short")
    failed = replace(large, label="failed", record=replace(large.record, failure=Failure("oom", "Full.")))
    runs = [large, failed, short, run, lean, replace(run, label="again")]
    assert [[run.label for run in group] for group in alike(runs)] == [
        ["baseline", "lean", "again"],
        ["large", "failed"],
        ["short"],
    ]
    assert ranks(runs) == [1, None, 1, 2, 1, 2]
    assert together(runs, Texts("en")) == (
        "6 runs of 3 different tasks, sizes or frame counts: they are ranked only among runs of the same. Failed runs: 1."
    )
    page = page_data(html_report(runs))
    assert (page["shown"], page["pinned"], page["ranks"]) == (4, [5, 4], [1, None, 1, 2, 1, 2])
    assert [kind["asked"] for kind in page["kinds"]] == [
        "t2v-1.3B 832*480, 81 frames",
        "t2v-14B 832*480, 81 frames",
        "t2v-1.3B 832*480, 17 frames",
    ]
    assert page["kinds"][2]["said"].startswith("One run, with a peak of 5,084.0 MiB; ")
    text = markdown_report(runs)
    assert text.index("### t2v-1.3B 832\\*480, 81 frames") < text.index("| 1 | lean |") < text.index("| 1 | large |")


def test_what_a_load_that_failed_had_loaded_is_weights(run: Run) -> None:
    load = replace(run.record.stages[0], peak=run.record.stages[0].end)
    failure = Failure("oom", "Full.", stage=load.name)
    failed = replace(run, record=replace(run.record, stages=[load], components=[], failure=failure))
    assert answer(failed, Texts()).owner == (
        "load text_encoder (text_encoder) owns the peak: 736.0 MiB of weights loaded by it on top of 0.0 MiB already there."
    )
    assert page_data(html_report([failed]))["runs"][0]["stages"][0]["activation"] is None


def test_the_time_of_a_run_leaves_loading_out(run: Run) -> None:
    assert page_data(html_report([run]))["runs"][0]["seconds"] == 4.5  # three stages of 1.5 s; three loads took as long


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("timeline.json", "{", "timeline.json is no valid JSON"),
        ("timeline.json", '{"schema": 2}', "timeline.json is no timeline of schema 1"),
        (
            "timeline.json",
            '{"schema": 1, "axis": "events", "points": [[0, "x", 1, null]], "stages": [], "weights": [], "moments": []}',
            "points.0.1 is 'x'; expected a whole number",
        ),
        (
            "timeline.json",
            '{"schema": 1, "axis": "events", "points": [], "stages": [{"name": "s", "component": null, "kind": "block", '
            '"start": 0, "end": 1}], "weights": [], "moments": []}',
            "timeline.json is damaged: stages.0.kind is 'block'; expected one of load, stage, step",
        ),
        ("timeline.json", '{"schema": 1, "axis": "years", "points": []}', "'years' is none of events, seconds"),
        ("advice.json", '{"advice": [{"change": "x"}]}', "advice.json is damaged: 'saved_bytes' is missing"),
        ("record.json", "[]", "this is no wanvram record of schema 1"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    (write_run(tmp_path) / name).write_text(text)
    with pytest.raises(InputError, match=re.escape(sentence)):
        read_run(tmp_path)


def test_a_record_whose_figures_are_text_is_refused(tmp_path: Path) -> None:
    path = write_run(tmp_path) / "record.json"
    data = json.loads(path.read_text())
    data["stages"][0]["peak_device_bytes"] = "<b>"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"device_bytes is .*; expected a whole number"):
        read_run(tmp_path)


def test_numbers_that_are_none_reach_no_page(tmp_path: Path) -> None:
    directory = write_run(tmp_path)
    path = directory / "record.json"
    path.write_text(path.read_text().replace('"seconds": 1.5', '"seconds": NaN'))
    assert "NaN" not in html_report([read_run(directory)]).split('id="data">')[1].split("</script>")[0]


def test_unknown_keys_of_a_timeline_are_dropped(run: Run) -> None:
    data = run.timeline.to_json() | {"extra": HOSTILE}
    assert read_timeline(json.loads(json.dumps(data))) == run.timeline


def test_device_memory_that_is_unknown_is_not_made_up(run: Run) -> None:
    stages = [replace(span, peak=Memory(5 * GIB, 6 * GIB, None)) for span in run.record.stages]
    for device, expected in (("cuda:NVIDIA H200", "6.00 GiB of reserved memory; "), ("cpu", "6.00 GiB of memory.")):
        said = answer(replace(run, record=replace(run.record, stages=stages, device=device)), Texts()).headline
        assert said.startswith(f"This run will need {expected}")


def test_both_languages_have_every_string_with_the_same_blanks() -> None:
    def blanks(text: str) -> set[str]:
        return {name for _, name, _, _ in Formatter().parse(text) if name}

    assert TEXTS["en"].keys() == TEXTS["zh"].keys()
    assert len(GLOSSARY["en"]) == len(GLOSSARY["zh"])
    for key, text in TEXTS["en"].items():
        assert blanks(text) == blanks(TEXTS["zh"][key]), key


def test_every_string_the_page_asks_for_exists() -> None:
    assets = resources.files("wanvram.report") / "assets"
    for name in ("base.js", "tables.js", "timeline.js", "alive.js", "report.js"):
        script = (assets / name).read_text()
        asked = set(re.findall(r'\bt\("(\w+)"', script)) | set(re.findall(r'column\("\w+", "(\w+)"', script))
        assert asked - TEXTS["en"].keys() == set()


def test_the_page_is_chinese_when_asked(run: Run) -> None:
    page = html_report([run], "zh")
    assert '<html lang="zh-CN">' in page
    assert page_data(page)["headline"] == "预计该运行需要 6,162.0 MiB 显存；能容纳它的最小标准显卡为 8 GB。"


def test_the_command_writes_the_page_beside_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_run(tmp_path / "run")
    assert command(str(directory)) == 0
    assert capsys.readouterr().out == f"Wrote {directory / 'report.html'}\n"
    assert (directory / "report.html").read_text().startswith("<!doctype html>")


def test_a_file_that_is_there_is_replaced_only_with_force(tmp_path: Path) -> None:
    directory, output = str(write_run(tmp_path / "run")), tmp_path / "mine.md"
    output.write_text("mine")
    with pytest.raises(InputError, match=r"mine\.md exists; --force replaces it"):
        command(directory, "-o", str(output))
    assert output.read_text() == "mine"
    assert command(directory, "-o", str(output), "--force") == 0
    assert output.read_text().startswith("# wanvram report")


def test_the_command_prints_one_json_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "both.md"
    assert command(str(write_run(tmp_path / "run")), "--json", "-o", str(output)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["written"], printed["runs"][0]["peak_device_bytes"]) == (str(output), 6162 * MIB)
    assert output.read_text().startswith("# wanvram report\n")


def test_text_and_markdown_go_to_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = str(write_run(tmp_path))
    assert command(directory, "--format", "text") == 0
    assert capsys.readouterr().out.startswith("This run will need 6,162.0 MiB of device memory")
    assert command(directory, "--format", "md", "--lang", "zh") == 0
    assert capsys.readouterr().out.startswith("# wanvram 报告\n")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("-o", "x.pdf"), "x.pdf: a report ends in .html, .htm, .md, .markdown, .txt"),
        (("-o", "x.md", "--format", "html"), "--format html contradicts the ending of x.md"),
        (("nowhere",), "nowhere is no run directory"),
    ],
)
def test_what_cannot_be_reported_is_said(tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        command(str(write_run(tmp_path)), *arguments)
