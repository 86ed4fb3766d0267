"""Where weights come from: files read one tensor at a time, straight into storage the caller owns.

Nothing stays mapped: the pages of a mapping count as this process's memory. While a component is loaded the host holds
what the caller allocated and one piece (4 MiB) per reading thread, also where the file's dtype differs from the destination's.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from wanvram.errors import CheckpointError
from wanvram.kernels.scaled_products import SCALE_SUFFIX
from wanvram.weights.stored import Shape, Stored, in_memory_order, memory_order, opened

__all__ = [
    "DTYPES",
    "MANIFEST",
    "MANIFEST_SCHEMA",
    "ConvertedSource",
    "FileSource",
    "SafetensorsSource",
    "TensorSource",
    "check_file",
    "check_keys",
    "check_shape",
    "read_manifest",
    "shown",
]

MAX_HEADER_BYTES = 100 * 2**20  # the limit of the safetensors library itself
MAX_DIMENSIONS = 64  # as many as torch can view
MAX_DIGITS = 20  # of a number in a header; 2^63 has 19
MANIFEST = "wanvram.json"  # of a folder written by `wanvram convert`
MANIFEST_SCHEMA = 1
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorSource(Protocol):
    """Named tensors that can be written into given storage. `fill` converts to the destination's dtype."""

    def keys(self) -> list[str]: ...

    def files(self) -> list[Path]:
        """In which the tensors lie."""

    def shape(self, key: str) -> Shape: ...

    def fill(self, key: str, dest: Tensor) -> None: ...

    def fill_rows(self, key: str, dest: Tensor, first: int) -> None:
        """As many rows of the tensor (along its first axis) as `dest` has, from `first` on; nothing else is read."""

    def rows(self, key: str, indices: Sequence[int]) -> Tensor:
        """The named rows of a matrix as a host tensor: a lookup that reads nothing else of a large table."""


def check_keys(
    expected: Mapping[str, Sequence[int]], source: TensorSource, what: str, *, ignored: Iterable[str] = ()
) -> None:
    """CheckpointError unless `source` holds exactly `expected` (and perhaps some `ignored`), in these shapes."""
    present = source.keys()
    unexpected = sorted(set(present) - set(expected) - set(ignored))
    missing = sorted(set(expected) - set(present))
    wrong = [
        f"{shown(key)} {shown(list(source.shape(key)))} instead of {list(expected[key])}"
        for key in sorted(set(expected) & set(present))
        if source.shape(key) != tuple(expected[key])
    ]
    problems = [
        f"{len(names)} {label}: {', '.join(map(shown, names[:3]))}{', ...' if len(names) > 3 else ''}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the weights are not those of {what}, which has {len(expected)} tensors: {'; '.join(problems)}"
        )


def shown(value: object) -> str:
    """A name or value out of a file as a sentence may hold it: one line of at most 120 printable characters."""
    text = value if isinstance(value, str) and value.isprintable() else ascii(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text):,} characters)"


def check_file(path: Path, expected: str) -> bytes:
    """The first 20 bytes. CheckpointError unless `path` is a file with content, and that no stand-in for the file."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'no file'}; expected {expected}")
        with path.open("rb") as file:
            start = file.read(20)
    except FileNotFoundError as error:
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a link to {os.readlink(path)}, which does not exist; expected {expected}: download it again"
            ) from error
        raise CheckpointError(f"{path} does not exist; expected {expected}") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL in it
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{shown(str(path))} cannot be read ({reason}); expected {expected}") from error
    if not start:
        raise CheckpointError(f"{path} is empty; expected {expected}")
    if start.startswith(b"version https://git-"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`")
    if start.lstrip()[:5].lower() in (b"<!doc", b"<html", b"<?xml"):
        raise CheckpointError(f"{path} is a web page, not the file itself: download it again; expected {expected}")
    if start.startswith(b"GGUF"):
        raise CheckpointError(f"{path} is a GGUF file, which is not read; expected {expected}")
    return start


def _copy(key: str, tensor: Tensor, dest: Tensor, origin: str) -> None:
    check_shape(key, tensor.shape, dest, origin)
    with torch.no_grad():
        if dest.device.type == "cpu":
            dest.copy_(tensor)
        else:
            dest.permute(memory_order(dest)).copy_(in_memory_order(dest, tensor))


def check_shape(key: str, shape: Sequence[int], dest: Tensor, origin: str) -> None:
    """CheckpointError where the tensor of a source has another shape than what it is written into."""
    if tuple(shape) != tuple(dest.shape):
        raise CheckpointError(f"{origin}: {shown(key)} has shape {list(shape)} instead of {list(dest.shape)}")


class FileSource:
    """Tensors of files, read when asked for. Those that are not plain bytes of a file are held as tensors."""

    def __init__(self, tensors: Mapping[str, Stored | Tensor], origin: str) -> None:
        self._tensors = dict(tensors)
        self._origin = origin

    def keys(self) -> list[str]:
        return list(self._tensors)

    def files(self) -> list[Path]:
        return sorted({stored.path for stored in self._tensors.values() if isinstance(stored, Stored)})

    def shape(self, key: str) -> Shape:
        return tuple(self._get(key).shape)

    def stored(self, key: str) -> Stored | None:
        """Where it lies; None for a tensor that is not plain bytes of a file."""
        stored = self._get(key)
        return stored if isinstance(stored, Stored) else None

    def fill(self, key: str, dest: Tensor) -> None:
        stored = self._get(key)
        if isinstance(stored, Tensor):
            _copy(key, stored, dest, self._origin)
            return
        check_shape(key, stored.shape, dest, str(stored.path))
        stored.fill(dest)

    def fill_rows(self, key: str, dest: Tensor, first: int) -> None:
        stored, last = self._get(key), first + dest.shape[0] - 1
        _check_rows(key, (first, last), stored.shape[0], self._origin)
        if isinstance(stored, Tensor):
            _copy(key, stored[first : last + 1], dest, self._origin)
            return
        check_shape(key, (dest.shape[0], *stored.shape[1:]), dest, str(stored.path))
        stored.fill(dest, first)

    def rows(self, key: str, indices: Sequence[int]) -> Tensor:
        stored = self._get(key)
        _check_rows(key, indices, stored.shape[0], self._origin)
        if isinstance(stored, Tensor):
            return stored[list(indices)]
        result = torch.empty((len(indices), *stored.shape[1:]), dtype=stored.dtype)
        for number, index in enumerate(indices):
            stored.read(result[number], index)
        scale = stored.scales()
        return result if scale is None else result.float() * scale[list(indices)]

    def _get(self, key: str) -> Stored | Tensor:
        if key not in self._tensors:
            raise CheckpointError(f"there is no tensor {key} in {self._origin}")
        return self._tensors[key]


def _check_rows(key: str, indices: Sequence[int], count: int, origin: str) -> None:
    outside = [index for index in indices if not 0 <= index < count]
    if outside:
        raise CheckpointError(f"{origin}: {key} has {count} rows; row {outside[0]} was asked for")


class SafetensorsSource(FileSource):
    """One safetensors file, or several that together are one model."""

    def __init__(self, paths: Sequence[Path]) -> None:
        tensors: dict[str, Stored] = {}
        for path in paths:
            for key, stored in _read_header(path).items():
                if key in tensors:
                    raise CheckpointError(f"tensor {shown(key)} is in both {tensors[key].path.name} and {path}")
                tensors[key] = stored
        super().__init__(tensors, ", ".join(str(path) for path in paths))

    @classmethod
    def from_index(cls, index: Path) -> SafetensorsSource:
        """The shards named by a `*.safetensors.index.json`, which lie beside it."""
        weight_map = _read_weight_map(index)
        source = cls([index.parent / name for name in sorted(set(weight_map.values()))])
        absent = sorted(set(weight_map) - set(source.keys()))
        if absent:
            raise CheckpointError(f"{index} names {len(absent)} tensors that its files lack, first {shown(absent[0])}")
        return source


def _read_header(path: Path) -> dict[str, Stored]:
    """Name -> place of every tensor of a safetensors file, whose size must be what the header says.

    Format: 8 bytes little-endian header size, JSON header with offsets into the rest, tensors back to back.
    """
    check_file(path, "a safetensors file")
    size = path.stat().st_size
    with opened(path) as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"a header of {length:,} bytes")
            header = _header_json(file.read(length))
            header.pop("__metadata__", None)
            stored = {key: _stored(path, 8 + length, key, entry) for key, entry in header.items()}
            end = 8 + length
            for entry in sorted(stored.values(), key=lambda s: (s.offset, s.nbytes)):
                if entry.offset != end:
                    raise ValueError(f"a gap or overlap at byte {end:,}")
                end += entry.nbytes
            if end != size:
                raise ValueError(f"its header tells of {end:,}")
        except ValueError as error:
            raise CheckpointError(
                f"{path} is truncated or damaged ({size:,} bytes; {error}); expected a safetensors file"
            ) from error
    return stored


def _header_json(text: bytes) -> dict[str, Any]:
    """Raises ValueError, in words of its own."""
    try:
        header = json.loads(text.decode("utf-8"), parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise ValueError("a header that is no JSON") from error
    if not isinstance(header, dict):
        raise ValueError("a header that is no table of tensors")
    return header


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError("a number of too many digits")
    return int(digits)


def _stored(path: Path, data_start: int, key: str, entry: Any) -> Stored:
    """Raises ValueError, in words of its own, for an entry that no correct file has."""
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        known = dtype in DTYPES
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"no dtype, shape and two data_offsets for {shown(key)}") from error
    if not known:
        raise ValueError(f"the unknown dtype {shown(dtype)}")
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError("a shape or offset that is not a natural number")
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{len(shape):,} dimensions for {shown(key)}")
    stored = Stored(path, data_start + start, DTYPES[dtype], shape)
    if stored.nbytes != end - start:
        raise ValueError(f"{end - start:,} bytes for the shape {shown(list(shape))} of {dtype}")
    return stored


class ConvertedSource(SafetensorsSource):
    """One component of a folder written by `wanvram convert`: fp8 matrices come back multiplied by their scales."""

    def __init__(self, ckpt_dir: Path, component: str) -> None:
        files = read_manifest(ckpt_dir)["files"]
        paths = [ckpt_dir / name for name, entry in sorted(files.items()) if entry["component"] == component]
        if not paths:
            present = sorted({entry["component"] for entry in files.values()})
            raise CheckpointError(f"{ckpt_dir} was converted without {component}; it holds {', '.join(present)}")
        for path in paths:
            _check_size(path, files[path.relative_to(ckpt_dir).as_posix()]["bytes"])
        super().__init__(paths)
        for key in [key for key in self._tensors if key.endswith(SCALE_SUFFIX)]:
            matrix = key.removesuffix(SCALE_SUFFIX)
            scale, stored = self._tensors.pop(key), self._tensors.get(matrix)
            assert isinstance(scale, Stored)  # as every tensor of a safetensors file
            if not isinstance(stored, Stored) or scale.dtype != torch.float32 or scale.shape != stored.shape[:1]:
                raise CheckpointError(f"{ckpt_dir}: {key} is not one float32 for each row of {matrix}")
            self._tensors[matrix] = replace(stored, scale=scale)


def _check_size(path: Path, expected: int) -> None:
    check_file(path, f"{expected:,} bytes written by wanvram convert")
    size = path.stat().st_size
    if size != expected:
        raise CheckpointError(f"{path} is truncated or damaged: {size:,} bytes; expected {expected:,}")


def read_manifest(ckpt_dir: Path) -> dict[str, Any]:
    """The manifest of a finished conversion. CheckpointError if it is damaged, or the conversion was interrupted."""
    path = ckpt_dir / MANIFEST
    check_file(path, "the manifest of a converted checkpoint")
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise ValueError("too large")
        manifest = json.loads(path.read_text(encoding="utf-8"), parse_int=_integer)
        known = manifest["schema"] == MANIFEST_SCHEMA
        for name, entry in manifest["files"].items() if known else ():
            # A name with other folders in it could reach any file of the machine.
            if not re.fullmatch(r"[a-z_]+/\w[\w.\-]*", name) or not isinstance(entry["component"], str):
                raise ValueError(f"the file {shown(name)}")
            if type(entry["bytes"]) is not int or not isinstance(entry["sha256"], str):
                raise ValueError(f"the entry of {shown(name)}")
        complete = known and manifest["complete"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        ours = type(error) is ValueError  # not one of JSON's or of a text's
        said = str(error) if ours else "it is no manifest of a conversion"
        raise CheckpointError(
            f"{path} is damaged ({said}); convert the checkpoint again into another folder"
        ) from error
    if not known:
        raise CheckpointError(
            f"{path} has the schema {shown(manifest['schema'])}; this wanvram reads {MANIFEST_SCHEMA}"
        )
    if not complete:
        raise CheckpointError(f"the conversion into {ckpt_dir} was interrupted; run the same `wanvram convert` again")
    return dict(manifest)


def _read_weight_map(index: Path) -> dict[str, str]:
    check_file(index, "the index of a sharded safetensors checkpoint")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f'{index} is damaged; expected JSON with an object "weight_map"') from error
    for name in names:
        # A name with a folder in it could reach any file of the machine.
        if not isinstance(name, str) or not name.endswith(".safetensors") or set(name) & set("/\\:\0"):
            raise CheckpointError(
                f"{index} names the file {shown(name)}; expected safetensors files beside the index only"
            )
    return dict(weight_map)
