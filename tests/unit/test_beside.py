"""A video's prediction is made in a process of its own while the run starts; without one the run goes on as ever."""

from __future__ import annotations

import os

import pytest
import torch

from wanvram.config import Request, RunConfig
from wanvram.errors import InputError
from wanvram.record import Predicted
from wanvram.run import beside
from wanvram.run.beside import Beside

CONFIG = RunConfig("x", "", "cuda", Request.for_task("t2v-1.3B", size="832*480", frame_num=5))


class FakeGpu:
    name = "NVIDIA H200"

    def memory(self) -> tuple[int, int]:
        return 0, 150_000_000_000


@pytest.fixture(autouse=True)
def large_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(beside, "first_gpu", FakeGpu)


def of_the_card(config: RunConfig) -> Predicted:
    assert (config.device, config.gpu) == ("simulated", "h200")
    return Predicted(4, 3, 2, 1, 100.0)


def test_it_is_simulated_for_the_card_that_is_here_and_counts_what_has_passed() -> None:
    found = Beside(CONFIG, of_the_card).result()
    assert found is not None
    assert (found.device_bytes, found.pinned_bytes) == (4, 1)
    assert found.seconds is not None
    assert found.seconds > 100.0  # this process has run for a while


def test_what_cannot_be_predicted_is_none() -> None:
    def fails(_config: RunConfig) -> Predicted | None:
        raise InputError("unknown")

    assert Beside(CONFIG, fails).result() is None


def test_a_process_that_dies_is_none() -> None:
    assert Beside(CONFIG, lambda _config: os._exit(3)).result() is None


def test_a_small_host_and_a_started_cuda_predict_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert Beside(CONFIG, of_the_card).result() is None
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert Beside(CONFIG, of_the_card).result() is None
