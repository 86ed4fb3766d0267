"""Architecture of every Wan2.1 component as frozen dataclasses, in one registry. No torch.

Source: the official configuration tables and constructors (Wan2.1 `wan/configs`, class defaults).
`tiny-*` entries are small models of the same shape for CPU runs (`--weights tiny`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod, sqrt

__all__ = [
    "CLIP",
    "DIT",
    "LATENT_MEAN",
    "LATENT_STD",
    "T5",
    "VAE",
    "WAN21_GEOMETRY",
    "CLIPSpec",
    "DiTSpec",
    "Geometry",
    "T5Spec",
    "VAESpec",
]


@dataclass(frozen=True)
class Geometry:
    """How pixels become latents, and latents tokens; each triple is (frames, rows, columns).

    strides: video frames and pixels of one latent (rows and columns alike; the first frame is a latent frame alone).
    patch: latents of one token.
    """

    latent_channels: int
    strides: tuple[int, int, int]
    patch: tuple[int, int, int]

    @property
    def token_side(self) -> int:
        """Pixels along a side of one token."""
        return self.strides[1] * self.patch[1]

    @property
    def image_channels(self) -> int:
        """Of the latents of given frames and of the mask that says which video frames those are."""
        return self.strides[0] + self.latent_channels

    @property
    def cell_channels(self) -> int:
        """Of a mask in the resolution of the latents: one for each pixel of a latent."""
        return self.strides[1] * self.strides[2]

    @property
    def source_channels(self) -> int:
        """Of VACE's context: the latents of what is kept, of what is remade, and the mask."""
        return 2 * self.latent_channels + self.cell_channels

    def are_frames_valid(self, frames: int) -> bool:
        """The VAE takes the first frame alone and then a stride at a time: 4n+1 of Wan2.1."""
        return frames >= 1 and frames % self.strides[0] == 1 % self.strides[0]

    def latent_frames(self, frames: int) -> int:
        """What a video of so many frames begins; what is left over of a stride counts nothing."""
        return (frames - 1) // self.strides[0] + 1

    def video_frames(self, latent_frames: int) -> int:
        return (latent_frames - 1) * self.strides[0] + 1

    def pieces(self, frames: int) -> list[int]:
        """The frames of a video as the VAE takes them: 1, 4, 4, ... of Wan2.1."""
        return [1, *[self.strides[0]] * (self.latent_frames(frames) - 1)]

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Video of frames x height x width pixels -> latent [channels, frames, rows, columns]."""
        _, rows, columns = self.strides
        return self.latent_channels, self.latent_frames(frames), height // rows, width // columns

    def tokens(self, shape: Sequence[int]) -> int:
        """Of a latent [channels, frames, rows, columns]."""
        return prod(shape[1:]) // prod(self.patch)

    def picture_size(self, area: int, width: int, height: int) -> tuple[int, int]:
        """(width, height) of a video of at most `area` pixels in the aspect ratio of a picture, in whole tokens.

        Float64 in the official order of operations: at a border case another order gives another size.
        """
        aspect = height / width
        (_, stride, _), (_, patch, _) = self.strides, self.patch
        rows = int(sqrt(area * aspect) // stride // patch * patch)
        columns = int(sqrt(area / aspect) // stride // patch * patch)
        return columns * stride, rows * stride


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
    def images(self) -> int:
        """Pictures that it sees through CLIP; two have positions."""
        return {"i2v": 1, "flf2v": 2}.get(self.model_type, 0)

    @property
    def has_image_branch(self) -> bool:
        return self.images > 0

    @property
    def has_source_branch(self) -> bool:
        """VACE: blocks of its own for a source video."""
        return self.model_type == "vace"


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


LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916,
)  # fmt: skip


@dataclass(frozen=True)
class VAESpec:
    """Causal video VAE. Every level but the last halves rows and columns, and where `temporal_downsample` says so, frames."""

    dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temporal_downsample: tuple[bool, ...]
    latent_mean: tuple[float, ...] = LATENT_MEAN
    latent_std: tuple[float, ...] = LATENT_STD

    @property
    def strides(self) -> tuple[int, int, int]:
        """See Geometry."""
        side = 2 ** (len(self.dim_mult) - 1)
        return 2 ** sum(self.temporal_downsample), side, side


@dataclass(frozen=True)
class CLIPSpec:
    """Vision tower of XLM-Roberta CLIP ViT-H/14; Wan uses the state before the last block."""

    image_size: int
    patch_size: int
    dim: int
    mlp_ratio: int
    num_heads: int
    num_layers: int

    @property
    def tokens(self) -> int:
        """Patches of one picture, and the class token."""
        return 1 + (self.image_size // self.patch_size) ** 2


WAN21_GEOMETRY = Geometry(latent_channels=16, strides=(4, 8, 8), patch=(1, 2, 2))

_T2V_1_3B = DiTSpec(
    model_type="t2v",
    patch_size=WAN21_GEOMETRY.patch,
    text_len=512,
    in_dim=WAN21_GEOMETRY.latent_channels,
    dim=1536,
    ffn_dim=8960,
    freq_dim=256,
    text_dim=4096,
    out_dim=WAN21_GEOMETRY.latent_channels,
    num_heads=12,
    num_layers=30,
    eps=1e-6,
    clip_dim=1280,
    vace_layers=(),
    vace_in_dim=WAN21_GEOMETRY.source_channels,
)
_T2V_14B = replace(_T2V_1_3B, dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
_WITH_IMAGE = WAN21_GEOMETRY.latent_channels + WAN21_GEOMETRY.image_channels
_TINY = replace(_T2V_1_3B, dim=64, ffn_dim=128, freq_dim=32, text_dim=32, num_heads=4, num_layers=4, clip_dim=40)

DIT: dict[str, DiTSpec] = {
    "t2v-1.3B": _T2V_1_3B,
    "t2v-14B": _T2V_14B,
    "t2i-14B": _T2V_14B,
    "i2v-14B": replace(_T2V_14B, model_type="i2v", in_dim=_WITH_IMAGE),
    "flf2v-14B": replace(_T2V_14B, model_type="flf2v", in_dim=_WITH_IMAGE),
    "vace-1.3B": replace(_T2V_1_3B, model_type="vace", vace_layers=tuple(range(0, 30, 2))),
    "vace-14B": replace(_T2V_14B, model_type="vace", vace_layers=tuple(range(0, 40, 5))),
    "tiny-t2v": _TINY,
    "tiny-i2v": replace(_TINY, model_type="i2v", in_dim=_WITH_IMAGE),
    "tiny-flf2v": replace(_TINY, model_type="flf2v", in_dim=_WITH_IMAGE),
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

_WAN21_VAE = VAESpec(
    dim=96,
    z_dim=WAN21_GEOMETRY.latent_channels,
    dim_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    temporal_downsample=(False, True, True),
)
VAE: dict[str, VAESpec] = {"wan2.1": _WAN21_VAE, "tiny": replace(_WAN21_VAE, dim=8)}

CLIP: dict[str, CLIPSpec] = {
    "vit-h-14": CLIPSpec(image_size=224, patch_size=14, dim=1280, mlp_ratio=4, num_heads=16, num_layers=32),
    "tiny": CLIPSpec(image_size=224, patch_size=14, dim=40, mlp_ratio=4, num_heads=4, num_layers=2),
}
