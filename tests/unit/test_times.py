"""Time is the time until the file is there: start, first use, loading, saving and the end are predicted and recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wanvram.config import Request, RunConfig, Strategy
from wanvram.predict import host
from wanvram.predict.simulate import simulate
from wanvram.record import RunRecord
from wanvram.simulate.clock import Clock
from wanvram.simulate.gpus import find_gpu
from wanvram.simulate.host import HOST, Reading
from wanvram.weights.reading_speed import ReadingSpeed

SHORT = RunConfig(
    name="short",
    description="",
    device="simulated",
    request=Request.for_task("t2v-1.3B", size="832*480", frame_num=5, sample_steps=2),
    strategy=Strategy(load_strategy="block", offload=True),
)


@pytest.fixture(scope="module")
def run() -> Callable[..., RunRecord]:
    known: dict[tuple[object, ...], RunRecord] = {}

    def simulated(config: RunConfig = SHORT, *, video: bool = True) -> RunRecord:
        if (config, video) not in known:
            known[config, video] = simulate(config, video=video)[0]
        return known[config, video]

    return simulated


def seconds(record: RunRecord, name: str) -> float:
    return next(stage.seconds or 0.0 for stage in record.stages if stage.name == name)


def test_everything_from_the_command_to_its_end_is_in_the_whole(run: Callable[..., RunRecord]) -> None:
    record = run()
    stages = sum(stage.seconds or 0.0 for stage in record.stages)
    whole = record.times.in_all_seconds or 0.0
    assert whole >= HOST.start_seconds + stages + HOST.end_seconds
    assert whole <= HOST.start_seconds + stages + HOST.end_seconds + 1.0  # giving weights back between the stages


def test_loading_pins_what_streams_and_takes_its_time(run: Callable[..., RunRecord]) -> None:
    pinned = next(stage.pinned_bytes for stage in run().stages if stage.name == "load text_encoder")
    assert seconds(run(), "load text_encoder") > pinned / HOST.pin_bytes > 0.5


def test_a_checkpoint_is_read_from_disk_where_random_weights_are_made(run: Callable[..., RunRecord]) -> None:
    read = run(replace(SHORT, weights="a-folder"))
    base = 8832.5 * 2**20
    assert seconds(read, "load text_encoder") == pytest.approx(
        base * (1 / HOST.disk_bytes + 1 / HOST.pin_bytes), rel=0.05
    )


def test_a_checkpoint_read_into_pinned_memory_needs_no_room_on_the_device_for_it(run: Callable[..., RunRecord]) -> None:
    """Generated weights are made on the device, part by part; those of a file go straight to where they wait."""
    assert run(replace(SHORT, weights="a-folder")).stages[2].peak.reserved_bytes < run().stages[2].peak.reserved_bytes


def test_saving_is_a_stage_of_its_own_that_only_a_video_has(run: Callable[..., RunRecord]) -> None:
    pixels = 5 * 832 * 480
    assert 0.0 < seconds(run(), "save") <= pixels / HOST.encode_pixels
    assert [s.name for s in run(video=False).stages] == [s.name for s in run().stages if s.name != "save"]


def test_kernels_that_were_never_compiled_cost_the_first_run() -> None:
    gpu = find_gpu("h200")
    warm, cold = Clock(gpu), Clock(gpu, cold=frozenset({"triton"}))
    for clock in (warm, cold):
        clock.first_use("triton")
    costs = HOST.first_use["triton"]
    assert (warm.now(), cold.now()) == (costs.warm, costs.cold)
    assert (warm.cold_seconds(), cold.cold_seconds()) == (0.0, costs.cold - costs.warm)


def test_a_slow_host_issues_every_operation_slower() -> None:
    gpu = find_gpu("h200")
    fast, slow = Clock(gpu), Clock(gpu, replace(HOST, operation_us=2 * HOST.operation_us))
    for clock in (fast, slow):
        clock.view()
    assert slow.now() == pytest.approx(2 * fast.now())
    assert slow.costs.price("aten.add.Tensor").dispatch == 2 * fast.costs.price("aten.add.Tensor").dispatch  # type: ignore[union-attr]


def test_under_a_limit_libraries_come_before_the_weights(run: Callable[..., RunRecord]) -> None:
    record = run(replace(SHORT, memory_limit_bytes=2**33))
    assert [stage.name for stage in record.stages][:2] == ["start", "load text_encoder"]
    gpu = find_gpu("h200")
    start = record.stages[0]
    assert (start.peak.device_bytes or 0) - start.peak.reserved_bytes == gpu.context_bytes + sum(
        gpu.module_bytes.values()
    )


def test_streamed_weights_are_read_again_from_the_page_cache_where_it_holds_them() -> None:
    gpu = find_gpu("h200")
    clock = Clock(gpu, replace(HOST, page_cache_bytes=1e9))
    clock.read_from_disk(int(1e8), "dit")
    first = clock.prefetch(0, None)
    clock.read_from_disk(int(1e8), "dit", kept_bytes=int(1e9))
    again = clock.prefetch(0, None)
    clock.read_from_disk(int(1e8), "dit", kept_bytes=int(2e9))
    too_large = clock.prefetch(0, None)
    assert first == pytest.approx(1e8 / HOST.disk_bytes)
    assert again - first == pytest.approx(1e8 / HOST.plain.used)
    assert too_large - again == pytest.approx(1e8 / HOST.disk_bytes)


def test_values_that_are_converted_while_they_are_read_take_longer() -> None:
    """A checkpoint in bf16 run in fp16: 14B takes 7.4 s from the page cache, T5, which is not converted, 1.8 s for a third of it."""
    gpu = find_gpu("h200")
    plain, converted = (Clock(gpu, replace(HOST, cached_share=1.0, stored=stored)) for stored in ({}, {"dit": 1.0}))
    for clock in (plain, converted):
        clock.load_from_disk(int(1e9), "dit")
    assert plain.now() == pytest.approx(1e9 / HOST.plain.taken)
    assert converted.now() == pytest.approx(1e9 / HOST.converted.taken)


def test_a_checkpoint_of_twice_the_bytes_is_read_whole() -> None:
    clock = Clock(find_gpu("h200"), replace(HOST, stored={"dit": 2.0}))
    clock.load_from_disk(int(1e9), "dit")
    assert clock.now() == pytest.approx(2e9 / min(HOST.disk_bytes, HOST.converted.taken))


def test_a_checkpoint_beside_its_card_is_timed_by_a_sample_of_its_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = ReadingSpeed(first=7e8, taken=3e9, used=9e9)
    save_file(
        {"blocks.0.ffn.0.weight": torch.ones(8, 8, dtype=torch.bfloat16)},
        tmp_path / "diffusion_pytorch_model.safetensors",
    )
    monkeypatch.setattr(host, "reading_speed", lambda matrices, wanted, room: speed)
    monkeypatch.setattr(host, "ROOM_BYTES", 4096)
    monkeypatch.setattr(host, "_cached_share", lambda weights: 0.01)
    config = replace(SHORT, weights=str(tmp_path), strategy=replace(SHORT.strategy, precision="fp16"))
    gpu = find_gpu("h200")
    for here in (False, True):
        monkeypatch.setattr(host, "is_here", lambda key, here=here: here)
        machine = host.clock_of(config, gpu).machine
        assert machine.stored == {"dit": 1.0}
        assert machine.disk_bytes == (7e8 if here else HOST.disk_bytes)
        assert machine.converted == (Reading(taken=3e9, used=9e9) if here else HOST.converted)
