"""A matrix file becomes configurations: every combination of its axes over one base, less `exclude`, plus `include`. No torch.

base: baseline.yaml                        # beside this file, or the configuration itself as a mapping
name: precision                            # optional: what names begin with instead of the base's name
axes:
  model_config.precision: [fp32, fp16]
  model_config.offload: [false, true]
exclude:
  - {model_config.precision: fp32, model_config.offload: false}
include:
  - {name: long, request.frame_num: 161}   # one more configuration over the base; the name is optional
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wanvram.config import RunConfig, load_config
from wanvram.errors import InputError, require
from wanvram.strict_yaml import MAX_BYTES, read_strict_yaml

__all__ = ["MAX_CONFIGURATIONS", "expand", "is_matrix", "load_configurations"]

MAX_CONFIGURATIONS = 500  # what one report holds
_SECTIONS = ("model_config", "optimization", "logging", "request")
_KEYS = ("name", "description", "base", "axes", "include", "exclude")

Settings = dict[str, Any]  # dotted key -> value


def is_matrix(path: Path, limit: int = MAX_BYTES) -> bool:
    """Whether the YAML of at most `limit` bytes at `path` has axes. Raises InputError for a file that cannot be read."""
    data = read_strict_yaml(path, limit)
    return isinstance(data, Mapping) and ("axes" in data or "base" in data)


def load_configurations(paths: Sequence[Path], limit: int = MAX_BYTES) -> list[RunConfig]:
    """Configurations (of at most `limit` bytes) and matrix files, in order.

    Raises InputError for a bad one, two of one name, or more than 500.
    """
    found: dict[str, Path] = {}
    configs: list[RunConfig] = []
    for path in paths:
        for config in expand(path) if is_matrix(path, limit) else [load_config(path, limit)]:
            first = found.setdefault(config.name, path)
            require(
                config.name not in {c.name for c in configs},
                f"{path}: the name '{config.name}' was already used in {first}; it names the run directory",
            )
            configs.append(config)
    require(len(configs) <= MAX_CONFIGURATIONS, f"{len(configs)} configurations; at most {MAX_CONFIGURATIONS} are run")
    return configs


def expand(path: Path) -> list[RunConfig]:
    """The configurations of a matrix file, the last axis fastest. Raises InputError naming the file and combination."""
    data = read_strict_yaml(path)
    try:
        require(isinstance(data, Mapping), "the matrix is not a mapping")
        for key in data:
            require(key in _KEYS, f"{key}: unknown key; allowed: {', '.join(_KEYS)}")
        base = _base(data.get("base"), path.parent)
        axes = _axes(data.get("axes"))
        excluded = [_excluded(item, axes) for item in _list(data.get("exclude"), "exclude")]
        combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
        kept = [c for c in combinations if not any(_matches(c, rule) for rule in excluded)]
        prefix = data.get("name", base["name"])
        require(isinstance(prefix, str), f"name: {prefix!r} is not text")
        varied = [key for key, values in axes.items() if len(values) > 1]
        result = [_configuration(base, c, _name(prefix, {key: c[key] for key in varied})) for c in kept]
        result += _included(base, prefix, _list(data.get("include"), "include"))
        require(bool(result), "exclude leaves no configuration")
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return result


def _base(base: Any, folder: Path) -> dict[str, Any]:
    """The base as plain values. A path is taken from the matrix file's folder."""
    require(base is not None, "base: is missing; give the file or the mapping that the axes vary")
    if isinstance(base, str):
        return load_config(folder / base).to_dict()
    require(isinstance(base, Mapping), f"base: {str(base)[:80]} is neither a file nor a mapping")
    RunConfig.from_dict(base)
    return copy.deepcopy(dict(base))


def _axes(axes: Any) -> dict[str, list[Any]]:
    require(isinstance(axes, Mapping) and bool(axes), "axes: must map dotted keys to lists of values")
    for key, values in axes.items():
        _check_key(key, "axes")
        require(isinstance(values, list) and bool(values), f"axes.{key}: must be a list of at least one value")
        require(len({repr(v) for v in values}) == len(values), f"axes.{key}: a value appears twice")
    count = math.prod(len(values) for values in axes.values())
    require(count <= MAX_CONFIGURATIONS, f"axes: {count} combinations; at most {MAX_CONFIGURATIONS} are run")
    return dict(axes)


def _check_key(key: Any, where: str) -> None:
    section, _, name = str(key).partition(".")
    known = section in _SECTIONS and bool(name)
    require(known, f"{where}: '{key}' is no dotted key; write for example model_config.precision")


def _list(value: Any, name: str) -> list[Any]:
    require(value is None or isinstance(value, list), f"{name}: must be a list of mappings")
    return value or []


def _mapping(item: Any, name: str) -> Settings:
    require(isinstance(item, Mapping) and bool(item), f"{name}: {str(item)[:80]} is not a mapping of dotted keys")
    return dict(item)


def _excluded(item: Any, axes: Mapping[str, Any]) -> Settings:
    settings = _mapping(item, "exclude")
    for key in settings:
        require(key in axes, f"exclude: '{key}' is not one of the axes ({', '.join(axes)})")
    return settings


def _matches(combination: Settings, rule: Settings) -> bool:
    # repr, because 1 == True in Python and these are different values in YAML.
    return all(repr(combination[key]) == repr(value) for key, value in rule.items())


def _included(base: dict[str, Any], prefix: str, items: Sequence[Any]) -> Iterator[RunConfig]:
    for item in items:
        settings = {key: value for key, value in _mapping(item, "include").items() if key != "name"}
        for key in settings:
            _check_key(key, "include")
        yield _configuration(base, settings, item.get("name", _name(prefix, settings)))


def _configuration(base: dict[str, Any], settings: Settings, name: Any) -> RunConfig:
    data = copy.deepcopy(base)
    for key, value in settings.items():
        section, _, field = key.partition(".")
        data[section] = dict(data.get(section) or {}) | {field: value}
    values = ", ".join(f"{key.rpartition('.')[2]} {_plain(value)}" for key, value in settings.items())
    description = str(data.get("description") or "")
    data |= {"name": name, "description": f"{description} [{values}]".strip()}
    try:
        return RunConfig.from_dict(data)
    except InputError as error:
        raise InputError(f"the combination {values} cannot be run: {error}") from error


def _name(prefix: str, settings: Settings) -> str:
    """`baseline-fp16-offload-frame_num=161`: a plain file name."""
    parts = [prefix, *(_label(key.rpartition(".")[2], value) for key, value in settings.items())]
    return "-".join(re.sub(r"[^\w.=+-]", "x", part) for part in parts)


def _label(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return key if value else f"no_{key}"
    return value if isinstance(value, str) and value else f"{key}={_plain(value)}"


def _plain(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
