"""The budget as a person types it, in one process, judged by NVML from this one and by PyTorch's own report of its settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from wanvram.config import load_config
from wanvram.predict.simulate import simulate
from wanvram.simulate.gpus import find_gpu
from wanvram.units import GIB, MIB

pytestmark = pytest.mark.gpu

REQUEST = ("--task", "t2v-1.3B", "--size", "832*480", "--frame_num", "17", "--sample_steps", "1", "--precision", "bf16")
COMMAND = (sys.executable, "-m", "wanvram", "generate", *REQUEST, "--ckpt_dir", "random", "--prompt", "a cat")


class Watch:
    """The highest of NVML's figures for the whole GPU while the command runs, less the one before, bytes."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]))
        before = self.highest = pynvml.nvmlDeviceGetMemoryInfo(handle).used
        ended = threading.Event()

        def poll() -> None:
            while not ended.wait(0.002):
                self.highest = max(self.highest, pynvml.nvmlDeviceGetMemoryInfo(handle).used)

        thread = threading.Thread(target=poll)
        thread.start()
        done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=os.environ | environment)
        ended.set()
        thread.join()
        self.peak_bytes, self.code, self.said = self.highest - before, done.returncode, done.stderr


def record_of(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "record.json").read_text()))


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Watch, dict[str, Any], Path]:
    directory = tmp_path_factory.mktemp("planned") / "run"
    watched = Watch("--vram_budget", "2GiB", "-o", str(directory))
    assert watched.code == 0, watched.said
    return watched, record_of(directory), directory


def test_planned_settings_are_in_force_in_the_process_that_planned(planned: tuple[Watch, dict[str, Any], Path]) -> None:
    _, record, _ = planned
    assert record["config"]["optimization"]["expandable_segments"] is True
    found = record["environment"]["in_force"]
    assert found["expandable_segments"] is True
    assert found["allocator_limit_bytes"] < 2 * GIB


def test_the_card_loses_no_more_than_the_budget_and_what_was_predicted(
    planned: tuple[Watch, dict[str, Any], Path],
) -> None:
    watched, record, _ = planned
    assert watched.peak_bytes <= 2 * GIB
    assert record["peak"]["device_bytes"] == pytest.approx(watched.peak_bytes, abs=2 * MIB)
    assert record["predicted"]["device_bytes"] == pytest.approx(watched.peak_bytes, abs=8 * MIB)


def test_a_forecast_200_mib_too_low_is_a_recorded_out_of_memory_and_no_excess(
    planned: tuple[Watch, dict[str, Any], Path], tmp_path: Path
) -> None:
    _, record, directory = planned
    limit = record["predicted"]["device_bytes"] - 200 * MIB
    config = directory / "config.yaml"
    text = config.read_text().replace(f"memory_limit_bytes: {2 * GIB}", f"memory_limit_bytes: {limit}")
    changed = tmp_path / "config.yaml"
    changed.write_text(text)
    watched = Watch("--config", str(changed), "-o", str(tmp_path / "run"))
    assert watched.code == 3, watched.said
    assert watched.peak_bytes <= limit
    record = record_of(tmp_path / "run")
    assert record["failure"]["kind"] == "oom"
    assert record["fits"] is False


def test_an_environment_that_contradicts_the_plan_is_a_sentence_before_anything_is_loaded() -> None:
    watched = Watch("--vram_budget", "2GiB", PYTORCH_CUDA_ALLOC_CONF="expandable_segments:False")
    assert watched.code == 2
    assert "expandable_segments:False" in watched.said
    assert "expandable_segments: True" in watched.said
    assert watched.peak_bytes < 64 * MIB


def test_settings_that_pytorch_read_too_early_are_an_error_that_names_both_sides(tmp_path: Path) -> None:
    program = (
        "import torch; torch.zeros(1, device='cuda'); import sys; from wanvram.cli.main import main; "
        f"sys.exit(main([*{list(COMMAND[3:])!r}, '--expandable_segments', 'True', '-o', {str(tmp_path / 'run')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "expandable_segments is False in PyTorch's allocator but True in the configuration" in done.stderr


def test_a_prediction_of_8_bit_products_is_the_run_s_memory_to_the_byte(tmp_path: Path) -> None:
    """Streamed, allocated and reserved peak of every stage; in a process of its own, where no library has begun."""
    watched = Watch("--product_precision", "fp8", "-o", str(tmp_path / "run"))
    assert watched.code == 0, watched.said
    card = find_gpu(torch.cuda.get_device_name()).key
    config = replace(load_config(tmp_path / "run" / "config.yaml"), device="simulated", gpu=card)
    predicted, _ = simulate(config)
    peaks = [(stage.name, stage.peak.allocated_bytes, stage.peak.reserved_bytes) for stage in predicted.stages]
    stages = [
        stage for stage in record_of(tmp_path / "run")["stages"] if stage["name"] != "save"
    ]  # nothing is estimated of
    assert [(s["name"], s["peak_allocated_bytes"], s["peak_reserved_bytes"]) for s in stages] == peaks
