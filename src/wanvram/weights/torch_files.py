"""State dicts saved by torch.save: where in the file each tensor lies, so that they are read like any other file's.

An archive is looked through before torch reads it: torch.save never compresses, so a member that is compressed, or larger than
the file, is no weights but a way to fill the memory.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wanvram.errors import CheckpointError
from wanvram.input_files import whole
from wanvram.weights.sources import FileSource, check_file, shown
from wanvram.weights.stored import Stored, opened

__all__ = ["TorchFileSource"]

EXPECTED = "a PyTorch state dict (.pth)"
MAX_MEMBERS = 100_000  # one for each tensor; the largest official file has 800
MAX_PICKLE = 64 * 2**20  # names, shapes and places of the tensors: some 100 bytes each
END_BYTES = 22 + 65_535 + 76  # end of an archive with the longest comment, and its 64-bit form before it


class TorchFileSource(FileSource):
    """A state dict saved by torch.save. Only tensors are unpickled; anything that would run code is refused.

    torch maps the file; from the mapping follows where in the file each tensor lies, and then the mapping is dropped.
    """

    def __init__(self, path: Path) -> None:
        tensors = _load_state_dict(path)
        super().__init__({**tensors, **_located(path, tensors)}, str(path))


def _load_state_dict(path: Path) -> dict[str, Tensor]:
    # Only the zip format (torch >= 1.6) can be mapped; an older file has to be read whole.
    start = check_file(path, EXPECTED)
    if start[8:10] == b'{"':
        raise CheckpointError(f"{path} is a safetensors file; give it the ending .safetensors; expected {EXPECTED}")
    mapped = start.startswith(b"PK\x03\x04")
    if mapped:
        _check_archive(path)
    try:
        with warnings.catch_warnings():  # of PyTorch about what a damaged pickle holds
            warnings.simplefilter("ignore")
            content: Any = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused: it is damaged, or would run code when loaded; expected {EXPECTED} of tensors only"
        ) from error
    except Exception as error:  # a damaged pickle or archive can fail in any way
        raise _damaged(path) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a state dict: expected a mapping from names to plain tensors")
    for key, value in content.items():
        if not isinstance(key, str) or not _is_plain(value):
            kind = "" if isinstance(value, Tensor) else f" of {type(value).__name__}"
            raise CheckpointError(
                f"{path} does not hold a state dict: expected a mapping from names to plain tensors, "
                f"not the entry {shown(key)}{kind}"
            )
    return content


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or damaged ({path.stat().st_size:,} bytes); expected {EXPECTED}")


def _check_archive(path: Path) -> None:
    """CheckpointError unless every member lies in the file as it is, and their table and the pickle are of a state dict's size."""
    size = path.stat().st_size
    try:
        with opened(path) as file:
            if _entries(file, size) > MAX_MEMBERS:
                raise CheckpointError(f"{path} was refused: it has more than {MAX_MEMBERS:,} members")
            members = zipfile.ZipFile(file).infolist()
    except CheckpointError:
        raise
    except Exception as error:  # zipfile fails in many ways on a damaged table
        raise _damaged(path) from error
    for member in members:
        name = shown(member.filename)
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise CheckpointError(f"{path} was refused: its member {name} is compressed, which torch.save never does")
        if member.file_size > size or (name.endswith(".pkl") and member.file_size > MAX_PICKLE):
            raise CheckpointError(f"{path} was refused: its member {name} is said to have {member.file_size:,} bytes")
    if sum(member.file_size for member in members) > size:
        raise CheckpointError(f"{path} was refused: its members are said to be larger than its {size:,} bytes")


def _entries(file: FileIO, size: int) -> int:
    """How many members the archive's end tells of, before the table itself, of any size, is read."""
    file.seek(max(0, size - END_BYTES))
    end = file.read(END_BYTES)
    at = end.rfind(b"PK\x05\x06")
    count = int.from_bytes(end[at + 10 : at + 12], "little") if at >= 0 else 0
    wide = end.rfind(b"PK\x06\x06", 0, max(at, 0))
    return max(count, int.from_bytes(end[wide + 32 : wide + 40], "little")) if wide >= 0 else count


def _is_plain(value: object) -> bool:
    """Dense numbers: neither sparse, nested nor quantised, nor without data (meta), nor stored with a sign to be turned."""
    if not isinstance(value, Tensor) or value.is_quantized or value.is_nested or value.is_conj() or value.is_neg():
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
        if len(fields) == 6 and fields[5] == str(whole(path)):
            low, high = (int(address, 16) for address in fields[0].split("-"))
            result.append((low, high, int(fields[2], 16)))
    return result
