"""kept.safetensors of a run directory: what an unfinished run needs to go on, in one file that is whole at every moment. No torch.

A safetensors file: its metadata say what run it is and how far each video is, its tensors are the solver's. Whatever else is
found there is an InputError of one sentence: sizes are checked before anything is read, sums before anything is used.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wanvram.errors import DamagedError, InputError
from wanvram.foreign_text import shown, why
from wanvram.input_files import open_regular
from wanvram.output_files import whole_file, writing
from wanvram.strict_json import built, strict_json

__all__ = ["KEPT_NAME", "KeptRun", "KeptVideo", "read_kept_run", "read_kept_videos", "write_kept"]

KEPT_NAME = "kept.safetensors"
SCHEMA = 1
NAMES = ("latent", "corrected", "clean", "previous")  # of a solver's tensors
MAX_HEADER_BYTES = 16 * 1024 * 1024  # 64 prompts of 20,000 characters, escaped twice, have 8
MAX_TENSOR_BYTES = 1 << 30  # the longest latent, 1024 frames of 160x90, has 944 MB
MAX_VIDEOS = 4096
_META = "wanvram"  # key of the metadata


@dataclass(frozen=True)
class KeptVideo:
    """A video between two steps. number: from 0, in the order of the run. steps: made. tensors: float32 [channels, F, h, w] by name."""

    number: int
    steps: int
    tensors: Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class _Entry:
    """A video as the metadata have it; sums: zlib.crc32 of each tensor's bytes."""

    number: int
    steps: int
    sums: dict[str, Any]


@dataclass(frozen=True)
class KeptRun:
    """What the file says without its tensors. folder: in which the command was given, where relative paths begin. made_of: what the
    videos depend on, by its name for people. prompts: as they were extended; empty before that. save_file: as --save_file gave it.
    step_seconds: a step's, measured.
    """

    folder: str
    save_file: str | None
    made_of: dict[str, Any]
    prompts: tuple[str, ...] = ()
    step_seconds: float | None = None
    videos: tuple[_Entry, ...] = field(default=())
    schema: int = SCHEMA

    def steps(self) -> dict[int, int]:
        """Steps made, by the number of the video; of those that are begun."""
        return {video.number: video.steps for video in self.videos}


def write_kept(path: Path, run: KeptRun, videos: Sequence[KeptVideo]) -> None:
    """The whole file or none of it, also when the power fails. Raises OutputError naming the path."""
    header: dict[str, Any] = {}
    entries, arrays, end = [], [], 0
    for video in videos:
        sums = {}
        for name, tensor in video.tensors.items():
            array = np.ascontiguousarray(tensor, dtype="<f4")
            place = [end, end := end + array.nbytes]
            header[f"{video.number}.{name}"] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": place}
            sums[name] = zlib.crc32(array.data.cast("B"))
            arrays.append(array)
        entries.append({"number": video.number, "steps": video.steps, "sums": sums})
    told = asdict(run) | {"videos": entries}
    header = {"__metadata__": {_META: json.dumps(told, ensure_ascii=False)}} | header
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with writing(path), whole_file(path) as beside, beside.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            file.write(array.data.cast("B"))
        file.flush()
        os.fsync(file.fileno())


def read_kept_run(path: Path) -> KeptRun:
    """Raises InputError naming the path."""
    with _usable(path):
        return _parsed(path)[0]


def read_kept_videos(path: Path, shape: tuple[int, ...]) -> list[KeptVideo]:
    """Every video that is begun, whose latents must have that shape. Raises InputError naming the path."""
    with _usable(path):
        run, places, start = _parsed(path)
        with open_regular(path) as file:
            file.seek(start)
            return [_video(file.read, entry, places, shape) for entry in run.videos]


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    """What is wrong inside is an InputError naming the path."""
    try:
        yield
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        said = f"{why(error)}. Without that file the run begins again: remove it"
        raise InputError(f"{shown(path)} is damaged or not of this program: {said}") from error


def _parsed(path: Path) -> tuple[KeptRun, dict[str, tuple[int, ...]], int]:
    """The metadata, every tensor's shape in the order of the file, and where the first one begins."""
    size = path.stat().st_size
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise DamagedError(f"a header of {length:,} bytes in a file of {size:,}")
        header = strict_json(file.read(length).decode("utf-8"))
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        raise DamagedError("it has no metadata")
    told = header.pop("__metadata__").get(_META)
    if not isinstance(told, str):
        raise DamagedError("its metadata are of another program")
    data = strict_json(told)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise DamagedError(f"it is not of schema {SCHEMA}")
    run: KeptRun = built(KeptRun, data)
    shapes = {key: _shape(key, entry) for key, entry in header.items()}
    _check_places(header, shapes, size - 8 - length)
    _check_videos(run, shapes)
    return run, shapes, 8 + length


def _shape(key: str, entry: Any) -> tuple[int, ...]:
    if not isinstance(entry, dict) or entry.get("dtype") != "F32":
        raise DamagedError(f"{shown(key, 60)} is no float32 tensor")
    shape = entry.get("shape")
    sizes = shape if isinstance(shape, list) else []
    whole = all(type(n) is int and 1 <= n <= MAX_TENSOR_BYTES for n in sizes)
    if not whole or len(sizes) != 4 or math.prod(sizes) * 4 > MAX_TENSOR_BYTES:
        raise DamagedError(f"the shape of {shown(key, 60)} is not that of a latent")
    return tuple(sizes)


def _check_places(header: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], size: int) -> None:
    """Back to back, in the header's order, up to the end of the file."""
    end = 0
    for key, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        if header[key].get("data_offsets") != [begin, end]:
            raise DamagedError(f"{shown(key, 60)} is not where it belongs")
    if end != size:
        raise DamagedError(f"it has {size:,} bytes of tensors, its header tells of {end:,}")


def _check_videos(run: KeptRun, shapes: Mapping[str, tuple[int, ...]]) -> None:
    numbers = [video.number for video in run.videos]
    if len(set(numbers)) != len(numbers) or len(numbers) > MAX_VIDEOS or not all(0 <= n < MAX_VIDEOS for n in numbers):
        raise DamagedError("its videos are not numbered")
    for video in run.videos:
        if video.steps < 1 or not video.sums or not set(video.sums) <= set(NAMES):
            raise DamagedError(f"video {video.number} is at no step")
    if list(shapes) != [f"{video.number}.{name}" for video in run.videos for name in video.sums]:
        raise DamagedError("its tensors are not those of its videos")


def _video(read: Any, entry: _Entry, places: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]) -> KeptVideo:
    tensors = {}
    for name, expected in entry.sums.items():
        key = f"{entry.number}.{name}"
        if places[key] != shape:
            raise DamagedError(f"{key} has the shape {list(places[key])}, the latent of this run {list(shape)}")
        data = bytearray(read(4 * math.prod(shape)))
        if len(data) != 4 * math.prod(shape) or zlib.crc32(data) != expected:
            raise DamagedError(f"the bytes of {key} are not those that were written")
        tensors[name] = np.frombuffer(data, dtype="<f4").reshape(shape)
    return KeptVideo(entry.number, entry.steps, tensors)
