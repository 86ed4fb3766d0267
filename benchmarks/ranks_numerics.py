"""Is a forward of several GPUs as near to float32 as that of one? Every layout of the GPUs that are there, exchanging as a run does.

    torchrun --standalone --nproc_per_node 2 benchmarks/ranks_numerics.py --out DIR
    torchrun --standalone --nproc_per_node 2 benchmarks/ranks_numerics.py --out DIR --device cpu --model tiny-t2v --latent 3 12 20

One velocity of the transformer, with weights that let every block count, made on each GPU from one seed. `one`: by one GPU in the
precision; `exact`: by one GPU in float32 without TF32; errors are root mean squares relative to `exact`. PASSES where a layout is no
further from `one` than `one` is from `exact`, is at most 1.05 times as far from `exact`, and all ranks have the same bits; and where
`displaced`, in which rank 1 turns its rows as their neighbours, does not pass. Exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from wanvram.config import Strategy
from wanvram.engine.cuda import CudaDevice
from wanvram.engine.devices import CpuDevice, Device
from wanvram.engine.team import team_of
from wanvram.machine.launched import launched
from wanvram.models.dit import Attending, Condition, WanDiT
from wanvram.models.precision import PRECISIONS
from wanvram.models.rotary import rotary_tables
from wanvram.run.world import joined
from wanvram.sharing import WORLD, Place
from wanvram.specs import DIT

ROWS = 4096  # of an exchanged chunk


def model_of(name: str, precision: str, device: torch.device) -> WanDiT:
    """The same float32 numbers in every precision, parameter by parameter."""
    with torch.device("meta"):
        model = WanDiT(DIT[name], PRECISIONS[precision])
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(1)
    for key, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, device=device)
        if parameter.dim() == 1:
            values.mul_(0.02).add_(1.0 if "norm" in key and key.endswith("weight") else 0.0)
        elif "modulation" not in key:  # gates as they are: each block then adds as much as there was
            values.mul_(values[0].numel() ** -0.5)
        parameter.data.copy_(values)
    return model


def velocity_of(model: WanDiT, latent: torch.Tensor, team: Any) -> torch.Tensor:
    generator = torch.Generator(latent.device).manual_seed(3)
    shape = (60, model.spec.text_dim)
    context = torch.randn(shape, generator=generator, device=latent.device, dtype=torch.bfloat16)
    (moment,), conditions = model.prepare([500], [Condition(context)])
    how = Attending(team=team)
    (velocity,) = model.velocity([latent], moment, conditions, rows_per_chunk=2 * ROWS, attending=how)
    return velocity.double()


def layouts(world: int) -> list[tuple[int, int]]:
    """(ulysses, ring)."""
    return [(world // ring, ring) for ring in range(1, world + 1) if world % ring == 0]


def displaced_tables(*arguments: Any) -> tuple[torch.Tensor, ...]:
    return tuple(table.roll(1, 0) for table in rotary_tables(*arguments))


def measured(args: argparse.Namespace, device: Device) -> dict[str, Any]:
    rank, world, world_peers = device.place.rank, device.place.world, device.peers(WORLD)
    generator = torch.Generator(device.torch_device).manual_seed(2)
    shape = (DIT[args.model].in_dim, *args.latent)
    latent = torch.randn(shape, generator=generator, device=device.torch_device)
    exact = velocity_of(model_of(args.model, "fp32", device.torch_device), latent, None)
    model = model_of(args.model, args.precision, device.torch_device)
    one = velocity_of(model, latent, None)

    def far(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).square().mean().sqrt() / exact.square().mean().sqrt())

    rows: dict[str, Any] = {"one from exact": far(one, exact)}
    tokens = latent[0].numel() // 4
    for ulysses, ring in layouts(world):
        device.place = Place(rank, ulysses, ring)
        device.connect(weights=False)
        for displaced in (False, True):
            team = team_of(device, tokens, model.spec.num_heads, ROWS)
            is_wrong = displaced and rank == 1
            with patch("wanvram.models.dit.rotary_tables", displaced_tables) if is_wrong else nullcontext():
                found = velocity_of(model, latent, team)
            first = found.clone()
            world_peers.broadcast(first)
            said = {"from one": far(found, one), "from exact": far(found, exact), "same": torch.equal(first, found)}
            rows[f"ulysses {ulysses} ring {ring}{' displaced' * displaced}"] = said
    return rows


def passes(rows: dict[str, Any]) -> bool:
    limit = rows["one from exact"]
    shared = {name: said for name, said in rows.items() if name != "one from exact"}
    right = [said for name, said in shared.items() if "displaced" not in name]
    wrong = [said for name, said in shared.items() if "displaced" in name]
    near = [s["same"] and s["from one"] <= limit and s["from exact"] <= 1.05 * limit for s in (*right, *wrong)]
    return near == [True] * len(right) + [False] * len(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", default="t2v-1.3B")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--latent", type=int, nargs=3, default=(21, 60, 104), help="frames, rows, columns")
    args = parser.parse_args()
    start, me = time.monotonic(), launched()
    with joined(me) as world, torch.no_grad():
        device: Device = CudaDevice(me.local_rank) if args.device == "cuda" else CpuDevice()
        device.place = Place(me.rank, ulysses=me.size)
        note = world.connect(device, Strategy())
        rows = measured(args, device)
    if not me.is_first:
        return 0
    report = {"device": device.name, "gpus": me.size, "exchanges": note or "copies, or gloo", "model": args.model}
    report |= {"latent": list(args.latent), "precision": args.precision, "errors": rows, "passes": passes(rows)}
    report["seconds"] = round(time.monotonic() - start, 1)
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"{datetime.date.today()}_{args.device}_ranks_numerics_{args.model}.json"
    (args.out / name).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0 if report["passes"] else 1


if __name__ == "__main__":
    sys.exit(main())
