"""RunConfig = Request (what) + Strategy (how) + Measurement (what to record), from strict YAML or from flags. No torch.

Every error is one InputError sentence that names the file, the key and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from wanvram import knobs
from wanvram.errors import InputError, require
from wanvram.request import Request, Video, is_unicode
from wanvram.sharing import LINKS, Place
from wanvram.specs import DIT
from wanvram.strict_yaml import MAX_BYTES, read_strict_yaml
from wanvram.units import MIB

__all__ = ["MAX_NAME_BYTES", "Measurement", "Request", "RunConfig", "Strategy", "load_config"]

MAX_NAME_BYTES = 200  # file systems take 255; a suffix, a number or the mark of an unfinished file must still fit
_SECTIONS = (knobs.MODEL, knobs.OPTIMIZATION)  # of knobs
DEVICES = ("auto", "cuda", "cpu", "simulated")


@dataclass(frozen=True)
class Strategy:
    """How to run: every choice that changes memory or time. See docs/strategy.md for what each costs.

    weights_in: where streamed blocks wait, pinned or pageable RAM or the checkpoint's files. resident_blocks: how many of the
    transformer's blocks stay on the device all the same. residual_in: where its residual stream is. weight_storage fp8: the
    transformer's matrices, lossy. product_precision fp8: they are multiplied so, too, lossy. vae_tile: edge in latent pixels (8 video
    pixels each), None: whole frames. vae_precision other than fp32: lossy. attention_backend: what computes the attention of the
    transformer.
    """

    precision: str = knobs.PRECISION.default
    load_strategy: str = knobs.LOAD_STRATEGY.default
    offload: bool = knobs.OFFLOAD.default
    t5_cpu: bool = knobs.T5_CPU.default
    attention_slicing: bool = knobs.ATTENTION_SLICING.default
    attention_backend: str = knobs.ATTENTION.default
    rows_per_chunk: int | None = knobs.ROWS_PER_CHUNK.default
    cfg: str = knobs.CFG.default
    weights_in: str = knobs.WEIGHTS_IN.default
    resident_blocks: int = knobs.RESIDENT_BLOCKS.default
    residual_in: str = knobs.RESIDUAL_IN.default
    weight_storage: str = knobs.WEIGHT_STORAGE.default
    product_precision: str = knobs.PRODUCT_PRECISION.default
    vae_tile: int | None = knobs.VAE_TILE.default
    vae_precision: str = knobs.VAE_PRECISION.default
    expandable_segments: bool = knobs.EXPANDABLE_SEGMENTS.default
    gradient_checkpointing: bool = knobs.GRADIENT_CHECKPOINTING.default
    batch_size: int = knobs.BATCH_SIZE.default
    micro_batch_size: int | None = knobs.MICRO_BATCH_SIZE.default
    cfg_size: int = knobs.CFG_SIZE.default
    parallel_degree: int = knobs.PARALLEL_DEGREE.default
    ulysses_size: int = knobs.ULYSSES_SIZE.default
    ring_size: int = knobs.RING_SIZE.default
    exchange_by: str = knobs.EXCHANGE.default
    t5_fsdp: bool = knobs.T5_FSDP.default
    dit_fsdp: bool = knobs.DIT_FSDP.default

    def __post_init__(self) -> None:
        for knob in knobs.TABLE:
            knob.check(self)


@dataclass(frozen=True)
class Measurement:
    """What to record. log_interval: every n-th denoising step is recorded block by block.

    trace, or a trace_path inside the run directory: a few steps are traced by torch.profiler in a pass of its own. keep_every:
    after so many steps a video's latents are kept to go on from; None: about every two minutes, 0: never.
    """

    profile_memory: bool = True
    log_interval: int = 10
    trace: bool = False
    trace_path: str | None = None
    snapshot: bool = False
    keep_every: int | None = None

    def __post_init__(self) -> None:
        require(self.log_interval >= 1, f"log_interval: {self.log_interval} must be at least 1")
        every = self.keep_every
        said = "must be at least 0 (never), or absent: about every two minutes"
        require(every is None or every >= 0, f"keep_every: {every} {said}")
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
    def is_traced(self) -> bool:
        return self.trace or self.trace_path is not None

    @property
    def trace_directory(self) -> str:
        """Relative to the run directory."""
        return self.trace_path or "trace"


@dataclass(frozen=True)
class RunConfig:
    """One complete configuration. weights: random, tiny or a checkpoint directory. gpu: which card to simulate; link: what joins
    several of them there (None: what usually does).
    """

    name: str
    description: str
    device: str
    request: Request
    strategy: Strategy = field(default_factory=Strategy)
    measurement: Measurement = field(default_factory=Measurement)
    weights: str = "random"
    gpu: str | None = None
    memory_limit_bytes: int | None = None
    link: str | None = None

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
        require(self.link in (None, *LINKS), f"link: '{self.link}'; choose one of {', '.join(LINKS)}")
        require(self.device in DEVICES, f"device: '{self.device}'; choose one of {', '.join(DEVICES)}")
        require(
            not (self.device == "cpu" and self.strategy.precision == "fp16"),
            "precision: fp16 has no fast CPU kernels; use bf16 or fp32 with device cpu",
        )
        for knob, what in ((knobs.ATTENTION, "computes on NVIDIA GPUs"), (knobs.EXCHANGE, "is how GPUs exchange")):
            said = f"{knob.name}: {knob.of(self.strategy)} {what}; with device cpu leave it at {knob.default}"
            require(self.device != "cpu" or not knob.differs(self.strategy), said)
        dit = DIT[self.request.facts.dit]
        heads = (DIT["tiny-" + dit.model_type] if self.weights == "tiny" else dit).num_heads
        sharing = knobs.ULYSSES_SIZE.of(self.strategy)
        require(
            sharing <= heads,
            f"{knobs.ULYSSES_SIZE.name}: {sharing} GPUs cannot share {heads} heads; give at most {heads}",
        )
        blocks, resident = dit.block_count, self.strategy.resident_blocks
        require(
            self.weights == "tiny" or resident <= blocks,  # tiny transformers have few blocks: there it means all
            f"resident_blocks: {resident}, but the transformer of {self.request.task} has {blocks} blocks; give at most that many",
        )
        require(
            self.strategy.cfg_size == 1 or self.request.guided,
            "cfg_size: 2 GPUs share two guidance passes, and sample_guide_scale 1 takes one; leave it at 1",
        )
        require(
            not (knobs.RESIDUAL_IN.differs(self.strategy) and self.request.facts.takes_source),
            f"{knobs.RESIDUAL_IN.name}: pinned keeps one stream, and {self.request.task} has a second one for the source video; use "
            "device",
        )
        together, prompts = knobs.BATCH_SIZE.of(self.strategy), self.request.all_prompts()
        require(
            together <= len(prompts) or len(prompts) == 1,
            f"{knobs.BATCH_SIZE.name}: {together}, but there are {len(prompts)} prompts; give at most that many",
        )
        last = self.videos()[-1].seed
        require(
            last < 2**63,
            f"base_seed: {self.request.base_seed} leaves no seed for {together} videos; the last is 2^63-1",
        )

    @property
    def gpus(self) -> int:
        """How many make the videos together."""
        return knobs.sizes_together(self.strategy)

    def place(self, rank: int) -> Place:
        """Of one of these GPUs among the others."""
        sizes = (knob.of(self.strategy) for knob in (knobs.ULYSSES_SIZE, knobs.RING_SIZE, knobs.CFG_SIZE))
        return Place(rank, *sizes)

    def videos(self) -> tuple[Video, ...]:
        """What is made, in order."""
        return self.request.videos(knobs.BATCH_SIZE.of(self.strategy))

    def notes(self) -> list[str]:
        """What was asked for and is lossy, or is accepted and changes nothing; to be shown with the result."""
        notes = knobs.lossy_notes(self.strategy)
        if self.strategy.gradient_checkpointing:
            notes.append("gradient_checkpointing has no effect: inference keeps no gradients")
        if knobs.CFG.differs(self.strategy) and not self.request.guided:
            notes.append(
                f"{knobs.CFG.name} has no effect with sample_guide_scale 1, which takes one pass and no negative prompt"
            )
        if self.link is not None and self.gpus == 1:
            notes.append(f"link: {self.link} has no effect on one GPU; it joins several")
        return notes

    def to_dict(self) -> dict[str, Any]:
        """The YAML's sections as plain values; `from_dict` is its inverse."""
        chosen: dict[str, dict[str, Any]] = {
            name: {k.name: k.of(self.strategy) for k in knobs.TABLE if k.section == name} for name in _SECTIONS
        }
        chosen[knobs.MODEL]["device"] = self.device
        request = dataclasses.asdict(self.request)  # tuples are lists in YAML
        return {
            "name": self.name,
            "description": self.description,
            **chosen,
            "logging": dataclasses.asdict(self.measurement),
            "request": {key: list(value) if isinstance(value, tuple) else value for key, value in request.items()}
            | {key: getattr(self, key) for key in _OWN},
        }

    def to_yaml(self) -> str:
        """What `load_config` reads."""
        return str(yaml.safe_dump(self.to_dict(), allow_unicode=True, sort_keys=False))

    @classmethod
    def from_dict(cls, data: Any) -> RunConfig:
        """Strict: unknown keys and wrong types are InputErrors naming the dotted key."""
        require(isinstance(data, Mapping), "the configuration is not a mapping of sections")
        sections = _checked(data, _TOP, "")
        model, optimization, logging, request = (
            _checked(sections.get(name, {}), keys, name) for name, keys in _sections().items()
        )
        require("name" in sections, "name: is missing; it names the run directory")
        device = model.pop("device", "auto")
        top = {key: request.pop(key) for key in _OWN if key in request}
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


_TOP = {"name": (str,), "description": (str,)} | dict.fromkeys((*_SECTIONS, "logging", "request"), (dict,))
_OWN = ("weights", "gpu", "memory_limit_bytes", "link")  # of RunConfig, beside what is asked for
_TYPE_NAMES: dict[type, str] = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "a section",
    list: "a list",
    type(None): "null",
}


def _sections() -> dict[str, dict[str, tuple[type, ...]]]:
    """Keys and types of every section, as the dataclasses have them."""
    chosen, own = _types(Strategy), _types(RunConfig)
    of_knobs = {name: {k.name: chosen[k.name] for k in knobs.TABLE if k.section == name} for name in _SECTIONS}
    of_knobs[knobs.MODEL]["device"] = own["device"]
    return of_knobs | {"logging": _types(Measurement), "request": _types(Request) | {key: own[key] for key in _OWN}}


def _types(cls: type) -> dict[str, tuple[type, ...]]:
    return {name: _kinds(hint) for name, hint in get_type_hints(cls).items()}


def _kinds(hint: Any) -> tuple[type, ...]:
    """As YAML has them: a tuple is a list, and a whole number is a number, too."""
    if isinstance(hint, UnionType):
        return tuple(kind for part in get_args(hint) for kind in _kinds(part))
    if get_origin(hint) is tuple:
        return (list,)
    return (int, float) if hint is float else (hint,)


def _owner(key: str) -> str | None:
    """The section that a key belongs to."""
    return next((section for section, keys in _sections().items() if key in keys), None)


def _checked(data: Mapping[str, Any], allowed: Mapping[str, tuple[type, ...]], section: str) -> dict[str, Any]:
    """The mapping with every key known and every value of its type."""
    prefix = f"{section}." if section else ""
    for key, value in data.items():
        if key not in allowed:
            raise InputError(f"{prefix}{key}: unknown key; {_hint(str(key), allowed)}allowed: {', '.join(allowed)}")
        kinds = allowed[key]
        wrong = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        if wrong:
            names = " or ".join(_TYPE_NAMES[kind] for kind in kinds)
            quotes = " (write it without quotes)" if isinstance(value, str) and str not in kinds else ""
            raise InputError(f"{prefix}{key}: {_shortened(value)} is not {names}{quotes}")
    return dict(data)


def _tupled(request: dict[str, Any]) -> dict[str, Any]:
    for key, value in request.items():
        for item in value if isinstance(value, list) else ():
            require(isinstance(item, str), f"{key}: {_shortened(item)} is not text")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in request.items()}


def _hint(key: str, allowed: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, list(allowed))  # the closest first
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
