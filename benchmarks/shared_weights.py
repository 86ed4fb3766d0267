"""Weights that GPUs share, in every home: is each unit what one GPU would hold, what do they keep, how fast do they come?

    torchrun --standalone --nproc_per_node 2 benchmarks/shared_weights.py --out benchmarks/DATE_2xh200_shared_weights.json
    torchrun --standalone --nproc_per_node 2 benchmarks/shared_weights.py --nccl --only pinned     by NCCL instead of copies
    torchrun --standalone --nproc_per_node 2 benchmarks/shared_weights.py --tiny                           without a GPU

Random weights of the 14B transformer, bf16. Every rank walks the transformer and compares each parameter, as it lies in its slot, bit
for bit with the one that it makes itself; then walks with nothing to compute (what the gathers alone reach), and with a product
beside every unit that takes about as long as the unit of a 720P step on two GPUs (what is left to wait for). Exit code 1 if a bit differs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from wanvram.config import RunConfig, Strategy
from wanvram.engine.components import Parts
from wanvram.engine.cuda import CudaDevice
from wanvram.engine.devices import CpuDevice, Device
from wanvram.engine.residency import Component
from wanvram.models.dit import WanDiT
from wanvram.request import Request
from wanvram.run.weights import choose_weights
from wanvram.sharing import Place
from wanvram.units import GIB, MIB
from wanvram.weights.sources import TensorSource

BLOCK = Strategy(load_strategy="block", ulysses_size=2, dit_fsdp=True)
WAYS = {
    "pinned": BLOCK,
    "pageable": replace(BLOCK, weights_in="pageable"),
    "on the device": Strategy(ulysses_size=2, dit_fsdp=True),
    "pinned, fp8": replace(BLOCK, weight_storage="fp8"),
}
UNIT_SECONDS = 0.024  # 5.8 s of a 720P forward on two H200s, by 240 visits of three units a block


def joined(tiny: bool, *, nccl: bool) -> tuple[Device, int]:
    """This process's device in the world that torchrun started, and its rank."""
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    os.environ |= {"NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "8", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    device: Device = CpuDevice() if tiny else CudaDevice(local)
    if isinstance(device, CudaDevice) and nccl:
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device.torch_device)
    else:
        dist.init_process_group("gloo")
    if isinstance(device, CudaDevice):
        device.exchanges_by_copies = not nccl
    device.place = Place(rank, ulysses=dist.get_world_size())
    return device, rank


def loaded(device: Device, way: str, tiny: bool) -> tuple[Component, TensorSource]:
    strategy = replace(WAYS[way], precision="bf16", ulysses_size=device.place.world)
    request = Request.for_task("t2v-14B", prompt="a prompt", base_seed=1)
    kind = "tiny" if tiny else "random"
    weights = choose_weights(kind, simulated=False, task=request.task, seed=1)
    config = RunConfig("shared", "", device.kind, request, strategy, weights=kind)
    component = Parts(config, device, weights).load("dit")
    source = weights.source("dit")
    assert source is not None
    return component, source


def order(component: Component) -> list[Any]:
    module = component.module
    assert isinstance(module, WanDiT)
    return module.walk_order()


def differing(component: Component, source: TensorSource) -> list[str]:
    """Names of parameters that are not, bit for bit, what one GPU makes."""
    names = {id(unit): name for name, unit in component.module.named_modules()}
    wrong = []
    for unit in component.walk(order(component)):
        for name, parameter in unit.named_parameters():
            key = f"{names[id(unit)]}.{name}"
            expected = torch.empty_like(parameter)
            source.fill(key, expected)
            if not torch.equal(expected, parameter):
                wrong.append(key)
    return wrong


def walked(device: Device, component: Component, work: Any) -> dict[str, float]:
    """Two passes, as a step has: seconds, and what of the coming of weights was waited for."""
    device.meter.synchronize()
    before, start = device.copies(), time.perf_counter()
    for _ in range(2):
        for _ in component.walk(order(component)):
            work()
    device.meter.synchronize()
    seconds, copies = time.perf_counter() - start, device.copies() - before
    return {"seconds": seconds, "stalled_seconds": copies.stalled_seconds, "copied_gib": copies.nbytes / GIB}


def product(device: Device, tiny: bool) -> Any:
    """Something to compute for UNIT_SECONDS."""
    if tiny:
        return lambda: None
    x = torch.randn(8192, 5120, dtype=torch.bfloat16, device=device.torch_device)
    w = torch.randn(5120, 5120, dtype=torch.bfloat16, device=device.torch_device)
    out = torch.empty_like(x)
    torch.mm(x, w, out=out)
    device.meter.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        torch.mm(x, w, out=out)
    device.meter.synchronize()
    times = max(1, round(UNIT_SECONDS / ((time.perf_counter() - start) / 20)))
    return lambda: [torch.mm(x, w, out=out) for _ in range(times)]


def measured(device: Device, way: str, tiny: bool) -> dict[str, Any]:
    start = time.perf_counter()
    component, source = loaded(device, way, tiny)
    result: dict[str, Any] = {"way": way, "ranks": device.place.world, "load_seconds": time.perf_counter() - start}
    if WAYS[way].weight_storage == "same":
        result["differing"] = differing(component, source)
    result["gather_only"] = walked(device, component, lambda: None)
    work = product(device, tiny)
    result["beside_products"] = walked(device, component, work)
    if not tiny:
        result["pinned_mib"] = device.meter.host()[1] / MIB
        result["device_mib"] = (device.meter.device_memory() or 0) / MIB
        result["allocated_mib"] = torch.cuda.memory_allocated() / MIB
        start = time.perf_counter()
        for _ in range(2 * len(order(component))):
            work()
        device.meter.synchronize()
        result["products_alone_seconds"] = time.perf_counter() - start
    component.release()
    del component, work
    gc.collect()
    device.empty_cache()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny weights on the CPU")
    parser.add_argument("--only", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--nccl", action="store_true", help="where copies out of each other's memory would do, too")
    parser.add_argument("--out", type=Path, help="a JSON file with every rank's results")
    args = parser.parse_args()
    device, rank = joined(args.tiny, nccl=args.nccl)
    results = []
    with device.session():
        for way in args.only:
            everyone: list[Any] = [None] * device.place.world
            dist.all_gather_object(everyone, measured(device, way, args.tiny))
            results.append(everyone)
            if rank == 0:
                print(json.dumps(everyone), flush=True)
    if rank == 0 and args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    dist.destroy_process_group()
    return int(any(result.get("differing") for everyone in results for result in everyone))


if __name__ == "__main__":
    sys.exit(main())
