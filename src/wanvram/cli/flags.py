"""The official script's flags (spec section 7: same names, same defaults) and how they become a RunConfig."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wanvram import knobs
from wanvram.command_line import flag_of
from wanvram.config import Request, RunConfig, load_config
from wanvram.errors import InputError
from wanvram.input_files import read_text
from wanvram.machine.launched import launched
from wanvram.tasks import TASKS, normal_size

__all__ = ["add_knob_flags", "add_request_flags", "add_strategy_flags", "boolean", "config_from_flags", "of_gpus"]

# What the official script assumes when a flag is absent; with --config the file says it.
REQUEST_DEFAULTS: dict[str, Any] = {"task": "t2v-14B", "size": "1280*720"}
# fp16 is refused there; 2 steps of a tiny model take 1.11 s in fp32, 1.27 s in bf16 (2 cores)
CPU_PRECISION = "fp32"
MAX_PROMPT_FILE_BYTES = 8 * 1024 * 1024


def boolean(text: str) -> bool:
    """`True`, `false`, `1`, `no` as the official script accepts them."""
    value = text.strip().lower()
    if value in ("true", "t", "yes", "y", "1"):
        return True
    if value in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is not a boolean; write True or False")


def _add_boolean(group: argparse._ArgumentGroup, flag: str, help: str, dest: str | None = None) -> None:
    group.add_argument(flag, dest=dest, type=boolean, nargs="?", const=True, metavar="BOOL", help=help)


def add_request_flags(parser: argparse.ArgumentParser) -> None:
    """Absent flags are None: the file of --config, or the official default, decides."""
    add = parser.add_argument_group("request").add_argument
    add("--config", type=Path, metavar="FILE.yaml", help="the same as YAML; flags override the file")
    add("--task", choices=sorted(TASKS), help="default: t2v-14B")
    size = "width*height, also 832x480, 480p, 720p (default: 1280*720)"
    add("--size", help=f"{size}; for i2v and flf2v the area, the picture gives the ratio")
    add("--frame_num", type=int, help="frames, 4n+1 (default: 81, 1 for t2i)")
    add("--sample_steps", type=int, help="default: 50, 40 for i2v")
    add("--sample_shift", type=float, help="default: 5.0 (3.0 for i2v at 480p, 16 for flf2v and vace)")
    add("--sample_guide_scale", type=float, help="default: 5.0")
    add("--sample_solver", choices=("unipc", "dpm++"), help="default: unipc")
    add("--base_seed", type=int, help="default: -1, a random seed")
    add("--prompt", help="what the video shows")
    add("--prompt_file", type=Path, metavar="FILE", help="one prompt per line; the models are loaded once for all")
    add("--negative_prompt", help="default: the official one of the task")
    add = parser.add_argument_group("pictures and videos").add_argument
    add("--image", metavar="FILE", help="i2v: the first frame")
    add("--first_frame", metavar="FILE", help="flf2v: the first frame")
    add("--last_frame", metavar="FILE", help="flf2v: the last frame")
    add("--src_video", metavar="FILE", help="vace: the video to change")
    add("--src_mask", metavar="FILE", help="vace: a video that is white where the source is to be remade")
    add("--src_ref_images", metavar="FILE,FILE", help="vace: pictures of what is to appear")
    extend = parser.add_argument_group("prompt extension")
    add = extend.add_argument
    _add_boolean(extend, "--use_prompt_extend", "let a language model rewrite the prompt (default: False)")
    add("--prompt_extend_method", choices=("local_qwen", "dashscope"), help="default: local_qwen")
    add("--prompt_extend_model", help="model directory or name (default: Qwen2.5_14B; qwen-plus for dashscope)")
    add("--prompt_extend_target_lang", choices=("zh", "en"), help="default: zh")
    _add_boolean(
        extend, "--prompt_extend_optional", "go on with the prompt as it is if extending fails (default: False)"
    )


def add_strategy_flags(parser: argparse.ArgumentParser) -> None:
    add_knob_flags(parser.add_argument_group("strategy"), knobs.TABLE)


def add_knob_flags(group: argparse._ArgumentGroup, table: Sequence[knobs.Knob[Any]]) -> None:
    for knob in table:
        if isinstance(knob.default, bool):
            _add_boolean(group, knob.flag, knob.help, dest=knob.name)
        else:
            kind = str if knob.choices else int
            group.add_argument(knob.flag, dest=knob.name, type=kind, choices=knob.choices or None, help=knob.help)


def config_from_flags(
    args: argparse.Namespace,
    *,
    device: str | None,
    weights: str | None,
    gpu: str | None,
    memory_limit_bytes: int | None,
    base: RunConfig | None = None,
) -> RunConfig:
    """Checked RunConfig from --config (or `base` in its place) and the flags that override it; raises InputError naming the flag or
    key."""
    request, strategy = _given_request(args), of_gpus(_given(args, [knob.name for knob in knobs.TABLE]))
    others = {"weights": weights, "gpu": gpu, "memory_limit_bytes": memory_limit_bytes, "link": vars(args).get("link")}
    others = {key: value for key, value in others.items() if value is not None}
    data: dict[str, Any]
    if args.config is None and base is None:
        data = {"name": "flags", "description": "from command line flags"}
        data |= {"request": REQUEST_DEFAULTS | request | others}
        data |= _sections(_strategy_defaults(device) | _as_launched(strategy), device or "auto")
        config = _from_dict(data)
        r = config.request
        return dataclasses.replace(config, name=f"{r.task}-{r.size.replace('*', 'x')}-{r.frame_num}")
    data = (base or load_config(args.config)).to_dict()
    if "size" in request:
        request["size"] = normal_size(request.get("task", data["request"]["task"]), request["size"])
    if any(request.get(key, data["request"][key]) != data["request"][key] for key in ("task", "size")):
        _forget_defaults(data["request"])
    for section, values in _sections(strategy, device).items():
        data[section].update(values)
    if "prompts" in request or "prompt" in request:  # either replaces both of the file
        data["request"].update(prompt="", prompts=[])
    data["request"].update(request | others)
    return _from_dict(data)


def of_gpus(given: dict[str, Any]) -> dict[str, Any]:
    """A number of GPUs forgets the file's sizes, and a size its number: what the flags say is meant."""
    sizes = {knob.name: knob.default for knob in knobs.SIZES}
    number = {knobs.PARALLEL_DEGREE.name: knobs.PARALLEL_DEGREE.default}
    return (sizes if number.keys() & given.keys() else number if sizes.keys() & given.keys() else {}) | given


def _as_launched(given: dict[str, Any]) -> dict[str, Any]:
    """torchrun has said how many GPUs there are where no flag does, as to the official script with --dit_fsdp alone."""
    count, number = launched().size, knobs.PARALLEL_DEGREE
    said = count == 1 or any(given.get(knob.name, 1) != 1 for knob in (*knobs.SIZES, number))
    return given if said else given | {number.name: count}


def _strategy_defaults(device: str | None) -> dict[str, Any]:
    """What the official script assumes when a flag is absent; with --config the file says it."""
    assumed = {knob.name: knob.official for knob in knobs.TABLE if knob.official is not None}
    return assumed | ({knobs.PRECISION.name: CPU_PRECISION} if device == "cpu" else {})


def _from_dict(data: dict[str, Any]) -> RunConfig:
    """The sections of the YAML are of no use to somebody who gave flags: `request.size:` becomes `--size:`."""
    try:
        return RunConfig.from_dict(data)
    except InputError as error:
        section, dot, rest = str(error).partition(".")
        if not dot or section not in data:
            raise
        key, colon, sentence = rest.partition(":")
        raise InputError(f"{flag_of(key)}{colon}{sentence}") from error


def _sections(strategy: dict[str, Any], device: str | None) -> dict[str, dict[str, Any]]:
    data: dict[str, dict[str, Any]] = {"model_config": {} if device is None else {"device": device}}
    for knob in knobs.TABLE:
        if knob.name in strategy:
            data.setdefault(knob.section, {})[knob.name] = strategy[knob.name]
    return data


def _forget_defaults(request: dict[str, Any]) -> None:
    """The file's values that were its task's defaults follow the task and size of the flags."""
    defaults = Request.for_task(request["task"], size=request["size"])
    for key in ("frame_num", "sample_steps", "sample_shift", "sample_guide_scale", "negative_prompt"):
        if request[key] == getattr(defaults, key):
            del request[key]


def _given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Those of the flags that were given."""
    return {name: vars(args)[name] for name in names if vars(args).get(name) is not None}


def _given_request(args: argparse.Namespace) -> dict[str, Any]:
    given = _given(args, [field.name for field in dataclasses.fields(Request)])
    if args.src_ref_images is not None:
        given["src_ref_images"] = args.src_ref_images.split(",")
    if args.prompt_file is not None:
        given["prompts"] = _read_prompts(args.prompt_file)
    return given


def _read_prompts(path: Path) -> list[str]:
    """One prompt per line; empty lines do not count."""
    try:
        text = read_text(path, MAX_PROMPT_FILE_BYTES)
    except InputError as error:
        raise InputError(f"--prompt_file {error}") from error
    if "\0" in text:
        raise InputError(f"--prompt_file {path}: is not text but binary; write one prompt per line")
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise InputError(f"--prompt_file {path}: holds no prompt; write one per line")
    return prompts
