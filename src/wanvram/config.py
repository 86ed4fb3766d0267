"""RunConfig = Request (what) + Strategy (how) + Measurement (what to record), from strict YAML or from flags. No torch.

Every error is one InputError sentence that names the file, the key and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from wanvram.errors import InputError
from wanvram.tasks import TASKS, are_frames_valid

__all__ = ["Measurement", "Request", "RunConfig", "Strategy", "load_config"]

MAX_FILE_BYTES = 1024 * 1024
MAX_PROMPT_CHARACTERS = 20_000
MAX_NAME_BYTES = 200  # file systems take 255; a suffix must still fit
DEVICES = ("auto", "cuda", "cpu", "simulated")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclass(frozen=True)
class Request:
    """What to generate. size is "width*height" in pixels; base_seed -1 draws a random one."""

    task: str
    size: str
    frame_num: int
    sample_steps: int
    sample_shift: float
    sample_guide_scale: float
    sample_solver: str
    base_seed: int
    prompt: str
    negative_prompt: str

    def __post_init__(self) -> None:
        _require(self.task in TASKS, f"task: '{self.task}' is unknown; choose one of {', '.join(TASKS)}")
        task = TASKS[self.task]
        _require(
            self.size in task.sizes,
            f"size: '{self.size}' is not supported by {self.task}; choose {', '.join(task.sizes)}",
        )
        _require(
            are_frames_valid(self.frame_num),
            f"frame_num: {self.frame_num} is not of the form 4n+1 (1, 5, 9, ..., 81)",
        )
        _require(
            task.frames != 1 or self.frame_num == 1, f"frame_num: {self.task} makes one image; frame_num must be 1"
        )
        _require(1 <= self.sample_steps <= 1000, f"sample_steps: {self.sample_steps} is outside 1..1000")
        _require(0 < self.sample_shift <= 100, f"sample_shift: {self.sample_shift} is outside 0..100")
        _require(
            math.isfinite(self.sample_guide_scale),
            f"sample_guide_scale: {self.sample_guide_scale} is not a finite number",
        )
        _require(
            self.sample_solver in ("unipc", "dpm++"), f"sample_solver: '{self.sample_solver}'; choose unipc or dpm++"
        )
        _require(-1 <= self.base_seed < 2**63, f"base_seed: {self.base_seed} is outside -1..2^63-1")
        for name in ("prompt", "negative_prompt"):
            length = len(getattr(self, name))
            _require(
                length <= MAX_PROMPT_CHARACTERS,
                f"{name}: {length} characters; at most {MAX_PROMPT_CHARACTERS} (the model reads 512 tokens)",
            )

    @classmethod
    def for_task(cls, task: str, **given: Any) -> Request:
        """The task's official defaults, overridden by every given value that is not None."""
        _require(task in TASKS, f"task: '{task}' is unknown; choose one of {', '.join(TASKS)}")
        values = {name: value for name, value in given.items() if value is not None}
        defaults = TASKS[task]
        size = values.get("size") or defaults.default_size
        base: dict[str, Any] = {
            "size": size,
            "frame_num": defaults.frames,
            "sample_steps": defaults.steps,
            "sample_shift": defaults.default_shift(size),
            "sample_guide_scale": defaults.guide_scale,
            "sample_solver": defaults.solver,
            "base_seed": -1,
            "prompt": "",
            "negative_prompt": defaults.negative_prompt,
        }
        return cls(task=task, **(base | values))

    @property
    def width(self) -> int:
        return int(self.size.split("*")[0])

    @property
    def height(self) -> int:
        return int(self.size.split("*")[1])


_MULTI_GPU = "running on several GPUs is not implemented; it must be {}"


@dataclass(frozen=True)
class Strategy:
    """How to run: every choice that changes memory or time. See docs/strategy.md for what each costs."""

    precision: str = "bf16"
    load_strategy: str = "full"
    offload: bool = False
    t5_cpu: bool = False
    attention_slicing: bool = False
    rows_per_chunk: int | None = None
    cfg: str = "sequential"
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
        _require(
            self.precision in ("fp32", "fp16", "bf16"), f"precision: '{self.precision}'; choose fp32, fp16 or bf16"
        )
        _require(
            self.load_strategy in ("full", "block"), f"load_strategy: '{self.load_strategy}'; choose full or block"
        )
        _require(self.cfg in ("sequential", "joint"), f"cfg: '{self.cfg}'; choose sequential or joint")
        _require(
            self.rows_per_chunk is None or self.rows_per_chunk >= 1,
            f"rows_per_chunk: {self.rows_per_chunk} must be at least 1 (or absent: chosen by size)",
        )
        for name in ("parallel_degree", "ulysses_size", "ring_size"):
            _require(getattr(self, name) == 1, f"{name}: {getattr(self, name)}; " + _MULTI_GPU.format(1))
        for name in ("t5_fsdp", "dit_fsdp"):
            _require(not getattr(self, name), f"{name}: true; " + _MULTI_GPU.format("false"))
        for name in ("batch_size", "micro_batch_size"):
            _require(
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
        _require(self.log_interval >= 1, f"log_interval: {self.log_interval} must be at least 1")
        if self.trace_path is None:
            return
        path = PurePosixPath(self.trace_path)
        _require(
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
        _require(
            bool(self.name) and self.name not in (".", "..") and not set(self.name) & set("/\\\0\n"),
            f"name: '{self.name}' names the run directory; use a plain file name",
        )
        _require(len(self.name.encode()) <= MAX_NAME_BYTES, f"name: is too long; at most {MAX_NAME_BYTES} bytes")
        _require(bool(self.weights), "weights: is empty; choose random, tiny or a checkpoint directory")
        _require(
            self.memory_limit_bytes is None or self.memory_limit_bytes >= 1,
            f"memory_limit_bytes: {self.memory_limit_bytes} must be at least 1 (or absent: no limit)",
        )
        _require(self.device in DEVICES, f"device: '{self.device}'; choose one of {', '.join(DEVICES)}")
        _require(
            not (self.device == "cpu" and self.strategy.precision == "fp16"),
            "precision: fp16 has no fast CPU kernels; use bf16 or fp32 with device cpu",
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
            "request": r | {"weights": self.weights, "gpu": self.gpu, "memory_limit_bytes": self.memory_limit_bytes},
        }

    @classmethod
    def from_dict(cls, data: Any) -> RunConfig:
        """Strict: unknown keys and wrong types are InputErrors naming the dotted key."""
        _require(isinstance(data, Mapping), "the configuration is not a mapping of sections")
        sections = _checked(data, _TOP, "")
        model = _checked(sections.get("model_config") or {}, _MODEL, "model_config")
        optimization = _checked(sections.get("optimization") or {}, _OPTIMIZATION, "optimization")
        logging = _checked(sections.get("logging") or {}, _LOGGING, "logging")
        request = _checked(sections.get("request") or {}, _REQUEST, "request")
        _require("name" in sections, "name: is missing; it names the run directory")
        device = model.pop("device", "auto")
        top = {key: request.pop(key) for key in ("weights", "gpu", "memory_limit_bytes") if key in request}
        try:
            return cls(
                name=sections["name"],
                description=sections.get("description", ""),
                device=device,
                request=Request.for_task(request.pop("task", "t2v-14B"), **request),
                strategy=Strategy(**model, **optimization),
                measurement=Measurement(**logging),
                **top,
            )
        except InputError as error:
            raise InputError(_dotted(str(error))) from error


_NUMBER = (int, float)
_OPTIONAL_INT = (int, type(None))
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
    type(None): "null",
}


def _checked(data: Any, allowed: Mapping[str, Any], section: str) -> dict[str, Any]:
    """The mapping with every key known and every value of its type."""
    prefix = f"{section}." if section else ""
    _require(isinstance(data, Mapping), f"{section}: must be a section of keys, not {data!r}")
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


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML without duplicate keys and without aliases, which can blow a small file up to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' appears twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _explain(error: yaml.YAMLError, text: str) -> tuple[str, int]:
    """(what is wrong, line)"""
    if isinstance(error, yaml.reader.ReaderError):
        return "a control character is not allowed", text.count("\n", 0, error.position) + 1
    mark = getattr(error, "problem_mark", None)
    return getattr(error, "problem", None) or "malformed", mark.line + 1 if mark else 1


def load_config(path: Path) -> RunConfig:
    """Reads one YAML configuration. Raises InputError naming the file, the key and what is allowed."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path}: {path.stat().st_size} bytes; a configuration has at most {MAX_FILE_BYTES}")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        data = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        problem, where = _explain(error, text)
        raise InputError(f"{path}: is not valid YAML at line {where}: {problem}") from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}: is not valid YAML: {error}") from error
    try:
        return RunConfig.from_dict(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
