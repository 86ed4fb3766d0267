"""State dicts saved by torch.save: where in the file each tensor lies, so that they are read like any other file's."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanvram.errors import CheckpointError
from wanvram.weights.sources import FileSource, Stored, check_file, opened

__all__ = ["TorchFileSource"]


class TorchFileSource(FileSource):
    """A state dict saved by torch.save. Only tensors are unpickled; anything that would run code is refused.

    torch maps the file; from the mapping follows where in the file each tensor lies, and then the mapping is dropped.
    """

    def __init__(self, path: Path) -> None:
        tensors = _load_state_dict(path)
        super().__init__({**tensors, **_located(path, tensors)}, str(path))


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
    if not isinstance(content, dict) or not all(_is_plain(value) for value in content.values()):
        raise CheckpointError(f"{path} does not hold a state dict: expected a mapping from names to plain tensors")
    return content


def _is_plain(value: object) -> bool:
    """Dense numbers: neither sparse, nor quantised, nor without data (meta)."""
    if not isinstance(value, Tensor) or value.is_quantized:
        return False
    return bool(value.device.type == "cpu" and value.layout == torch.strided)


def _located(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """The tensors whose bytes are found in the file. Empty if any first bytes differ: the file's byte order is another."""
    found: dict[str, Stored] = {}
    maps = _mappings(path)
    with opened(path) as file:
        for key, tensor in tensors.items():
            if not tensor.is_contiguous():
                continue
            start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
            offset = next((start - low + at for low, high, at in maps if low <= start and start + size <= high), None)
            if offset is None:
                continue
            file.seek(offset)
            if file.read(min(size, 64)) != bytes(tensor.reshape(-1).view(torch.uint8)[:64].numpy()):
                return {}
            found[key] = Stored(path, offset, tensor.dtype, tuple(tensor.shape))
    return found


def _mappings(path: Path) -> list[tuple[int, int, int]]:
    """(first address, end, offset in the file) of each mapping of `path`; none where there is no /proc."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    result = []
    for fields in (line.split(None, 5) for line in lines):
        if len(fields) == 6 and fields[5] == str(path.resolve()):
            low, high = (int(address, 16) for address in fields[0].split("-"))
            result.append((low, high, int(fields[2], 16)))
    return result
