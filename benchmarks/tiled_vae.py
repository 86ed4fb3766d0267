"""What tiles cost the VAE: seconds and peak of decoding and encoding whole frames and in tiles, in one process.

    python benchmarks/tiled_vae.py                              81 frames at 832*480 and 1280*720, float32
    python benchmarks/tiled_vae.py --profile                    and how long the GPU was busy in 17 frames of each
    python benchmarks/tiled_vae.py --precision bf16             the VAE in 16 bits, which is lossy

Every form is run once on 9 frames before it is timed, so that loading libraries, compiling and cuDNN's choices are not counted;
what they take is in `first_seconds`. `device_bytes` is NVML's peak of the whole GPU less what it was before this process, the
weights of one half of the VAE (0.3 GiB) and the CUDA context (0.6) in it.
Frames come from random latents through the engine, download included; `different` is the
largest difference of a frame's value (of 255) from the whole decode's. The project's bound is 1.15 times the whole
picture's time: exit code 1 where a tile takes longer. Writes <out>/<date>_<gpu>_tiled_vae.json.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from fit_card import Sampler
from own_parts import Unrecorded
from provenance import conclude, header, unused

from wanvram.config import Request, RunConfig, Strategy
from wanvram.engine.components import Parts
from wanvram.engine.cuda import CudaDevice
from wanvram.engine.residency import Component
from wanvram.engine.shared_stages import SharedStages
from wanvram.engine.vae_stages import decode, encode
from wanvram.run.weights import GeneratedWeights

TILES = (80, 52, 30)
SIZES = {"832*480": (60, 104), "1280*720": (90, 160)}
MIB = 2**20
MOST_RATIO = 1.15  # of a tile's time to the whole frames'


class Bench:
    """One half of the VAE on the GPU, resident."""

    def __init__(self, which: str, precision: str) -> None:
        request = Request.for_task("t2v-1.3B", size="832*480", frame_num=81, sample_steps=1, base_seed=1)
        strategy = Strategy(expandable_segments=True, vae_precision=precision)
        config = RunConfig("tiled_vae", "", "cuda", request, strategy, weights="random")
        self.device = CudaDevice()
        self.component: Component = Parts(config, self.device, GeneratedWeights(1, tiny=False)).load(which)

    def decode(self, latent: torch.Tensor, tile: int | None) -> torch.Tensor:
        recorder = Unrecorded(self.device.meter, None, None)
        return torch.cat(list(decode(self.component, SharedStages(self.device), recorder, latent, tile)))

    def encode(self, video: torch.Tensor, tile: int | None) -> torch.Tensor:
        def chunks() -> Iterator[torch.Tensor]:
            for frame in video:
                yield self.device.upload(frame).float().div_(127.5).sub_(1).permute(2, 0, 1)[:, None]

        return encode(self.component, self.device, chunks, tile).cpu()


def timed(work: Callable[[], torch.Tensor]) -> tuple[float, int, torch.Tensor]:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base, start = torch.cuda.memory_allocated(), time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() - base, result


def busy_seconds(work: Callable[[], torch.Tensor]) -> dict[str, float]:
    """Wall time, and the sum of the kernels' times, of one run under torch.profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        wall = timed(work)[0]
    totals = {e.key: e.device_time_total / 1e6 for e in profile.key_averages()}
    top = dict(sorted(totals.items(), key=lambda item: -item[1])[:6])
    return {"wall": wall, "kernels": sum(totals.values())} | {key[:60]: value for key, value in top.items()}


def material(way: str, size: str, frames: int) -> torch.Tensor:
    """Latents on the GPU to decode, or a video on the host to encode."""
    height, width = SIZES[size]
    generator = torch.Generator().manual_seed(1)
    if way == "decode":
        return torch.randn(16, 1 + (frames - 1) // 4, height, width, generator=generator).cuda()
    return torch.randint(0, 256, (frames, 8 * height, 8 * width, 3), generator=generator, dtype=torch.uint8)


def measure(bench: Bench, way: str, size: str, tile: int | None, args: argparse.Namespace) -> dict[str, Any]:
    work = {frames: partial(getattr(bench, way), material(way, size, frames), tile) for frames in (9, 17, args.frames)}
    row: dict[str, Any] = {"way": way, "size": size, "tile": tile, "first_seconds": timed(work[9])[0]}
    torch.cuda.empty_cache()
    watch = Sampler() if args.idle_bytes is not None else None
    seconds, row["peak_bytes"], row["result"] = timed(work[args.frames])
    row["all_seconds"] = [seconds, *(timed(work[args.frames])[0] for _ in range(args.repeats - 1))]
    row["seconds"] = median(row["all_seconds"])
    if watch:
        row["device_bytes"] = watch.close() + watch.idle - args.idle_bytes
    if args.profile:
        row["profile"] = busy_seconds(work[17])
    return row


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for way in args.ways:
        bench = Bench(f"vae_{way}r", args.precision)
        for size in args.sizes:
            whole: dict[str, Any] = {}
            for tile in (None, *args.tiles):
                row = measure(bench, way, size, tile, args)
                whole = whole or row
                different = (row["result"].float() - whole["result"].float()).abs().max().item()
                row |= {"ratio": row["seconds"] / whole["seconds"], "different": different}
                yield {key: value for key, value in row.items() if key != "result"}


def breaches_of(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"{row['way']} {row['size']} in tiles of {row['tile']}: {row['ratio']:.2f} times the whole, at most {MOST_RATIO}"
        for row in rows
        if row["ratio"] > MOST_RATIO
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=["decode", "encode"], choices=("decode", "encode"))
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--tiles", nargs="+", type=int, default=list(TILES), help="edges in latent pixels")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--repeats", type=int, default=3, help="`seconds` is their median")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="of the VAE")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    args = parser.parse_args()
    watch = Sampler()
    watch.close()
    args.idle_bytes = watch.idle  # before this process has touched the card
    device = torch.cuda.get_device_name()
    target = unused(args.out / f"{datetime.date.today()}_{device.split()[1].lower()}_tiled_vae.json")
    about = header("tiled_vae.py", "own_parts.py") | {
        "device": device,
        "frames": args.frames,
        "precision": args.precision,
    }
    done: list[dict[str, Any]] = []
    with torch.no_grad():
        for row in rows(args):
            done.append(row)
            print(
                f"{row['way']} {row['size']:9s} tile {row['tile']!s:5s} {row['seconds']:7.2f} s = {row['ratio']:.2f} x, peak "
                f"{row['peak_bytes'] / MIB:7.0f} MiB, device "
                f"{row['device_bytes'] / MIB:7.0f}, first {row['first_seconds']:.2f} s, different {row['different']:.3g} "
                f"{row.get('profile', '')}",
                flush=True,
            )
            document = about | {"breaches": breaches_of(done), "rows": done}
            target.write_text(json.dumps(document, indent=1) + "\n")
    return conclude({"rows": len(done), "breaches": breaches_of(done)})


if __name__ == "__main__":
    sys.exit(main())
