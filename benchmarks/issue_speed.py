"""What the host takes to issue work: single operations, and whole passes whose tensors are so small that the GPU waits for the host.

    python benchmarks/issue_speed.py --out benchmarks                    on a GPU, half a minute
    python benchmarks/issue_speed.py --predict                           no GPU: what the clock says of the same passes, for an H200

Single operations: the fastest of many short rounds, as `operation_us` is. Passes: the median of REPEATS, behind one that loads and
plans: a denoising step of 1.3B for one picture of 832x480, and a decode of 21 latent frames of 8x8, float32 and bf16. Exit code 1
where a pass was predicted more than 15 % off, for a processor as fast as this one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from own_parts import OwnParts, Unrecorded
from provenance import conclude, header, unused

from wanvram.config import RunConfig, Strategy
from wanvram.engine.components import Parts
from wanvram.engine.devices import SimulatedDevice
from wanvram.engine.shared_stages import SharedStages
from wanvram.engine.vae_stages import decode
from wanvram.errors import DeviceError, InputError
from wanvram.machine.host import operation_us
from wanvram.predict.simulate import simulated_device
from wanvram.run.weights import NoWeights
from wanvram.simulate.gpus import find_gpu

ROUND = 100  # operations: far fewer than the driver's queue holds (1024), so that none waits for the GPU
ROUNDS = 50
REPEATS = 5
MOST_ERROR = 0.15
EDGE = 8  # of the latent
FRAMES = 21
TASK = "t2v-1.3B"
PASSES = ("step", "decode fp32", "decode bf16")


def single() -> dict[str, float]:
    """Microseconds of host time per operation."""
    from wanvram.kernels.channel_norm import fill_window
    from wanvram.kernels.conv import conv2d, conv3d, place_frame
    from wanvram.kernels.elementwise import gated_add_, layer_norm_modulate, linear_gelu, rms_norm_rope_
    from wanvram.kernels.scaled_attention import attention

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, device="cuda", dtype=dtype)

    x, half, row = new(64, 1536, dtype=torch.float32), new(64, 1536), new(1536)
    wide, cos = new(1, 1536, dtype=torch.float32), new(64, 64, dtype=torch.float32)
    q, long = new(64, 12, 128), new(4352, 12, 128)
    picture = new(1, 96, 8, 8).contiguous(memory_format=torch.channels_last)
    frame, window = (new(1, 96, n, 8, 8).contiguous(memory_format=torch.channels_last_3d) for n in (1, 3))
    flat = new(96, 96, 3, 3).contiguous(memory_format=torch.channels_last)
    weight = new(96, 96, 3, 3, 3).contiguous(memory_format=torch.channels_last_3d)
    square, gamma = new(1536, 1536), new(96)
    calls: dict[str, Callable[[], Any]] = {
        "view": lambda: half.view(-1),
        "slice": lambda: half[1:],
        "empty": lambda: torch.empty_like(half),
        "add_": lambda: half.add_(1.0),
        "copy_": lambda: half.copy_(x),
        "addmm": lambda: torch.addmm(row, half, square),
        "linear_gelu": lambda: linear_gelu(half, square, row),
        "layer_norm_modulate": lambda: layer_norm_modulate(x, wide, wide, 1e-6, 1.0, torch.bfloat16),
        "rms_norm_rope_": lambda: rms_norm_rope_(half, row, cos, cos, 12, 1e-6),
        "gated_add_": lambda: gated_add_(x, half, wide),
        "attention cudnn": lambda: attention(q, q, q, "cudnn"),
        "attention fa4": lambda: attention(q, long, long, "fa4"),
        "conv2d": lambda: conv2d(picture, flat, None, [1, 1], [1, 1]),
        "conv3d": lambda: conv3d(window, weight, None, [1, 1, 1], [0, 1, 1]),
        "fill_window": lambda: fill_window(frame, [frame, frame], gamma, window, 0, 0),
        "place_frame": lambda: place_frame(frame, gamma, frame, True),
    }
    found = {}
    for name, call in calls.items():
        try:
            found[name] = fastest(call)
        except (DeviceError, InputError, ImportError) as error:  # fa4 is not installed, or not for this card
            print(f"{name}: {error}", file=sys.stderr)
    return found


def fastest(call: Callable[[], Any]) -> float:
    found = float("inf")
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(ROUND):
            call()
        found = min(found, time.perf_counter() - start)
    return round(found / ROUND * 1e6, 2)


def parts(name: str, where: str) -> OwnParts:
    vae = name.removeprefix("decode ") if name.startswith("decode") else "fp32"
    strategy = Strategy(precision="bf16", expandable_segments=True, vae_precision=vae)
    return OwnParts(TASK, (FRAMES, 60, 104), strategy, where)


def call_of(own: OwnParts, name: str) -> Callable[[], object]:
    if name == "step":
        return partial(own.denoiser(500), 1)
    decoder, device = own.parts.load("vae_decoder"), own.device
    latent = torch.randn(16, FRAMES, EDGE, EDGE, device=device.torch_device)
    recorder = Unrecorded(device.meter, None, None)
    return lambda: list(decode(decoder, SharedStages(device), recorder, latent, None))


def measured() -> Iterator[dict[str, Any]]:
    for name in PASSES:
        own = parts(name, "cuda")
        with torch.no_grad(), own.device.session():
            work, seconds = call_of(own, name), []
            for _ in range(1 + REPEATS):
                torch.cuda.synchronize()
                start = time.perf_counter()
                work()
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
        yield {"pass": name, "seconds": median(seconds[1:]), "all_seconds": seconds[1:], "first_seconds": seconds[0]}


def predicted(name: str, card: str, speed_us: float | None = None) -> float:
    """Seconds of a warm pass on a simulated card. speed_us: of this host's processor."""
    device: SimulatedDevice | None = None

    def make(config: RunConfig) -> SimulatedDevice:
        nonlocal device
        device = simulated_device(replace(config, gpu=card))
        return device

    with mock.patch("own_parts.make_device", make):
        own = parts(name, "simulated")
    assert device is not None
    own.parts = Parts(own.config, own.device, NoWeights(tiny=False))
    clock = device.clock
    clock.machine = replace(clock.machine, first_use={}, operation_us=speed_us or clock.machine.operation_us)
    clock.__post_init__()
    clock.leave_out_plans()
    with own.device.session():
        work = call_of(own, name)
        work()
        clock.synchronize()
        start = clock.now()
        work()
        clock.synchronize()
    return clock.now() - start


def breaches_of(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"{row['pass']}: {row['predicted_seconds']:.4f} s predicted, {row['seconds']:.4f} measured, at most {MOST_ERROR:.0%} off"
        for row in rows
        if abs(row["predicted_seconds"] / row["seconds"] - 1) > MOST_ERROR
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--predict", action="store_true", help="print what the clock says; needs no GPU")
    args = parser.parse_args()
    if args.predict:
        for name in PASSES:
            print(f"{name:12s} {predicted(name, 'h200'):.4f} s")
        return 0
    gpu = find_gpu(torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1])
    target = unused(args.out / f"{datetime.date.today()}_{gpu.key}_issue_speed.json")
    document = header("issue_speed.py", "own_parts.py") | {"microseconds": single(), "rows": []}
    for row in measured():
        row["predicted_seconds"] = predicted(row["pass"], gpu.key, operation_us())
        document["rows"].append(row)
        print(f"{row['pass']:12s} {row['seconds']:.4f} s, predicted {row['predicted_seconds']:.4f}", flush=True)
    breaches = breaches_of(document["rows"])
    target.write_text(json.dumps(document | {"breaches": breaches}, indent=1) + "\n")
    return conclude({"microseconds": document["microseconds"], "breaches": breaches})


if __name__ == "__main__":
    sys.exit(main())
