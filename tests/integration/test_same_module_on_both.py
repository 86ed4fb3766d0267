"""One module through the simulated device of the pipeline and through that of foreign code: the same bytes, the same events."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wanvram import simulated_gpu
from wanvram.simulate.allocator import CachingAllocator
from wanvram.simulate.gpus import find_gpu
from wanvram.simulate.libraries import Libraries
from wanvram.simulate.memory import SimulatedMemory


class Block(nn.Module):
    """Products of two and three dimensions, views, elementwise operations and normalization; [rows, 512]."""

    def __init__(self, width: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        kind = {"dtype": dtype, "device": device}
        self.norm = nn.LayerNorm(width, **kind)
        self.wide, self.narrow = nn.Linear(width, 4 * width, **kind), nn.Linear(4 * width, width, **kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        scores = torch.softmax(torch.mm(h, h.t()) * 0.1, -1)
        x = x + torch.mm(scores, h)
        x += self.narrow(nn.functional.gelu(self.wide(x)))
        return torch.cat([x[:, ::2], x[:, 1::2]], -1).contiguous()


def play(device: str, dtype: torch.dtype) -> None:
    Block(512, dtype, device)(torch.zeros(3000, 512, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("card", ["h200", "rtx4090"])
def test_peaks_and_sizes_of_all_allocations_agree(card: str, dtype: torch.dtype) -> None:
    gpu = find_gpu(card)
    memory = SimulatedMemory(gpu, CachingAllocator(), Libraries(gpu), keep_events=True)
    with memory, torch.no_grad():
        play("meta", dtype)
    with simulated_gpu(card) as run, torch.no_grad():
        run.memory.events = []
        play("cuda", dtype)
        assert torch.cuda.max_memory_allocated() == memory.allocator.peak_allocated_bytes
        assert torch.cuda.max_memory_reserved() == memory.allocator.peak_reserved_bytes
        ours, theirs = memory.events, run.memory.events
    assert ours is not None
    assert [event.nbytes for event in theirs] == [event.nbytes for event in ours]
