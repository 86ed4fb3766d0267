"""Architecture of every Wan2.1 component as frozen dataclasses, in one registry. No torch.

Source: the official configuration tables and constructors (Wan2.1 `wan/configs`, class defaults).
`tiny-*` entries are small models of the same shape for CPU runs (`--weights tiny`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["CLIP", "DIT", "T5", "VAE", "CLIPSpec", "DiTSpec", "T5Spec", "VAESpec"]


@dataclass(frozen=True)
class DiTSpec:
    """Diffusion transformer. `model_type` is t2v, i2v, flf2v or vace; head_dim = dim / num_heads."""

    model_type: str
    patch_size: tuple[int, int, int]
    text_len: int
    in_dim: int
    dim: int
    ffn_dim: int
    freq_dim: int
    text_dim: int
    out_dim: int
    num_heads: int
    num_layers: int
    eps: float
    clip_dim: int
    vace_layers: tuple[int, ...]
    vace_in_dim: int

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def block_count(self) -> int:
        """The main blocks, and those of VACE."""
        return self.num_layers + len(self.vace_layers)

    @property
    def has_image_branch(self) -> bool:
        return self.model_type in ("i2v", "flf2v")


@dataclass(frozen=True)
class T5Spec:
    """umT5 encoder: gated GELU feed-forward, one relative position table per block."""

    vocab_size: int
    dim: int
    dim_attn: int
    dim_ffn: int
    num_heads: int
    num_layers: int
    num_buckets: int
    max_distance: int


@dataclass(frozen=True)
class VAESpec:
    """Causal video VAE. Strides (4, 8, 8) follow from three spatial and two temporal halvings."""

    dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temporal_downsample: tuple[bool, ...]


@dataclass(frozen=True)
class CLIPSpec:
    """Vision tower of XLM-Roberta CLIP ViT-H/14; Wan uses the state before the last block."""

    image_size: int
    patch_size: int
    dim: int
    mlp_ratio: int
    num_heads: int
    num_layers: int


_T2V_1_3B = DiTSpec(
    model_type="t2v",
    patch_size=(1, 2, 2),
    text_len=512,
    in_dim=16,
    dim=1536,
    ffn_dim=8960,
    freq_dim=256,
    text_dim=4096,
    out_dim=16,
    num_heads=12,
    num_layers=30,
    eps=1e-6,
    clip_dim=1280,
    vace_layers=(),
    vace_in_dim=96,
)
_T2V_14B = replace(_T2V_1_3B, dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
_TINY = replace(_T2V_1_3B, dim=64, ffn_dim=128, freq_dim=32, text_dim=32, num_heads=4, num_layers=4, clip_dim=40)

DIT: dict[str, DiTSpec] = {
    "t2v-1.3B": _T2V_1_3B,
    "t2v-14B": _T2V_14B,
    "t2i-14B": _T2V_14B,
    "i2v-14B": replace(_T2V_14B, model_type="i2v", in_dim=36),
    "flf2v-14B": replace(_T2V_14B, model_type="flf2v", in_dim=36),
    "vace-1.3B": replace(_T2V_1_3B, model_type="vace", vace_layers=tuple(range(0, 30, 2))),
    "vace-14B": replace(_T2V_14B, model_type="vace", vace_layers=tuple(range(0, 40, 5))),
    "tiny-t2v": _TINY,
    "tiny-i2v": replace(_TINY, model_type="i2v", in_dim=36),
    "tiny-flf2v": replace(_TINY, model_type="flf2v", in_dim=36),
    "tiny-vace": replace(_TINY, model_type="vace", vace_layers=(0, 2)),
}

T5: dict[str, T5Spec] = {
    "umt5-xxl": T5Spec(
        vocab_size=256384,
        dim=4096,
        dim_attn=4096,
        dim_ffn=10240,
        num_heads=64,
        num_layers=24,
        num_buckets=32,
        max_distance=128,
    ),
    "tiny": T5Spec(
        vocab_size=300, dim=32, dim_attn=32, dim_ffn=64, num_heads=4, num_layers=2, num_buckets=32, max_distance=128
    ),
}

VAE: dict[str, VAESpec] = {
    "wan2.1": VAESpec(
        dim=96, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=2, temporal_downsample=(False, True, True)
    ),
    "tiny": VAESpec(dim=8, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=2, temporal_downsample=(False, True, True)),
}

CLIP: dict[str, CLIPSpec] = {
    "vit-h-14": CLIPSpec(image_size=224, patch_size=14, dim=1280, mlp_ratio=4, num_heads=16, num_layers=32),
    "tiny": CLIPSpec(image_size=224, patch_size=14, dim=40, mlp_ratio=4, num_heads=4, num_layers=2),
}
