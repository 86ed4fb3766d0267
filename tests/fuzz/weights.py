"""Checkpoint folders of every layout with one to three damages: bytes, headers, archives, names, kinds of files."""

from __future__ import annotations

import json
import os
import random
import shutil
import zipfile
from pathlib import Path

from checkpoints import TINY_SIZE, tiny_models
from fuzz.judge import Trial, command
from fuzz.mutations import mutated
from fuzz.places import ODD_NAMES, odd_kind, write_odd

__all__ = ["try_checkpoint"]

TASKS = {"sharded": "vace-1.3B", "image": "i2v-14B"}


def try_checkpoint(rng: random.Random, sources: Path, now: Path) -> list[Trial]:
    source = rng.choice(sorted((sources / "checkpoints").iterdir()))
    folder = now / "ckpt"
    shutil.copytree(source, folder, copy_function=os.link)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        if files:
            _damage(rng.choice(files), rng)
    task = TASKS.get(source.name, rng.choice(["t2v-1.3B", "t2v-1.3B", "t2i-14B", "i2v-14B"]))
    generate = [
        "generate",
        "--ckpt_dir",
        str(folder),
        "--task",
        task,
        "--device",
        rng.choice(["cpu", "cpu", "simulated"]),
    ]
    generate += [
        "--size",
        TINY_SIZE,
        "--frame_num",
        "1",
        "--sample_steps",
        "1",
        "--prompt",
        "a cat",
        "-o",
        str(now / "video"),
    ]
    generate += ["--image", str(sources / "media/a.png")] if task == "i2v-14B" else []
    converted = ["convert", str(folder), "--precision", rng.choice(["bf16", "fp16", "fp8"]), "-o", str(now / "out")]
    label, trial = command(generate)

    def small() -> list[str]:
        with tiny_models():
            return trial()

    return [(label, small), command(converted if rng.random() < 0.8 else [*converted, "--json", "--verify"])]


def _damage(path: Path, rng: random.Random) -> None:
    how = rng.random()
    if how < 0.06:
        write_odd(path, odd_kind(rng))
    elif how < 0.1:
        path.unlink()
    elif how < 0.15:
        _renamed(path, rng)
    elif how < 0.2:
        others = sorted(p for p in path.parent.iterdir() if p.is_file() and p != path)
        if others:
            _put(path, rng.choice(others).read_bytes())
    elif path.suffix == ".safetensors" and how < 0.75:
        _put(path, _safetensors(path.read_bytes(), rng))
    elif path.suffix == ".pth" and _is_sound(path) and how < 0.8:
        _put(path, _archive(path, rng))
    else:
        _put(path, mutated(path.name, path.read_bytes(), rng))


def _put(path: Path, data: bytes) -> None:
    """Not into the file, whose bytes are those of the source, too."""
    path.unlink()
    path.write_bytes(data)


def _renamed(path: Path, rng: random.Random) -> None:
    name = rng.choice([*ODD_NAMES, *(n + path.suffix for n in ODD_NAMES)])
    try:
        path.rename(path.with_name(name))
    except OSError:  # too long
        path.unlink()


def _safetensors(whole: bytes, rng: random.Random) -> bytes:
    """Another header, or another length of it, before the same data."""
    length = int.from_bytes(whole[:8], "little")
    if not 0 < length < len(whole) or rng.random() < 0.1:
        return mutated("x", whole, rng)
    header, data = whole[8 : 8 + length], whole[8 + length :]
    how = rng.random()
    if how < 0.15:
        wrong = rng.choice([0, 1, length - 1, length + 1, len(whole), 1 << 27, 1 << 40, (1 << 64) - 1])
        return wrong.to_bytes(8, "little") + header + data
    if how < 0.25:
        return whole[: rng.randrange(len(whole))]
    header = _entries(header, rng) if how < 0.5 else mutated("header.json", header, rng)
    return len(header).to_bytes(8, "little") + header + data


def _entries(header: bytes, rng: random.Random) -> bytes:
    """One tensor described otherwise."""
    try:
        content = json.loads(header)
        key = rng.choice([k for k in content if k != "__metadata__"])
        entry = content[key]
        entry["dtype"], entry["shape"], entry["data_offsets"]
    except (ValueError, LookupError, TypeError):
        return header[:-1]
    shapes = [
        [],
        [0],
        [1],
        [-1],
        [1 << 62, 1 << 62],
        [1] * 300,
        entry["shape"][::-1],
        [*entry["shape"], 1],
        "x",
        [1.5],
        [True],
        None,
    ]
    offsets = [[0, 0], [5, 1], [-4, 0], [0, 1 << 62], [1, 2, 3], [], [0], "x", None, [0.0, 4.0], [1, 5]]
    dtypes = [
        "F32",
        "F16",
        "BF16",
        "F64",
        "I64",
        "BOOL",
        "U8",
        "F8_E4M3",
        "F8_E5M2",
        "F4",
        "C64",
        "",
        "\x1b[31m",
        None,
        7,
        ["F32"],
    ]
    what = rng.random()
    if what < 0.3:
        entry["shape"] = rng.choice(shapes)
    elif what < 0.5:
        entry["data_offsets"] = rng.choice(offsets)
    elif what < 0.7:
        entry["dtype"] = rng.choice(dtypes)
    elif what < 0.85:
        content[rng.choice([*ODD_NAMES, "scaled_fp8", key + ".lora_A.weight", "__metadata__"])] = content.pop(key)
    else:
        content["__metadata__"] = rng.choice([None, [], {"format": 7}, {"format": "tf"}, {"a": "x" * 100_000}, "x"])
    return json.dumps(content).encode()


def _is_sound(path: Path) -> bool:
    """An archive that can be packed again: an earlier damage of this input leaves some that cannot."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # whatever a damaged archive makes of the reader
        return False


def _archive(path: Path, rng: random.Random) -> bytes:
    """The members of a state dict again: one changed, compressed, left out, twice, or under another name."""
    target = path.with_name("repacked")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        names = old.namelist()
        pickles = [n for n in names if n.endswith(".pkl")] if rng.random() < 0.5 else []
        chosen = rng.choice(pickles or names or [""])
        how = rng.choice(["bytes", "bytes", "bytes", "deflate", "drop", "twice", "rename", "nothing"])
        for name in names:
            data, kind = old.read(name), zipfile.ZIP_STORED
            if name == chosen:
                data = mutated("x", data, rng) if how == "bytes" else data
                kind = zipfile.ZIP_DEFLATED if how == "deflate" else kind
                name = rng.choice(["../x", "/x", "archive/../data.pkl", name + "x"]) if how == "rename" else name
            if not (name == chosen and how == "drop"):
                new.writestr(name, data, kind)
    data = target.read_bytes()
    target.unlink()
    return mutated("x", data, rng) if how == "nothing" else data
