"""cuDNN's workspace for every convolution of the VAE at every supported size, on the GPU at hand.

    python benchmarks/harvest_conv_workspaces.py src/wanvram/simulate/conv_workspaces.json

The list of convolutions comes from a run of the VAE on meta tensors; each is then run once under the allocator's history.
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
def main() -> None:
    with torch.device("meta"):
        vae = WanVAE(VAE["wan2.1"])
    collect = Collect()
    with collect:
        for height, width in SIZES:
            for latents in (1, 3):
                for _ in vae.decode(torch.empty(16, latents, height // 8, width // 8, device="meta")):
                    pass
                vae.encode(video(1 + 4 * (latents - 1), height, width))
    table = {}
    for key, (x_shape, w_shape, has_bias, stride, padding, dtype) in collect.calls.items():
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
        output = y.numel() * y.element_size()
        del x, w, b, y
        if sizes and sizes[0] == output:
            sizes = sizes[1:]
        if len(sizes) > 1:
            print(f"{key}: several buffers {sizes}", file=sys.stderr)
        table[key] = sum(sizes)
    Path(sys.argv[1]).write_text(json.dumps(table, indent=0, sort_keys=True) + "\n")
    large = sorted(table.items(), key=lambda item: -item[1])[:8]
    print(f"{len(table)} convolutions on {torch.cuda.get_device_name()}; largest: {large}")


if __name__ == "__main__":
    main()
