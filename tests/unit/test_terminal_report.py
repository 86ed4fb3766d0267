"""The terminal summary, letter for letter, for records made by hand: simulated, measured, and failed out of memory."""

from __future__ import annotations

import io
import json
import re
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wanvram.cli.main import main
from wanvram.record import ComponentRecord, Failure, RunRecord
from wanvram.report.terminal import show, summarize
from wanvram.spans import Memory, Span
from wanvram.units import GIB, MIB

CONFIG: dict[str, Any] = {"name": "lean", "request": {"task": "t2v-1.3B", "size": "832*480", "frame_num": 81}}


def memory(allocated: float, reserved: float, device: float | None = None) -> Memory:
    """In MiB."""
    return Memory(int(allocated * MIB), int(reserved * MIB), None if device is None else int(device * MIB))


def simulated() -> RunRecord:
    empty, loaded = memory(0, 0, 600), memory(2706.5, 2710, 3310)
    steps = [
        Span("step 0", "step", "dit", loaded, memory(4000, 4100, 4700), loaded),
        Span("step 1", "step", "dit", loaded, memory(4200.25, 4300, 4900), loaded),
    ]
    stages = [
        Span("load dit", "load", "dit", empty, memory(2706.5, 2710, 3310), loaded, seconds=1.5),
        Span("denoise", "stage", "dit", loaded, memory(4200.25, 4300, 4900), loaded, children=steps),
        Span("decode", "stage", "vae", memory(242, 260, 860), memory(7242, 7300, 7900), memory(242, 7300, 7900)),
    ]
    return RunRecord(
        device="simulated:h200",
        simulated=True,
        config=CONFIG,
        fits=True,
        budget_bytes=8 * GIB,
        components=[
            ComponentRecord("dit", 1_418_996_800, int(2706.5 * MIB), 0, int(1493.75 * MIB)),
            ComponentRecord("vae", 126_892_531, 242 * MIB, 12 * MIB, 7000 * MIB),
        ],
        stages=stages,
        environment={},
        host={},
        notes=["the text encoder computed on the host"],
    )


def test_a_simulated_run_that_fits_is_said_to_be_simulated() -> None:
    assert summarize(simulated()) == (
        """\
lean: t2v-1.3B 832*480 81 frames
SIMULATED, nothing was run on a GPU (simulated:h200)
Peak: allocated 7,242.0 MiB, reserved 7,300.0 MiB, device 7,900.0 MiB in decode
      242.0 MiB there when the stage began + 7,000.0 MiB activation: mostly activations of the stage
Verdict: fits in 8.00 GiB

component     parameters  base MiB  host MiB  activation MiB
------------------------------------------------------------
dit        1,418,996,800   2,706.5       0.0         1,493.8
vae          126,892,531     242.0      12.0         7,000.0

stage     start MiB  peak MiB  activation MiB  reserved MiB  device MiB    time
-------------------------------------------------------------------------------
load dit        0.0   2,706.5               -       2,710.0     3,310.0  1.50 s
denoise     2,706.5   4,200.2         1,493.8       4,300.0     4,900.0       -
decode        242.0   7,242.0         7,000.0       7,300.0     7,900.0       -

largest moments:
     7,242.0 MiB  decode
     4,200.2 MiB  denoise / step 1
     2,706.5 MiB  load dit

note: the text encoder computed on the host
"""
    )


def test_a_measured_run_without_a_limit_has_times_and_gibibytes_and_no_device_figure_where_none_is_known() -> None:
    loaded = memory(28_000, 28_100)
    record = RunRecord(
        device="cuda:NVIDIA H200",
        simulated=False,
        config={"name": "plain", "request": {"task": "t2i-14B", "size": "1280*720", "frame_num": 1}},
        fits=None,
        budget_bytes=None,
        components=[ComponentRecord("dit", 14_288_491_584, 28_000 * MIB, 0, 2000 * MIB)],
        stages=[
            Span("load dit", "load", "dit", memory(0, 0), loaded, loaded, seconds=12.34),
            Span("denoise", "stage", "dit", loaded, memory(30_000, 30_720), loaded, seconds=185.9),
        ],
        environment={},
        host={},
    )
    assert summarize(record) == (
        """\
plain: t2i-14B 1280*720 1 frames
MEASURED (cuda:NVIDIA H200)
Peak: allocated 29.30 GiB, reserved 30.00 GiB in denoise
      27.34 GiB there when the stage began + 2,000.0 MiB activation: mostly weights and tensors already there
Verdict: no memory limit was given (--vram 8GiB asks whether it fits)

component      parameters  base MiB  host MiB  activation MiB
-------------------------------------------------------------
dit        14,288,491,584  28,000.0       0.0         2,000.0

stage     start MiB  peak MiB  activation MiB  reserved MiB  device MiB        time
-----------------------------------------------------------------------------------
load dit        0.0  28,000.0               -      28,100.0           -      12.3 s
denoise    28,000.0  30,000.0         2,000.0      30,720.0           -  3 min 05 s

largest moments:
       29.30 GiB  denoise
       27.34 GiB  load dit
"""
    )


def test_a_run_that_ran_out_of_memory_says_where_instead_of_a_verdict() -> None:
    failure = Failure("oom", "Tried to allocate 1.50 GiB: the limit is 8.00 GiB.", "decode", "vae", 1536 * MIB)
    start, peak = memory(242, 260, 860), memory(7242, 7300, 7900)
    block = Span("up 1", "block", "vae", start, memory(7242, 7300), memory(7000, 7300))
    record = replace(
        simulated(),
        device="cuda:NVIDIA H200",
        simulated=False,
        fits=False,
        failure=failure,
        components=[ComponentRecord("vae", 126_892_531, 242 * MIB, 0, 7000 * MIB)],
        stages=[Span("decode", "stage", "vae", start, peak, peak, seconds=0.5, children=[block])],
        notes=[],
    )
    assert summarize(record) == (
        """\
lean: t2v-1.3B 832*480 81 frames
MEASURED (cuda:NVIDIA H200)
Peak: allocated 7,242.0 MiB, reserved 7,300.0 MiB, device 7,900.0 MiB in decode
      242.0 MiB there when the stage began + 7,000.0 MiB activation: mostly activations of the stage
FAILED (oom) in decode: Tried to allocate 1.50 GiB: the limit is 8.00 GiB.

component   parameters  base MiB  host MiB  activation MiB
----------------------------------------------------------
vae        126,892,531     242.0       0.0         7,000.0

stage   start MiB  peak MiB  activation MiB  reserved MiB  device MiB    time
-----------------------------------------------------------------------------
decode      242.0   7,242.0         7,000.0       7,300.0     7,900.0  0.50 s

largest moments:
     7,242.0 MiB  decode / up 1

what would make it fit:
  wanvram plan --task t2v-1.3B --size '832*480' --frame_num 81 --precision bf16 --vram 8192MiB
  wanvram analyze DIR --advice    (DIR: this run's directory; computes what each change saves)
"""
    )


def test_a_failure_outside_every_stage_names_none_and_empty_tables_keep_their_heads() -> None:
    failure = Failure("interrupted", "stopped by the user")
    record = replace(simulated(), simulated=False, device="cpu", failure=failure, components=[], stages=[], notes=[])
    assert summarize(record) == (
        """\
lean: t2v-1.3B 832*480 81 frames
MEASURED (cpu)
FAILED (interrupted): stopped by the user

component  parameters  base MiB  host MiB  activation MiB
---------------------------------------------------------

stage  start MiB  peak MiB  activation MiB  device MiB  time
------------------------------------------------------------

largest moments:
"""
    )


def test_every_figure_of_the_peak_is_that_of_the_record_and_names_another_stage_that_reaches_it() -> None:
    full = memory(7000, 8000, 8600)
    record = replace(simulated(), stages=[*simulated().stages, Span("save", "stage", None, full, full, full)])
    assert "Peak: allocated 7,242.0 MiB (in decode), reserved 8,000.0 MiB, device 8,600.0 MiB in save\n" in summarize(
        record
    )
    assert record.to_json()["peak"]["allocated_bytes"] == 7242 * MIB


def test_on_the_cpu_the_peak_is_where_tensors_take_most_since_a_process_hardly_gives_memory_back() -> None:
    after = Span("save", "stage", None, memory(1, 1, 7900), memory(1, 1, 7901), memory(1, 1, 7901))
    record = replace(simulated(), device="cpu", simulated=False, stages=[*simulated().stages, after])
    assert "Peak: allocated 7,242.0 MiB, device 7,901.0 MiB (in save) in decode\n" in summarize(record)
    assert record.to_json()["peak"]["stage"] == "decode"


def test_what_means_nothing_on_the_cpu_is_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = replace(simulated(), simulated=False, device="cpu", fits=None, budget_bytes=None)
    assert "reserved" not in summarize(record)
    assert "Peak: allocated 7,242.0 MiB, device 7,900.0 MiB in decode\n" in summarize(record)
    other = replace(record, config=CONFIG | {"name": "other"})
    paths = [str(write(tmp_path / "a", record)), str(write(tmp_path / "b", other))]
    for command in (["report", "--format", "text"], ["report", "--format", "md"], ["compare"]):
        assert main([*command, *paths]) == 0
        text = capsys.readouterr().out
        assert "7,242.0" in text
        assert not re.search("reserved|fragmentation|smallest", text)
    assert main(["report", *paths, "--format", "text"]) == 0
    assert "allocated MiB  device MiB" in capsys.readouterr().out
    unknown = replace(record, stages=[replace(record.stages[0], peak=memory(5, 5))])
    assert main(["report", str(write(tmp_path / "c", unknown)), "--format", "text"]) == 0
    assert capsys.readouterr().out.startswith("This run needed 5.0 MiB of memory.\n")


def test_a_text_report_in_chinese_has_the_same_figures_in_aligned_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(write(tmp_path / "a", simulated()))]
    failed = replace(simulated(), config=CONFIG | {"name": "full"}, failure=Failure("oom", "Full.", stage="decode"))
    paths.append(str(write(tmp_path / "b", failed)))
    said = {}
    for language in ("en", "zh"):
        assert main(["report", *paths, "--format", "text", "--lang", language]) == 0
        said[language] = capsys.readouterr().out
    figures = {
        language: re.findall(r"[\d,]+\.\d MiB|[\d,]+\.\d+(?=  )|\d+\.\d\d s", text) for language, text in said.items()
    }
    assert sorted(figures["en"]) == sorted(figures["zh"])
    assert len(figures["zh"]) > 30
    english = r"Peak|reserved|Verdict|stage\b|largest|what would|FAILED|configuration|allocated|predicted"
    assert not re.search(english, said["zh"])
    lines = said["zh"].splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("阶段"))
    widths = [sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in line) for line in lines[head : head + 5]]
    assert widths[0] == widths[1]
    assert widths[2] == len(lines[head + 1])
    assert "load dit" in lines[head + 2]


def test_a_budget_that_is_too_small_is_said_in_capitals() -> None:
    assert "\nVerdict: DOES NOT FIT in 6.00 GiB\n" in summarize(replace(simulated(), fits=False, budget_bytes=6 * GIB))


def test_only_the_three_largest_moments_are_listed_each_with_its_path_down_to_the_block() -> None:
    start = memory(1, 1)

    def stage(name: str, peak: int) -> Span:
        block = Span("block 3", "block", None, start, memory(peak, peak), start)
        step = Span("step 0", "step", None, start, memory(peak, peak), start, children=[block])
        return Span(name, "stage", None, start, memory(peak, peak), start, children=[step])

    record = replace(simulated(), stages=[stage(name, peak) for name, peak in zip("abcd", (5, 20, 9, 7), strict=True)])
    moments = summarize(record).split("largest moments:\n")[1].splitlines()[:4]
    assert moments == [
        "        20.0 MiB  b / step 0 / block 3",
        "         9.0 MiB  c / step 0 / block 3",
        "         7.0 MiB  d / step 0 / block 3",
        "",
    ]


def test_a_peak_between_the_children_of_a_stage_is_named_as_the_stage() -> None:
    at = [Memory(n * 2**20, n * 2**20, None) for n in (10, 99, 15)]
    step = Span("step 0", "step", "dit", at[0], at[2], at[0])
    stage = Span("denoise", "stage", "dit", at[0], at[1], at[0], children=[step])
    record = RunRecord("cpu", False, {"name": "x", "request": {}}, None, None, [], [stage], {}, {})
    assert "      99.0 MiB  denoise\n" in summarize(record)


def test_an_out_of_memory_summary_says_what_was_alive() -> None:
    failure = Failure("oom", "full", stage="denoise", alive=[("weights of dit", 3 * 2**20)])
    record = RunRecord("cpu", False, {"name": "x", "request": {}}, False, 2**20, [], [], {}, {}, failure=failure)
    assert "alive when it failed:\n         3.0 MiB  weights of dit\n" in summarize(record)


def test_equal_allocations_of_an_out_of_memory_record_are_one_line_with_their_count() -> None:
    failure = Failure("oom", "full", alive=(("aten.empty", MIB), ("weights of dit", 5 * MIB), ("aten.empty", MIB)))
    record = replace(simulated(), failure=failure)
    lines = summarize(record).split("alive when it failed:\n")[1].splitlines()
    assert lines[:3] == ["         5.0 MiB  weights of dit", "         2.0 MiB  2 x aten.empty", ""]


def test_what_would_make_it_fit_is_asked_for_the_simulated_card_or_else_for_what_is_free() -> None:
    failure = Failure("oom", "full")
    text = summarize(replace(simulated(), device="simulated:rtx4060", budget_bytes=None, failure=failure))
    assert " --vram 8028MiB --gpu rtx4060\n" in text
    measured = replace(simulated(), device="cuda:NVIDIA H200", simulated=False, budget_bytes=None, failure=failure)
    assert " --vram auto\n" in summarize(measured)
    assert "make it fit" not in summarize(replace(measured, failure=Failure("interrupted", "stopped")))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_the_same_words_in_bold_and_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    text = summarize(replace(simulated(), notes=["[bold]" + "x " * 80 + ":smile:"]))
    plain, terminal = io.StringIO(), Terminal()
    show(text, plain)
    show(text, terminal)
    drawn = terminal.getvalue()
    assert plain.getvalue() == text
    assert re.sub(r"\x1b\[[0-9;]*m", "", drawn) == text
    assert drawn.startswith("\x1b[1mlean: ")
    assert "Verdict: \x1b[32mfits\x1b[0m in" in drawn
    assert re.search(r"\x1b\[1mstage +start MiB", drawn)
    bad = Terminal()
    show(summarize(replace(simulated(), fits=False)), bad)
    assert "\x1b[1;31mDOES NOT FIT\x1b[0m" in bad.getvalue()


def write(directory: Path, record: RunRecord) -> Path:
    directory.mkdir()
    record.write(directory / "record.json")
    return directory


def test_a_report_of_several_runs_begins_with_the_lowest_and_highest_and_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = simulated(), replace(simulated(), config=CONFIG | {"name": "small"})
    second.stages = second.stages[:2]
    a, b = write(tmp_path / "a", first), write(tmp_path / "b", second)
    saved = {"change": "--vae_tile 80", "saved_bytes": 79 * MIB, "seconds": 1.5, "peak_device_bytes": 7821 * MIB}
    (a / "advice.json").write_text(json.dumps({"schema": 1, "advice": [saved]}))
    assert main(["report", str(a), str(b), "--format", "text"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Of 2 runs the lowest peak is 4,900.0 MiB")
    assert "The highest is 7,900.0 MiB." in text.splitlines()[0]
    order = [
        "\nconfiguration ",
        "\nlean ",
        "\nlean\n====\n",
        "decode (vae) owns the peak",
        "--vae_tile 80",
        "\ncomponent ",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    heads, _, lean, small = text.splitlines()[2:6]
    assert heads.split()[:2] == ["configuration", "rank"]
    assert [lean.split()[:2], small.split()[:2]] == [["lean", "2"], ["small", "1"]]
    assert "79.0 MiB" in text
    assert "1.50 s" in text
    assert text.index("\nsmall\n=====\n") > places[-1]


def test_a_text_report_of_unlike_runs_has_a_table_for_each_thing_that_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = CONFIG | {"name": "longer", "request": CONFIG["request"] | {"frame_num": 161}}
    paths = [write(tmp_path / "a", simulated()), write(tmp_path / "b", replace(simulated(), config=longer))]
    assert main(["report", *map(str, paths), "--format", "text"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "2 runs of 2 different tasks, sizes or frame counts: they are ranked only among runs of the same."
    )
    assert "t2v-1.3B 832*480, 161 frames\nOne run, with a peak of 7,900.0 MiB;" in text
    assert main(["compare", *map(str, paths)]) == 0
    assert "\nTask, size or frames differ: " in capsys.readouterr().out
    assert main(["compare", str(paths[0]), str(paths[0] / "record.json")]) == 0
    assert "Task, size or frames differ: " not in capsys.readouterr().out


def test_a_report_of_one_run_begins_with_its_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(write(tmp_path / "a", simulated())), "--format", "text"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("This run will need 7,900.0 MiB of device memory; it fits the budget of 8.00 GiB")
    assert lines[1].startswith("decode (vae) owns the peak: 7,000.0 MiB of activations")
    assert lines[4] == "lean: t2v-1.3B 832*480 81 frames"
    assert "configuration " not in "\n".join(lines)


def test_a_simulated_run_out_of_memory_groups_what_was_alive_by_module_and_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--device", "simulated", "--vram", "5GiB", "-o", str(tmp_path / "run")]
    config = Path(__file__).parents[1] / "configs" / "baseline.yaml"
    assert main(["profile", str(config), *flags]) == 3
    lines = capsys.readouterr().out.split("alive when it failed:\n")[1].split("\n\n")[0].splitlines()
    assert len(lines) == len(set(lines)) == 10
    assert any(
        re.search(r" \d+ x \[1, 192, 1, 240, 416\] float32 of vae_blocks\.\S+ > new_frames$", line) for line in lines
    )
    assert any(re.search(r"736\.0 MiB  \d+ x weights of text_encoder$", line) for line in lines)
