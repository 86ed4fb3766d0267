"""What keep_promise.py draws at random: reproducible, of every kind, and such as the command line and the readers take."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import promise_requests
import pytest

from wanvram.cli.flags import config_from_flags
from wanvram.cli.main import build_parser
from wanvram.media.sources import picture_size, plan_frames, probe_video
from wanvram.tasks import TASKS, WAN21
from wanvram.units import parse_bytes

GIB = 2**30
CARD = 80 * GIB


def drawn(count: int = 42, seed: int = 1) -> list[promise_requests.Case]:
    return [promise_requests.draw(seed, index, CARD) for index in range(count)]


def test_a_case_depends_on_the_seed_its_number_and_the_card_alone() -> None:
    random.seed(5)
    before = drawn()
    random.seed(6)
    assert [promise_requests.draw(1, index, CARD) for index in reversed(range(42))] == before[::-1]
    assert drawn(seed=2) != before


def test_every_seven_cases_hold_all_seven_tasks() -> None:
    tasks = [case.task for case in drawn()]
    assert all(sorted(tasks[start : start + 7]) == sorted(TASKS) for start in range(0, 42, 7))


def test_budgets_go_from_two_gib_to_what_the_card_has() -> None:
    budgets = [case.budget_bytes for case in drawn(400)]
    assert all(2 * GIB <= budget <= CARD for budget in budgets)
    assert min(budgets) < 2.2 * GIB
    assert max(budgets) > 72 * GIB
    below = sum(budget < math.sqrt(2 * GIB * CARD) for budget in budgets)
    assert 160 < below < 240  # log-uniform: half of them below the geometric mean


def test_another_range_of_budgets_changes_the_budget_alone() -> None:
    small = [promise_requests.draw(1, index, CARD, budget_gib=(1.0, 1.9)) for index in range(100)]
    assert {case.budget for case in small} == {f"1.{tenth}GiB" for tenth in range(9)}
    assert [replace(case, budget="") for case in small] == [replace(case, budget="") for case in drawn(100)]


def test_every_size_of_every_task_and_every_kind_of_file_is_drawn() -> None:
    cases = drawn(700)
    assert {(case.task, case.size) for case in cases} == {(task, size) for task in TASKS for size in TASKS[task].sizes}
    flags = {media.flag for case in cases for media in case.media}
    assert flags == {"--image", "--first_frame", "--last_frame", "--src_video", "--src_mask", "--src_ref_images"}
    frames = {case.frames for case in cases if case.task == "t2v-1.3B"}
    assert len(frames) > 12
    assert all(WAN21.geometry.are_frames_valid(count) for count in frames if count is not None)


def test_a_case_over_its_limit_has_fewer_frames_and_says_how_many_were_drawn() -> None:
    cases = drawn(200)
    assert {case.limit_seconds for case in cases} == {4.0, 15.0}
    assert sum(case.limit_seconds == 15.0 for case in cases) == 200 // 8
    for case in cases:
        least = 5 if TASKS[case.task].kind == "flf2v" else 1
        assert case.expected_seconds <= case.limit_seconds or (case.frames or least) <= least
    assert 0 < sum(case.drawn_frames is not None for case in cases) < 150


@pytest.mark.parametrize("index", range(21))
def test_a_drawn_command_parses_and_its_files_are_read(
    index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = promise_requests.draw(3, index, CARD)
    monkeypatch.chdir(tmp_path)
    promise_requests.write_media(case, tmp_path)
    words = promise_requests.typed(case)
    assert words[0] == "wanvram"
    args = build_parser().parse_args(words[1:])
    config = config_from_flags(args, device="cuda", weights=args.weights, gpu=None, memory_limit_bytes=None)
    assert (config.request.task, config.request.size, config.request.sample_steps) == (case.task, case.size, 2)
    assert parse_bytes(args.vram_budget) == case.budget_bytes
    assert args.output == Path("run")
    for media in case.media:
        path = Path(media.name)
        if media.kind == "picture":
            assert picture_size(path, media.flag) == (media.width, media.height)
            continue
        info = probe_video(path, media.flag)
        assert (info.width, info.height, info.frames) == (media.width, media.height, media.frames)
        assert WAN21.geometry.are_frames_valid(
            len(plan_frames(info, config.request.width * config.request.height).frame_ids)
        )
