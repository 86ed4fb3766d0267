"""The files that people give by mistake, good ones beside them: pictures, videos, texts, checkpoints."""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np
import yaml
from PIL import Image

from checkpoints import write_download
from wanvram.weights.official import CLIP_FILE, DIT_FILE, T5_FILE, TOKENIZER_FILE, VAE_FILE


def write_picture(path: Path, width: int = 80, height: int = 80) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_header(path: Path, width: int, height: int) -> None:
    """A PNG that states its size and has next to no pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0"))]
    parts = [
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in (*chunks, (b"IEND", b""))
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def write_video(path: Path, frames: int = 5, width: int = 96, height: int = 64) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            pixels: Any = np.full((height, width, 3), 40 * index % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def write_media(folder: Path) -> None:
    write_picture(folder / "good.png")
    write_video(folder / "good.mp4")
    (folder / "text.png").write_text("a picture of a cat")
    (folder / "text.mp4").write_text("a video of a cat")
    (folder / "empty.png").touch()
    (folder / "empty.mp4").touch()
    (folder / "folder.png").mkdir()
    (folder / "folder.mp4").mkdir()
    write_picture(folder / "one.png", 1, 1)
    write_header(folder / "giant.png", 20000, 20000)
    write_picture(folder / "large.png", 1000, 999)
    write_picture(folder / "thin.png", 32, 40000)
    write_picture(folder / "wide.png", 40000, 32)
    shutil.copy(folder / "good.mp4", folder / "video.png")
    shutil.copy(folder / "good.png", folder / "picture.mp4")
    for name, keep in (("good.png", 0.5), ("good.mp4", 0.6)):
        data = (folder / name).read_bytes()
        (folder / f"cut{Path(name).suffix}").write_bytes(data[: int(len(data) * keep)])
    write_video(folder / "small.mp4", width=8, height=8)


def write_texts(folder: Path) -> None:
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    (folder / "no-prompts.txt").write_text(" \n\n")
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    (folder / "nul.txt").write_bytes(b"a\0b")
    (folder / "long-prompt.txt").write_text("a cat\n" + "x" * 100_000)
    (folder / "many-prompts.txt").write_text("a cat\n" * 65)
    (folder / "bad.yaml").write_text("name: [")
    (folder / "list.yaml").write_text("- a\n- b\n")
    (folder / "unknown.yaml").write_text("name: x\nrequest: {sampel_steps: 3}\n")
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    (folder / "frames.yaml").write_text(yaml.safe_dump({"name": "x", "request": {"frame_num": 4}}))
    (folder / "existing.mp4").touch()
    (folder / "sidecar.json").touch()
    (folder / "a-file").touch()


CHECKPOINTS = {"t2v": "tiny-t2v", "i2v": "tiny-i2v", "flf2v": "tiny-flf2v", "vace": "tiny-vace"}


def write_checkpoints(folder: Path) -> None:
    """A good one of each kind, and damaged copies of that for i2v, which has every file."""
    for kind, dit in CHECKPOINTS.items():
        (folder / kind).mkdir()
        write_download(folder / kind, dit, sharded=kind == "flf2v")
    for number, name in enumerate((T5_FILE, VAE_FILE, CLIP_FILE, DIT_FILE, TOKENIZER_FILE)):
        for damage in ("missing", "cut"):
            copy = folder / f"{damage}{number}"
            shutil.copytree(folder / "i2v", copy)
            os.truncate(copy / name, (copy / name).stat().st_size // 2) if damage == "cut" else (copy / name).unlink()
    shutil.copytree(folder / "flf2v", folder / "shard")
    (folder / "shard/diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    shutil.copytree(folder / "t2v", folder / "swapped")
    shutil.copy(folder / "t2v" / VAE_FILE, folder / "swapped" / T5_FILE)
    (folder / "nothing").mkdir()
