"""Rewrites a checkpoint in the precision it is run in: one safetensors file per block, one for the rest of a component.

A file is written under another name, hashed and renamed; the manifest then lists it, so an interrupted conversion goes
on after its last whole file. Host memory: one tensor in its new dtype, one in float32 where fp8 is made of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wanvram.errors import CheckpointError, InputError, OutputError
from wanvram.folder_lock import LOCK_FILE, alone_in
from wanvram.input_files import whole
from wanvram.kernels.scaled_products import FP8, LARGEST, SCALE_SUFFIX, row_scales, to_fp8
from wanvram.output_files import writing
from wanvram.record import write_atomically
from wanvram.specs import DIT
from wanvram.units import human
from wanvram.weights.official import (
    COMPONENTS,
    blueprint,
    check_model,
    identify,
    layout,
    open_checkpoint,
    spec_beside,
    tokenizer_file,
)
from wanvram.weights.recognise import explain
from wanvram.weights.sources import DTYPES, MANIFEST, MANIFEST_SCHEMA, TensorSource
from wanvram.weights.tokenizer import try_tokenizer

__all__ = ["Conversion", "convert", "free_bytes", "verify"]

CHUNK_BYTES = 16 * 2**20
# What a tokenizer of transformers is read from; tokenizer.json alone would do for wanvram.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")
TOKENIZER_FOLDER = "tokenizer"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_Opened = Callable[[str], TensorSource]  # a component of the source, opened once


@dataclass(frozen=True)
class Conversion:
    """What to convert. precision: bf16, fp16 or fp8 (bf16 with the matrices of the dit's blocks in float8_e4m3fn).

    dit: the transformer expected, a key of specs.DIT; None: recognised by its tensors. components: None is all that the
    transformer needs. fp8_text_encoder: also the matrices of the text encoder's blocks.
    """

    source: Path
    precision: str
    dit: str | None = None
    components: tuple[str, ...] | None = None
    fp8_text_encoder: bool = False

    def uses_fp8(self, component: str) -> bool:
        if self.precision != "fp8":
            return False
        return component == "dit" or (component == "text_encoder" and self.fp8_text_encoder)


@dataclass(frozen=True)
class _WeightFile:
    """One file to write: tensors in the order of the file, each with its dtype there."""

    component: str
    name: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]

    @cached_property
    def header(self) -> bytes:
        """Padded to 8 bytes and preceded by its length, as the safetensors format has it."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for key, (start, end) in self.offsets.items():
            dtype, shape = _NAMES[self.dtypes[key]], list(self.shapes[key])
            entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def offsets(self) -> dict[str, tuple[int, int]]:
        """Wide dtypes first: every tensor is then aligned to its own element size."""
        result, end = {}, 0
        for key in sorted(self.shapes, key=lambda k: -self.dtypes[k].itemsize):
            size = torch.Size(self.shapes[key]).numel() * self.dtypes[key].itemsize
            result[key] = end, end + size
            end += size
        return result

    @property
    def nbytes(self) -> int:
        return len(self.header) + max((end for _, end in self.offsets.values()), default=0)


@dataclass
class _ConversionPlan:
    """Everything known before the first byte is written."""

    job: Conversion
    models: dict[str, str]
    parts: list[_WeightFile]
    tokenizer: list[Path] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [part.name for part in self.parts] + [f"{TOKENIZER_FOLDER}/{path.name}" for path in self.tokenizer]

    def manifest(self) -> dict[str, Any]:
        return {
            "schema": MANIFEST_SCHEMA,
            "complete": False,
            "source": {"path": str(whole(self.job.source)), "files": _snapshot(self.job.source)},
            "models": self.models,
            "precision": self.job.precision,
            "fp8_components": [component for component in self.models if self.job.uses_fp8(component)],
            "files": {},
        }


def free_bytes(directory: Path) -> int:
    """Free space where `directory` is or will be."""
    return shutil.disk_usage(next(path for path in (directory, *directory.parents) if path.exists())).free


def convert(job: Conversion, output: Path, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Writes `output`, or goes on where an earlier call with the same job stopped; returns the manifest.

    CheckpointError: the source is not usable. InputError: `output` holds something else, or another process is writing to it.
    OutputError: it cannot be written, or the disk has not the space; then nothing is written.
    """
    opened: _Opened = cache(partial(open_checkpoint, job.source))
    try:
        plan = _plan(job, opened, output)
    except CheckpointError as error:
        raise explain(job.source, error) from error
    if not output.exists():
        _check_space(output, sum(part.nbytes for part in plan.parts))
        with writing(f"to {output}"):
            output.mkdir(parents=True, exist_ok=True)
    with alone_in(output):
        return _written(plan, opened, output, progress)


def _written(
    plan: _ConversionPlan, opened: _Opened, output: Path, progress: Callable[[str], None] | None
) -> dict[str, Any]:
    manifest = _begun(output, plan)
    pending = [part for part in plan.parts if not _is_finished(output, manifest, part.name)]
    _check_space(output, sum(part.nbytes for part in pending))
    with writing(f"to {output}"):
        _save(output, manifest)
        for path in plan.tokenizer:
            _copy_file(path, output, manifest)
        for part in pending:
            manifest["files"][part.name] = _write(part, opened(part.component), output)
            _save(output, manifest)
            if progress:
                left = sum(p.name not in manifest["files"] for p in plan.parts)
                progress(f"{part.name}  {human(part.nbytes)}  ({len(plan.parts) - left} of {len(plan.parts)})")
    _finish(output, manifest)
    return manifest


def _plan(job: Conversion, opened: _Opened, output: Path) -> _ConversionPlan:
    if whole(job.source) in whole(output).parents:
        raise InputError(f"-o {output} lies in the checkpoint itself; name a folder outside {job.source}")
    if layout(job.source) == "converted":
        raise CheckpointError(f"{job.source} was already converted; give the official or Diffusers folder it came from")
    components, dit = job.components, job.dit
    if components is None:
        dit = dit or identify("dit", opened("dit"))
        components = tuple(c for c in COMPONENTS if c != "image_encoder" or DIT[dit].has_image_branch)
    models: dict[str, str] = {}
    parts: list[_WeightFile] = []
    for component in sorted(components, key=lambda c: c != "dit"):  # the one that is most often the wrong one
        if dit is None:
            models[component] = identify(component, opened(component))
        else:
            models[component] = spec_beside(component, dit)
            check_model(component, opened(component), models[component])
        parts += _parts(job, component, models[component])
    plan = _ConversionPlan(job, models, parts)
    if "text_encoder" in components:
        file = tokenizer_file(job.source)
        try_tokenizer(file)
        folder = file.parent
        plan.tokenizer = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return plan


def _parts(job: Conversion, component: str, model: str) -> Iterator[_WeightFile]:
    """One part for each block and one, called shell, for what is outside the blocks."""
    module, blocks = blueprint(component, model, "bf16" if job.precision == "fp8" else job.precision)
    names = {id(block): name for name, block in module.named_modules()}
    groups = {names[id(block)]: dict(block.named_parameters(prefix=names[id(block)])) for block in blocks}
    inside = {key for group in groups.values() for key in group}
    groups["shell"] = {key: p for key, p in module.named_parameters() if key not in inside}
    matrices = _matrices(module) & inside if job.uses_fp8(component) else set()
    for name, group in groups.items():
        shapes = {key: tuple(p.shape) for key, p in group.items()}
        dtypes = {key: FP8 if key in matrices else p.dtype for key, p in group.items()}
        for key in sorted(matrices & set(group)):
            shapes[key + SCALE_SUFFIX], dtypes[key + SCALE_SUFFIX] = shapes[key][:1], torch.float32
        if shapes:
            yield _WeightFile(component, f"{component}/{name}.safetensors", shapes, dtypes)


def _matrices(module: nn.Module) -> set[str]:
    """Names of the two-dimensional 16-bit weights that are multiplied with, which tables that are looked up in are not."""
    tables = {f"{name}.weight" for name, m in module.named_modules() if isinstance(m, nn.Embedding)}
    return {key for key, p in module.named_parameters() if p.dim() == 2 and p.dtype.itemsize == 2} - tables


def _snapshot(ckpt_dir: Path) -> dict[str, list[int]]:
    """Name -> [bytes, time of change in ns] of the weight files: what tells one checkpoint from the next in its place."""
    found = sorted(
        p for pattern in ("*", "*/*") for p in ckpt_dir.glob(pattern) if p.suffix in (".pth", ".safetensors")
    )
    files = {}
    for path in found:
        name = os.fsencode(path.relative_to(ckpt_dir).as_posix()).decode("utf-8", "backslashreplace")
        with suppress(OSError):  # a link to nowhere that no component is read from
            status = path.stat()
            files[name] = [status.st_size, status.st_mtime_ns]
    return files


# --- the output folder ---------------------------------------------------------------------------------------------------------


def _begun(output: Path, plan: _ConversionPlan) -> dict[str, Any]:
    """The manifest to go on with: that in `output` if it is of the same job, a fresh one if there is nothing."""
    path, wanted = output / MANIFEST, plan.manifest()
    if not path.exists():
        if output.exists() and (not output.is_dir() or any(p.name != LOCK_FILE for p in output.iterdir())):
            raise InputError(f"{output} holds something that is no conversion; name an empty or new folder with -o")
        return wanted
    try:
        present = json.loads(path.read_text(encoding="utf-8"))
        files = {name: present["files"][name] for name in plan.names if name in present["files"]}
        if not all(type(entry["bytes"]) is int and isinstance(entry["sha256"], str) for entry in files.values()):
            raise ValueError("files")
        differing = [key for key in wanted if key not in ("complete", "files") and present[key] != wanted[key]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is damaged; name another folder with -o") from error
    if differing:
        details = "; ".join(f"{key} {_short(present[key])} instead of {_short(wanted[key])}" for key in differing)
        raise InputError(f"{output} holds another conversion ({details}); name another folder with -o")
    return {**wanted, "files": files}


def _short(value: Any) -> str:
    if isinstance(value, dict) and "path" in value:
        return f"{value['path']} with {len(value.get('files', ()))} files of certain sizes and times"
    return json.dumps(value)


def _is_finished(output: Path, manifest: dict[str, Any], name: str) -> bool:
    """Read and hashed again: a part whose bytes are others by now is not taken over."""
    path, entry = output / name, manifest["files"].get(name)
    if entry is not None and path.is_file() and path.stat().st_size == entry["bytes"]:
        with suppress(OSError):
            if _sha256(path) == entry["sha256"]:
                return True
    manifest["files"].pop(name, None)
    return False


def _check_space(output: Path, needed: int) -> None:
    available = free_bytes(output)
    if needed > available:
        raise OutputError(f"the conversion needs {human(needed)} in {output}; the disk has {human(available)} free")


def _save(output: Path, manifest: dict[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _finish(output: Path, manifest: dict[str, Any]) -> None:
    errors = [entry["fp8"] for entry in manifest["files"].values() if entry.get("fp8")]
    if errors:
        manifest["fp8"] = {name: max(error[name] for error in errors) for name in errors[0]}
    manifest["files"] = dict(sorted(manifest["files"].items()))  # the same after an interruption
    manifest["complete"] = True
    _save(output, manifest)


def _copy_file(path: Path, output: Path, manifest: dict[str, Any]) -> None:
    name = f"{TOKENIZER_FOLDER}/{path.name}"
    if _is_finished(output, manifest, name):
        return
    target = output / name
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(target.name + ".part")
    shutil.copyfile(path, partial)
    manifest["files"][name] = _entry(TOKENIZER_FOLDER, partial)
    os.replace(partial, target)


def _entry(component: str, path: Path) -> dict[str, Any]:
    return {"component": component, "bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def verify(output: Path, manifest: Mapping[str, Any], progress: Callable[[str], None] | None = None) -> int:
    """Reads every file again and compares its hash; returns how many. CheckpointError names the first that differs."""
    for number, (name, entry) in enumerate(manifest["files"].items(), 1):
        path = output / name
        if not path.is_file() or _sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path} is not what was written; delete it and run the same conversion again")
        if progress:
            progress(f"{name} verified  ({number} of {len(manifest['files'])})")
    return len(manifest["files"])


# --- tensors -------------------------------------------------------------------------------------------------------------------


def _write(part: _WeightFile, source: TensorSource, output: Path) -> dict[str, Any]:
    """The file of one part, whole and on disk when this returns its manifest entry."""
    target = output / part.name
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(target.name + ".part")
    errors: list[tuple[float, float]] = []
    with FileIO(partial, "w") as file:
        file.write(part.header)
        start = file.tell()
        for key in part.shapes:
            if key.endswith(SCALE_SUFFIX):
                continue
            value = _read(part, key, source)
            if part.dtypes[key] == FP8:
                value, scale, error = _quantised(value)
                _put(file, start + part.offsets[key + SCALE_SUFFIX][0], scale)
                errors.append(error)
            _put(file, start + part.offsets[key][0], value)
            del value
        os.fsync(file.fileno())
    entry = _entry(part.component, partial) | {"keys": list(part.shapes)}
    if errors:
        entry["fp8"] = {
            "max_error_of_row_maximum": max(e for e, _ in errors),
            "max_relative_rms_error": max(e for _, e in errors),
        }
    os.replace(partial, target)
    return entry


def _read(part: _WeightFile, key: str, source: TensorSource) -> Tensor:
    dtype = torch.float32 if part.dtypes[key] == FP8 else part.dtypes[key]
    value = torch.empty(part.shapes[key], dtype=dtype)
    source.fill(key, value)
    # Of the bounds: isfinite of the whole needs three times its memory.
    if not all(bound.isfinite() for bound in torch.aminmax(value)):
        raise CheckpointError(f"{key} is not finite in {dtype}; choose bf16, or the file is damaged")
    return value


def _quantised(matrix: Tensor) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """float32 [rows, columns] -> fp8, scale [rows], (largest error of its row's maximum, relative RMS error)."""
    stored, scale = torch.empty(matrix.shape, dtype=FP8), torch.empty(matrix.shape[0])
    worst = squares = norm = 0.0
    step = max(1, CHUNK_BYTES // (4 * matrix.shape[1]))
    for first in range(0, matrix.shape[0], step):
        rows = slice(first, first + step)
        values = matrix[rows]
        factor = row_scales(values)
        stored[rows] = to_fp8(values, factor)
        scale[rows] = factor.squeeze(1)
        error = (stored[rows].float() * factor).sub_(values)
        norm += float(values.square().sum(dtype=torch.float64))
        squares += float(error.square().sum(dtype=torch.float64))
        worst = max(worst, float((error.abs_() / (factor * LARGEST)).max()))
    return stored, scale, (worst, (squares / norm) ** 0.5 if norm else 0.0)


def _put(file: FileIO, offset: int, value: Tensor) -> None:
    view = value.reshape(-1).view(torch.uint8).numpy().data
    file.seek(offset)
    while view:
        view = view[file.write(view) :]
