"""The cases of foreign_predict.py: models of diffusers, transformers, torchvision and torch from their configurations, weights random.

CASES: name -> builds on `cuda` and returns the call. Nothing here knows whether that card is simulated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

Call = Callable[[], Any]
UMT5: dict[str, Any] = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24}
UMT5 |= {"num_heads": 64, "feed_forward_proj": "gated-gelu"}
UNIPC: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
FLOATS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def built(make: Callable[[], Any], dtype: str) -> Any:
    """make() on the card, its parameters in dtype."""
    import torch

    torch.set_default_dtype(getattr(torch, FLOATS[dtype]))
    try:
        with torch.device("cuda"):
            return make().eval()
    finally:
        torch.set_default_dtype(torch.float32)


def noise(*shape: int, dtype: str = "bf16") -> Any:
    import torch

    return torch.randn(*shape, device="cuda", dtype=getattr(torch, FLOATS[dtype]))


def at(value: int, dtype: str | None = None) -> Any:
    import torch

    return torch.tensor([value], device="cuda", dtype=None if dtype is None else getattr(torch, FLOATS[dtype]))


# --- diffusers: transformers -------------------------------------------------------------------------------------------------


def wan(shape: tuple[int, int, int], per_token: bool = False, **config: Any) -> Call:
    import torch
    from diffusers import WanTransformer3DModel

    model = built(lambda: WanTransformer3DModel(**config), "bf16")
    for name, p in model.named_parameters():
        if set(name.split(".")) & set(model._keep_in_fp32_modules):  # the rule of from_pretrained
            p.data = p.data.float()
    x, text = noise(1, config.get("in_channels", 16), *shape), noise(1, 512, 4096)
    frames, height, width = shape
    t = torch.full((1, frames * height * width // 4), 500, device="cuda") if per_token else at(500)
    return lambda: model(hidden_states=x, timestep=t, encoder_hidden_states=text, return_dict=False)


def flux(size: int) -> Call:
    from diffusers import FluxTransformer2DModel

    model = built(lambda: FluxTransformer2DModel(guidance_embeds=True), "bf16")
    tokens = (size // 16) ** 2
    x, text, pooled = noise(1, tokens, 64), noise(1, 512, 4096), noise(1, 768)
    ids, text_ids = noise(tokens, 3), noise(512, 3)
    return lambda: model(
        hidden_states=x,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=at(1, "bf16"),
        img_ids=ids,
        txt_ids=text_ids,
        guidance=at(3, "bf16"),
        return_dict=False,
    )


def ltx() -> Call:
    import torch
    from diffusers import LTXVideoTransformer3DModel

    model = built(LTXVideoTransformer3DModel, "bf16")
    x, text = noise(1, 21 * 16 * 24, 128), noise(1, 128, 4096)
    mask = torch.ones(1, 128, device="cuda")
    return lambda: model(
        hidden_states=x,
        encoder_hidden_states=text,
        timestep=at(500),
        encoder_attention_mask=mask,
        num_frames=21,
        height=16,
        width=24,
        return_dict=False,
    )


def hunyuan() -> Call:
    import torch
    from diffusers import HunyuanVideoTransformer3DModel

    model = built(HunyuanVideoTransformer3DModel, "bf16")
    x, text, pooled = noise(1, 16, 13, 60, 104), noise(1, 256, 4096), noise(1, 768)
    mask = torch.ones(1, 256, device="cuda", dtype=torch.bfloat16)
    return lambda: model(
        hidden_states=x,
        timestep=at(500),
        encoder_hidden_states=text,
        encoder_attention_mask=mask,
        pooled_projections=pooled,
        guidance=at(6000, "bf16"),
        return_dict=False,
    )


def cogvideox() -> Call:
    from diffusers import CogVideoXTransformer3DModel

    model = built(CogVideoXTransformer3DModel, "bf16")
    x, text = noise(1, 13, 16, 60, 90), noise(1, 226, 4096)
    return lambda: model(hidden_states=x, encoder_hidden_states=text, timestep=at(500), return_dict=False)


def sd3(batch: int) -> Call:
    from diffusers import SD3Transformer2DModel

    config = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
    model = built(lambda: SD3Transformer2DModel(**config), "bf16")
    x, text, pooled = noise(batch, 16, 128, 128), noise(batch, 333, 4096), noise(batch, 2048)
    return lambda: model(
        hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=at(500), return_dict=False
    )


SDXL: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def sdxl(dtype: str, last: bool = False) -> Call:
    import torch
    from diffusers import UNet2DConditionModel

    model = built(lambda: UNet2DConditionModel(**SDXL), dtype)
    x, text = noise(2, 4, 128, 128, dtype=dtype), noise(2, 77, 2048, dtype=dtype)
    added = {"text_embeds": noise(2, 1280, dtype=dtype), "time_ids": noise(2, 6, dtype=dtype)}
    if last:
        model = model.to(memory_format=torch.channels_last)
    return lambda: model(x, at(500), encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)


# --- diffusers: autoencoders -------------------------------------------------------------------------------------------------

IMAGE_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 1024,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def vae(
    name: str, shape: tuple[int, ...], dtype: str, *, tiled: bool = False, last: bool = False, **config: Any
) -> Call:
    """Decoding. shape: of the latent, with the batch."""
    import diffusers
    import torch

    model = built(lambda: getattr(diffusers, name)(**config), dtype)
    if last:
        model = model.to(memory_format=torch.channels_last)
    if tiled:
        model.enable_tiling()
    z = noise(*shape, dtype=dtype)
    return lambda: model.decode(z, return_dict=False)


def wan_encoder() -> Call:
    from diffusers import AutoencoderKLWan

    model = built(AutoencoderKLWan, "fp32")
    video = noise(1, 3, 17, 480, 832, dtype="fp32")
    return lambda: model.encode(video, return_dict=False)


# --- transformers ------------------------------------------------------------------------------------------------------------


def umt5() -> Call:
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(**UMT5)
    model = built(lambda: UMT5EncoderModel(config), "bf16")
    ids = torch.zeros(1, 512, device="cuda", dtype=torch.long)
    mask = torch.ones(1, 512, device="cuda", dtype=torch.long)
    return lambda: model(ids, mask)


def clip_text() -> Call:
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    model = built(
        lambda: CLIPTextModel(
            CLIPTextConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
        ),
        "fp16",
    )
    ids = torch.zeros(16, 77, device="cuda", dtype=torch.long)
    return lambda: model(ids)


def clip_vision() -> Call:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14
    )
    model = built(lambda: CLIPVisionModel(config), "fp16")
    pixels = noise(8, 3, 224, 224, dtype="fp16")
    return lambda: model(pixels)


def llama(prompt: int, new: int) -> Call:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = built(lambda: LlamaForCausalLM(config), "bf16")
    ids = torch.ones(2, prompt, device="cuda", dtype=torch.long)
    mask = torch.ones_like(ids)
    return lambda: model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)


# --- torchvision and torch ---------------------------------------------------------------------------------------------------


def vision(name: str, batch: int, dtype: str, last: bool = False) -> Call:
    import torch
    import torchvision

    model = built(lambda: getattr(torchvision.models, name)(), dtype)
    x = noise(batch, 3, 224, 224, dtype=dtype)
    if last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    return lambda: model(x)


def encoder(dtype: str, *, batch_first: bool) -> Call:
    from torch import nn

    def make() -> Any:
        layer = nn.TransformerEncoderLayer(1024, 16, 4096, batch_first=batch_first)
        return nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)

    model = built(make, dtype)
    x = noise(*((8, 1024) if batch_first else (1024, 8)), 1024, dtype=dtype)
    return lambda: model(x)


def autocast() -> Call:
    import torch
    from torch import nn

    layers = [
        nn.Sequential(nn.LayerNorm(2048), nn.Linear(2048, 8192), nn.GELU(), nn.Linear(8192, 2048)) for _ in range(4)
    ]
    model = built(lambda: nn.Sequential(*layers), "fp32").cuda()
    x = noise(4, 2048, 2048, dtype="fp32")

    def call() -> Any:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return model(x)

    return call


# --- a pipeline --------------------------------------------------------------------------------------------------------------


class Tokenizer:
    """As many tokens as asked for, whatever the text: no vocabulary has to be downloaded."""

    def __call__(self, text: Any, max_length: int = 512, **_: Any) -> Any:
        import torch
        from transformers import BatchEncoding

        count = 1 if isinstance(text, str) else len(text)
        ids = torch.ones(count, max_length, dtype=torch.long)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def on_host(make: Callable[[], Any], dtype: str) -> Any:
    """Without the time that random numbers take on the CPU."""
    import torch

    torch.set_default_dtype(getattr(torch, FLOATS[dtype]))
    try:
        with torch.device("meta"):
            model = make().eval()
    finally:
        torch.set_default_dtype(torch.float32)
    model.to_empty(device="cpu")
    for buffer in model.buffers():  # positions and frequencies, which index
        buffer.zero_()
    return model


def wan_pipeline(offload: str) -> Call:
    import diffusers
    import torch
    from diffusers.pipelines.wan import pipeline_wan
    from transformers import UMT5Config, UMT5EncoderModel

    pipeline_wan.prompt_clean = lambda prompt: prompt  # which needs ftfy
    text = UMT5Config(**UMT5)
    transformer = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
    pipe = diffusers.WanPipeline(
        tokenizer=Tokenizer(),
        text_encoder=on_host(lambda: UMT5EncoderModel(text), "bf16"),
        transformer=on_host(lambda: diffusers.WanTransformer3DModel(**transformer), "bf16"),
        vae=on_host(diffusers.AutoencoderKLWan, "fp32"),
        scheduler=diffusers.UniPCMultistepScheduler(**UNIPC),
    )
    pipe.set_progress_bar_config(disable=True)
    if offload == "none":
        pipe.to("cuda")
    elif offload == "model":
        pipe.enable_model_cpu_offload()
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        options = {"onload_device": torch.device("cuda"), "offload_type": "leaf_level", "use_stream": True}
        for part in (pipe.text_encoder, pipe.transformer):
            diffusers.hooks.apply_group_offloading(part, **options)
        pipe.vae.to("cuda")

    def call() -> Any:
        generator = torch.Generator("cuda").manual_seed(1)
        size = {"height": 480, "width": 832, "num_frames": 17, "num_inference_steps": 2}
        return pipe(prompt="a", negative_prompt="b", generator=generator, output_type="np", **size).frames

    return call


SMALL: dict[str, Any] = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
TI2V: dict[str, Any] = {
    "num_attention_heads": 24,
    "num_layers": 30,
    "ffn_dim": 14336,
    "in_channels": 48,
    "out_channels": 48,
}
WAN22_VAE: dict[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}

CASES: dict[str, Callable[[], Call]] = {
    "dit/wan-1.3b-480p-49": partial(wan, (13, 60, 104), **SMALL),
    "dit/wan-14b-720p-33": partial(wan, (9, 90, 160)),
    "dit/wan22-ti2v-5b": partial(wan, (31, 44, 80), per_token=True, **TI2V),
    "dit/flux-1024": partial(flux, 1024),
    "dit/ltx": ltx,
    "dit/hunyuan-480p-49": hunyuan,
    "dit/cogvideox": cogvideox,
    "dit/sd3-1024": partial(sd3, 2),
    "unet/sdxl-bf16": partial(sdxl, "bf16"),
    "unet/sdxl-fp16": partial(sdxl, "fp16"),
    "unet/sdxl-fp16-channels_last": partial(sdxl, "fp16", last=True),
    "vae/wan-480p-17-fp32": partial(vae, "AutoencoderKLWan", (1, 16, 5, 60, 104), "fp32"),
    "vae/wan-480p-17-bf16": partial(vae, "AutoencoderKLWan", (1, 16, 5, 60, 104), "bf16"),
    "vae/wan-480p-9-tiled": partial(vae, "AutoencoderKLWan", (1, 16, 3, 60, 104), "fp32", tiled=True),
    "vae/wan-encoder-480p-17": wan_encoder,
    "vae/wan22-9": partial(vae, "AutoencoderKLWan", (1, 48, 3, 44, 80), "fp32", **WAN22_VAE),
    "vae/flux-1024-bf16": partial(vae, "AutoencoderKL", (1, 16, 128, 128), "bf16", **IMAGE_VAE),
    "vae/flux-1024-fp32": partial(vae, "AutoencoderKL", (1, 16, 128, 128), "fp32", **IMAGE_VAE),
    "vae/flux-1024-bf16-channels_last": partial(
        vae, "AutoencoderKL", (1, 16, 128, 128), "bf16", last=True, **IMAGE_VAE
    ),
    "vae/flux-2048-bf16-tiled": partial(vae, "AutoencoderKL", (1, 16, 256, 256), "bf16", tiled=True, **IMAGE_VAE),
    "vae/ltx": partial(vae, "AutoencoderKLLTXVideo", (1, 128, 7, 16, 24), "bf16"),
    "vae/hunyuan-9-tiled": partial(vae, "AutoencoderKLHunyuanVideo", (1, 16, 3, 60, 104), "fp16", tiled=True),
    "vae/cogvideox-9": partial(vae, "AutoencoderKLCogVideoX", (1, 16, 3, 60, 90), "bf16"),
    "text/umt5-xxl": umt5,
    "text/clip-l": clip_text,
    "vision/clip-h": clip_vision,
    "text/llama-1.1b-generate": partial(llama, 512, 32),
    "vision/resnet50-fp32": partial(vision, "resnet50", 32, "fp32"),
    "vision/resnet50-fp16-channels_last": partial(vision, "resnet50", 32, "fp16", last=True),
    "vision/vit-b16-fp32": partial(vision, "vit_b_16", 32, "fp32"),
    "vision/vit-b16-bf16": partial(vision, "vit_b_16", 32, "bf16"),
    "torch/encoder-bf16": partial(encoder, "bf16", batch_first=True),
    "torch/encoder-fp32-seq-first": partial(encoder, "fp32", batch_first=False),
    "torch/autocast-mlp": autocast,
    "pipeline/wan-1.3b-none": partial(wan_pipeline, "none"),
    "pipeline/wan-1.3b-model": partial(wan_pipeline, "model"),
    "pipeline/wan-1.3b-sequential": partial(wan_pipeline, "sequential"),
    "pipeline/wan-1.3b-group": partial(wan_pipeline, "group"),
}
