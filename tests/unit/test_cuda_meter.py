"""What the card loses to a run, from NVML's figures of the whole GPU and of the process, without a GPU."""

from __future__ import annotations

import time

import pytest
import torch

from wanvram.machine.driver import DRIVER_BYTES
from wanvram.recorder import meters
from wanvram.recorder.meters import CudaMeter
from wanvram.units import GIB, MIB


class FakeGpu:
    """615 MiB are used before the run; of its own the driver tells `mine`, of others nothing."""

    uuid = "GPU-1"

    def __init__(self) -> None:
        self.idle, self.mine, self.others, self.tells = 615 * MIB, 0, 0, True
        self.tables = 0

    def used_bytes(self) -> int:
        own = self.mine + DRIVER_BYTES + self.tables if self.mine else 0
        return self.idle + own + self.others

    def process_bytes(self) -> int | None:
        return self.mine or None if self.tells else None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    reserved = {"current": 1 * GIB, "peak": 2 * GIB}
    fakes = {
        "is_initialized": lambda: False,
        "get_device_name": lambda _index: "card",
        "memory_reserved": lambda _index: reserved["current"],
        "memory_stats_as_nested_dict": lambda _index: {
            name: {"all": reserved} for name in ("allocated_bytes", "reserved_bytes")
        },
        "mem_get_info": lambda _index: (140 * GIB - fake.used_bytes(), 140 * GIB),
    }
    for name, answer in fakes.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(meters, "_nvml_gpu", lambda: fake)
    monkeypatch.setattr(CudaMeter, "_before", {})
    return fake


def test_alone_on_the_card_it_is_the_whole_gpu_less_what_was_before(gpu: FakeGpu) -> None:
    meter = CudaMeter()
    gpu.mine, gpu.tables = 1 * GIB + 600 * MIB, 54 * MIB
    meter.pinned(27602 * MIB)
    assert meter.device_memory() == gpu.mine + DRIVER_BYTES + gpu.tables


def test_beside_others_it_is_the_process_with_what_the_driver_takes_for_it(gpu: FakeGpu) -> None:
    meter = CudaMeter()
    gpu.mine, gpu.tables, gpu.others = 1 * GIB + 600 * MIB, 54 * MIB, 3 * GIB
    meter.pinned(27602 * MIB)
    assert meter.device_memory() == gpu.mine + DRIVER_BYTES + 54 * MIB
    assert meter.used_by_others() == gpu.idle + 3 * GIB


def test_where_the_driver_tells_no_process_it_is_what_the_card_lost(gpu: FakeGpu) -> None:
    meter = CudaMeter()
    gpu.tells, gpu.mine = False, 2 * GIB
    assert meter.device_memory() == 2 * GIB + DRIVER_BYTES


def test_what_was_used_before_the_context_stays_known_to_later_meters(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    CudaMeter()
    gpu.mine = 1 * GIB
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert CudaMeter().device_memory() == 1 * GIB + DRIVER_BYTES


def test_with_a_context_that_came_first_the_process_figure_counts(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    gpu.mine = 1 * GIB
    assert CudaMeter().device_memory() == 1 * GIB + DRIVER_BYTES


def test_a_peak_between_two_readings_is_polled(gpu: FakeGpu) -> None:
    meter = CudaMeter()
    gpu.mine = 1 * GIB + 600 * MIB
    meter.device_memory()
    gpu.mine += 40 * MIB  # a library's module, gone again before anybody asks
    time.sleep(20 * meters.POLL_SECONDS)
    gpu.mine -= 40 * MIB
    assert meter.peak().device_bytes == max(
        1 * GIB + 640 * MIB + DRIVER_BYTES,  # what was polled
        2 * GIB + 600 * MIB + DRIVER_BYTES,  # the allocator's peak with what lay beside it
    )
    meter._poll.take()  # type: ignore[union-attr]


def test_a_polled_peak_of_somebody_else_is_not_ours(gpu: FakeGpu) -> None:
    meter = CudaMeter()
    gpu.mine = 1 * GIB + 600 * MIB
    meter.device_memory()
    gpu.others = 30 * GIB
    time.sleep(20 * meters.POLL_SECONDS)
    gpu.others = 0
    assert meter.peak().device_bytes == 2 * GIB + 600 * MIB + DRIVER_BYTES
