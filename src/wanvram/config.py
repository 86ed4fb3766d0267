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

from wanvram.errors import InputError, require
from wanvram.request import Request, is_unicode
from wanvram.specs import DIT
from wanvram.strict_yaml import MAX_BYTES, read_strict_yaml
from wanvram.tasks import TASKS
from wanvram.units import MIB

__all__ = ["MAX_NAME_BYTES", "WEIGHT_HOMES", "Measurement", "Request", "RunConfig", "Strategy", "load_config"]

MAX_NAME_BYTES = 200  # file systems take 255; a suffix, a number or the mark of an unfinished file must still fit
DEVICES = ("auto", "cuda", "cpu", "simulated")

WEIGHT_HOMES = ("pinned", "pageable", "disk")
_MULTI_GPU = "running on several GPUs is not implemented; it must be {}"


def _choose(name: str, value: str, allowed: tuple[str, ...]) -> None:
    require(value in allowed, f"{name}: '{value}'; choose {', '.join(allowed[:-1])} or {allowed[-1]}")


@dataclass(frozen=True)
class Strategy:
    """How to run: every choice that changes memory or time. See docs/strategy.md for what each costs.

    weights_in: where streamed blocks wait, pinned or pageable RAM or the checkpoint's files. resident_blocks: how many of the
    transformer's blocks stay on the device all the same. weight_storage fp8: the transformer's matrices, lossy. vae_tile: edge
    in latent pixels (8 video pixels each), None: whole frames. vae_precision other than fp32: lossy.
    """

    precision: str = "bf16"
    load_strategy: str = "full"
    offload: bool = False
    t5_cpu: bool = False
    attention_slicing: bool = False
    rows_per_chunk: int | None = None
    cfg: str = "sequential"
    weights_in: str = "pinned"
    resident_blocks: int = 0
    weight_storage: str = "same"
    vae_tile: int | None = None
    vae_precision: str = "fp32"
    expandable_segments: bool = False
    gradient_checkpointing: bool = False
    batch_size: int = 1
    micro_batch_size: int = 1
    parallel_degree: int = 1
    ulysses_size: int = 1
    ring_size: int = 1
    t5_fsdp: bool = False
    dit_fsdp: bool = False

    def __post_init__(self) -> None:
        _choose("precision", self.precision, ("fp32", "fp16", "bf16"))
        _choose("load_strategy", self.load_strategy, ("full", "block"))
        _choose("cfg", self.cfg, ("sequential", "joint"))
        require(
            self.rows_per_chunk is None or self.rows_per_chunk >= 1,
            f"rows_per_chunk: {self.rows_per_chunk} must be at least 1 (or absent: chosen by size)",
        )
        _choose("weights_in", self.weights_in, WEIGHT_HOMES)
        _choose("weight_storage", self.weight_storage, ("same", "fp8"))
        require(
            self.weight_storage == "same" or self.precision != "fp32",
            "weight_storage: fp8 is for bf16 and fp16; precision fp32 asks for full precision",
        )
        _choose("vae_precision", self.vae_precision, ("fp32", "bf16", "fp16"))
        require(self.resident_blocks >= 0, f"resident_blocks: {self.resident_blocks} must be at least 0")
        require(
            self.vae_tile is None or self.vae_tile >= 8, f"vae_tile: {self.vae_tile} must be at least 8 (or absent)"
        )
        for name in ("weights_in", "resident_blocks"):
            require(
                self.load_strategy == "block" or getattr(self, name) == getattr(Strategy, name),
                f"{name}: has no meaning with load_strategy full; use load_strategy block",
            )
        for name in ("parallel_degree", "ulysses_size", "ring_size"):
            require(getattr(self, name) == 1, f"{name}: {getattr(self, name)}; " + _MULTI_GPU.format(1))
        for name in ("t5_fsdp", "dit_fsdp"):
            require(not getattr(self, name), f"{name}: true; " + _MULTI_GPU.format("false"))
        for name in ("batch_size", "micro_batch_size"):
            require(
                getattr(self, name) == 1, f"{name}: {getattr(self, name)}; batches are not implemented; it must be 1"
            )


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
        model = {k: s.pop(k) for k in ("load_strategy", "precision", "offload", "t5_cpu")}
        return {
            "name": self.name,
            "description": self.description,
            "model_config": model | {"device": self.device},
            "optimization": s,
            "logging": m,
            "request": _listed(r)
            | {"weights": self.weights, "gpu": self.gpu, "memory_limit_bytes": self.memory_limit_bytes},
        }

    @classmethod
    def from_dict(cls, data: Any) -> RunConfig:
        """Strict: unknown keys and wrong types are InputErrors naming the dotted key."""
        require(isinstance(data, Mapping), "the configuration is not a mapping of sections")
        sections = _checked(data, _TOP, "")
        model = _checked(sections.get("model_config") or {}, _MODEL, "model_config")
        optimization = _checked(sections.get("optimization") or {}, _OPTIMIZATION, "optimization")
        logging = _checked(sections.get("logging") or {}, _LOGGING, "logging")
        request = _checked(sections.get("request") or {}, _REQUEST, "request")
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
_MODEL = {"load_strategy": str, "precision": str, "device": str, "offload": bool, "t5_cpu": bool}
_OPTIMIZATION = {
    "attention_slicing": bool,
    "gradient_checkpointing": bool,
    "batch_size": int,
    "micro_batch_size": int,
    "parallel_degree": int,
    "rows_per_chunk": _OPTIONAL_INT,
    "cfg": str,
    "weights_in": str,
    "resident_blocks": int,
    "weight_storage": str,
    "vae_tile": _OPTIONAL_INT,
    "vae_precision": str,
    "expandable_segments": bool,
    "ulysses_size": int,
    "ring_size": int,
    "t5_fsdp": bool,
    "dit_fsdp": bool,
}
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
_SECTIONS: dict[str, dict[str, Any]] = {
    "model_config": _MODEL,
    "optimization": _OPTIMIZATION,
    "logging": _LOGGING,
    "request": _REQUEST,
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
    owner = next((section for section, keys in _SECTIONS.items() if key in keys), None)
    return f"it belongs under {owner}; " if owner else ""


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _dotted(message: str) -> str:
    """`precision: ...` -> `model_config.precision: ...`: the flags and the YAML share the checks, not the sections."""
    key = message.partition(":")[0]
    owner = next((section for section, keys in _SECTIONS.items() if key in keys), None)
    return f"{owner}.{message}" if owner else message


def load_config(path: Path, limit: int = MAX_BYTES) -> RunConfig:
    """Reads one YAML configuration of at most `limit` bytes. Raises InputError naming the file, the key and what is allowed."""
    data = read_strict_yaml(path, limit)
    try:
        return RunConfig.from_dict(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
