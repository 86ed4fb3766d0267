"""File names of the official Wan2.1 checkpoint folders, and the source each component is read from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from wanvram.errors import CheckpointError
from wanvram.weights.sources import FilteredSource, SafetensorsSource, TensorSource, TorchFileSource

__all__ = ["CLIP_FILE", "DIT_FILE", "DIT_INDEX", "T5_FILE", "TOKENIZER_FILE", "VAE_FILE", "Component", "open_official"]

Component = Literal["text_encoder", "image_encoder", "dit", "vae"]

T5_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
VAE_FILE = "Wan2.1_VAE.pth"
DIT_FILE = "diffusion_pytorch_model.safetensors"
DIT_INDEX = "diffusion_pytorch_model.safetensors.index.json"
TOKENIZER_FILE = "google/umt5-xxl/tokenizer.json"


def open_official(ckpt_dir: Path, component: Component) -> TensorSource:
    """The tensors of one component under their official names. Raises CheckpointError, never anything else."""
    if not ckpt_dir.is_dir():
        raise CheckpointError(f"the checkpoint folder {ckpt_dir} does not exist; expected an official Wan2.1 download")
    if component == "text_encoder":
        return TorchFileSource(ckpt_dir / T5_FILE)
    if component == "vae":
        return TorchFileSource(ckpt_dir / VAE_FILE)
    if component == "image_encoder":
        # The file also holds a text tower that Wan does not run.
        return FilteredSource(TorchFileSource(ckpt_dir / CLIP_FILE), "visual.")
    if (ckpt_dir / DIT_INDEX).exists():
        return SafetensorsSource.from_index(ckpt_dir / DIT_INDEX)
    if not (ckpt_dir / DIT_FILE).exists():
        raise CheckpointError(f"{ckpt_dir} has no transformer weights; expected {DIT_FILE} or {DIT_INDEX}")
    return SafetensorsSource([ckpt_dir / DIT_FILE])
