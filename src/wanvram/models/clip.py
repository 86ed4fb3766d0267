"""The vision tower of XLM-Roberta CLIP ViT-H/14, as far as Wan runs it: up to the input of its last block.

All parameters share one dtype (official: float16). LayerNorm and softmax compute in float32 and round their result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wanvram.specs import CLIPSpec

__all__ = ["CLIPBlock", "CLIPVision"]

Walk = Callable[[Sequence[nn.Module]], Iterator[nn.Module]]

EPS = 1e-5
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class CLIPAttention(nn.Module):
    """Plain self-attention. At 257 tokens and 16 heads the float16 scores are 2 MB, not worth a fused kernel."""

    def __init__(self, spec: CLIPSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = spec.num_heads
        self.to_qkv = nn.Linear(spec.dim, 3 * spec.dim, dtype=dtype)
        self.proj = nn.Linear(spec.dim, spec.dim, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.to_qkv(x).view(batch, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        # q is scaled before the product, so that float16 scores cannot overflow.
        scores = (q * (dim // self.heads) ** -0.5) @ k.transpose(-1, -2)
        mixed = torch.softmax(scores, dim=-1) @ v
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, length, dim))
        return projected


class CLIPBlock(nn.Module):
    """Pre-norm attention and MLP (exact GELU)."""

    def __init__(self, spec: CLIPSpec, dtype: torch.dtype) -> None:
        super().__init__()
        hidden = spec.dim * spec.mlp_ratio
        self.norm1 = nn.LayerNorm(spec.dim, eps=EPS, dtype=dtype)
        self.attn = CLIPAttention(spec, dtype)
        self.norm2 = nn.LayerNorm(spec.dim, eps=EPS, dtype=dtype)
        self.mlp = nn.Sequential(
            nn.Linear(spec.dim, hidden, dtype=dtype), nn.GELU(), nn.Linear(hidden, spec.dim, dtype=dtype)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x.add_(self.mlp(self.norm2(x)))


class CLIPPatches(nn.Module):
    """The official convolution over separate patches as one product, whose memory needs no cuDNN plan to be known."""

    def __init__(self, spec: CLIPSpec, dtype: torch.dtype) -> None:
        super().__init__()
        shape = (spec.dim, 3, spec.patch_size, spec.patch_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, patches, dim]."""
        images, channels, side = pixels.shape[:3]
        patch = self.weight.shape[-1]
        cells = pixels.view(images, channels, side // patch, patch, side // patch, patch)
        rows = cells.permute(0, 2, 4, 1, 3, 5).reshape(images * (side // patch) ** 2, -1)
        return (rows @ self.weight.flatten(1).t()).view(images, -1, self.weight.shape[0])


class VisionTower(nn.Module):
    """Patches and class token through all blocks but the last."""

    def __init__(self, spec: CLIPSpec, dtype: torch.dtype) -> None:
        super().__init__()
        patches = (spec.image_size // spec.patch_size) ** 2
        self.cls_embedding = nn.Parameter(torch.zeros(1, 1, spec.dim, dtype=dtype))
        self.pos_embedding = nn.Parameter(torch.zeros(1, 1 + patches, spec.dim, dtype=dtype))
        self.patch_embedding = CLIPPatches(spec, dtype)
        self.pre_norm = nn.LayerNorm(spec.dim, eps=EPS, dtype=dtype)
        self.transformer = nn.ModuleList(CLIPBlock(spec, dtype) for _ in range(spec.num_layers - 1))

    def forward(self, pixels: Tensor, walk: Walk) -> Tensor:
        patches = self.patch_embedding(pixels)
        x: Tensor = torch.cat([self.cls_embedding.expand(len(patches), -1, -1), patches], dim=1)
        del patches
        x = self.pre_norm(x.add_(self.pos_embedding))
        for block in walk(list(self.transformer)):
            x = block(x)
        return x


class CLIPVision(nn.Module):
    """Images -> [N, 1 + patches, dim], class token first, without final norm or projection."""

    def __init__(self, spec: CLIPSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = spec
        self.dtype = dtype
        self.visual = VisionTower(spec, dtype)

    def unused_keys(self) -> list[str]:
        """Tensors of the official tower that Wan never runs, so that are not built here."""
        with torch.device("meta"):
            block = CLIPBlock(self.spec, self.dtype)
        last = f"visual.transformer.{self.spec.num_layers - 1}."
        return [
            "visual.head",
            "visual.post_norm.weight",
            "visual.post_norm.bias",
            *(last + k for k in block.state_dict()),
        ]

    def walk_order(self) -> list[nn.Module]:
        """Every block in the order of use."""
        return list(self.visual.transformer)

    def preprocess(self, images: Sequence[Tensor]) -> Tensor:
        """Images [3, 1, H, W] in [-1, 1] -> [N, 3, S, S] float32: squashed to the square, CLIP's normalisation."""
        size = (self.spec.image_size, self.spec.image_size)
        squares = [
            F.interpolate(image.float().transpose(0, 1), size=size, mode="bicubic", align_corners=False)
            for image in images
        ]
        pixels = torch.cat(squares).mul_(0.5).add_(0.5)
        for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):  # scalars need no copy to the device
            pixels[:, channel].sub_(mean).div_(std)
        return pixels

    @torch.no_grad()
    def forward(self, pixels: Tensor, *, walk: Walk = iter) -> Tensor:
        features: Tensor = self.visual(pixels.to(self.dtype), walk)
        return features
