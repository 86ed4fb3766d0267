"""Which process this is, and which sizes several GPUs get that nobody gave."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from wanvram import knobs
from wanvram.cli.flags import of_gpus
from wanvram.cli.processes import for_all
from wanvram.config import Request, RunConfig, Strategy
from wanvram.errors import InputError
from wanvram.machine.launched import Launched, launched
from wanvram.planner.sizes import sizes_at_once


def config(task: str = "t2v-14B", device: str = "cuda", **strategy: Any) -> RunConfig:
    return RunConfig("x", "", device, Request.for_task(task), Strategy(**strategy))


def sizes(config: RunConfig) -> tuple[int, int, int]:
    """cfg, ring, ulysses."""
    return config.strategy.cfg_size, config.strategy.ring_size, config.strategy.ulysses_size


def test_without_a_launcher_a_process_is_the_only_one_and_with_one_it_is_told_which() -> None:
    assert launched({}) == launched({"RANK": "0", "WORLD_SIZE": "1"}) == launched({"WORLD_SIZE": "8"}) == Launched()
    second = launched({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert (second.rank, second.local_rank, second.is_first, second.is_one_of_several) == (5, 1, False, True)
    for wrong in ({"RANK": "1"}, {"RANK": "8", "LOCAL_RANK": "0"}, {"RANK": "x", "LOCAL_RANK": "0"}):
        with pytest.raises(InputError, match="which no launcher of several processes says"):
            launched({"WORLD_SIZE": "8", **wrong})


@pytest.mark.parametrize(
    ("task", "gpus", "found"),
    [
        ("t2v-14B", 2, (2, 1, 1)),
        ("t2v-14B", 8, (2, 1, 4)),
        ("t2v-1.3B", 8, (2, 1, 4)),
        ("t2v-1.3B", 16, (2, 2, 4)),  # 12 heads
        ("t2v-14B", 3, (1, 3, 1)),  # 40 heads
        ("t2v-1.3B", 3, (1, 1, 3)),
    ],
)
def test_guidance_is_shared_first_then_heads_that_divide_then_the_ring(
    task: str, gpus: int, found: tuple[int, int, int]
) -> None:
    assert sizes(sizes_at_once(config(task), gpus)) == found


def test_sizes_that_are_given_are_kept_and_must_be_of_as_many_gpus() -> None:
    given = config(ulysses_size=4)
    assert sizes_at_once(given, 4) == given
    with pytest.raises(InputError, match="ulysses_size 4 share the work of 4 GPUs, and 8 were asked for"):
        sizes_at_once(given, 8)
    assert sizes(sizes_at_once(config(cfg="joint"), 2)) == (1, 1, 2)


def test_a_launcher_or_a_number_gives_sizes_unless_a_plan_will(monkeypatch: pytest.MonkeyPatch) -> None:
    assert for_all(config()) == config()
    assert sizes(for_all(config(parallel_degree=2))) == (2, 1, 1)
    planned = for_all(config(parallel_degree=2), to_be_planned=True)
    assert (sizes(planned), knobs.gpus(planned.strategy)) == ((1, 1, 1), 2)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert sizes(for_all(config())) == (2, 1, 2)
    assert knobs.gpus(for_all(config(), to_be_planned=True).strategy) == 4
    with pytest.raises(InputError, match="takes one process"):
        for_all(config(device="simulated"))


def test_a_number_of_gpus_on_the_command_line_forgets_the_sizes_of_a_file_and_a_size_the_number() -> None:
    before = config(parallel_degree=4, cfg_size=2, ulysses_size=2)
    assert of_gpus({}) == {}
    fewer = replace(before.strategy, **of_gpus({"parallel_degree": 1}))
    assert knobs.gpus(fewer) == 1
    other = replace(before.strategy, **of_gpus({"cfg_size": 1}))
    assert knobs.gpus(other) == 2
