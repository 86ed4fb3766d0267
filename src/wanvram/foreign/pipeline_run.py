"""A diffusers pipeline from its folder's configurations, run once on the simulated card with few steps."""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from wanvram.errors import InputError, WanvramError
from wanvram.foreign.components import DTYPES, built_component, diffusers_class, offline
from wanvram.foreign.cuda_api import patched
from wanvram.foreign.errors import SimulatedOutOfMemory
from wanvram.foreign.pipeline_folder import PipelineFolder
from wanvram.foreign.session import SimulatedRun
from wanvram.foreign_text import shown

__all__ = ["OFFLOADS", "PipelineCall", "run_pipeline"]

# Solvers of second order keep two results before and correct from the third step on; later steps take no more.
STEPS = 3
OFFLOADS = ("none", "model", "sequential", "group")


@dataclass(frozen=True)
class PipelineCall:
    """height, width, num_frames: None as the pipeline has it. dtype, vae_dtype: of DTYPES."""

    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    offload: str = "none"
    dtype: str = "bf16"
    vae_dtype: str = "bf16"


def run_pipeline(folder: PipelineFolder, call: PipelineCall, run: SimulatedRun) -> None:
    """Stages: load, then every component that is called. `run.fits` is False where the card is too small.

    Raises InputError that names the component that cannot be built, or what the pipeline needs beside.
    """
    with offline(), warnings.catch_warnings():
        _quiet()
        kind = diffusers_class("diffusers", folder.kind, f"the pipeline of {shown(folder.path)}")
        if not issubclass(kind, import_module("diffusers").DiffusionPipeline):
            raise InputError(f"{shown(folder.path)}: {folder.kind} is no pipeline of diffusers")
        arguments = _arguments(kind, folder, call)
        try:
            with run.stage("load"):
                pipe = _built(kind, folder, call)
                _placed(pipe, call.offload)
            with _named_stages(pipe, run), _plain_prompts(kind):
                pipe(**arguments)
        except SimulatedOutOfMemory as error:
            run.refuse(error)
        except WanvramError:
            raise
        except Exception as error:
            said = shown(str(error).strip().partition("\n")[0] or type(error).__name__, 200)
            raise InputError(f"{folder.kind} cannot be run from its configurations: {said}") from error


def _quiet() -> None:
    """What the two packages would say of absent weights, packages and older calls is not of this run."""
    warnings.simplefilter("ignore")
    for name in ("transformers", "diffusers"):
        if find_spec(name) is not None:
            import_module(f"{name}.utils.logging").set_verbosity_error()


def _built(kind: Any, folder: PipelineFolder, call: PipelineCall) -> Any:
    known = inspect.signature(kind.__init__).parameters
    parts: dict[str, Any] = dict.fromkeys(name for name in folder.absent if name in known)
    for component in folder.components:
        if component.name in known:
            dtype = DTYPES[call.vae_dtype if component.name == "vae" else call.dtype]
            parts[component.name] = built_component(component, dtype)
    parts |= {name: value for name, value in folder.options.items() if name in known}
    for name, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and name not in (*parts, "self"):
            raise InputError(f"{folder.kind} needs a component {name}, which model_index.json does not name")
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _placed(pipe: Any, offload: str) -> None:
    """As in diffusers' documentation; group: leaf by leaf, with a stream."""
    if offload == "none":
        pipe.to("cuda")
    elif offload == "model":
        pipe.enable_model_cpu_offload()
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        pipe.enable_group_offload(onload_device=torch.device("cuda"), offload_type="leaf_level", use_stream=True)


@contextmanager
def _named_stages(pipe: Any, run: SimulatedRun) -> Iterator[None]:
    """A stage for every call of a component, around whatever offloading puts there."""
    names = {id(part): name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    for name, part in pipe.components.items():
        for entry in ("encode", "decode"):
            if id(part) in names and callable(getattr(part, entry, None)):
                setattr(part, entry, _staged(getattr(part, entry), f"{name}.{entry}", run))
    plain = torch.nn.Module.__call__

    def called(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        name = names.get(id(module))
        return plain(module, *args, **kwargs) if name is None else _staged(plain, name, run)(module, *args, **kwargs)

    with patched([(torch.nn.Module, "__call__", called)]):
        yield


def _staged(plain: Callable[..., Any], name: str, run: SimulatedRun) -> Callable[..., Any]:
    @functools.wraps(plain)
    def staged(*args: Any, **kwargs: Any) -> Any:
        with run.stage(name):
            return plain(*args, **kwargs)

    return staged


# --- the call ----------------------------------------------------------------------------------------------------------------


def _arguments(kind: Any, folder: PipelineFolder, call: PipelineCall) -> dict[str, Any]:
    """Of the pipeline's own call: prompt, size and pictures; everything else as it is by default."""
    known = inspect.signature(kind.__call__).parameters
    found: dict[str, Any] = {}
    for name in ("height", "width", "num_frames"):
        value = getattr(call, name)
        if value is not None:
            if name not in known:
                raise InputError(f"--{name}: {folder.kind} takes no {name}")
            found[name] = value
    standard: dict[str, Any] = {"prompt": "a", "num_inference_steps": STEPS}
    for name in ("image", "mask_image", "video"):
        if name in known:
            standard[name] = _picture(name, known, call)
    found |= {name: value for name, value in standard.items() if name in known}
    for name, parameter in known.items():
        varies = parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if parameter.default is inspect.Parameter.empty and not varies and name not in (*found, "self"):
            raise InputError(f"{folder.kind} needs {name}, for which there is no standard value here: write a script")
    return found


def _picture(name: str, known: Any, call: PipelineCall) -> Any:
    """Black, of the size that is asked for; several for a video."""
    sizes = {}
    for side in ("width", "height"):
        usual = known[side].default if side in known else None
        sizes[side] = getattr(call, side) or (usual if isinstance(usual, int) else 512)
    made = import_module("PIL.Image").new("L" if name == "mask_image" else "RGB", (sizes["width"], sizes["height"]))
    return [made] * (call.num_frames or 1) if name == "video" else made


@contextmanager
def _plain_prompts(kind: Any) -> Iterator[None]:
    """Prompts are not tidied up, for which diffusers needs ftfy."""
    modules = [sys.modules[base.__module__] for base in kind.__mro__ if base.__module__.startswith("diffusers.")]
    tidying = [module for module in dict.fromkeys(modules) if hasattr(module, "prompt_clean")]
    with patched([(module, "prompt_clean", lambda prompt: prompt) for module in tidying]):
        yield
