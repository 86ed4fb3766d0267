"""Where weights come from: files are memory-mapped and copied one tensor at a time into storage the caller owns.

Host memory in use beyond the mapping (page cache, which the system takes back when it needs it) is at most one tensor,
the one being converted.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wanvram.errors import CheckpointError

__all__ = [
    "FilteredSource",
    "MappingSource",
    "SafetensorsSource",
    "TensorSource",
    "TorchFileSource",
    "check_keys",
]

Shape = tuple[int, ...]


class TensorSource(Protocol):
    """Named tensors that can be written into given storage. `fill` converts to the destination's dtype."""

    def keys(self) -> list[str]: ...

    def shape(self, key: str) -> Shape: ...

    def fill(self, key: str, dest: Tensor) -> None: ...

    def rows(self, key: str, indices: Sequence[int]) -> Tensor:
        """The named rows of a matrix as a host tensor: a lookup that reads nothing else of a large table."""
        ...

    def close(self) -> None: ...


def check_keys(
    expected: Mapping[str, Sequence[int]], source: TensorSource, what: str, *, ignored: Iterable[str] = ()
) -> None:
    """CheckpointError unless `source` holds exactly `expected` (and perhaps some `ignored`), in these shapes."""
    present = source.keys()
    unexpected = sorted(set(present) - set(expected) - set(ignored))
    missing = sorted(set(expected) - set(present))
    wrong = [
        f"{key} {list(source.shape(key))} instead of {list(expected[key])}"
        for key in sorted(set(expected) & set(present))
        if source.shape(key) != tuple(expected[key])
    ]
    problems = [
        f"{len(names)} {label}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the weights are not those of {what}, which has {len(expected)} tensors: {'; '.join(problems)}"
        )


def check_file(path: Path, expected: str) -> bytes:
    """The first 20 bytes. CheckpointError unless `path` is a file with content that is not a Git LFS pointer."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; expected {expected}")
    try:
        with path.open("rb") as file:
            start = file.read(20)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); expected {expected}") from error
    if not start:
        raise CheckpointError(f"{path} is empty; expected {expected}")
    if start.startswith(b"version https://git-"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`")
    return start


def _copy(key: str, tensor: Tensor, dest: Tensor, origin: str) -> None:
    if tensor.shape != dest.shape:
        raise CheckpointError(f"{origin}: {key} has shape {list(tensor.shape)} instead of {list(dest.shape)}")
    with torch.no_grad():
        # Converted on the host, so that the device never holds the file's dtype beside its own.
        dest.copy_(tensor if dest.device.type == "cpu" else tensor.to(dest.dtype))


class MappingSource:
    """Tensors already in memory."""

    def __init__(self, tensors: Mapping[str, Tensor], origin: str = "tensors in memory") -> None:
        self._tensors = dict(tensors)
        self._origin = origin

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> Shape:
        return tuple(self._get(key).shape)

    def fill(self, key: str, dest: Tensor) -> None:
        _copy(key, self._get(key), dest, self._origin)

    def rows(self, key: str, indices: Sequence[int]) -> Tensor:
        return self._get(key)[list(indices)]

    def close(self) -> None:
        self._tensors.clear()

    def _get(self, key: str) -> Tensor:
        if key not in self._tensors:
            raise CheckpointError(f"{self._origin}: there is no tensor {key}")
        return self._tensors[key]


class TorchFileSource(MappingSource):
    """A state dict saved by torch.save. Only tensors are unpickled; anything that would run code is refused."""

    def __init__(self, path: Path) -> None:
        super().__init__(_load_state_dict(path), str(path))


def _load_state_dict(path: Path) -> dict[str, Tensor]:
    # Only the zip format (torch >= 1.6) can be mapped; an older file has to be read whole.
    mapped = check_file(path, "a PyTorch state dict (.pth)").startswith(b"PK\x03\x04")
    try:
        content: Any = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused: it is damaged, or would run code when loaded; "
            "expected a PyTorch state dict (.pth) of tensors only"
        ) from error
    except Exception as error:  # a damaged pickle or archive can fail in any way
        raise CheckpointError(
            f"{path} is truncated or damaged ({path.stat().st_size:,} bytes); expected a PyTorch state dict (.pth)"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} does not hold a state dict: expected a mapping from names to tensors")
    return content


class SafetensorsSource:
    """One safetensors file, or several that together are one model."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        self._shapes: dict[str, Shape] = {}
        for path in paths:
            self._open(path)

    @classmethod
    def from_index(cls, index: Path) -> SafetensorsSource:
        """The shards named by a `*.safetensors.index.json`, which lie beside it."""
        weight_map = _read_weight_map(index)
        source = cls([index.parent / name for name in sorted(set(weight_map.values()))])
        absent = sorted(set(weight_map) - set(source.keys()))
        if absent:
            raise CheckpointError(f"{index} names {len(absent)} tensors that its files lack, first {absent[0]}")
        return source

    def keys(self) -> list[str]:
        return list(self._files)

    def shape(self, key: str) -> Shape:
        self._check(key)
        return self._shapes[key]

    def fill(self, key: str, dest: Tensor) -> None:
        self._check(key)
        _copy(key, self._files[key].get_tensor(key), dest, str(self._paths[key]))

    def rows(self, key: str, indices: Sequence[int]) -> Tensor:
        self._check(key)
        table: Tensor = self._files[key].get_tensor(key)
        return table[list(indices)]

    def close(self) -> None:
        self._files.clear()

    def _open(self, path: Path) -> None:
        check_file(path, "a safetensors file")
        try:
            file = safe_open(str(path), framework="pt", device="cpu")
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} is truncated or damaged ({path.stat().st_size:,} bytes; {error}); expected a safetensors file"
            ) from error
        for key in file.keys():  # noqa: SIM118 (a safe_open is not a mapping)
            if key in self._files:
                raise CheckpointError(f"tensor {key} is in both {self._paths[key].name} and {path}")
            self._files[key] = file
            self._paths[key] = path
            self._shapes[key] = tuple(file.get_slice(key).get_shape())

    def _check(self, key: str) -> None:
        if key not in self._files:
            raise CheckpointError(f"there is no tensor {key} in {sorted({str(p) for p in self._paths.values()})}")


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
            raise CheckpointError(f"{index} names the file {name!r}; expected safetensors files beside the index only")
    return dict(weight_map)


class FilteredSource:
    """The tensors of another source whose name starts with `prefix`, under their full names."""

    def __init__(self, source: TensorSource, prefix: str) -> None:
        self._source = source
        self._keys = [key for key in source.keys() if key.startswith(prefix)]  # noqa: SIM118 (not a mapping)

    def keys(self) -> list[str]:
        return list(self._keys)

    def shape(self, key: str) -> Shape:
        return self._source.shape(key)

    def fill(self, key: str, dest: Tensor) -> None:
        self._source.fill(key, dest)

    def rows(self, key: str, indices: Sequence[int]) -> Tensor:
        return self._source.rows(key, indices)

    def close(self) -> None:
        self._source.close()
