"""cuDNN's workspace for the convolutions of the VAE at every size it meets, on the GPU at hand.

    python benchmarks/harvest_conv_workspaces.py collect shapes.json.gz --known measured.json.gz      on any machine, minutes
    python benchmarks/harvest_conv_workspaces.py run shapes.json.gz measured.json.gz --seconds 70     on the GPU

The list of convolutions comes from runs of the VAE on meta tensors, whole and in the planner's tiles, for the official sizes and
for the sizes of pictures of other aspect ratios; the most valuable come first, and `run` measures as many as the time allows.
A workspace is the allocator's peak of requested bytes beside input, weight and output.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

# One convolution: dtype, input [C,T,H,W], weight [O,I,kT,kH,kW], stride, padding; of a picture without T.
Shape = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]

OFFICIAL = ((480, 832), (832, 480), (720, 1280), (1280, 720))
AREAS = (480 * 832, 720 * 1280)
COMMON_RATIOS = ((3, 2), (4, 3), (1, 1), (16, 9), (21, 9), (5, 4), (2, 1), (16, 10), (7, 5), (13, 9))
LARGEST_RATIO = 4.0
BUFFER_BYTES = 2 << 30
SAMPLED_KERNELS = {
    "float32": 60,
    "bfloat16": 8,
    "float16": 8,
}  # of each kind of convolution, large and small workspaces apart


def key_of(shape: Shape) -> str:
    dtype, *parts = shape
    return " ".join([dtype, *("x".join(map(str, part)) for part in parts)])


def shape_of(key: str) -> Shape:
    dtype, *parts = key.split()
    x, weight, stride, padding = (tuple(map(int, part.split("x"))) for part in parts)
    return dtype, x, weight, stride, padding


def is_small(shape: Shape) -> bool:
    """Kinds in float32 that took less than one block, 512 bytes, at each of their 5,000 measured shapes."""
    outputs, inputs, *kernel = shape[2]
    return shape[0] == "float32" and (kernel == [1, 1, 1] or (outputs == 96 and inputs in (96, 192, 384)))


class Collector(TorchDispatchMode):
    """Lists the convolutions of a VAE on meta tensors: one frame and five, decoding and encoding."""

    def __init__(self, dtype: torch.dtype) -> None:
        from wanvram.models.vae import WanVAE
        from wanvram.specs import VAE

        super().__init__()
        with torch.device("meta"):
            self.vae = WanVAE(VAE["wan2.1"], dtype)
        self.shapes: dict[Shape, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.wanvram.conv2d.default, torch.ops.wanvram.conv3d.default):
            x, weight, _, stride, padding = args
            name = str(x.dtype).removeprefix("torch.")
            self.shapes.setdefault((name, tuple(x.shape[1:]), tuple(weight.shape), tuple(stride), tuple(padding)))
        return func(*args, **(kwargs or {}))

    @torch.no_grad()
    def add(self, height: int, width: int) -> None:
        from wanvram.knobs import TILES

        for latents in (1, 2):
            z = torch.empty(16, latents, height // 8, width // 8, device="meta")

            def video(frames: int = 4 * latents - 3) -> Iterator[torch.Tensor]:
                for _ in range(frames):
                    yield torch.empty(3, 1, height, width, device="meta")

            with self:
                for _ in self.vae.decode(z):
                    pass
                self.vae.encode(video())
                for edge in (edge for edge in TILES if edge < max(height, width) // 8):
                    for _ in self.vae.decode_tiles(z, (edge, edge)):
                        pass
                    self.vae.encode_tiles(video, (edge, edge))


def picture_sizes(largest_ratio: float) -> list[tuple[int, int]]:
    """Every (height, width) that a picture's aspect ratio up to this, either way up, gives; the least extreme first."""
    from wanvram.tasks import picture_size

    steps = 50_000
    ratios = (math.exp((2 * step / steps - 1) * math.log(largest_ratio)) for step in range(steps + 1))
    found = {picture_size(area, 100_000, round(100_000 * ratio))[::-1] for ratio in ratios for area in AREAS}
    return sorted(found, key=lambda size: abs(math.log(size[0] / size[1])))


def collect(target: Path, known: dict[str, int]) -> None:
    from wanvram.simulate.convolutions import Convolution
    from wanvram.tasks import picture_size

    common = [
        picture_size(area, *ratio)[::-1] for area in AREAS for pair in COMMON_RATIOS for ratio in (pair, pair[::-1])
    ]
    listed: dict[str, None] = {}
    for dtype, sizes in (
        (torch.float32, [*OFFICIAL, (1024, 1024)]),
        (torch.float32, common),
        (torch.bfloat16, [*OFFICIAL, (1024, 1024)]),
        (torch.float16, [*OFFICIAL, (1024, 1024)]),
        (torch.float32, picture_sizes(2.0)),
        (torch.float32, picture_sizes(LARGEST_RATIO)),
    ):
        collector = Collector(dtype)
        for height, width in dict.fromkeys(sizes):
            collector.add(height, width)
        # In random order, so that what the time allows is a fair sample.
        keys = [Convolution(*shape).key for shape in collector.shapes]
        fresh = [key for key in dict.fromkeys(keys) if key not in listed and key not in known]
        random.Random(0).shuffle(fresh)
        listed.update(dict.fromkeys(fresh))
        print(f"{dtype}, {len(sizes)} sizes: {len(listed)} convolutions so far", flush=True)
    large = [key for key in listed if not is_small(shape_of(key))]
    small = [key for key in listed if is_small(shape_of(key))]
    write(target, [*large[:500], *small[:500], *large[500:], *small[500:]])


def read(file: Path) -> Any:
    return json.loads(gzip.decompress(file.read_bytes()))


def write(file: Path, content: object) -> None:
    file.write_bytes(gzip.compress(json.dumps(content, indent=0).encode(), mtime=0))


def layout_of(x: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def convolved(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, shape: Shape) -> torch.Tensor:
    convolution = F.conv2d if x.dim() == 4 else F.conv3d
    return convolution(x, weight, bias, stride=shape[3], padding=shape[4])


class Bench:
    """Runs convolutions on one buffer of zeros: what cuDNN chooses depends on no value."""

    def __init__(self) -> None:
        self.buffer = torch.zeros(BUFFER_BYTES, dtype=torch.uint8, device="cuda")
        self.weights: dict[tuple[str, tuple[int, ...]], tuple[torch.Tensor, torch.Tensor]] = {}

    def arguments(self, shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Input and weight, channels last, and bias."""
        name, (channels, *sizes), weight_shape, _, _ = shape
        dtype = getattr(torch, name)
        flat = self.buffer[: channels * math.prod(sizes) * dtype.itemsize].view(dtype)
        x = flat.view(1, *sizes, channels).movedim(-1, 1)
        if (name, weight_shape) not in self.weights:
            weight = torch.zeros(weight_shape, dtype=dtype, device="cuda")
            bias = torch.zeros(weight_shape[0], dtype=dtype, device="cuda")
            self.weights[name, weight_shape] = weight.contiguous(memory_format=layout_of(weight)), bias
        return x, *self.weights[name, weight_shape]

    def workspace(self, shape: Shape) -> int:
        """Bytes, as requested from the allocator."""
        x, weight, bias = self.arguments(shape)
        torch._C._cuda_resetPeakMemoryStats(0)
        y = convolved(x, weight, bias, shape)
        requested = torch._C._cuda_memoryStats(0)["requested_bytes"]["all"]
        if not y.is_contiguous(memory_format=layout_of(y)):
            raise RuntimeError(f"{key_of(shape)}: cuDNN left channels last")
        return int(requested["peak"] - requested["current"])

    def kernels(self, shapes: list[Shape]) -> dict[str, list[list[Any]]]:
        """Name, grid and block of every kernel of each convolution; fills of a marker stand between convolutions."""
        marker = torch.zeros(1, dtype=torch.int16, device="cuda")
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profiler:
            for shape in shapes:
                marker.fill_(7)
                convolved(*self.arguments(shape), shape)
            torch.cuda.synchronize()
        with TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text())["traceEvents"]
        launched = sorted((e for e in events if e.get("cat") == "kernel"), key=lambda e: e["ts"])
        groups: list[list[list[Any]]] = []
        for event in launched:
            if "FillFunctor<short>" in event["name"]:
                groups.append([])
            elif groups:
                groups[-1].append([event["name"], event["args"].get("grid"), event["args"].get("block")])
        if len(groups) != len(shapes):
            return {"marker": [[f"{len(groups)} groups for {len(shapes)} convolutions"]]}
        return {key_of(shape): group for shape, group in zip(shapes, groups, strict=True)}


@torch.no_grad()
def run(shapes: Path, target: Path, seconds: float, kernels: bool) -> None:
    """kernels: also name the kernels of a sample of what was measured."""
    start = time.perf_counter()
    gpu = torch.cuda.get_device_properties(0)
    bench = Bench()
    table: dict[str, int] = {}
    errors: dict[str, str] = {}
    for key in read(shapes):
        if time.perf_counter() - start > seconds:
            break
        try:
            table[key] = bench.workspace(shape_of(key))
        except RuntimeError as error:
            errors[key] = str(error)[:200]
    torch.cuda.synchronize()
    device = {
        "gpu": gpu.name,
        "multiprocessors": gpu.multi_processor_count,
        "capability": [gpu.major, gpu.minor],
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "seconds": round(time.perf_counter() - start, 2),
    }
    result = {"device": device, "workspaces": table, "errors": errors}
    write(target, result)  # before the profiler, which may fail
    print(f"{len(table)} convolutions, {len(errors)} errors, on {device}", flush=True)
    if kernels:
        by_kind: dict[tuple[Any, ...], list[Shape]] = {}
        for shape in map(shape_of, table):
            by_kind.setdefault((shape[0], *shape[2:4], table[key_of(shape)] > 512), []).append(shape)
        sample = [shape for kind in by_kind.values() for shape in kind[: SAMPLED_KERNELS[kind[0][0]]]]
        write(target, result | {"kernels": bench.kernels(sample)})
        print(f"kernels named at {time.perf_counter() - start:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    collecting = verbs.add_parser("collect")
    collecting.add_argument("shapes", type=Path)
    collecting.add_argument("--known", type=Path, nargs="*", default=[], help="what runs have measured already")
    running = verbs.add_parser("run")
    running.add_argument("shapes", type=Path)
    running.add_argument("target", type=Path)
    running.add_argument("--seconds", type=float, default=70.0, help="stop after this long (default: 70)")
    running.add_argument("--kernels", action="store_true", help="name the kernels of a sample, too: about 10 s more")
    args = parser.parse_args()
    if args.verb == "collect":
        collect(args.shapes, {key: size for file in args.known for key, size in read(file)["workspaces"].items()})
    else:
        run(args.shapes, args.target, args.seconds, args.kernels)


if __name__ == "__main__":
    main()
