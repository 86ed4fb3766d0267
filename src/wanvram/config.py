"""RunConfig = Request (what) + Strategy (how) + Measurement (what to record), from strict YAML or from flags. No torch.

Every error is one InputError sentence that names the file, the key and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from wanvram import knobs
from wanvram.errors import InputError, require
from wanvram.request import Request, is_unicode
from wanvram.specs import DIT
from wanvram.strict_yaml import MAX_BYTES, read_strict_yaml
from wanvram.tasks import TASKS
from wanvram.units import MIB

__all__ = ["MAX_NAME_BYTES", "Measurement", "Request", "RunConfig", "Strategy", "load_config"]

MAX_NAME_BYTES = 200  # file systems take 255; a suffix, a number or the mark of an unfinished file must still fit
DEVICES = ("auto", "cuda", "cpu", "simulated")


@dataclass(frozen=True)
class Strategy:
    """How to run: every choice that changes memory or time. See docs/strategy.md for what each costs.

    weights_in: where streamed blocks wait, pinned or pageable RAM or the checkpoint's files. resident_blocks: how many of the
    transformer's blocks stay on the device all the same. weight_storage fp8: the transformer's matrices, lossy. vae_tile: edge
    in latent pixels (8 video pixels each), None: whole frames. vae_precision other than fp32: lossy.
    """

    precision: str = knobs.PRECISION.default
    load_strategy: str = knobs.LOAD_STRATEGY.default
    offload: bool = knobs.OFFLOAD.default
    t5_cpu: bool = knobs.T5_CPU.default
    attention_slicing: bool = knobs.ATTENTION_SLICING.default
    rows_per_chunk: int | None = knobs.ROWS_PER_CHUNK.default
    cfg: str = knobs.CFG.default
    weights_in: str = knobs.WEIGHTS_IN.default
    resident_blocks: int = knobs.RESIDENT_BLOCKS.default
    weight_storage: str = knobs.WEIGHT_STORAGE.default
    vae_tile: int | None = knobs.VAE_TILE.default
    vae_precision: str = knobs.VAE_PRECISION.default
    expandable_segments: bool = knobs.EXPANDABLE_SEGMENTS.default
    gradient_checkpointing: bool = knobs.GRADIENT_CHECKPOINTING.default
    batch_size: int = knobs.BATCH_SIZE.default
    micro_batch_size: int = knobs.MICRO_BATCH_SIZE.default
    parallel_degree: int = knobs.PARALLEL_DEGREE.default
    ulysses_size: int = knobs.ULYSSES_SIZE.default
    ring_size: int = knobs.RING_SIZE.default
    t5_fsdp: bool = knobs.T5_FSDP.default
    dit_fsdp: bool = knobs.DIT_FSDP.default

    def __post_init__(self) -> None:
        for knob in knobs.TABLE:
            knob.check(self)


@dataclass(frozen=True)
class Measurement:
    """What to record. log_interval: every n-th denoising step is recorded block by block.

    trace_path: inside the run directory.
    """

    profile_memory: bool = True
    log_interval: int = 10
    trace: bool = False
    trace_path: str | None = None
    snapshot: bool = False

    def __post_init__(self) -> None:
        require(self.log_interval >= 1, f"log_interval: {self.log_interval} must be at least 1")
        if self.trace_path is None:
            return
        path = PurePosixPath(self.trace_path)
        require(
            bool(path.parts)
            and not path.is_absolute()
            and ".." not in path.parts
            and not set(self.trace_path) & set("\\:\0"),
            f"trace_path: '{self.trace_path}' leaves the run directory; give a relative path without '..'",
        )

    @property
    def trace_directory(self) -> str:
        """Relative to the run directory."""
        return self.trace_path or "trace"


@dataclass(frozen=True)
class RunConfig:
    """One complete configuration. weights: random, tiny or a checkpoint directory. gpu: which card to simulate."""

    name: str
    description: str
    device: str
    request: Request
    strategy: Strategy = field(default_factory=Strategy)
    measurement: Measurement = field(default_factory=Measurement)
    weights: str = "random"
    gpu: str | None = None
    memory_limit_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("name", "description", "weights", "gpu"):
            text = getattr(self, name) or ""
            require(is_unicode(text), f"{name}: {text!a} is not UTF-8 text")
        require(
            bool(self.name) and self.name not in (".", "..") and not set(self.name) & set("/\\\0\n"),
            f"name: '{self.name}' names the run directory; use a plain file name",
        )
        require(len(self.name.encode()) <= MAX_NAME_BYTES, f"name: is too long; at most {MAX_NAME_BYTES} bytes")
        require(bool(self.weights), "weights: is empty; choose random, tiny or a checkpoint directory")
        require(
            self.memory_limit_bytes is None or self.memory_limit_bytes >= MIB,
            f"memory_limit_bytes: {self.memory_limit_bytes} must be at least {MIB}, in bytes: 8 GiB are 8589934592 (or absent: "
            "no limit)",
        )
        self.request.check_size(tiny=self.weights == "tiny")
        require(self.device in DEVICES, f"device: '{self.device}'; choose one of {', '.join(DEVICES)}")
        require(
            not (self.device == "cpu" and self.strategy.precision == "fp16"),
            "precision: fp16 has no fast CPU kernels; use bf16 or fp32 with device cpu",
        )
        blocks, resident = DIT[TASKS[self.request.task].dit].block_count, self.strategy.resident_blocks
        require(
            self.weights == "tiny" or resident <= blocks,  # tiny transformers have few blocks: there it means all
            f"resident_blocks: {resident}, but the transformer of {self.request.task} has {blocks} blocks; give at most that many",
        )

    def notes(self) -> list[str]:
        """What was asked for, is accepted and changes nothing; to be shown with the result."""
        notes = []
        if self.strategy.gradient_checkpointing:
            notes.append("gradient_checkpointing has no effect: inference keeps no gradients")
        if self.measurement.trace_path is not None and not self.measurement.trace:
            notes.append(
                "trace_path has no effect without trace: true; tracing disturbs what is measured and is off by default"
            )
        return notes

    def to_dict(self) -> dict[str, Any]:
        """The YAML's sections as plain values; `from_dict` is its inverse."""
        s, m, r = (dataclasses.asdict(part) for part in (self.strategy, self.measurement, self.request))
        model, optimization = ({k: s[k] for k in s if k in _keys(section)} for section in (_MODEL, _OPTIMIZATION))
        return {
            "name": self.name,
            "description": self.description,
            _MODEL: model | {"device": self.device},
            _OPTIMIZATION: optimization,
            "logging": m,
            "request": _listed(r)
            | {"weights": self.weights, "gpu": self.gpu, "memory_limit_bytes": self.memory_limit_bytes},
        }

    @classmethod
    def from_dict(cls, data: Any) -> RunConfig:
        """Strict: unknown keys and wrong types are InputErrors naming the dotted key."""
        require(isinstance(data, Mapping), "the configuration is not a mapping of sections")
        sections = _checked(data, _TOP, "")
        model, optimization, logging, request = (
            _checked(sections.get(name) or {}, keys, name) for name, keys in _sections().items()
        )
        require("name" in sections, "name: is missing; it names the run directory")
        device = model.pop("device", "auto")
        top = {key: request.pop(key) for key in ("weights", "gpu", "memory_limit_bytes") if key in request}
        try:
            return cls(
                name=sections["name"],
                description=sections.get("description", ""),
                device=device,
                request=Request.for_task(request.pop("task", "t2v-14B"), **_tupled(request)),
                strategy=Strategy(**model, **optimization),
                measurement=Measurement(**logging),
                **top,
            )
        except InputError as error:
            raise InputError(_dotted(str(error))) from error


_NUMBER = (int, float)
_OPTIONAL_INT = (int, type(None))
_OPTIONAL_TEXT = (str, type(None))
_TOP = {"name": str, "description": str, "model_config": dict, "optimization": dict, "logging": dict, "request": dict}
_MODEL, _OPTIMIZATION = "model_config", "optimization"  # sections of knobs
_LOGGING = {
    "profile_memory": bool,
    "log_interval": int,
    "trace": bool,
    "trace_path": (str, type(None)),
    "snapshot": bool,
}
_REQUEST = {
    "task": str,
    "size": str,
    "frame_num": int,
    "sample_steps": int,
    "sample_shift": _NUMBER,
    "sample_guide_scale": _NUMBER,
    "sample_solver": str,
    "base_seed": int,
    "prompt": str,
    "negative_prompt": str,
    "prompts": list,
    "image": _OPTIONAL_TEXT,
    "first_frame": _OPTIONAL_TEXT,
    "last_frame": _OPTIONAL_TEXT,
    "src_video": _OPTIONAL_TEXT,
    "src_mask": _OPTIONAL_TEXT,
    "src_ref_images": list,
    "use_prompt_extend": bool,
    "prompt_extend_method": str,
    "prompt_extend_model": _OPTIONAL_TEXT,
    "prompt_extend_target_lang": str,
    "prompt_extend_optional": bool,
    "weights": str,
    "gpu": (str, type(None)),
    "memory_limit_bytes": _OPTIONAL_INT,
}
_TYPE_NAMES: dict[type, str] = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "a section",
    list: "a list",
    type(None): "null",
}


def _keys(section: str) -> dict[str, Any]:
    """A section's knobs and their types."""
    return {knob.name: knob.kinds for knob in knobs.TABLE if knob.section == section}


def _sections() -> dict[str, dict[str, Any]]:
    model = _keys(_MODEL) | {"device": str}
    return {_MODEL: model, _OPTIMIZATION: _keys(_OPTIMIZATION), "logging": _LOGGING, "request": _REQUEST}


def _owner(key: str) -> str | None:
    """The section that a key belongs to."""
    return next((section for section, keys in _sections().items() if key in keys), None)


def _checked(data: Any, allowed: Mapping[str, Any], section: str) -> dict[str, Any]:
    """The mapping with every key known and every value of its type."""
    prefix = f"{section}." if section else ""
    require(isinstance(data, Mapping), f"{section}: must be a section of keys, not {data!r}")
    for key, value in data.items():
        if key not in allowed:
            raise InputError(f"{prefix}{key}: unknown key; {_hint(str(key), allowed)}allowed: {', '.join(allowed)}")
        kinds = allowed[key] if isinstance(allowed[key], tuple) else (allowed[key],)
        wrong = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        if wrong:
            names = " or ".join(_TYPE_NAMES[kind] for kind in kinds)
            quotes = " (write it without quotes)" if isinstance(value, str) and str not in kinds else ""
            raise InputError(f"{prefix}{key}: {_shortened(value)} is not {names}{quotes}")
    return dict(data)


_LISTS = ("prompts", "src_ref_images")


def _listed(request: dict[str, Any]) -> dict[str, Any]:
    """Tuples are lists in YAML."""
    return {key: list(value) if key in _LISTS else value for key, value in request.items()}


def _tupled(request: dict[str, Any]) -> dict[str, Any]:
    for key in _LISTS:
        for item in request.get(key, ()):
            require(isinstance(item, str), f"{key}: {_shortened(item)} is not text")
    return {key: tuple(value) if key in _LISTS else value for key, value in request.items()}


def _hint(key: str, allowed: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, list(allowed), n=1)
    if close:
        return f"did you mean {close[0]}? "
    owner = _owner(key)
    return f"it belongs under {owner}; " if owner else ""


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _dotted(message: str) -> str:
    """`precision: ...` -> `model_config.precision: ...`: the flags and the YAML share the checks, not the sections."""
    owner = _owner(message.partition(":")[0])
    return f"{owner}.{message}" if owner else message


def load_config(path: Path, limit: int = MAX_BYTES) -> RunConfig:
    """Reads one YAML configuration of at most `limit` bytes. Raises InputError naming the file, the key and what is allowed."""
    data = read_strict_yaml(path, limit)
    try:
        return RunConfig.from_dict(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
