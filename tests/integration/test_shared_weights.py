"""Weights shared by real processes: a tiny transformer walked by gloo ranks is that of one process, and as simulated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.rank_processes import on_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoints import write_diffusers, write_official
from wanvram.config import RunConfig, Strategy
from wanvram.engine.components import Parts, Weights
from wanvram.engine.devices import CpuDevice, SimulatedDevice
from wanvram.models.dit import WanDiT
from wanvram.request import Request
from wanvram.run.weights import GeneratedWeights, choose_weights
from wanvram.sharing import Place
from wanvram.simulate.allocator import CachingAllocator
from wanvram.simulate.gpus import find_gpu
from wanvram.simulate.libraries import Libraries
from wanvram.simulate.memory import SimulatedMemory
from wanvram.weights.official import open_checkpoint
from wanvram.weights.sources import TensorSource

WAYS = {
    "pinned": {"load_strategy": "block"},
    "pageable": {"load_strategy": "block", "weights_in": "pageable"},
    "disk": {"load_strategy": "block", "weights_in": "disk"},
    "on the device": {},
    "one block resident": {"load_strategy": "block", "resident_blocks": 1},
    "fp8": {"load_strategy": "block", "weight_storage": "fp8"},
    "fp8 products": {"load_strategy": "block", "product_precision": "fp8"},
    "fp8 products on the device": {"product_precision": "fp8", "weight_storage": "fp8"},
}


def config_of(way: str, count: int, device: str, weights: str) -> RunConfig:
    request = Request.for_task("t2v-1.3B", prompt="a cat", size="832*480", frame_num=5, base_seed=1)
    shared = {"ulysses_size": count, "dit_fsdp": count > 1, "t5_fsdp": count > 1}
    strategy = Strategy(precision="bf16", **shared, **WAYS[way])  # type: ignore[arg-type]
    return RunConfig("shared", "", device, request, strategy, weights=weights)


class FromFiles(GeneratedWeights):
    """Of a checkpoint folder of a tiny model."""

    def __init__(self, folder: str) -> None:
        super().__init__(1, tiny=True)
        self.folder = Path(folder)

    def source(self, component: str) -> TensorSource:
        return open_checkpoint(self.folder, component)


FILES = ("pinned", "disk", "on the device", "one block resident", "fp8")
PARTS = ("dit", "text_encoder")


@dataclass
class Kept:
    """What a rank saw of every parameter in two walks, and what it held. sizes: of its allocations on the device, bytes."""

    seen: list[torch.Tensor]
    host_bytes: int
    sizes: list[int]


class NotedDevice(CpuDevice):
    """Sizes of what is asked for by torch.empty on the device; host memory is not among it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = Asked()

    def host_empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool = False) -> torch.Tensor:
        with self.asked.silent():
            return super().host_empty(shape, dtype, pinned=pinned)


class Asked(TorchDispatchMode):
    """Bytes of every torch.empty."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self._silent = False

    @contextmanager
    def silent(self) -> Iterator[None]:
        self._silent = True
        yield
        self._silent = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (
            str(func) == "aten.empty.memory_format"
            and result.device.type == "cpu"
            and not self._silent
            and result.nbytes
        ):
            self.sizes.append(result.nbytes)
        return result


def walked(device: Any, way: str, component: str, folder: str = "tiny") -> tuple[list[torch.Tensor], int]:
    """Loads a component and walks it twice -> copies of its weights as they came by, bytes in host RAM."""
    config = config_of(way, device.place.world, device.kind, folder)
    weights: Weights = FromFiles(folder)
    if folder == "tiny":
        weights = choose_weights(folder, simulated=device.kind == "simulated", task=config.request.task, seed=1)
    loaded = Parts(config, device, weights).load(component)
    module, seen = loaded.module, []
    order = module.walk_order() if isinstance(module, WanDiT) else list(module.blocks)
    if isinstance(module, WanDiT):
        for embedder in loaded.walk_embedders(module.embedders()):
            seen += [p.detach().clone() for p in embedder.parameters()] if device.kind == "cpu" else []
    for _ in range(2):
        for unit in loaded.walk(order):
            seen += [p.detach().clone() for p in unit.parameters()] if device.kind == "cpu" else []
    host_bytes = loaded.host_bytes
    loaded.release()
    return seen, host_bytes


def walks(rank: int, count: int) -> dict[tuple[str, str], Kept]:
    results = {}
    for way in WAYS:
        for component in ("dit", "text_encoder"):
            device = NotedDevice()
            device.place = Place(rank, ulysses=count)
            with torch.no_grad(), device.asked:
                seen, host_bytes = walked(device, way, component)
            results[way, component] = Kept(seen, host_bytes, device.asked.sizes)
    return results


@cache
def together(count: int) -> list[dict[tuple[str, str], Kept]]:
    return on_ranks(count, walks, count)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("component", ["dit", "text_encoder"])
@pytest.mark.parametrize("way", WAYS)
def test_every_rank_walks_the_weights_of_one_process_bit_for_bit(way: str, component: str, count: int) -> None:
    with torch.no_grad():
        alone, host_bytes = walked(CpuDevice(), way, component)
    ranks = [results[way, component] for results in together(count)]
    for kept in ranks:
        assert len(kept.seen) == len(alone) > 0
        assert all(torch.equal(mine, one) for mine, one in zip(kept.seen, alone, strict=True))
    if way == "on the device":
        assert host_bytes == 0
    assert sum(kept.host_bytes for kept in ranks) == pytest.approx(
        host_bytes, rel=0.15
    )  # tiny units, padded to 256 bytes


def of_files(rank: int, count: int, folders: tuple[str, ...]) -> list[list[torch.Tensor]]:
    device = CpuDevice()
    device.place = Place(rank, ulysses=count)
    with torch.no_grad():
        return [walked(device, way, part, folder)[0] for folder in folders for way in FILES for part in PARTS]


def test_ranks_that_read_a_checkpoint_together_have_what_one_process_reads(tmp_path: Path) -> None:
    """Official and Diffusers folders: float32 files for bfloat16 weights, tensors in pieces, torch files and safetensors."""
    folders = tuple(str(tmp_path / name) for name in ("official", "diffusers"))
    for folder, write in zip(folders, (write_official, write_diffusers), strict=True):
        Path(folder).mkdir()
        write(Path(folder))
    alone = of_files(0, 1, folders)
    assert all(alone)
    for mine in on_ranks(3, of_files, 3, folders):
        for seen, one in zip(mine, alone, strict=True):
            assert all(map(torch.equal, seen, one))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("component", ["dit", "text_encoder"])
@pytest.mark.parametrize("way", WAYS)
def test_a_simulated_rank_asks_the_device_for_what_a_real_one_does(way: str, component: str, count: int) -> None:
    gpu = find_gpu("h200")
    for rank in range(count):
        memory = SimulatedMemory(gpu, CachingAllocator(), Libraries(gpu), keep_events=True)
        device = SimulatedDevice(memory)
        device.place = Place(rank, ulysses=count)
        with device.session():
            walked(device, way, component)
        assert memory.events is not None
        asked = [e.nbytes for e in memory.events if e.operation.startswith("aten.empty.memory_format") and e.nbytes > 0]
        assert asked == together(count)[rank][way, component].sizes
        assert memory.allocator.allocated_bytes == 0
