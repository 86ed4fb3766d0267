"""Folders of diffusers pipelines as they are published, without weights and with tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "write_pipeline"]

T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
CLIP = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CLIP |= {"projection_dim": 32}
IMAGE_VAE: dict[str, Any] = {
    "block_out_channels": [32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 4,
    "sample_size": 64,
}
FLOW = "FlowMatchEulerDiscreteScheduler"

# name of the component -> library, class, configuration; None: no file
KINDS: dict[str, dict[str, tuple[str, str, dict[str, Any] | None]]] = {
    "WanPipeline": {
        "scheduler": ("diffusers", "UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0}),
        "text_encoder": ("transformers", "UMT5EncoderModel", T5),
        "tokenizer": ("transformers", "T5TokenizerFast", None),
        "transformer": (
            "diffusers",
            "WanTransformer3DModel",
            {
                "num_attention_heads": 2,
                "attention_head_dim": 12,
                "text_dim": 32,
                "freq_dim": 32,
                "ffn_dim": 64,
                "num_layers": 2,
            },
        ),
        "vae": ("diffusers", "AutoencoderKLWan", {"base_dim": 8, "num_res_blocks": 1}),
    },
    "FluxPipeline": {
        "scheduler": ("diffusers", FLOW, {}),
        "text_encoder": ("transformers", "CLIPTextModel", CLIP),
        "text_encoder_2": ("transformers", "T5EncoderModel", T5),
        "tokenizer": ("transformers", "CLIPTokenizer", None),
        "tokenizer_2": ("transformers", "T5TokenizerFast", None),
        "transformer": (
            "diffusers",
            "FluxTransformer2DModel",
            {
                "in_channels": 16,
                "num_layers": 1,
                "num_single_layers": 1,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": 32,
                "pooled_projection_dim": 32,
                "axes_dims_rope": [4, 4, 8],
            },
        ),
        "vae": ("diffusers", "AutoencoderKL", IMAGE_VAE | {"scaling_factor": 0.4, "shift_factor": 0.1}),
    },
    "StableDiffusionXLPipeline": {
        "scheduler": ("diffusers", "EulerDiscreteScheduler", {}),
        "text_encoder": ("transformers", "CLIPTextModel", CLIP),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", CLIP),
        "tokenizer": ("transformers", "CLIPTokenizer", None),
        "tokenizer_2": ("transformers", "CLIPTokenizer", None),
        "unet": (
            "diffusers",
            "UNet2DConditionModel",
            {
                "sample_size": 32,
                "block_out_channels": [32, 64],
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
                "attention_head_dim": [2, 4],
                "cross_attention_dim": 64,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 80,
            },
        ),
        "vae": ("diffusers", "AutoencoderKL", IMAGE_VAE),
    },
    "LTXPipeline": {
        "scheduler": ("diffusers", FLOW, {}),
        "text_encoder": ("transformers", "T5EncoderModel", T5),
        "tokenizer": ("transformers", "T5TokenizerFast", None),
        "transformer": (
            "diffusers",
            "LTXVideoTransformer3DModel",
            {
                "in_channels": 8,
                "out_channels": 8,
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "cross_attention_dim": 32,
                "num_layers": 1,
                "caption_channels": 32,
            },
        ),
        "vae": (
            "diffusers",
            "AutoencoderKLLTXVideo",
            {
                "latent_channels": 8,
                "block_out_channels": [8, 8, 8, 8],
                "decoder_block_out_channels": [8, 8, 8, 8],
                "layers_per_block": [1, 1, 1, 1, 1],
                "decoder_layers_per_block": [1, 1, 1, 1, 1],
            },
        ),
    },
    "StableDiffusion3Pipeline": {
        "scheduler": ("diffusers", FLOW, {}),
        "text_encoder": ("transformers", "CLIPTextModelWithProjection", CLIP),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", CLIP),
        "text_encoder_3": ("transformers", "T5EncoderModel", T5 | {"d_model": 64}),
        "tokenizer": ("transformers", "CLIPTokenizer", None),
        "tokenizer_2": ("transformers", "CLIPTokenizer", None),
        "tokenizer_3": ("transformers", "T5TokenizerFast", None),
        "transformer": (
            "diffusers",
            "SD3Transformer2DModel",
            {
                "sample_size": 32,
                "in_channels": 4,
                "num_layers": 1,
                "attention_head_dim": 8,
                "num_attention_heads": 4,
                "joint_attention_dim": 64,
                "caption_projection_dim": 32,
                "pooled_projection_dim": 64,
                "out_channels": 4,
            },
        ),
        "vae": ("diffusers", "AutoencoderKL", IMAGE_VAE | {"scaling_factor": 0.4, "shift_factor": 0.1}),
    },
}


def write_pipeline(folder: Path, kind: str = "WanPipeline") -> Path:
    """The folder, with model_index.json and a configuration for each component."""
    index: dict[str, Any] = {"_class_name": kind, "_diffusers_version": "0.35.0"}
    for name, (library, class_name, config) in KINDS[kind].items():
        index[name] = [library, class_name]
        (folder / name).mkdir(parents=True)
        if config is not None:
            file = "scheduler_config.json" if name == "scheduler" else "config.json"
            (folder / name / file).write_text(json.dumps(config), encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
