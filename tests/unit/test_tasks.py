"""The tasks against the official script's facts; every task, size and number is read from facts.json."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from wanvram.config import Request, RunConfig
from wanvram.errors import InputError
from wanvram.tasks import TASKS, latent_shape, normal_size

GOLDEN = Path(os.environ.get("WANVRAM_GOLDEN", Path(__file__).parent.parent / "golden"))
FACTS: dict[str, Any] = json.loads((GOLDEN / "facts.json").read_text(encoding="utf-8"))
SIZES: dict[str, list[str]] = FACTS["SUPPORTED_SIZES"]
DEFAULTS: dict[str, dict[str, dict[str, Any] | None]] = FACTS["generate_py"]["effective_defaults_per_task_and_size"]
CASES = [(task, size) for task, sizes in DEFAULTS.items() for size in sizes]


def test_there_is_no_task_more_or_less_than_in_the_official_script() -> None:
    assert set(TASKS) == set(SIZES) == set(DEFAULTS)


@pytest.mark.parametrize("task", SIZES)
def test_a_task_has_the_official_sizes_each_once(task: str) -> None:
    assert sorted(TASKS[task].sizes) == sorted(SIZES[task])


@pytest.mark.parametrize(("task", "size"), CASES, ids=lambda value: str(value))
def test_a_request_without_options_has_the_official_defaults_of_its_size(task: str, size: str) -> None:
    official = DEFAULTS[task][size]
    if official is None:
        with pytest.raises(InputError, match=r"size: .* is not supported"):
            RunConfig("x", "", "auto", Request.for_task(task, size=size))
        return
    request = Request.for_task(task, size=size)
    assert {name: getattr(request, name) for name in official} == official
    assert (request.width, request.height) == tuple(FACTS["SIZE_CONFIGS"][size])


@pytest.mark.parametrize("task", FACTS["default_negative_prompt"])
def test_the_negative_prompt_is_the_official_one_to_the_character(task: str) -> None:
    assert Request.for_task(task).negative_prompt == FACTS["default_negative_prompt"][task]


def test_a_given_value_overrides_the_default_and_none_does_not() -> None:
    task, size = next((task, size) for task, size in CASES if DEFAULTS[task][size])
    official = DEFAULTS[task][size]
    assert official is not None
    request = Request.for_task(task, size=size, sample_steps=7, sample_shift=None)
    assert (request.sample_steps, request.sample_shift) == (7, official["sample_shift"])


@pytest.mark.parametrize("example", FACTS["t2v_shapes"]["examples"], ids=lambda e: f"{e['size']} {e['frame_num']}")
def test_the_latent_has_the_shape_of_the_official_noise(example: dict[str, Any]) -> None:
    width, height = example["wh"]
    assert latent_shape(example["frame_num"], height, width) == tuple(example["noise_shape"])


@pytest.mark.parametrize(
    ("task", "written", "size"),
    [
        ("t2v-1.3B", "832x480", "832*480"),
        ("t2v-14B", " 720X1280 ", "720*1280"),
        ("t2v-14B", "480p", "832*480"),
        ("i2v-14B", "720P", "1280*720"),
        ("t2i-14B", "1024x1024", "1024*1024"),
        ("t2v-1.3B", "720p", "720p"),
        ("t2v-14B", "640x480", "640x480"),
    ],
)
def test_sizes_are_read_as_our_own_pages_write_them(task: str, written: str, size: str) -> None:
    assert normal_size(task, written) == size
    if size in TASKS[task].sizes:
        assert Request.for_task(task, size=written) == Request.for_task(task, size=size)
    else:
        with pytest.raises(InputError, match="is not supported by"):
            Request.for_task(task, size=written)
