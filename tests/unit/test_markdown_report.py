"""The Markdown report, letter for letter, for runs made by hand; what it escapes; that it does not change without reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from report_runs import Recipe, write_run
from wanvram.advice import Advice
from wanvram.record import Failure
from wanvram.report.findings import answer
from wanvram.report.markdown import markdown_report
from wanvram.report.runs import Run, find_runs, read_run
from wanvram.report.translations import Texts
from wanvram.timeline_record import AliveBlocks
from wanvram.units import GIB, MIB


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return read_run(write_run(tmp_path / "run", Recipe(budget_bytes=8 * GIB)))


def test_the_report_of_one_run_is_exactly_this(run: Run) -> None:
    assert markdown_report([run]) == (
        """\
# wanvram report

## baseline

Predicted: simulated, nothing was run on a GPU (simulated:h200)

This run will need 6,162.0 MiB of device memory; it fits the budget of 8.00 GiB with 2,030.0 MiB to spare; the smallest standard card that holds it has 8 GB.

decode (vae) owns the peak: 3,858.0 MiB of activations on top of 1,276.0 MiB already there. The largest group alive then: 1,929.0 MiB, 1 x \\[1, 96, 4, 480, 832\\] float16 of decoder.up.0.

What lowers it: \\`wanvram analyze DIR --advice\\` simulates every change and says what each saves.

### Components

| component | parameters | base memory MiB | host memory MiB | activation MiB |
| --- | ---: | ---: | ---: | ---: |
| text_encoder | 385,875,968 | 736.0 | 0.0 | 80.0 |
| dit | 136,314,880 | 260.0 | 0.0 | 500.0 |
| vae | 146,800,640 | 280.0 | 0.0 | 3,858.0 |

### Stages

| stage | component | start MiB | activation MiB | peak device MiB | peak reserved MiB | peak allocated MiB | fragmentation | time |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| load text_encoder | text_encoder | 0.0 |  | 1,398.0 | 798.0 | 736.0 | 7.8% | 1.50 s |
| load vae | vae | 736.0 |  | 1,702.0 | 1,102.0 | 1,016.0 | 7.8% | 1.50 s |
| load dit | dit | 1,016.0 |  | 1,984.0 | 1,384.0 | 1,276.0 | 7.8% | 1.50 s |
| encode_text | text_encoder | 1,276.0 | 80.0 | 2,070.0 | 1,470.0 | 1,356.0 | 7.8% | 1.50 s |
| denoise | dit | 1,276.0 | 500.0 | 2,524.0 | 1,924.0 | 1,776.0 | 7.7% | 1.50 s |
| decode | vae | 1,276.0 | 3,858.0 | 6,162.0 | 5,562.0 | 5,134.0 | 7.7% | 1.50 s |

### What was alive: peak

| size MiB | count | component | operation | shape | dtype | module |
| ---: | ---: | --- | --- | --- | --- | --- |
| 1,929.0 | 1 | vae | conv3d | 1x96x4x480x832 | float16 | decoder.up.0 |
| 964.5 | 2 | vae | cat | 1x192x4x480x832 | float16 | decoder.up.1 |
| 736.0 | 100 | text_encoder | weights | 1536x1536 | float16 | blocks |
| 482.2 | 3 | vae | silu | 1x288x4x480x832 | float16 | decoder.up.2 |
| 280.0 | 100 | vae | weights | 1536x1536 | float16 | blocks |
| 260.0 | 100 | dit | weights | 1536x1536 | float16 | blocks |
| 241.1 | 4 | vae | rms_norm | 1x384x4x480x832 | float16 | decoder.up.3 |
| 120.6 | 5 | vae | clone | 1x480x4x480x832 | float16 | decoder.up.4 |
| 120.6 | 6 | vae | add | 1x576x4x480x832 | float16 | decoder.up.5 |

### Configuration

- `model_config.device`: simulated
- `model_config.load_strategy`: block
- `model_config.offload`: false
- `model_config.precision`: fp16
- `model_config.t5_cpu`: false
- `name`: baseline
- `optimization.attention_slicing`: false
- `optimization.expandable_segments`: false
- `request.frame_num`: 81
- `request.prompt`: Two cats.
- `request.size`: 832\\*480
- `request.task`: t2v-1.3B

### Notes

- made for a test
"""
    )


def test_several_runs_open_with_the_best_a_table_and_the_errors_of_the_prediction(tmp_path: Path) -> None:
    recipes = Recipe(), Recipe("lean", offload=True), Recipe("real", simulated=False, factor=1.01)
    text = markdown_report(find_runs([write_run(tmp_path / r.name, r) for r in recipes]))
    assert text.split("| load ")[0] == (
        """\
# wanvram report

Of 2 runs the lowest peak is 5,084.0 MiB; the smallest standard card that holds it has 6 GB. \
The highest is 6,204.0 MiB.

## Runs

| rank | run | kind | peak device MiB | peak reserved MiB | peak allocated MiB | step | stage | smallest card | verdict |
| ---: | --- | --- | ---: | ---: | ---: | ---: | --- | --- | --- |
|  | baseline | prediction of real | 6,162.0 | 5,562.0 | 5,134.0 |  | decode | 8 GB |  |
| 1 | lean | predicted | 5,084.0 | 4,484.0 | 4,138.0 |  | decode | 6 GB |  |
| 2 | real | measured | 6,204.0 | 5,604.0 | 5,172.6 |  | decode | 8 GB |  |

## Predicted against measured: baseline, real

Error is predicted minus measured: + means the prediction was too high.

| figure | predicted MiB | measured MiB | error MiB | relative |
| --- | ---: | ---: | ---: | ---: |
| whole run: peak device | 6,162.0 | 6,204.0 | -42.0 | -0.68% |
| whole run: peak reserved | 5,562.0 | 5,604.0 | -42.0 | -0.75% |
| whole run: peak allocated | 5,134.0 | 5,172.6 | -38.6 | -0.75% |
"""
    )


def test_a_changed_figure_changes_its_own_lines_only(run: Run) -> None:
    before = markdown_report([run]).splitlines()
    larger = replace(run.record.components[0], base_bytes=73_600_000 * MIB)
    after = markdown_report([replace(run, record=replace(run.record, components=[larger, *run.record.components[1:]]))])
    assert [line for line in after.splitlines() if line not in before] == [
        "| text_encoder | 385,875,968 | 73,600,000.0 | 0.0 | 80.0 |"
    ]


def test_where_the_runs_lie_leaves_no_trace(tmp_path: Path) -> None:
    texts = [markdown_report([read_run(write_run(tmp_path / place))]) for place in ("here", "there")]
    assert texts[0] == texts[1]


def test_markup_in_names_and_prompts_is_shown_not_obeyed(tmp_path: Path) -> None:
    recipe = Recipe("a|b <img> `c`", prompt="*x*\n# _y_ [z](javascript:1)", timeline=False)
    text = markdown_report([read_run(write_run(tmp_path, recipe))])
    assert "## a\\|b &lt;img&gt; \\`c\\`\n" in text
    assert "- `request.prompt`: \\*x\\* \\# \\_y\\_ \\[z\\](javascript:1)\n" in text
    assert "<" not in text


def test_a_long_prompt_is_cut(tmp_path: Path) -> None:
    text = markdown_report([read_run(write_run(tmp_path, Recipe(prompt="word " * 1000)))])
    assert max(len(line) for line in text.splitlines()) < 400


def test_a_failure_takes_the_place_of_the_verdict(run: Run) -> None:
    record = replace(run.record, failure=Failure("error", "The disk is full.", stage="decode"), fits=None)
    text = markdown_report([replace(run, record=record), replace(run, label="good")])
    assert "|  | baseline | predicted | 6,162.0 | 5,562.0 | 5,134.0 |  | decode | - | failed |" in text
    assert "The run failed in decode: The disk is full. Its peak until then: 6,162.0 MiB of device memory." in text
    assert "Failed runs: 1." in text


def with_alive(run: Run, alive: Sequence[AliveBlocks]) -> Run:
    """With these at the peak, and no other moment."""
    moment = replace(run.timeline.moments[0], alive=tuple(alive))
    return replace(run, timeline=replace(run.timeline, moments=(moment,)))


def test_of_a_moment_with_many_groups_the_ten_largest_are_listed_and_the_rest_is_summed(run: Run) -> None:
    group = run.timeline.moments[0].alive[0]
    many = [replace(group, bytes=n * MIB, count=1, operation=f"op {n}") for n in range(1, 16)]
    text = markdown_report([with_alive(run, many)])
    assert "| 6.0 | 1 | vae | op 6 |" in text
    assert "| 15.0 | 5 |  | other |  |  |  |\n" in text  # 1 + 2 + 3 + 4 + 5 MiB


def test_moving_the_code_to_other_lines_changes_nothing_and_one_place_is_one_row(run: Run) -> None:
    group = replace(run.timeline.moments[0].alive[0], bytes=30 * MIB, count=2)

    def at(*modules: str) -> str:
        return markdown_report([with_alive(run, [replace(group, module=module) for module in modules])])

    text = at("vae.Stream.history:129 > new_frames:46", "vae.Stream.history:131 > new_frames:46")
    assert text == at("vae.Stream.history:7 > new_frames:9", "vae.Stream.history:8 > new_frames:9")
    assert "| 60.0 | 4 | vae | conv3d | 1x96x4x480x832 | float16 | vae.Stream.history &gt; new_frames |\n" in text
    assert "60.0 MiB, 4 x \\[1, 96, 4, 480, 832\\] float16 of vae.Stream.history &gt; new_frames." in text


def test_the_largest_group_is_said_in_both_languages_also_when_it_is_weights_or_nothing_is_known(run: Run) -> None:
    group = replace(run.timeline.moments[0].alive[0], bytes=30 * MIB, count=2)

    def said(language: str, **other: Any) -> str:
        return answer(with_alive(run, [replace(group, **other)]), Texts(language)).owner

    assert said("zh").endswith("2 个 decoder.up.0 的 [1, 96, 4, 480, 832] float16，共 30.0 MiB。")
    assert said("en", operation="weights", component="dit").endswith("2 x weights of dit.")
    assert said("zh", operation="weights", component="dit").endswith("2 个 dit 的权重，共 30.0 MiB。")
    assert said("en", shape=None, operation="cublas workspace").endswith("2 x cublas workspace.")
    assert said("en", shape=None, operation=None).endswith("2 x unknown.")


# --- advice on a run that ran out of memory ----------------------------------------------------------------------------------


@pytest.fixture
def failed(run: Run) -> Run:
    """Out of memory at 6 GiB, with advice that starts from the 40 GiB it would need."""
    advice = (
        Advice("--weight_storage fp8", 36 * GIB, -1.0, False, 40 * GIB, 4 * GIB, fits=True),
        Advice("--load_strategy block", 32 * GIB, 0.5, True, 40 * GIB, 8 * GIB, fits=False),
    )
    record = replace(run.record, failure=Failure("oom", "no memory", stage="decode"), fits=None)
    return replace(run, record=record, advice=advice)


def test_what_advice_saves_of_a_run_without_memory_is_a_share_of_what_it_would_need(failed: Run) -> None:
    assert answer(failed, Texts()).change == (
        "On a card without limit this run would need 40.00 GiB; with --load_strategy block 8.00 GiB (80 % less), "
        "which does not fit the card, for 0.50 s more per run (simulated). "
        "Lossy, the video changes: on a card without limit this run would need 40.00 GiB; with --weight_storage fp8 "
        "4.00 GiB (90 % less), which fits the card, and takes 1.00 s less per run (simulated)."
    )
    assert "若显存无上限，该运行需要 40.00 GiB；" in answer(failed, Texts("zh")).change


def test_the_table_of_advice_says_what_is_left_and_whether_that_fits(failed: Run) -> None:
    assert """\
Each is taken from the 40.00 GiB that this run would need on a card without limit.

| change | saves MiB | leaves MiB | added time per run | fits |
| --- | ---: | ---: | ---: | --- |
| --load_strategy block | 32,768.0 | 8,192.0 | 0.50 s | no |
| --weight_storage fp8 (lossy) | 36,864.0 | 4,096.0 | -1.00 s | yes |
""" in markdown_report([failed])


def test_advice_that_does_not_say_what_it_starts_from_is_no_share_of_a_run_that_failed(failed: Run) -> None:
    old = replace(failed, advice=(Advice("--load_strategy block", 32 * GIB, None),))
    assert "lowers the peak by 32.00 GiB (-)" in answer(old, Texts()).change
    ended = replace(old, record=replace(old.record, failure=None), advice=(Advice("x", 616 * MIB, None),))
    assert "(10 %)" in answer(ended, Texts()).change
