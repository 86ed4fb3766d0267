"""Wall clock of commands: what is judged fails exactly when a bound is missed, and the checkpoint that is read is a real one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import random_checkpoint
import torch
import wall_clock

from wanvram.cli.flags import config_from_flags
from wanvram.cli.main import build_parser
from wanvram.weights.official import DIT_FILE, VAE_FILE, check_model, open_official

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]


def timed(**changes: Any) -> Row:
    """A run whose prediction is as far off as it may be."""
    row = {
        "name": "a",
        "cold": False,
        "exit_code": 0,
        "seconds": 100.0,
        "predicted_seconds": 115.0,
        "pages_in_ram": None,
    }
    return row | {"stderr_tail": ""} | changes


def test_a_time_within_fifteen_percent_is_kept() -> None:
    assert wall_clock.judge_run(timed()) == []
    assert wall_clock.judge_run(timed(predicted_seconds=85.0)) == []
    assert wall_clock.judge_run(timed(cold=True, pages_in_ram=0.01)) == []
    assert wall_clock.judge_run(timed(pages_in_ram=0.99)) == []


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"predicted_seconds": 115.1}, "115.1 s predicted, 100.0 s measured: +15.1%"),
        ({"predicted_seconds": 84.9}, "-15.1%"),
        ({"predicted_seconds": None}, "no prediction"),
        ({"exit_code": -9, "predicted_seconds": None}, "exit code -9"),
        ({"exit_code": 3}, "exit code 3"),
        ({"cold": True, "pages_in_ram": 0.5}, "50.0% of the checkpoint were in RAM"),
        ({"pages_in_ram": 0.5}, "50.0% of the checkpoint were in RAM"),
    ],
)
def test_a_time_that_misses_one_bound_is_broken_for_that(changes: Row, word: str) -> None:
    breaches = wall_clock.judge_run(timed(**changes))
    assert len(breaches) == 1
    assert word in breaches[0]


def test_a_configuration_counts_with_its_cold_and_its_warm_run() -> None:
    both = [timed(cold=True), timed()]
    assert wall_clock.judge(both, 1)["breaches"] == []
    assert wall_clock.judge(both, 1)["error"] == [pytest.approx(0.15), pytest.approx(0.15)]
    assert wall_clock.judge([*both, timed(name="b")], 2)["breaches"] == [
        "1 configurations ran cold and warm, at least 2 must"
    ]
    assert wall_clock.judge([*both, timed(name="b", exit_code=1)], 1)["breaches"] == [
        "b warm: failed with exit code 1: "
    ]


def test_at_least_ten_configurations_are_typed_as_the_command_line_takes_them() -> None:
    places = {wall_clock.LARGE: Path("/large"), wall_clock.SMALL: Path("/small")}
    requests = []
    for configuration in wall_clock.CONFIGURATIONS:
        args = build_parser().parse_args(wall_clock.typed(configuration, places, "cold")[1:])
        config = config_from_flags(args, device="cuda", weights=args.weights, gpu=None, memory_limit_bytes=None)
        requests.append(config.request)
        assert config.request.sample_steps < 50 or config.request.size in ("832*480", "480*832")
    assert len({configuration.name for configuration in wall_clock.CONFIGURATIONS}) >= 10
    assert {request.sample_steps for request in requests} >= {2, 10, 50}
    assert {request.task for request in requests} >= {"t2v-1.3B", "t2v-14B", "i2v-14B", "t2i-14B"}


def test_pages_of_a_checkpoint_that_was_read_are_in_ram(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(bytes(5_000_001))
    wall_clock.warm_up(tmp_path)
    assert wall_clock.share_in_ram(tmp_path) == 1.0
    wall_clock.evict(tmp_path)
    assert (tmp_path / "a.safetensors").read_bytes() == bytes(5_000_001)


def test_a_command_is_timed_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    flags = "--task t2i-14B --size 832*480 --sample_steps 1 --device simulated --gpu h100"
    row = wall_clock.run_once(wall_clock.Configuration("one", flags), {}, tmp_path, cold=True)
    assert row["exit_code"] == 0, row["stderr_tail"]
    assert row["seconds"] > 1
    assert any(name.endswith("denoise") for name in row["stages"])
    assert row["pages_in_ram"] is None


# --- the checkpoint that it reads ----------------------------------------------------------------------------------------------


def test_a_random_checkpoint_is_read_as_the_model_it_is_of(tmp_path: Path) -> None:
    noise = random_checkpoint.Noise(period=10_007)
    random_checkpoint.write(tmp_path / DIT_FILE, "dit", "tiny-t2v", torch.bfloat16, noise)
    vae = (tmp_path / VAE_FILE).with_suffix(".safetensors")
    random_checkpoint.write(vae, "vae", "tiny", torch.float32, noise)
    for component, spec in (("dit", "tiny-t2v"), ("vae", "tiny")):
        source = open_official(tmp_path, component)  # type: ignore[arg-type]
        check_model(component, source, spec)  # type: ignore[arg-type]
        for key in source.keys():  # noqa: SIM118
            values = torch.empty(source.shape(key))
            source.fill(key, values)
            assert values.isfinite().all()
            assert (values == expected_constant(key, values)).all() or 0.01 < values.std() < 0.03
    source = open_official(tmp_path, "dit")
    rows = torch.empty(source.shape("blocks.0.ffn.0.weight"))
    source.fill("blocks.0.ffn.0.weight", rows)
    other = torch.empty_like(rows)
    source.fill("blocks.1.ffn.0.weight", other)
    assert not torch.equal(rows, other)
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)


def expected_constant(key: str, values: torch.Tensor) -> float:
    """0 of a bias, 1 of a norm; nan of what is random."""
    if key.endswith("bias"):
        return 0.0
    return 1.0 if key.endswith("gamma") or (key.endswith("weight") and values.dim() == 1) else math.nan
