"""Tensors that travel between device and host while the device goes on."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wanvram.engine.devices import CpuDevice
from wanvram.engine.residency import Component
from wanvram.engine.shared_stages import SharedStages
from wanvram.engine.staging import Ferry
from wanvram.engine.vae_stages import decode
from wanvram.models.vae import WanVAE
from wanvram.recorder.recorder import Recorder
from wanvram.specs import VAE


class Lazy(CpuDevice):
    """What comes down is in its buffer only once its mark has been waited for; marks are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, int | None]] = []
        self.coming: dict[int, tuple[Tensor, Tensor]] = {}
        self.count = 0

    def mark(self) -> Any:
        self.count += 1
        return self.count

    def send(self, host: Tensor, passage: Tensor) -> Tensor:
        self.log.append(("send", None))
        return passage.copy_(host).clone()

    def receive(self, passage: Tensor, tensor: Tensor) -> Any:
        mark = self.mark()
        self.coming[mark] = (passage, tensor.clone())
        self.log.append(("receive", mark))
        return mark

    def host_waits(self, mark: Any) -> None:
        if mark in self.coming:
            passage, value = self.coming.pop(mark)
            passage.copy_(value)
            self.log.append(("caught up", mark))


@pytest.fixture
def device() -> Lazy:
    return Lazy()


def test_what_came_down_is_in_its_target_after_land_whatever_came_between(device: Lazy) -> None:
    ferry, values = Ferry(device), [torch.full((3, size), float(size)) for size in (2, 5, 1, 7)]
    targets = [torch.zeros(4, value.shape[1]) for value in values]
    for value, target in zip(values, targets, strict=True):
        ferry.down(value, target[1:])
    assert not targets[2].any()
    assert not targets[3].any()
    assert torch.equal(targets[0][1:], values[0])
    ferry.land(leave=1)
    assert torch.equal(targets[2][1:], values[2])
    assert not targets[3].any()
    ferry.land()
    for value, target in zip(values, targets, strict=True):
        assert torch.equal(target[1:], value)
        assert not target[0].any()


def test_what_was_parked_can_be_fetched_in_parts(device: Lazy) -> None:
    ferry, x = Ferry(device), torch.arange(24.0).view(4, 6)
    parked = [ferry.park(x), ferry.park(-x)]
    part = ferry.fetch(parked[1][1:3, 2:])
    assert part.is_contiguous()
    assert torch.equal(part, -x[1:3, 2:])
    assert torch.equal(ferry.fetch(parked[0]), x)


def vae_decoder(device: Lazy) -> Component:
    torch.manual_seed(0)
    vae = WanVAE(VAE["tiny"])
    with torch.no_grad():
        for p in vae.parameters():
            p.normal_(std=0.05)
    return Component("vae", vae, [], device)


@pytest.mark.parametrize("tile", [None, 3])
def test_a_group_of_frames_is_waited_for_only_after_the_next_one_has_been_queued(
    device: Lazy, tile: int | None
) -> None:
    component, z = vae_decoder(device), torch.randn(16, 4, 3, 6)
    with device.session():
        frames = torch.cat(list(decode(component, SharedStages(device), Recorder(device.meter, None, None), z, tile)))
    assert isinstance(component.module, nn.Module)
    plain = torch.cat(list(component.module.decode(z)), dim=1)
    expected = plain.clamp(-1, 1).add(1).mul(127.5).permute(1, 2, 3, 0)
    assert (frames.float() - expected).abs().max() <= 1
    pieces = [what for what in device.log if what[0] != "send"]
    for before, after in pairwise(pieces):
        if after[0] == "caught up" and after != pieces[-1] and not _parked(device.log, after):
            assert before[0] == "receive", device.log
            assert before[1] != after[1], device.log


def _parked(log: list[tuple[str, int | None]], event: tuple[str, int | None]) -> bool:
    """The features between the two phases: all of them are waited for before the first tile."""
    first = next((i for i, what in enumerate(log) if what[0] == "send"), 0)
    return log.index(event) < first


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16])
def test_a_small_copy_between_host_tensors_changes_its_place_alone_and_wakes_no_threads(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    video, part = torch.zeros(5, 12, 16, 3, dtype=dtype), torch.arange(2 * 4 * 6 * 3).view(2, 4, 6, 3).to(dtype)
    wanted = video.clone()
    wanted[1:3, 4:8, 2:8] = part
    monkeypatch.setattr(Tensor, "copy_", lambda *_: pytest.fail("PyTorch's copies are spread over its threads"))
    CpuDevice().copy_on_host(video[1:3, 4:8, 2:8], part)
    assert torch.equal(video, wanted)
    back = torch.empty_like(part)
    CpuDevice().copy_on_host(back, video[1:3, 4:8, 2:8])
    assert torch.equal(back, part)
