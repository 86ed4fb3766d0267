"""A diffusers folder without weights: model_index.json and the configurations of its components, read to a limit. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanvram.errors import InputError
from wanvram.foreign_text import quoted, shown, why
from wanvram.input_files import read_text
from wanvram.strict_json import strict_json

__all__ = ["PipelineFolder", "PipelinePart", "read_json", "read_pipeline_folder"]

MAX_JSON_BYTES = 1 << 20  # the longest configuration of diffusers' own pipelines has 10 KiB
MAX_COMPONENTS = 32  # the most of diffusers' own pipelines is 12
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}")


@dataclass(frozen=True)
class PipelinePart:
    """name: of the pipeline's argument and of the folder. library: diffusers, transformers or one of diffusers' pipelines."""

    name: str
    library: str
    kind: str
    folder: Path

    def __str__(self) -> str:
        return f"{self.name} ({self.library}.{self.kind})"


@dataclass(frozen=True)
class PipelineFolder:
    """kind: class of the pipeline. absent: components that are null. options: what else the pipeline's constructor is given."""

    path: Path
    kind: str
    components: tuple[PipelinePart, ...]
    absent: tuple[str, ...]
    options: dict[str, Any]


def read_pipeline_folder(path: Path) -> PipelineFolder:
    """Raises InputError that names what is missing or is not what belongs there."""
    index = path / "model_index.json"
    if not index.is_file():
        raise InputError(f"--diffusers {shown(path)} has no model_index.json: it is no folder of a diffusers pipeline")
    content = read_json(index)
    kind = content.get("_class_name")
    if not isinstance(kind, str) or not _is_name(kind):
        raise InputError(f"{shown(index)}: _class_name is {quoted(kind)}; expected the name of a diffusers pipeline")
    components, absent, options = [], [], {}
    for name, value in content.items():
        if name.startswith("_"):
            continue
        if not _is_name(name):
            raise InputError(f"{shown(index)}: {quoted(name)} is no name of a component")
        if not isinstance(value, list) or len(value) != 2:
            options[name] = value
        elif value == [None, None]:
            absent.append(name)
        elif all(map(_is_name, value)):
            library, kind_of_it = value
            components.append(PipelinePart(name, library, kind_of_it, path / name))
        else:
            raise InputError(f"{shown(index)}: {name} is {quoted(value)}; expected a library and the name of a class")
    if not 1 <= len(components) <= MAX_COMPONENTS:
        raise InputError(f"{shown(index)} names {len(components)} components; expected 1 to {MAX_COMPONENTS}")
    return PipelineFolder(path, kind, tuple(components), tuple(absent), options)


def read_json(path: Path) -> dict[str, Any]:
    """A section of plain values. Raises InputError naming the path."""
    try:
        content = strict_json(read_text(path, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{shown(path)} is no readable JSON: {why(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{shown(path)} is {quoted(content)}; expected a section")
    return content


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None
