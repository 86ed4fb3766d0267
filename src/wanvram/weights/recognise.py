"""What a folder or file is that is no checkpoint as it stands, and what to do: asked only after it could not be opened.

Facts: ComfyUI's `model.diffusion_model.` prefix, `scaled_fp8`, `.scale_weight` and `.comfy_quant`; the suffixes of LoRA, LoHa and
LoKr files; the layouts of Wan2.2 (`high_noise_model/`, `Wan2.2_VAE.pth`, `transformer_2/`); the hub's cache (`snapshots/HASH`,
`*.incomplete`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from wanvram.errors import CheckpointError
from wanvram.input_files import whole
from wanvram.knobs import PRECISION
from wanvram.tasks import WAN21
from wanvram.weights.sources import MANIFEST, SafetensorsSource, shown

__all__ = ["PREFIXES", "check_kind", "comfy_files", "explain", "prefix_of"]

MAX_FILES = 200  # of a folder that are looked at
# Of a transformer in a single file of ComfyUI or of a training program, longest first.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "net.")
# A name that only this component has: official or of the other layout, behind one of the prefixes.
_SIGNS = {
    "dit": ("", *PREFIXES),
    "text_encoder": ("", "text_encoders.umt5xxl.transformer.", "umt5xxl.transformer.", "transformer."),
    "image_encoder": ("", "clip_vision.", "model."),
    "vae": ("", "first_stage_model.", "vae."),
}
_NAMES = {
    "dit": ("patch_embedding.weight",),
    "text_encoder": ("shared.weight", "encoder.embed_tokens.weight", "token_embedding.weight"),
    "image_encoder": ("vision_model.embeddings.class_embedding", "visual.cls_embedding"),
    "vae": ("decoder.conv1.weight", "encoder.conv1.weight", "decoder.conv_in.weight"),
}
_BESIDE = {
    "dit": "the transformer (wan2.1_t2v_14B_fp16.safetensors or its like)",
    "text_encoder": "the text encoder (umt5_xxl_fp16.safetensors)",
    "vae": "the VAE (wan_2.1_vae.safetensors)",
    "image_encoder": "for tasks that start from pictures clip_vision_h.safetensors",
}
_OF_COMFY = ("diffusion_models", "unet", "checkpoints", "text_encoders", "clip", "clip_vision", "vae")
_COMFY_FOLDERS = ("", *_OF_COMFY, "split_files")
_LORA = re.compile(
    r"(^|[._])lora[._]?(A|B|up|down|a|b|mid)([._]|$)|^lora_(unet|te|transformer)|\.(hada_w\d|lokr_w\d|dora_scale|diff|diff_b)(\b|_)"
)
_QUANTISED = re.compile(
    r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale|input_scale|comfy_quant|absmax|quant_state(\..*)?|qweight|qzeros"
    r"|wscales|smooth_factor|proj_down)$"
)
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")  # a part of a file, found by its index only
_DOWNLOADING = ("*.incomplete", "*.aria2", "*.crdownload", "*.part", "*.download", "*.tmp")
_WANTED = (
    "an official Wan2.1 download, a Diffusers folder, ComfyUI's single files or a folder written by wanvram convert"
)


def prefix_of(keys: Iterable[str], component: str) -> str:
    """What stands before every name of the component in a single file; empty if nothing does."""
    return next(_prefixes(set(keys), component), "")


def _prefixes(present: set[str], component: str) -> Iterator[str]:
    """Behind which a name that only this component has is there."""
    return (p for p in _SIGNS[component] if any(p + name in present for name in _NAMES[component]))


def comfy_files(ckpt_dir: Path) -> dict[str, list[Path]]:
    """Component -> the safetensors files that hold it, perhaps with others, of the folder and of ComfyUI's own folders in it."""
    found: dict[str, list[Path]] = {}
    for path, keys in _safetensors(ckpt_dir):
        present = set() if _kind_of(keys) else set(keys)
        for component in (name for name in _SIGNS if any(True for _ in _prefixes(present, name))):
            found.setdefault(component, []).append(path)
    return found


def _safetensors(ckpt_dir: Path) -> list[tuple[Path, list[str]]]:
    """The readable files and their names."""
    folders = (*_COMFY_FOLDERS, *(f"split_files/{name}" for name in _OF_COMFY))
    paths = [path for name in folders for path in _glob(ckpt_dir / name, "*.safetensors")]
    return list(_readable(path for path in paths[:MAX_FILES] if not _SHARD.search(path.name)))


def _readable(paths: Iterable[Path]) -> Iterator[tuple[Path, list[str]]]:
    for path in paths:
        with suppress(CheckpointError):
            yield path, SafetensorsSource([path]).keys()


def check_kind(keys: Iterable[str], path: Path) -> None:
    """CheckpointError if these are the names of a LoRA or of quantised weights, which no component has."""
    kind = _kind_of(keys)
    if kind:
        raise CheckpointError(f"{path} {kind}")


def _kind_of(keys: Iterable[str]) -> str:
    present = list(keys)
    lora = [key for key in present if _LORA.search(key)]
    if lora and 2 * len(lora) >= len(present):
        return (
            f"is a LoRA ({len(present)} tensors such as {shown(lora[0])}): changes to a model, not a model. LoRAs are not applied; "
            f"give the checkpoint folder of the model, or one that the LoRA was merged into"
        )
    scales = [key for key in present if _QUANTISED.search(key)]
    if scales:
        return (
            f"is quantised (scaled fp8 or the like: {len(scales)} tensors such as {shown(scales[0])}), which is not read. Take the file "
            f"in fp16 or bf16; `wanvram convert {PRECISION.asked('fp8')}` makes small weights of it"
        )
    return ""


def explain(ckpt_dir: Path, error: CheckpointError) -> CheckpointError:
    """The error, or a better one where it is known what the folder is: what to do comes last."""
    instead = (_is_file, _is_hub_cache, _is_wan22, _is_no_model, _is_gguf, _is_elsewhere)
    said = next((said for question in instead if (said := question(ckpt_dir))), "")
    if said:
        return CheckpointError(said)
    beside = _is_unfinished(ckpt_dir) or _is_comfy(ckpt_dir)
    return CheckpointError(f"{error}. {beside}") if beside else error


def _is_file(path: Path) -> str:
    if not path.is_file():
        return ""
    if path.suffix == ".gguf":
        return f"{path} is a GGUF file, which is not read; give {_WANTED}"
    if path.suffix == ".safetensors":
        try:
            kind = _kind_of(SafetensorsSource([path]).keys())
        except CheckpointError as error:
            return str(error)
        if kind:
            return f"{path} {kind}"
    return f"{path} is a file; give the folder that holds it with the other components"


def _is_hub_cache(ckpt_dir: Path) -> str:
    snapshots = _glob(ckpt_dir / "snapshots", "*/")
    if snapshots and ((ckpt_dir / "refs").is_dir() or (ckpt_dir / "blobs").is_dir()):
        unfinished = len(_glob(ckpt_dir / "blobs", "*.incomplete"))
        left = f"; {unfinished} of its files are not downloaded to their end, run `hf download` again"
        left = left if unfinished else ""
        return f"{ckpt_dir} is a model in the hub's cache; give the folder of its files, {snapshots[-1]}{left}"
    models = _glob(ckpt_dir, "models--*/") or _glob(ckpt_dir / "hub", "models--*/")
    if models:
        inside = [path for model in models for path in _glob(model / "snapshots", "*/")]
        wan = [path for path in inside if "wan" in path.parts[-3].lower()] or inside or models
        return f"{ckpt_dir} is the hub's cache of {len(models)} models; give the folder of one model's files, such as {wan[0]}"
    beside = _glob(ckpt_dir.parent, "snapshots/*/") if ckpt_dir.name in ("blobs", "refs", "snapshots") else []
    return f"{ckpt_dir} is a part of the hub's cache; give the folder of the files, {beside[-1]}" if beside else ""


def _is_wan22(ckpt_dir: Path) -> str:
    both = [name for name in ("high_noise_model", "low_noise_model", "transformer_2") if (ckpt_dir / name).is_dir()]
    config = _config(ckpt_dir / "model_index.json") or _config(ckpt_dir / "config.json")
    inner = _config(ckpt_dir / "transformer" / "config.json")
    if (ckpt_dir.name in ("high_noise_model", "low_noise_model")) and (ckpt_dir / "config.json").is_file():
        both = [ckpt_dir.name]
    small = (ckpt_dir / "Wan2.2_VAE.pth").exists() or config.get("model_type") in ("ti2v", "s2v", "animate")
    small |= 48 in (config.get("in_dim"), inner.get("in_channels")) or bool(config.get("expand_timesteps"))
    what = ""
    if both or config.get("boundary_ratio"):
        what = f"a transformer for high and one for low noise: {', '.join(both) or 'boundary_ratio'}"
    elif small:
        what = "another VAE or input than Wan2.1's"
    return f"{ckpt_dir} holds Wan2.2 ({what}), which is not run; give a checkpoint of Wan2.1" if what else ""


def _is_no_model(ckpt_dir: Path) -> str:
    """A LoRA or quantised weights where no transformer is."""
    if "dit" in comfy_files(ckpt_dir):
        return ""
    folders = (*_COMFY_FOLDERS, "transformer")
    paths = islice((path for name in folders for path in _glob(ckpt_dir / name, "*.safetensors")), MAX_FILES)
    kinds = ((path, _kind_of(keys)) for path, keys in _readable(paths))
    return next((f"{path} {kind}" for path, kind in kinds if kind), "")


def _is_gguf(ckpt_dir: Path) -> str:
    found = [path for name in _COMFY_FOLDERS for path in _glob(ckpt_dir / name, "*.gguf")]
    if not found or _looks_whole(ckpt_dir):
        return ""
    return (
        f"{ckpt_dir} holds GGUF files ({found[0].name}), which are not read; give {_WANTED}. "
        f"`wanvram convert {PRECISION.asked('fp8')}` makes small weights of those"
    )


def _is_unfinished(ckpt_dir: Path) -> str:
    """Traces that downloading programs leave while they are at it, as in .cache/huggingface/download."""
    places = ("", "*/", "*/*/", "*/*/*/", "*/*/*/*/")
    found = [path for place in places for name in _DOWNLOADING for path in _glob(ckpt_dir, place + name)]
    if not found:
        return ""
    return (
        f"{ckpt_dir} is a download that did not finish: {len(found)} files are incomplete, such as "
        f"{found[0].relative_to(ckpt_dir)}. Run the same download again (`hf download ... --local-dir {ckpt_dir}`); it goes on where it was"
    )


def _is_elsewhere(ckpt_dir: Path) -> str:
    """A level too high or too low."""
    inside = [path for path in _glob(ckpt_dir, "*/") if _looks_whole(path)]
    inside = inside or [path for path in _glob(ckpt_dir, "*/*/") if _looks_whole(path)]
    if inside and not _looks_whole(ckpt_dir):
        others = f" (or one of {len(inside)} others)" if len(inside) > 1 else ""
        return f"{ckpt_dir} holds no checkpoint itself; give the folder {inside[0]} in it{others}"
    parent = whole(ckpt_dir).parent
    if (parent / "model_index.json").is_file() and (ckpt_dir / "config.json").is_file():
        return f"{ckpt_dir} is one component of a Diffusers folder; give the folder above it, {parent}"
    return ""


def _looks_whole(path: Path) -> bool:
    return any((path / name).is_file() for name in ("model_index.json", MANIFEST, *WAN21.component_of("dit").files))


def _is_comfy(ckpt_dir: Path) -> str:
    files = comfy_files(ckpt_dir)
    if not files or (not any(prefix_of(keys, "dit") for _, keys in _safetensors(ckpt_dir)) and _looks_whole(ckpt_dir)):
        return ""
    missing = [what for component, what in _BESIDE.items() if component not in files]
    held = ", ".join(f"{paths[0].name} ({component})" for component, paths in files.items())
    if not (ckpt_dir / "google" / "umt5-xxl" / "tokenizer.json").is_file():
        missing.append("google/umt5-xxl/tokenizer.json of an official download")
    return f"{ckpt_dir} holds ComfyUI's single files: {held}. They are read" + (
        f"; beside them belong {', '.join(missing)}" if missing else ""
    )


def _config(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(2**20).decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _glob(folder: Path, pattern: str) -> list[Path]:
    """Sorted, at most MAX_FILES, hidden folders too; nothing where the folder cannot be read."""
    try:
        only_folders = pattern.endswith("/")
        found = (path for path in folder.glob(pattern.rstrip("/")) if not only_folders or path.is_dir())
        return sorted(islice(found, MAX_FILES), key=os.fspath)
    except (OSError, ValueError):
        return []
