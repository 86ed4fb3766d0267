"""A run on several GPUs in every report: what each of them took, and predictions against measurements GPU by GPU."""

from __future__ import annotations

from dataclasses import replace

from wanvram.analysis.compare import compare, judge, parse_condition
from wanvram.record import RankRecord, RunRecord
from wanvram.report.compare import comparison_text
from wanvram.report.html import html_report
from wanvram.report.markdown import markdown_report
from wanvram.report.runs import Run
from wanvram.report.terminal import summarize
from wanvram.report.timeline import coarse_timeline
from wanvram.report.translations import Texts
from wanvram.spans import Memory, Span
from wanvram.units import MIB


def stage(allocated: int, seconds: float) -> Span:
    start, peak = Memory(0, 0, 900 * MIB), Memory(allocated * MIB, (allocated + 50) * MIB, (allocated + 1000) * MIB)
    return Span("denoise", "stage", "dit", start, peak, start, seconds)


def rank(ranks: tuple[int, ...], allocated: int, seconds: float) -> RankRecord:
    host = {"peak_rss_bytes": 0, "pinned_bytes": 300 * MIB}
    spans = [stage(allocated, seconds)]
    return RankRecord(ranks, "simulated:h200", spans, host, 70 * MIB, 1.5, communication_bytes=566 * MIB)


def several(name: str, *ranks: RankRecord, simulated: bool = True) -> RunRecord:
    request = {"task": "t2v-14B", "size": "1280*720", "frame_num": 81}
    return RunRecord(
        device="simulated:h200" if simulated else "cuda:NVIDIA H200",
        simulated=simulated,
        config={"name": name, "description": "", "request": request},
        fits=None,
        budget_bytes=None,
        components=[],
        stages=ranks[0].stages,
        environment={},
        host={"peak_rss_bytes": 0, "pinned_bytes": 0},
        ranks=list(ranks),
    )


PREDICTED = several("predicted", rank((0,), 500, 4.0), rank((1, 2, 3), 700, 5.0))
MEASURED = several("measured", *(rank((n,), 500 + 200 * (n > 0), 4.5) for n in range(4)), simulated=False)


def test_the_terminal_has_a_line_for_every_kind_of_gpu_and_the_largest_peak_above_all() -> None:
    text = summarize(PREDICTED)
    assert "Peak: allocated 700.0 MiB, reserved 750.0 MiB, device 1,700.0 MiB in denoise" in text
    line = next(line for line in text.splitlines() if line.startswith("1-3"))
    assert line.split() == ["1-3", "700.0", "750.0", "1,700.0", "566.0", "300.0", "70.0", "1.50", "s", "denoise"]
    assert "communication MiB" not in summarize(replace(PREDICTED, ranks=[]))
    assert "通信 MiB" in summarize(PREDICTED, Texts("zh"))


def test_the_terminal_says_how_many_gpus_share_the_video_along_which_axes_and_what_they_pin_together() -> None:
    config = PREDICTED.config | {"optimization": {"cfg_size": 2, "ulysses_size": 2, "ring_size": 1}}
    line = "4 GPUs make it together: ulysses_size 2 x cfg_size 2; the peak is the highest of theirs; they pin 1,200.0 MiB of host RAM"
    assert line in summarize(replace(PREDICTED, config=config)).splitlines()
    assert "4 张 GPU" in summarize(PREDICTED, Texts("zh"))
    assert "make it together" not in summarize(replace(PREDICTED, ranks=[]))


def test_markdown_and_html_have_the_gpus_too() -> None:
    run = Run("predicted", PREDICTED, coarse_timeline(PREDICTED), False)
    assert "### GPUs" in markdown_report([run])
    assert '"ranks":[{"gpus":"0"' in html_report([run])


def test_a_prediction_is_compared_with_every_gpu_that_it_stands_for() -> None:
    comparison = compare(["P", "M"], [PREDICTED, MEASURED], [(0, 1)])
    assert comparison.figures["ranks", "3 denoise", "peak_allocated_bytes"] == (700 * MIB, 700 * MIB)
    (_, _, errors) = comparison.predictions[0]
    by_gpu = {error.key[1]: error.error for error in errors if error.key[0] == "ranks" and error.key[2] == "seconds"}
    assert set(by_gpu) == {"0 denoise", "1 denoise", "2 denoise", "3 denoise"}
    assert "rank, time s" in comparison_text(comparison)


def test_a_build_can_fail_because_of_one_of_several_gpus() -> None:
    comparison = compare(["P", "M"], [PREDICTED, MEASURED])
    condition = parse_condition("ranks.3 denoise.peak_allocated_bytes > 600MiB")
    assert [violation.value for violation in judge(comparison, [condition])] == [700 * MIB]
