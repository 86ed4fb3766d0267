"""Copies out of each other's memory bring what gloo brings, in one round and in several, on as many GPUs as there are, or one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = """
import os

import torch
import torch.distributed as dist

from wanvram.engine.peers import TorchPeers
from wanvram.engine.symmetric import SymmetricPeers
from wanvram.sharing import PASSING, RING, ULYSSES, Place, parts, size

rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
device = torch.device("cuda", rank % torch.cuda.device_count())
torch.cuda.set_device(device)
dist.init_process_group("gloo")
rooms = {}

def both(place, axis, use=""):
    SymmetricPeers(place, axis, rooms=rooms, use=use).open(device)
    return TorchPeers(place, axis), SymmetricPeers(place, axis, rooms=rooms)

def same(cpu, gpu, what):
    torch.cuda.synchronize()
    assert torch.equal(cpu, gpu.cpu()), what

random = torch.Generator().manual_seed(rank)
new = lambda n: torch.randn(n, generator=random)
for rows, width in ((7, 1), (9001, 2048)):
    heads, shares = parts(5, count), parts(rows, count)
    mine = size(shares[rank])
    sent_counts = [mine * size(run) * width for run in heads]
    received_counts = [size(run) * size(heads[rank]) * width for run in shares]
    gloo, copies = both(Place(rank, ulysses=count), ULYSSES)
    sent, into = new(sum(sent_counts)), torch.zeros(sum(received_counts))
    there = into.to(device)
    for _ in range(3):
        gloo.wait(gloo.exchange(into, sent, received_counts, sent_counts))
        copies.wait(copies.exchange(there, sent.to(device), received_counts, sent_counts))
        same(into, there, "exchange")
    whole, counts = new(rows * width), [size(run) * width for run in shares]
    there = whole.to(device)
    gloo.gather(whole, counts)
    copies.gather(there, counts)
    same(whole, there, "gather")
    tensor = new(rows * width)
    there = tensor.to(device)
    gloo.broadcast(tensor)
    copies.broadcast(there)
    same(tensor, there, "broadcast")
    gloo, copies = both(Place(rank, ring=count), RING, PASSING)
    before = size(shares[(rank - 1) % count]) * width
    pair, coming = [new(mine * width) for _ in range(2)], [torch.zeros(before) for _ in range(2)]
    on_device, arriving = [t.to(device) for t in pair], [t.to(device) for t in coming]
    gloo.wait(gloo.pass_on(coming, pair))
    copies.wait(copies.pass_on(arriving, on_device))
    for cpu, gpu in zip(coming, arriving):
        same(cpu, gpu, "pass_on")
    rooms.clear()  # another size of what is passed on
dist.barrier()
print("rank", rank, "has the same", flush=True)
os._exit(0)
"""


@pytest.mark.gpu
@pytest.mark.parametrize("count", [2, 3])
def test_copies_out_of_each_others_memory_bring_what_gloo_brings(count: int, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    alone = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"} if torch.cuda.device_count() < count else {}
    variables = os.environ | {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"} | alone
    ended = subprocess.run(
        [*command, str(tmp_path / "program.py")], env=variables, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("has the same") == count
