"""A full-size checkpoint of random numbers in the official layout (bf16 safetensors): something real to stream from disk.

    python benchmarks/random_checkpoint.py /tmp/wan-14B --task t2v-14B                            40 GB; about a minute on a fast disk
    python benchmarks/random_checkpoint.py /tmp/wan-1.3B --task t2v-1.3B --share /tmp/wan-14B     3 GB: the rest is linked

Then: python benchmarks/fit_card.py --only t2v-14B --weights /tmp/wan-14B --weights_in disk
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from checkpoints import write_tokenizer
from wanvram.tasks import TASKS
from wanvram.weights.official import DIT_FILE, T5_FILE, TOKENIZER_FILE, VAE_FILE, blueprint
from wanvram.weights.random import RandomSource

DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}


def write(path: Path, component: str, spec: str, dtype: torch.dtype) -> None:
    """One safetensors file, tensor by tensor: RAM for one tensor."""
    module, _ = blueprint(component, spec)  # type: ignore[arg-type]
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    source = RandomSource(shapes, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = torch.empty(shape, dtype=dtype)
            source.fill(name, tensor)
            file.write(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
    print(f"{path}: {path.stat().st_size / 2**30:.1f} GiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument(
        "--task", default="t2v-14B", choices=sorted(t for t in TASKS if TASKS[t].kind in ("t2v", "t2i"))
    )
    parser.add_argument("--share", type=Path, help="a checkpoint made before, whose text encoder and VAE are linked")
    args = parser.parse_args()
    directory: Path = args.directory
    write(directory / DIT_FILE, "dit", TASKS[args.task].dit, torch.bfloat16)
    parts = ((T5_FILE, "text_encoder", "umt5-xxl", torch.bfloat16), (VAE_FILE, "vae", "wan2.1", torch.float32))
    for file, component, spec, dtype in parts:
        path = Path(file).with_suffix(".safetensors")
        if args.share:
            (directory / path).hardlink_to(args.share / path)
        else:
            write(directory / path, component, spec, dtype)
    (directory / TOKENIZER_FILE).parent.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory / TOKENIZER_FILE)


if __name__ == "__main__":
    main()
