"""Checkpoint folders: which layout one has, the source and the model of each component, what a task needs of it.

Three layouts: the official download (names below), the Diffusers folders, and what `wanvram convert` writes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from wanvram.errors import CheckpointError
from wanvram.models.clip import CLIPVision
from wanvram.models.dit import WanDiT
from wanvram.models.precision import PRECISIONS
from wanvram.models.t5 import T5Encoder
from wanvram.models.vae import WanVAE
from wanvram.specs import CLIP, DIT, T5, VAE, DiTSpec
from wanvram.tasks import WAN21
from wanvram.weights.diffusers import TABLES, RenamedSource, is_diffusers, official_names, open_diffusers
from wanvram.weights.recognise import check_kind, comfy_files, explain, prefix_of
from wanvram.weights.sources import MANIFEST, ConvertedSource, SafetensorsSource, TensorSource, check_file, check_keys
from wanvram.weights.torch_files import TorchFileSource

__all__ = [
    "CLIP_FILE",
    "COMPONENTS",
    "DIT_FILE",
    "DIT_INDEX",
    "T5_FILE",
    "TOKENIZER_FILE",
    "VAE_FILE",
    "blueprint",
    "check_checkpoint",
    "check_model",
    "identify",
    "layout",
    "open_checkpoint",
    "open_official",
    "spec_beside",
    "tokenizer_file",
]

COMPONENTS = tuple(model.name for model in WAN21.components)
(T5_FILE,), (CLIP_FILE,), (DIT_FILE, DIT_INDEX), (VAE_FILE,) = (model.files for model in WAN21.components)
TOKENIZER_FILE = "google/umt5-xxl/tokenizer.json"

EXTRAS = ("spiece_model",)  # ComfyUI keeps the text encoder's vocabulary among its tensors
_FILES = {model.name: model.files[0] for model in WAN21.components if model.kind != "dit"}
_SPECS: dict[str, dict[str, Any]] = {"dit": DIT, "text_encoder": T5, "image_encoder": CLIP, "vae": VAE}


def layout(ckpt_dir: Path) -> Literal["official", "diffusers", "converted", "comfy"]:
    """What kind of folder this is; CheckpointError if it is none. An unknown one counts as official."""
    if not ckpt_dir.is_dir():
        missing = CheckpointError(
            f"the checkpoint folder {ckpt_dir} does not exist; expected an official Wan2.1 download, "
            "a Diffusers folder or one written by wanvram convert"
        )
        raise explain(ckpt_dir, missing)
    if (ckpt_dir / MANIFEST).exists():
        return "converted"
    names = (*_FILES.values(), DIT_FILE, DIT_INDEX)
    official = any(
        (ckpt_dir / name).exists() or (ckpt_dir / name).with_suffix(".safetensors").exists() for name in names
    )
    if (ckpt_dir / "model_index.json").exists():
        return "diffusers"
    folders = any((ckpt_dir / name).is_dir() for name in ("transformer", "text_encoder"))  # vae/ is in either layout
    if not official and not folders and comfy_files(ckpt_dir):
        return "comfy"
    return "official" if official or not is_diffusers(ckpt_dir) else "diffusers"


def open_checkpoint(ckpt_dir: Path, component: str) -> TensorSource:
    """The tensors of one component under their official names, from any layout. Raises CheckpointError, nothing else."""
    kind = layout(ckpt_dir)
    if kind == "converted":
        return ConvertedSource(ckpt_dir, component)
    if kind == "comfy":
        return _open_comfy(ckpt_dir, component)
    source = open_diffusers(ckpt_dir, component) if kind == "diffusers" else open_official(ckpt_dir, component)
    check_kind(source.keys(), ckpt_dir)
    return source


def _open_comfy(ckpt_dir: Path, component: str) -> TensorSource:
    """Of ComfyUI's single files the one that holds the component, whatever its name."""
    found = comfy_files(ckpt_dir).get(component, [])
    if not found:
        raise CheckpointError(f"{ckpt_dir} has no file of the {component}")
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:3])
        raise CheckpointError(f"{ckpt_dir} has {len(found)} files of the {component}: {names}; leave the one to use")
    return _single_file(SafetensorsSource(found), component)


def _single_file(source: TensorSource, component: str) -> TensorSource:
    """A file of others under the official names: without ComfyUI's prefix, and with the names of Diffusers translated."""
    prefix = prefix_of(source.keys(), component)
    keys = {key[len(prefix) :]: key for key in source.keys() if key.startswith(prefix) and key not in EXTRAS}  # noqa: SIM118
    names = official_names(keys, TABLES[component])
    return RenamedSource(source, {official: [keys[part] for part in parts] for official, parts in names.items()})


def open_official(ckpt_dir: Path, component: str) -> TensorSource:
    """One component of an official folder. Where the .pth is missing, safetensors of the same name are taken."""
    layout(ckpt_dir)
    names = (DIT_FILE, DIT_INDEX) if component == "dit" else (_FILES[component],)
    present = any(
        os.path.lexists(p) for name in names for p in (ckpt_dir / name, (ckpt_dir / name).with_suffix(".safetensors"))
    )
    if not present and component in comfy_files(ckpt_dir):
        return _open_comfy(ckpt_dir, component)
    if component == "dit":
        return _open_dit(ckpt_dir)
    path = ckpt_dir / _FILES[component]
    source: TensorSource
    if not path.exists() and path.with_suffix(".safetensors").exists():
        # Such files are made by others, from the official weights or from those of transformers.
        source = _single_file(SafetensorsSource([path.with_suffix(".safetensors")]), component)
    else:
        source = TorchFileSource(path)
    if component != "image_encoder":
        return source
    # The CLIP file also holds a text tower that Wan does not run.
    return RenamedSource(source, {key: (key,) for key in source.keys() if key.startswith("visual.")})  # noqa: SIM118


def _open_dit(ckpt_dir: Path) -> TensorSource:
    if (ckpt_dir / DIT_INDEX).exists():
        return SafetensorsSource.from_index(ckpt_dir / DIT_INDEX)
    if not (ckpt_dir / DIT_FILE).exists():
        raise CheckpointError(f"{ckpt_dir} has no transformer weights; expected {DIT_FILE} or {DIT_INDEX}")
    source = SafetensorsSource([ckpt_dir / DIT_FILE])
    return _single_file(source, "dit") if prefix_of(source.keys(), "dit") else source


def tokenizer_file(ckpt_dir: Path) -> Path:
    """The umT5 tokenizer.json of a folder of any layout. Raises CheckpointError."""
    name = TOKENIZER_FILE if layout(ckpt_dir) in ("official", "comfy") else "tokenizer/tokenizer.json"
    check_file(ckpt_dir / name, f"the umt5-xxl tokenizer ({name})")
    return ckpt_dir / name


def blueprint(component: str, spec: str, precision: str = "bf16") -> tuple[nn.Module, list[nn.Module]]:
    """The component's module on meta and its blocks. `spec`: its key in wanvram.specs; precision matters to the dit only."""
    with torch.device("meta"):
        if component == "dit":
            dit = WanDiT(DIT[spec], PRECISIONS[precision])
            return dit, [*dit.blocks, *getattr(dit, "vace_blocks", ())]
        if component == "text_encoder":
            t5 = T5Encoder(T5[spec], torch.bfloat16)  # as official stores and runs it
            return t5, list(t5.blocks)
        if component == "image_encoder":
            clip = CLIPVision(CLIP[spec], torch.float16)  # as official runs it
            return clip, list(clip.visual.transformer)
        return WanVAE(VAE[spec], torch.float32), []


def identify(component: str, source: TensorSource) -> str:
    """Key of the spec whose tensors `source` holds; of equal ones the first. CheckpointError if it is none."""
    if component == "dit":
        found = _shape_of_dit(source)
        matches = [name for name, spec in DIT.items() if _shape_of_spec(spec) == found]
        if not matches:
            known = ", ".join(name for name in DIT if not name.startswith("tiny-"))
            raise CheckpointError(f"the transformer is none of {known}: it has {_described(found)}")
        check_model(component, source, matches[0])
        return matches[0]
    names = list(_SPECS[component])
    for name in names[1:]:
        try:
            check_model(component, source, name)
        except CheckpointError:
            continue
        return name
    check_model(component, source, names[0])
    return names[0]


def check_model(component: str, source: TensorSource, spec: str) -> None:
    """CheckpointError, naming the model it is instead where that is known, unless `source` holds the model `spec`."""
    if component == "dit" and _shape_of_dit(source) != _shape_of_spec(DIT[spec]):
        raise CheckpointError(
            f"the transformer is not that of {spec}: it has {_described(_shape_of_dit(source))} "
            f"instead of {_described(_shape_of_spec(DIT[spec]))}"
        )
    module, _ = blueprint(component, spec)
    expected = {key: tuple(parameter.shape) for key, parameter in module.named_parameters()}
    unused = module.unused_keys() if isinstance(module, CLIPVision) else []
    check_keys(expected, source, f"{component} {spec}", ignored=unused)


# Width, input channels, blocks, VACE blocks, and whether it takes one image, two (with positions) or none.
_DiTShape = tuple[int, int, int, int, int]


def _shape_of_spec(spec: DiTSpec) -> _DiTShape:
    return spec.dim, spec.in_dim, spec.num_layers, len(spec.vace_layers), spec.images


def _shape_of_dit(source: TensorSource) -> _DiTShape:
    keys = source.keys()
    patches = (*(source.shape("patch_embedding.weight") if "patch_embedding.weight" in keys else ()), 0, 0)
    blocks, vace = (len({k.split(".")[1] for k in keys if k.startswith(p)}) for p in ("blocks.", "vace_blocks."))
    images = 2 if "img_emb.emb_pos" in keys else int(any(key.startswith("img_emb.") for key in keys))
    return patches[0], patches[1], blocks, vace, images


def _described(shape: _DiTShape) -> str:
    width, channels, blocks, vace, images = shape
    name = next((name for name, spec in DIT.items() if _shape_of_spec(spec) == shape), None)
    text = f"{blocks} blocks of width {width} for {channels} input channels"
    text += f" and {vace} VACE blocks" if vace else ""
    text += f" and {images} image{'s'[: images - 1]}" if images else ""
    return text + (f" ({name})" if name else "")


def check_checkpoint(ckpt_dir: Path, components: Sequence[str], dit: str | None = None) -> dict[str, TensorSource]:
    """The components' sources, opened, every file of which is there with a whole header; no tensor is read. CheckpointError.

    dit: key of specs.DIT; then every component must also have the tensors of that model. The first problem is told in
    full, other components with problems by name.
    """
    problems: dict[str, str] = {}
    sources: dict[str, TensorSource] = {}
    for component in components:
        try:
            sources[component] = open_checkpoint(ckpt_dir, component)
            if dit is not None:
                check_model(component, sources[component], spec_beside(component, dit))
            if component == "text_encoder":
                tokenizer_file(ckpt_dir)
        except CheckpointError as error:
            where = "" if str(ckpt_dir) in str(error) else f"{ckpt_dir}: "
            problems[component] = where + str(error)
    if problems:
        first, *others = problems
        also = f" ({', '.join(others)}: not usable either)" if others else ""
        raise explain(ckpt_dir, CheckpointError(problems[first] + also))
    return sources


def spec_beside(component: str, dit: str) -> str:
    """The other components' spec: `tiny-` transformers come with tiny ones."""
    if component == "dit":
        return dit
    return next(name for name in _SPECS[component] if (name == "tiny") == dit.startswith("tiny-"))
