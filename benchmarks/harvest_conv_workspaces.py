"""cuDNN's workspace for every convolution of the VAE at every supported size, on the GPU at hand.

    python benchmarks/harvest_conv_workspaces.py collect shapes.json                    on any machine, minutes
    python benchmarks/harvest_conv_workspaces.py run shapes.json src/wanvram/simulate/conv_workspaces.json    on the GPU

The list of convolutions comes from runs of the VAE on meta tensors, whole and in the planner's tiles; each is then run once under
the allocator's history.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wanvram.kernels.conv import conv3d
from wanvram.models.vae import WanVAE
from wanvram.simulate.libraries import conv_key
from wanvram.specs import VAE

TILE_EDGES = (80, 52, 40, 30, 20)  # those the planner tries
SIZES = ((480, 832), (832, 480), (720, 1280), (1280, 720), (1024, 1024))


class Collect(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) == "wanvram.conv3d.default":
            x, weight, bias, stride, padding = args
            key = conv_key(str(x.dtype).removeprefix("torch."), x.shape, weight.shape, stride)
            self.calls[key] = (x.shape, weight.shape, bias is not None, list(stride), list(padding), x.dtype)
        return func(*args, **(kwargs or {}))


def video(frames: int, height: int, width: int) -> Iterator[torch.Tensor]:
    for _ in range(frames):
        yield torch.empty(3, 1, height, width, device="meta")


@torch.no_grad()
def collect(target: Path) -> None:
    with torch.device("meta"):
        vae = WanVAE(VAE["wan2.1"])
    found = Collect()
    with found:
        for height, width in SIZES:
            for latents in (1, 3) if height != width else (1,):
                frames = 1 + 4 * (latents - 1)
                z = torch.empty(16, latents, height // 8, width // 8, device="meta")
                for _ in vae.decode(z):
                    pass
                vae.encode(video(frames, height, width))
                for edge in TILE_EDGES:
                    for _ in vae.decode_tiles(z, (edge, edge)):
                        pass
                    vae.encode_tiles(lambda n=frames, h=height, w=width: video(n, h, w), (edge, edge))
            print(f"{width}x{height}: {len(found.calls)} convolutions so far", flush=True)
    shapes = {
        key: [list(x), list(w), bias, stride, padding, str(dtype).removeprefix("torch.")]
        for key, (x, w, bias, stride, padding, dtype) in found.calls.items()
    }
    target.write_text(json.dumps(shapes, indent=0))


@torch.no_grad()
def run(shapes: Path, target: Path) -> None:
    table = json.loads(target.read_text()) if target.exists() else {}
    for key, (x_shape, w_shape, has_bias, stride, padding, name) in json.loads(shapes.read_text()).items():
        if key not in table:
            dtype = getattr(torch, name)
            table[key] = workspace(x_shape, w_shape, has_bias, stride, padding, dtype, key)
    target.write_text(json.dumps(table, indent=0, sort_keys=True) + "\n")
    large = sorted(table.items(), key=lambda item: -item[1])[:8]
    print(f"{len(table)} convolutions on {torch.cuda.get_device_name()}; largest: {large}")


def workspace(
    x_shape: list[int],
    w_shape: list[int],
    has_bias: bool,
    stride: list[int],
    padding: list[int],
    dtype: torch.dtype,
    key: str,
) -> int:
    x = torch.randn(x_shape, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    w = torch.randn(w_shape, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    b = torch.randn(w_shape[0], device="cuda", dtype=dtype) if has_bias else None
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history(max_entries=1000, stacks="python", clear_history=True)
    y = conv3d(x, w, b, stride, padding)
    torch.cuda.synchronize()
    trace = torch.cuda.memory._snapshot()["device_traces"][0]
    torch.cuda.memory._record_memory_history(None)
    sizes = [e["size"] for e in trace if e["action"] == "alloc"]
    if sizes and sizes[0] == y.numel() * y.element_size():
        sizes = sizes[1:]
    if len(sizes) > 1:
        print(f"{key}: several buffers {sizes}", file=sys.stderr)
    return sum(sizes)


if __name__ == "__main__":
    if sys.argv[1] == "collect":
        collect(Path(sys.argv[2]))
    else:
        run(Path(sys.argv[2]), Path(sys.argv[3]))
