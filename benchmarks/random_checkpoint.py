"""A full-size checkpoint of random numbers in the official layout (bf16 safetensors): something real to read from disk.

    python benchmarks/random_checkpoint.py /tmp/wan-14B --task t2v-14B                            40 GB, as fast as the disk writes
    python benchmarks/random_checkpoint.py /tmp/wan-1.3B --task t2v-1.3B --share /tmp/wan-14B     3 GB: the rest is linked
    python benchmarks/random_checkpoint.py /tmp/Wan2.1-T2V-1.3B --task t2v-1.3B --as_downloaded   18 GB, as the hub gives them

--as_downloaded: the text encoder and the VAE as the .pth files that torch.save writes, the transformer in float32, as published.
The values follow weights/random.py: matrices normal with a deviation of 0.02, norms 1, biases 0. They are drawn once, 256 MiB in
bf16, and every tensor begins elsewhere in them. What is written is on the disk (fsync) when the command ends.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from checkpoints import write_tokenizer
from wanvram.tasks import TASKS
from wanvram.weights.official import DIT_FILE, T5_FILE, TOKENIZER_FILE, VAE_FILE, blueprint
from wanvram.weights.random import STD

__all__ = ["Noise", "write"]

DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}
PERIOD = 134_217_689  # values; a prime, so that no row length divides it and rows differ
PIECE_BYTES = 128 * 2**20
WRITERS = 8


class Noise:
    """The same random values again and again, as bytes of a dtype."""

    def __init__(self, period: int = PERIOD) -> None:
        drawn = torch.empty(period).normal_(0.0, STD, generator=torch.Generator().manual_seed(0))
        self._values = {torch.float32: _bytes(drawn), torch.bfloat16: _bytes(drawn.to(torch.bfloat16))}
        self._period = period

    def of(self, name: str, count: int, dtype: torch.dtype) -> Iterator[memoryview]:
        """`count` values of the tensor `name`, in pieces."""
        source = self._values[dtype]
        start = zlib.crc32(name.encode()) % self._period
        most = PIECE_BYTES // dtype.itemsize
        while count:
            length = min(count, self._period - start, most)
            yield source[start * dtype.itemsize : (start + length) * dtype.itemsize]
            count, start = count - length, (start + length) % self._period


def _bytes(values: Tensor) -> memoryview:
    return values.view(torch.uint8).numpy().data


def _pieces(name: str, shape: torch.Size, dtype: torch.dtype, noise: Noise) -> Iterator[memoryview]:
    last = name.rsplit(".", 1)[-1]
    if last == "bias":
        yield _bytes(torch.zeros(shape.numel(), dtype=dtype))
    elif last == "gamma" or (last == "weight" and len(shape) == 1):  # every 1-D weight belongs to a norm
        yield _bytes(torch.ones(shape.numel(), dtype=dtype))
    else:
        yield from noise.of(name, shape.numel(), dtype)


@dataclass(frozen=True)
class Piece:
    offset: int
    data: memoryview


def _layout(shapes: dict[str, torch.Size], dtype: torch.dtype, noise: Noise) -> Iterator[Piece]:
    """The whole file in order: the length of the header, the header, the tensors."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = shape.numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield Piece(0, memoryview(len(text).to_bytes(8, "little") + text))
    offset = 8 + len(text)
    for name, shape in shapes.items():
        for data in _pieces(name, shape, dtype, noise):
            yield Piece(offset, data)
            offset += len(data)


def write(path: Path, component: str, spec: str, dtype: torch.dtype, noise: Noise) -> None:
    """One safetensors file with every tensor of the component."""
    start = time.monotonic()
    module, _ = blueprint(component, spec)
    pieces = list(_layout({name: p.shape for name, p in module.named_parameters()}, dtype, noise))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, ThreadPoolExecutor(WRITERS) as pool:
        file.truncate(pieces[-1].offset + len(pieces[-1].data))
        list(pool.map(lambda piece: _write_at(file.fileno(), piece), pieces))
        os.fsync(file.fileno())
    size, seconds = path.stat().st_size, time.monotonic() - start
    print(f"{path}: {size / 2**30:.1f} GiB in {seconds:.1f} s, {size / seconds / 1e9:.1f} GB/s", flush=True)


def write_pth(path: Path, component: str, spec: str, dtype: torch.dtype, noise: Noise) -> None:
    """The same tensors as torch.save writes them, from as much RAM."""
    module, _ = blueprint(component, spec)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: _tensor(name, p.shape, dtype, noise) for name, p in module.named_parameters()}, path)
    print(f"{path}: {path.stat().st_size / 2**30:.1f} GiB", flush=True)


def _tensor(name: str, shape: torch.Size, dtype: torch.dtype, noise: Noise) -> Tensor:
    made, start = torch.empty(shape, dtype=dtype), 0
    into = _bytes(made.view(-1))
    for piece in _pieces(name, shape, dtype, noise):
        into[start : start + len(piece)] = piece
        start += len(piece)
    return made


def _write_at(file: int, piece: Piece) -> None:
    done = 0
    while done < len(piece.data):
        done += os.pwrite(file, piece.data[done:], piece.offset + done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument(
        "--task", default="t2v-14B", choices=sorted(t for t in TASKS if TASKS[t].kind in ("t2v", "t2i"))
    )
    parser.add_argument("--share", type=Path, help="a checkpoint made before, whose text encoder and VAE are linked")
    parser.add_argument(
        "--as_downloaded", action="store_true", help="t2v-1.3B in the formats and dtypes of the official files"
    )
    args = parser.parse_args()
    if args.as_downloaded and (args.task != "t2v-1.3B" or args.share):
        parser.error("--as_downloaded is for t2v-1.3B alone: the 14B's six files of float32 are not written")
    directory: Path = args.directory
    noise = Noise()
    dit_dtype = torch.float32 if args.as_downloaded else torch.bfloat16
    write(directory / DIT_FILE, "dit", TASKS[args.task].dit, dit_dtype, noise)
    parts = ((T5_FILE, "text_encoder", "umt5-xxl", torch.bfloat16), (VAE_FILE, "vae", "wan2.1", torch.float32))
    for file, component, spec, dtype in parts:
        path = Path(file).with_suffix(".safetensors")
        if args.as_downloaded:
            write_pth(directory / file, component, spec, dtype, noise)
        elif args.share:
            (directory / path).hardlink_to(args.share / path)
        else:
            write(directory / path, component, spec, dtype, noise)
    (directory / TOKENIZER_FILE).parent.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory / TOKENIZER_FILE)


if __name__ == "__main__":
    main()
