"""Pieces of the Wan2.1 transformer. Everything over the sequence is done in row chunks, and the residual stream changes in place.

The large matrices form units (SelfAttention, CrossAttention, FeedForward, two projections of VACE), each used as a whole and
then no more until the next pass: the engine may stream them through a buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wanvram.kernels.attention_backends import AUTO
from wanvram.kernels.elementwise import (
    add_,
    gated_add_,
    gelu_tanh_,
    inverse_rms,
    layer_norm_modulate,
    rms_norm_,
    rms_norm_rope_,
    scaled_rope_,
)
from wanvram.kernels.scaled_attention import attention
from wanvram.kernels.scaled_products import ScaledRows, gelu_rows
from wanvram.models.linear import Linear, parameter
from wanvram.models.precision import Precision
from wanvram.models.shared_attention import SharedAttention
from wanvram.models.team import Team
from wanvram.specs import DiTSpec

__all__ = ["Attending", "Block", "BlockInputs", "GeluTanh", "Head", "ImageEmbedding", "PatchEmbedding", "VaceBlock"]

IMAGE_TOKENS = 257  # 16 x 16 patches and the class token of CLIP ViT-H/14 at 224 pixels
IMAGE_NORM_EPS = 1e-5  # the two norms of the image MLP; every other norm uses the spec's 1e-6


@dataclass(frozen=True)
class Attending:
    """How self-attention is computed, whatever it sees. heads_per_group: heads that attend at once (None: all).

    backend: the one asked for (kernels.attention_backends). team: other ranks that share the sequence.
    """

    heads_per_group: int | None = None
    backend: str = AUTO
    team: Team | None = None


@dataclass(frozen=True)
class BlockInputs:
    """What every block reads besides the residual stream. cos and sin are of the rows that this rank has."""

    modulation: Tensor  # float32 [6, dim]
    cos: Tensor  # float32 [L, head_dim / 2]
    sin: Tensor
    text: Tensor  # [text_len, dim]
    image: Tensor | None  # [257 or 514, dim]
    how: Attending


def chunks(length: int, rows: int | None) -> Iterator[slice]:
    step = length if rows is None else rows
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


class PatchEmbedding(nn.Module):
    """Linear on non-overlapping patches; the weight keeps the shape of the official convolution."""

    def __init__(self, inputs: int, dim: int, patch: tuple[int, int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = parameter(dim, inputs, *patch, dtype=dtype)
        self.bias = parameter(dim, dtype=dtype)

    def forward(self, parts: Sequence[Tensor], rows: int | None, of: slice | None = None) -> Tensor:
        """Latents [c_i,F,H,W], stacked along channels -> float32 tokens [L, dim], rounded to the weight's dtype.

        of: these rows only.
        """
        patches, weight = self.unfold(parts), self.matrix()
        patches = patches if of is None else patches[of]
        tokens = torch.empty((patches.shape[0], weight.shape[1]), dtype=torch.float32, device=patches.device)
        for c in chunks(tokens.shape[0], rows):
            self.rows_into(tokens[c], patches[c], weight)
        return tokens

    def matrix(self) -> Tensor:
        """[channels * patch volume, dim]."""
        return self.weight.flatten(1).t()

    def rows_into(self, tokens: Tensor, patches: Tensor, weight: Tensor) -> None:
        """Some rows of what `unfold` gives -> their tokens; weight: the `matrix`."""
        tokens.copy_(torch.addmm(self.bias, patches, weight))

    def unfold(self, parts: Sequence[Tensor]) -> Tensor:
        """[L, channels * patch volume] in the weight's dtype, written without an intermediate copy."""
        _, channels, pt, ph, pw = self.weight.shape
        _, frames, height, width = parts[0].shape
        grid = (frames // pt, height // ph, width // pw)
        patches = self.weight.new_empty((*grid, channels, pt, ph, pw))
        start = 0
        for part in parts:
            cells = part.view(part.shape[0], grid[0], pt, grid[1], ph, grid[2], pw)
            patches[:, :, :, start : start + part.shape[0]].copy_(cells.permute(1, 3, 5, 0, 2, 4, 6))
            start += part.shape[0]
        return patches.view(grid[0] * grid[1] * grid[2], channels * pt * ph * pw)


class RMSNorm(nn.Module):
    """Only the float32 weight: the operation is fused with what follows it."""

    def __init__(self, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = parameter(dim, dtype=dtype)


class AffineNorm(nn.Module):
    """LayerNorm with weight and bias, computed in float32, rounded to the dtype of the product that follows."""

    def __init__(self, dim: int, eps: float, precision: Precision) -> None:
        super().__init__()
        self.weight = parameter(dim, dtype=precision.small)
        self.bias = parameter(dim, dtype=precision.small)
        self.eps = eps
        self.out_dtype = precision.matmul

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm_modulate(x, self.weight, self.bias, self.eps, 0.0, self.out_dtype)


class GeluTanh(nn.Module):
    """GELU in its tanh form, in place."""

    def forward(self, h: Tensor) -> Tensor:
        gelu_tanh_(h)
        return h


class _Projections(nn.Module):
    """The projections both attentions have, and the norms of their queries and keys over the full width."""

    def __init__(self, spec: DiTSpec, precision: Precision) -> None:
        super().__init__()
        self.num_heads, self.eps = spec.num_heads, spec.eps
        self.q = Linear(spec.dim, spec.dim, precision.matmul)
        self.k = Linear(spec.dim, spec.dim, precision.matmul)
        self.v = Linear(spec.dim, spec.dim, precision.matmul)
        self.o = Linear(spec.dim, spec.dim, precision.matmul)
        self.norm_q = RMSNorm(spec.dim, precision.small)
        self.norm_k = RMSNorm(spec.dim, precision.small)


class SelfAttention(_Projections):
    """Attention among all rows. One unit of weights: everything here is needed at once."""

    def forward(self, x: Tensor, modulation: Sequence[Tensor], inputs: BlockInputs, rows: int | None) -> None:
        """x += gate * attention(norm(x)). modulation: shift, scale, gate, each float32 [dim]."""
        if inputs.how.team is not None:
            SharedAttention(self, x, modulation, inputs, inputs.how.team).add()
        elif inputs.how.heads_per_group is None:
            self._whole(x, modulation, inputs, rows)
        else:
            self._sliced(x, modulation, inputs, rows)

    def _whole(self, x: Tensor, modulation: Sequence[Tensor], inputs: BlockInputs, rows: int | None) -> None:
        """Keys and values for all rows first, then queries, attention and output projection row chunk by row chunk."""
        k = torch.empty(x.shape, dtype=self.k.bias.dtype, device=x.device)
        v = torch.empty_like(k)
        for c in chunks(x.shape[0], rows):
            self.keys_and_values_into(k, v, x[c], c, modulation, inputs)
        k, v = (self.by_head(t) for t in (k, v))
        for c in chunks(x.shape[0], rows):
            self.attend_rows(x[c], c, k, v, modulation, inputs)

    def keys_and_values_into(
        self, k: Tensor, v: Tensor, x: Tensor, c: slice, modulation: Sequence[Tensor], inputs: BlockInputs
    ) -> None:
        """k[c] and v[c], of [L, dim], from x, the rows c of the stream."""
        h = self._normed(x, modulation, self.k)
        self.k.into(k[c], h)
        self.v.into(v[c], h)
        del h
        rms_norm_rope_(k[c], self.norm_k.weight, inputs.cos[c], inputs.sin[c], self.num_heads, self.eps)

    def attend_rows(
        self, x: Tensor, c: slice, k: Tensor, v: Tensor, modulation: Sequence[Tensor], inputs: BlockInputs
    ) -> None:
        """x, the rows c of the stream, += gate * their attention to all keys and values [L, heads, head_dim]."""
        h = self._normed(x, modulation, self.q)
        q = self.q(h)
        del h
        rms_norm_rope_(q, self.norm_q.weight, inputs.cos[c], inputs.sin[c], self.num_heads, self.eps)
        attended = attention(self.by_head(q), k, v, inputs.how.backend)
        del q
        rows = self.o.operand(attended.flatten(1))
        del attended
        y = self.o(rows)
        del rows
        gated_add_(x, y, modulation[2])

    def _sliced(self, x: Tensor, modulation: Sequence[Tensor], inputs: BlockInputs, rows: int | None) -> None:
        """Queries for all rows; keys and values of one head group at a time, whose result takes the queries' place.

        Keys are normalised over their full width, so their statistics come first: a quarter of the projections is made twice.
        """
        q = torch.empty(x.shape, dtype=self.q.bias.dtype, device=x.device)
        inverse = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        for c in chunks(x.shape[0], rows):
            h = self._normed(x[c], modulation, self.q)
            self.q.into(q[c], h)
            rms_norm_rope_(q[c], self.norm_q.weight, inputs.cos[c], inputs.sin[c], self.num_heads, self.eps)
            k = self.k(h)
            del h
            inverse_rms(k, inverse[c], self.eps)
            del k
        heads = self.by_head(q)
        for group in chunks(self.num_heads, inputs.how.heads_per_group):
            self._attend_group(heads, group, x, modulation, inputs, inverse, rows)
        for c in chunks(x.shape[0], rows):
            y = self.o(q[c])
            gated_add_(x[c], y, modulation[2])
            del y

    def _attend_group(
        self,
        q: Tensor,
        group: slice,
        x: Tensor,
        modulation: Sequence[Tensor],
        inputs: BlockInputs,
        inverse: Tensor,
        rows: int | None,
    ) -> None:
        """Overwrites the group's queries q[:, group] with their attention, row chunk by row chunk."""
        count, width = q[:, group].shape[1], q.shape[2]
        columns = slice(group.start * width, (group.start + count) * width)
        k = torch.empty((x.shape[0], count * width), dtype=q.dtype, device=x.device)
        v = torch.empty_like(k)
        for c in chunks(x.shape[0], rows):
            h = self._normed(x[c], modulation, self.k)
            self.k.columns_into(k[c], h, columns)
            self.v.columns_into(v[c], h, columns)
            del h
            rope = inputs.cos[c], inputs.sin[c]
            scaled_rope_(k[c], inverse[c], self.norm_k.weight[columns], *rope, count)
        k, v = (t.view(t.shape[0], count, width) for t in (k, v))
        # As many bytes as a chunk of h had: 8190 queries x 3 heads leave a quarter of an H200 idle, 32760 x 3 do not.
        for c in chunks(x.shape[0], rows and rows * (self.num_heads // count)):
            q[c, group].copy_(attention(q[c, group], k, v, inputs.how.backend))

    def _normed(self, x: Tensor, modulation: Sequence[Tensor], product: Linear) -> Tensor | ScaledRows:
        return product.modulated(x, modulation[1], modulation[0], self.eps, 1.0)

    def by_head(self, t: Tensor) -> Tensor:
        return t.view(t.shape[0], self.num_heads, -1)


class CrossAttention(_Projections):
    """Attention of rows to text tokens and, for i2v and flf2v, to image tokens with keys and values of their own."""

    def __init__(self, spec: DiTSpec, precision: Precision) -> None:
        super().__init__(spec, precision)
        if spec.has_image_branch:
            self.k_img = Linear(spec.dim, spec.dim, precision.matmul)
            self.v_img = Linear(spec.dim, spec.dim, precision.matmul)
            self.norm_k_img = RMSNorm(spec.dim, precision.small)

    def keys_and_values(self, text: Tensor, image: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """One pair [tokens, heads, head_dim] per kind of token: text, then image if there is one."""
        pairs = [self._pair(text, self.k, self.v, self.norm_k)]
        if image is not None:
            pairs.append(self._pair(image, self.k_img, self.v_img, self.norm_k_img))
        return pairs

    def _pair(self, tokens: Tensor, to_k: Linear, to_v: Linear, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        rows = to_k.operand(tokens)
        k = to_k(rows)
        rms_norm_(k, norm.weight, self.eps)
        shape = (tokens.shape[0], self.num_heads, -1)
        return k.view(shape), to_v(rows).view(shape)

    def forward(self, x: Tensor, norm: AffineNorm, inputs: BlockInputs, rows: int | None) -> None:
        """x += attention(norm(x)), without a gate."""
        pairs = self.keys_and_values(inputs.text, inputs.image)
        for c in chunks(x.shape[0], rows):
            self.attend_rows(x[c], norm, pairs, inputs.how.backend)

    def attend_rows(self, x: Tensor, norm: AffineNorm, pairs: Sequence[tuple[Tensor, Tensor]], asked: str) -> None:
        h = self.q.modulated(x, norm.weight, norm.bias, norm.eps, 0.0)
        q = self.q(h)
        del h
        rms_norm_(q, self.norm_q.weight, self.eps)
        q = q.view(q.shape[0], self.num_heads, -1)
        attended = attention(q, *pairs[0], asked)
        for k, v in pairs[1:]:
            attended.add_(attention(q, k, v, asked))
        del q
        rows = self.o.operand(attended.flatten(1))
        del attended
        y = self.o(rows)
        del rows
        add_(x, y)


class FeedForward(nn.Sequential):
    """Two products with a GELU between them; the keys of the official nn.Sequential."""

    def __init__(self, spec: DiTSpec, precision: Precision) -> None:
        up, down = (spec.dim, spec.ffn_dim), (spec.ffn_dim, spec.dim)
        super().__init__(Linear(*up, precision.matmul), GeluTanh(), Linear(*down, precision.matmul))
        self.eps = spec.eps

    def forward(self, x: Tensor, modulation: Sequence[Tensor], rows: int | None) -> None:  # type: ignore[override]
        """x += gate * ffn(norm(x)). modulation: shift, scale, gate."""
        for c in chunks(x.shape[0], rows):
            self.add_rows(x[c], modulation)

    def add_rows(self, x: Tensor, modulation: Sequence[Tensor]) -> None:
        """The same for some rows of the stream."""
        shift, scale, gate = modulation
        up, down = (module for module in self if isinstance(module, Linear))
        h = up.modulated(x, scale, shift, self.eps, 1.0)
        rows: Tensor | ScaledRows
        if isinstance(h, Tensor):
            rows = up.gelu(h)
            del h
        else:
            wide = up(h)
            del h
            rows = gelu_rows(wide)
            del wide
        y = down(rows)
        del rows
        gated_add_(x, y, gate)


class Block(nn.Module):
    """A main block. Its three units of weights are visited one after the other; modulation and norm3 are small and stay."""

    def __init__(self, spec: DiTSpec, precision: Precision) -> None:
        super().__init__()
        self.modulation = parameter(1, 6, spec.dim, dtype=precision.small)
        self.self_attn = SelfAttention(spec, precision)
        self.norm3 = AffineNorm(spec.dim, spec.eps, precision)
        self.cross_attn = CrossAttention(spec, precision)
        self.ffn = FeedForward(spec, precision)

    def units(self) -> list[nn.Module]:
        return [self.self_attn, self.cross_attn, self.ffn]

    def advance(self, unit: nn.Module, x: Tensor, inputs: BlockInputs, rows: int | None) -> None:
        """One unit of this block on x [L, dim] in place."""
        if unit is self.cross_attn:
            self.cross_attn(x, self.norm3, inputs, rows)
            return
        modulation = self.modulated(inputs)
        if unit is self.self_attn:
            self.self_attn(x, modulation[:3], inputs, rows)
        else:
            self.ffn(x, modulation[3:], rows)

    def modulated(self, inputs: BlockInputs) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the self-attention, then of the feed-forward, each float32 [dim]."""
        return (self.modulation[0] + inputs.modulation).unbind(0)


class VaceBlock(Block):
    """Block of the VACE branch, which has a stream of its own and sends a hint to one main block."""

    def __init__(self, spec: DiTSpec, precision: Precision, first: bool) -> None:
        super().__init__(spec, precision)
        self.matmul = precision.matmul
        if first:
            self.before_proj = Linear(spec.dim, spec.dim, precision.matmul)
        self.first = first
        self.after_proj = Linear(spec.dim, spec.dim, precision.matmul)

    def begin(self, stream: Tensor, x: Tensor, rows: int | None) -> None:
        """stream = before_proj(stream) + x, in place. x: the main stream before any block."""
        for c in chunks(stream.shape[0], rows):
            start = self.before_proj(stream[c].to(self.matmul))
            start.add_(x[c])  # official adds two patch embeddings in the compute dtype
            stream[c].copy_(start)
            del start

    def add_hint(self, x: Tensor, stream: Tensor, scale: float, rows: int | None) -> None:
        """x += scale * after_proj(stream): the hint never exists for all rows at once."""
        for c in chunks(x.shape[0], rows):
            hint = self.after_proj(stream[c].to(self.matmul))
            if scale != 1.0:
                hint.mul_(scale)
            add_(x[c], hint)
            del hint


class Head(nn.Module):
    """Final modulated norm and projection, float32 throughout."""

    def __init__(self, spec: DiTSpec, precision: Precision) -> None:
        super().__init__()
        self.eps, self.dtype = spec.eps, precision.small
        pt, ph, pw = spec.patch_size
        self.modulation = parameter(1, 2, spec.dim, dtype=precision.small)
        self.head = Linear(spec.dim, pt * ph * pw * spec.out_dim, precision.small)

    def forward(self, x: Tensor, e: Tensor, rows: int | None) -> Tensor:
        """x [L, dim], e [1, dim] -> [L, patch volume * out_dim]."""
        modulation = self.modulated(e)
        out = torch.empty((x.shape[0], self.head.bias.shape[0]), dtype=self.dtype, device=x.device)
        for c in chunks(x.shape[0], rows):
            self.rows_into(out[c], x[c], modulation)
        return out

    def modulated(self, e: Tensor) -> tuple[Tensor, ...]:
        """Shift and scale, float32 [dim]."""
        return (self.modulation[0] + e).unbind(0)

    def rows_into(self, out: Tensor, x: Tensor, modulation: Sequence[Tensor]) -> None:
        """Some rows of the stream -> their rows of what the head gives."""
        shift, scale = modulation
        self.head.into(out, layer_norm_modulate(x, scale, shift, self.eps, 1.0, self.dtype))


class ImageEmbedding(nn.Module):
    """CLIP features -> image tokens of width dim; flf2v joins both images and adds positions."""

    def __init__(self, spec: DiTSpec, precision: Precision) -> None:
        super().__init__()
        self.has_positions = spec.images > 1
        if self.has_positions:
            self.emb_pos = parameter(1, spec.images * IMAGE_TOKENS, spec.clip_dim, dtype=precision.small)
        self.proj = nn.Sequential(
            AffineNorm(spec.clip_dim, IMAGE_NORM_EPS, precision),
            Linear(spec.clip_dim, spec.clip_dim, precision.matmul),
            nn.GELU(),
            Linear(spec.clip_dim, spec.dim, precision.matmul),
            AffineNorm(spec.dim, IMAGE_NORM_EPS, precision),
        )

    def forward(self, clip_fea: Tensor) -> Tensor:
        """[1 or 2, 257, clip_dim] -> [257 or 514, dim]."""
        tokens = clip_fea.flatten(0, 1).float()
        if self.has_positions:
            tokens = tokens + self.emb_pos[0]
        projected: Tensor = self.proj(tokens)
        return projected
