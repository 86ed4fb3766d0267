"""cuDNN's convolutions of the VAE: of three frames against of one picture with three times the channels.

    python benchmarks/convolution_kernels.py --out DIR        a minute on a GPU

For each shape of a decode and each type: seconds (of ten calls in a row, after two), TFLOP/s, bytes beside the output, the root mean
square of the error against float64 on the first rows, and cuDNN's kernels with their microseconds. Exit code 1 where in float32 the
picture, which `models.vae_blocks` takes there, is slower than the frames, or further from float64. Writes
<out>/<date>_<gpu>_convolution_kernels.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from provenance import conclude, header, unused

# Channels in, out, rows, columns: bands of whole frames at 832x480 and 1280x720, tiles, and the lower levels.
SHAPES = (
    *((96, 96, 120, 832), (96, 96, 480, 832), (192, 192, 240, 416), (192, 384, 120, 208)),
    *((384, 384, 120, 208), (384, 384, 60, 104), (96, 96, 180, 1280), (96, 96, 120, 480)),
)
TYPES = (torch.float32, torch.float16, torch.bfloat16)
CALLS = 10
JUDGED_ROWS = 8
MOST_ERROR_RATIO = 1.1


def forms(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], torch.Tensor], torch.Tensor]]:
    """Name, call, and what float64 gives for the first rows [rows, columns, out]."""
    inputs, outputs, height, width = shape
    generator = torch.Generator("cuda").manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": "cuda"}
    x = torch.randn(3, height, width, inputs, **options) * 0.5
    weight = torch.randn(outputs, 3, 3, 3, inputs, **options) / (27 * inputs) ** 0.5
    bias = torch.randn(outputs, **options)
    frames, taps = x.permute(3, 0, 1, 2)[None], weight.permute(0, 4, 1, 2, 3)
    top = frames[..., : JUDGED_ROWS + 1, :].double()
    wanted = F.conv3d(top, taps.double(), bias.double(), padding=(0, 1, 1))[0, :, 0, :JUDGED_ROWS].permute(1, 2, 0)
    picture = x.permute(1, 2, 0, 3).reshape(height, width, -1).permute(2, 0, 1)[None]
    flat = weight.permute(0, 2, 3, 1, 4).reshape(outputs, 3, 3, -1).permute(0, 3, 1, 2)
    frames, taps, picture, flat, bias = (tensor.to(dtype) for tensor in (frames, taps, picture, flat, bias))
    yield "frames", lambda: F.conv3d(frames, taps, bias, padding=(0, 1, 1))[:, :, 0], wanted
    yield "picture", lambda: F.conv2d(picture, flat, bias, padding=1), wanted


def measured(call: Callable[[], torch.Tensor], wanted: torch.Tensor) -> dict[str, Any]:
    for _ in range(2):
        out = call()
    off = out[0].permute(1, 2, 0)[:JUDGED_ROWS].double() - wanted
    kept = out.numel() * out.element_size()
    del out
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    extra = torch.cuda.max_memory_allocated() - before - kept
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    torch.cuda.synchronize()
    return {"ms": start.elapsed_time(end) / CALLS, "extra": extra, "rms": off.square().mean().sqrt().item()}


def kernels(call: Callable[[], torch.Tensor]) -> list[tuple[str, float]]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [(event.key[:110], event.device_time_total) for event in profile.key_averages() if event.device_time_total]


def rows() -> Iterator[dict[str, Any]]:
    for shape in SHAPES:
        inputs, outputs, height, width = shape
        for dtype in TYPES:
            for name, call, wanted in forms(shape, dtype):
                row: dict[str, Any] = {"shape": shape, "form": name, "dtype": str(dtype).removeprefix("torch.")}
                row |= measured(call, wanted)
                row["tflops"] = 2 * height * width * inputs * outputs * 27 / row["ms"] / 1e9
                yield row | {"kernels": kernels(call)}


def breaches_of(rows: list[dict[str, Any]]) -> list[str]:
    """Where a picture is the worse choice in float32."""
    found, wide = [], [row for row in rows if row["dtype"] == "float32"]
    for frames in (row for row in wide if row["form"] == "frames"):
        same = (row for row in wide if row["shape"] == frames["shape"] and row["form"] == "picture")
        for picture in same:
            if picture["ms"] > frames["ms"]:
                found.append(f"{frames['shape']}: {picture['ms']:.3f} ms as a picture, {frames['ms']:.3f} as frames")
            if picture["rms"] > MOST_ERROR_RATIO * frames["rms"]:
                found.append(
                    f"{frames['shape']}: error {picture['rms']:.2e} as a picture, {frames['rms']:.2e} as frames"
                )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    args = parser.parse_args()
    card = torch.cuda.get_device_name().split()[-1].lower()
    target = unused(args.out / f"{datetime.date.today()}_{card}_convolution_kernels.json")
    done: list[dict[str, Any]] = []
    with torch.no_grad():
        for row in rows():
            done.append(row)
            print(f"{row['shape']} {row['dtype']:8s} {row['form']:7s} {row['ms']:.3f} ms, {row['tflops']:.0f} TFLOP/s")
            document = header("convolution_kernels.py") | {"breaches": breaches_of(done), "rows": done}
            target.write_text(json.dumps(document, indent=1) + "\n")
    return conclude({"rows": len(done), "breaches": breaches_of(done)})


if __name__ == "__main__":
    sys.exit(main())
