"""Host memory and time of loading each component, at full size: is the peak the weights themselves plus one tensor?

    python benchmarks/loading.py                                    text_encoder, image_encoder, vae, dit of t2v-1.3B
    python benchmarks/loading.py dit --dit t2v-14B --folder /big    one component, its files made in /big
    python benchmarks/loading.py --out benchmarks/loading-2026-11-24.json

For each component a checkpoint of the official layout is made whose tensors are holes: headers, names, sizes and dtypes of the
real one, zeros inside, no space on the disk. Each way of loading runs in fresh processes with the file in the page cache, so the
times are those of copying and converting; a disk adds its own. `wanvram` is engine.residency.Component.load_host, `plain` is
torch.load or safetensors' load_file and a conversion of every tensor, `mapped` the same with torch.load(mmap=True) or safe_open.
Peak: VmHWM above what the process had before loading, where it is reset. Bound: the loaded bytes plus the largest tensor as the
file holds it. Of the repeated runs the highest peak and the shortest time count.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from wanvram.engine.devices import CpuDevice
from wanvram.engine.residency import Component
from wanvram.units import human
from wanvram.weights.official import CLIP_FILE, DIT_FILE, T5_FILE, VAE_FILE, blueprint, open_checkpoint

FILES = {"text_encoder": T5_FILE, "image_encoder": CLIP_FILE, "vae": VAE_FILE, "dit": DIT_FILE}
SPECS = {"text_encoder": "umt5-xxl", "image_encoder": "vit-h-14", "vae": "wan2.1"}
# As downloads have them; the transformer's is what generate.py of the official repository loads.
DTYPES = {
    "text_encoder": torch.bfloat16,
    "image_encoder": torch.float16,
    "vae": torch.float32,
    "dit": torch.float32,
}
WAYS = ("wanvram", "plain", "mapped")


def shapes_of(component: str, spec: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of the file. CLIP: with the unused last block, without the text tower, 1 GB that nobody reads."""
    module, blocks = blueprint(component, spec)
    shapes = {key: tuple(p.shape) for key, p in module.named_parameters()}
    if component == "image_encoder":
        last, unused = len(blocks) - 1, len(blocks)
        block = {k: s for k, s in shapes.items() if f"transformer.{last}." in k}
        shapes |= {k.replace(f".{last}.", f".{unused}.", 1): s for k, s in block.items()}
        shapes |= {"visual.head": (1280, 1024), "visual.post_norm.weight": (1280,), "visual.post_norm.bias": (1280,)}
    return shapes


def make(component: str, spec: str, folder: Path) -> Path:
    path, dtype = folder / FILES[component], DTYPES[component]
    shapes = shapes_of(component, spec)
    if path.suffix == ".pth":
        with torch.serialization.skip_data():  # leaves holes where the data would be
            torch.save({key: torch.empty(shape, dtype=dtype) for key, shape in shapes.items()}, path)
        return path
    header: dict[str, Any] = {}
    end = 0
    for key, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    return path


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def load(way: str, component: str, spec: str, folder: Path) -> dict[str, Any]:
    """Runs in a process of its own."""
    module, blocks = blueprint(component, spec)
    if component == "text_encoder":
        del module.token_embedding  # only the rows of a prompt are ever read
    target = {key: p.dtype for key, p in module.named_parameters()}
    parts = Component(component, module, blocks, CpuDevice())
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before, start = status("VmRSS"), time.perf_counter()
    if way == "wanvram":
        parts.load_host(open_checkpoint(folder, component))
        kept: Any = parts
    elif way == "plain":
        path = folder / FILES[component]
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        kept = {key: state[key].to(dtype) for key, dtype in target.items()}
    else:
        kept = _mapped(folder / FILES[component], target)
    seconds = time.perf_counter() - start
    assert kept is not None
    return {
        "seconds": round(seconds, 2),
        "peak_rss_bytes": status("VmHWM") - before,
        "weight_bytes": parts.weight_bytes,
    }


def _mapped(path: Path, target: dict[str, torch.dtype]) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        with safe_open(str(path), "pt") as file:
            return {key: file.get_tensor(key).to(dtype, copy=True) for key, dtype in target.items()}
    state = torch.load(path, weights_only=True, mmap=True)
    return {key: state[key].to(dtype, copy=True) for key, dtype in target.items()}


def _in_a_process(way: str, component: str, spec: str, path: Path) -> dict[str, Any]:
    subprocess.run(["cat", str(path)], stdout=subprocess.DEVNULL, check=True)
    command = [sys.executable, __file__, component, "--dit", spec, "--child", way, "--folder", str(path.parent)]
    return dict(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))


def measure(component: str, spec: str, base: Path, repeat: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="wanvram-loading-", dir=base))
    try:
        path = make(component, spec, folder)
        print(f"{component} {spec}: {path.name}, {human(path.stat().st_size)}", file=sys.stderr, flush=True)
        result: dict[str, Any] = {"component": component, "model": spec, "file_bytes": path.stat().st_size}
        largest = max(torch.Size(shape).numel() for shape in loaded_shapes(component, spec))
        for way in WAYS:
            runs = [_in_a_process(way, component, spec, path) for _ in range(repeat)]
            result[way] = {
                "seconds": min(run["seconds"] for run in runs),
                "all_seconds": [run["seconds"] for run in runs],
                "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
            }
            print(f"  {way}: {result[way]}", file=sys.stderr, flush=True)
        result["weight_bytes"] = runs[0]["weight_bytes"]
        result["bound_bytes"] = result["weight_bytes"] + largest * DTYPES[component].itemsize
        result["within_bound"] = result["wanvram"]["peak_rss_bytes"] <= result["bound_bytes"]
        return result
    finally:
        shutil.rmtree(folder)


def loaded_shapes(component: str, spec: str) -> list[tuple[int, ...]]:
    module, _ = blueprint(component, spec)
    return [tuple(p.shape) for key, p in module.named_parameters() if key != "token_embedding.weight"]


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| component | file | weights | bound | wanvram | mapped | plain | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        peaks = [human(r[way]["peak_rss_bytes"]) for way in ("wanvram", "mapped", "plain")]
        times = " / ".join(f"{r[way]['seconds']:.1f}" for way in ("wanvram", "mapped", "plain"))
        sizes = [human(r[name]) for name in ("file_bytes", "weight_bytes", "bound_bytes")]
        lines.append(f"| {' | '.join([r['component'] + ' ' + r['model'], *sizes, *peaks, times])} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("components", nargs="*", help=f"some of {', '.join(FILES)} (default: all)")
    parser.add_argument("--dit", default="t2v-1.3B", help="which transformer (default: t2v-1.3B)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files are made")
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/loading-{datetime.date.today()}.json"))
    parser.add_argument("--repeat", type=int, default=3, help="runs of each way; the fastest and the highest count")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(load(args.child, args.components[0], args.dit, args.folder)))
        return 0
    names = args.components or list(FILES)
    results = [measure(name, SPECS.get(name, args.dit), args.folder, args.repeat) for name in names]
    machine = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
    args.out.write_text(json.dumps({"schema": 1, "machine": machine, "results": results}, indent=1) + "\n")
    print(table(results))
    print(f"Wrote {args.out}")
    return 0 if all(result["within_bound"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
