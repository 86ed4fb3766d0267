"""The Wan2.1 diffusion transformer (t2v, i2v, flf2v, vace): official weights and arithmetic, one sample at a time.

Owns the parameters under their official state-dict names, and the order in which temporaries are born and die: the
float32 residual stream [L, dim] is updated in place, and only keys and values exist for the whole sequence besides it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from wanvram.errors import InputError
from wanvram.kernels import attention, gated_add_, gelu_tanh_, layer_norm_modulate, rms_norm_, rms_norm_rope_
from wanvram.models.precision import Precision
from wanvram.models.rotary import rotary_tables
from wanvram.specs import DiTSpec

__all__ = ["Block", "Condition", "VaceBlock", "Walk", "WanDiT"]

Walk = Callable[[Sequence[nn.Module]], Iterator[nn.Module]]

_IMAGE_TOKENS = 257  # 16 x 16 patches and the class token of CLIP ViT-H/14 at 224 pixels
_IMAGE_NORM_EPS = 1e-5  # the two norms of the image MLP; every other norm uses the spec's 1e-6


@dataclass(frozen=True)
class Condition:
    """What one forward is conditioned on. context is unpadded [tokens, text_dim]."""

    context: Tensor
    y: Tensor | None = None  # i2v, flf2v: mask and image latents [20,F,H,W]
    clip_fea: Tensor | None = None  # i2v: [1,257,clip_dim]; flf2v: [2,257,clip_dim], first then last image
    vace_context: Tensor | None = None  # vace: [96,F,H,W]
    vace_scale: float = 1.0


@dataclass(frozen=True)
class BlockInputs:
    """What every block reads besides the residual stream."""

    modulation: Tensor  # float32 [6, dim]
    cos: Tensor  # float32 [L, head_dim / 2]
    sin: Tensor
    text: Tensor  # [text_len, dim]
    image: Tensor | None  # [257 or 514, dim]
    heads_per_group: int | None = None  # heads that attend at once; None: all


@dataclass
class _Stream:
    """One condition on its way through the blocks."""

    x: Tensor
    inputs: BlockInputs
    vace: Tensor | None
    vace_scale: float
    hint: Tensor | None = None


def _parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def _chunks(length: int, rows: int | None) -> Iterator[slice]:
    step = length if rows is None else rows
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


class Linear(nn.Module):
    """Product and bias in the dtype of the parameters, which are left uninitialised."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _parameter(outputs, inputs, dtype=dtype)
        self.bias = _parameter(outputs, dtype=dtype)

    def forward(self, h: Tensor) -> Tensor:
        return torch.addmm(self.bias, h, self.weight.t())

    def into(self, out: Tensor, h: Tensor) -> None:
        torch.addmm(self.bias, h, self.weight.t(), out=out)


class PatchEmbedding(nn.Module):
    """Linear on non-overlapping patches; the weight keeps the shape of the official convolution."""

    def __init__(self, inputs: int, dim: int, patch: tuple[int, int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _parameter(dim, inputs, *patch, dtype=dtype)
        self.bias = _parameter(dim, dtype=dtype)

    def forward(self, parts: Sequence[Tensor], rows: int | None) -> Tensor:
        """Latents [c_i,F,H,W], stacked along channels -> float32 tokens [L, dim], rounded to the weight's dtype."""
        patches = self._unfold(parts)
        weight = self.weight.flatten(1).t()
        tokens = torch.empty((patches.shape[0], weight.shape[1]), dtype=torch.float32, device=patches.device)
        for c in _chunks(tokens.shape[0], rows):
            tokens[c].copy_(torch.addmm(self.bias, patches[c], weight))
        return tokens

    def _unfold(self, parts: Sequence[Tensor]) -> Tensor:
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
        self.weight = _parameter(dim, dtype=dtype)


class AffineNorm(nn.Module):
    """LayerNorm with weight and bias, computed in float32, rounded to the dtype of the product that follows."""

    def __init__(self, dim: int, eps: float, precision: Precision) -> None:
        super().__init__()
        self.weight = _parameter(dim, dtype=precision.small)
        self.bias = _parameter(dim, dtype=precision.small)
        self.eps = eps
        self.out_dtype = precision.matmul

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm_modulate(x, self.weight, self.bias, self.eps, 0.0, self.out_dtype)


class GeluTanh(nn.Module):
    """GELU in its tanh form, in place."""

    def forward(self, h: Tensor) -> Tensor:
        gelu_tanh_(h)
        return h


def _attend(q: Tensor, k: Tensor, v: Tensor, heads_per_group: int | None) -> Tensor:
    """Attention of q [rows, heads, head_dim]; by head groups the result takes q's place, group after group."""
    if heads_per_group is None:
        return attention(q, k, v)
    for start in range(0, q.shape[1], heads_per_group):
        group = slice(start, start + heads_per_group)
        q[:, group].copy_(attention(q[:, group], k[:, group], v[:, group]))
    return q


class SelfAttention(nn.Module):
    """Keys and values for all rows first, then queries, attention and output projection row chunk by row chunk."""

    def __init__(self, spec: DiTSpec, precision: Precision) -> None:
        super().__init__()
        self.num_heads, self.eps = spec.num_heads, spec.eps
        self.q = Linear(spec.dim, spec.dim, precision.matmul)
        self.k = Linear(spec.dim, spec.dim, precision.matmul)
        self.v = Linear(spec.dim, spec.dim, precision.matmul)
        self.o = Linear(spec.dim, spec.dim, precision.matmul)
        self.norm_q = RMSNorm(spec.dim, precision.small)
        self.norm_k = RMSNorm(spec.dim, precision.small)

    def forward(self, x: Tensor, modulation: Sequence[Tensor], inputs: BlockInputs, rows: int | None) -> None:
        """x += gate * attention(norm(x)). modulation: shift, scale, gate, each float32 [dim]."""
        shift, scale, gate = modulation
        k = torch.empty(x.shape, dtype=self.k.weight.dtype, device=x.device)
        v = torch.empty_like(k)
        for c in _chunks(x.shape[0], rows):
            h = layer_norm_modulate(x[c], scale, shift, self.eps, 1.0, k.dtype)
            self.k.into(k[c], h)
            self.v.into(v[c], h)
            del h
            rms_norm_rope_(k[c], self.norm_k.weight, inputs.cos[c], inputs.sin[c], self.num_heads, self.eps)
        k, v = (t.view(t.shape[0], self.num_heads, -1) for t in (k, v))
        for c in _chunks(x.shape[0], rows):
            h = layer_norm_modulate(x[c], scale, shift, self.eps, 1.0, k.dtype)
            q = self.q(h)
            del h
            rms_norm_rope_(q, self.norm_q.weight, inputs.cos[c], inputs.sin[c], self.num_heads, self.eps)
            attended = _attend(q.view(q.shape[0], self.num_heads, -1), k, v, inputs.heads_per_group)
            del q
            y = self.o(attended.flatten(1))
            del attended
            gated_add_(x[c], y, gate)
            del y


class CrossAttention(nn.Module):
    """Attention of rows to text tokens and, for i2v and flf2v, to image tokens with keys and values of their own."""

    def __init__(self, spec: DiTSpec, precision: Precision) -> None:
        super().__init__()
        self.num_heads, self.eps = spec.num_heads, spec.eps
        self.q = Linear(spec.dim, spec.dim, precision.matmul)
        self.k = Linear(spec.dim, spec.dim, precision.matmul)
        self.v = Linear(spec.dim, spec.dim, precision.matmul)
        self.o = Linear(spec.dim, spec.dim, precision.matmul)
        self.norm_q = RMSNorm(spec.dim, precision.small)
        self.norm_k = RMSNorm(spec.dim, precision.small)
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
        k = to_k(tokens)
        rms_norm_(k, norm.weight, self.eps)
        shape = (tokens.shape[0], self.num_heads, -1)
        return k.view(shape), to_v(tokens).view(shape)

    def forward(self, x: Tensor, norm: AffineNorm, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """x += attention(norm(x)) for these rows, without a gate."""
        h = norm(x)
        q = self.q(h)
        del h
        rms_norm_(q, self.norm_q.weight, self.eps)
        q = q.view(q.shape[0], self.num_heads, -1)
        attended = attention(q, *pairs[0])
        for k, v in pairs[1:]:
            attended.add_(attention(q, k, v))
        del q
        y = self.o(attended.flatten(1))
        del attended
        x.add_(y)


class _BlockBody(nn.Module):
    """Parameters and arithmetic that main and VACE blocks share."""

    def __init__(self, spec: DiTSpec, precision: Precision) -> None:
        super().__init__()
        self.eps, self.matmul = spec.eps, precision.matmul
        self.modulation = _parameter(1, 6, spec.dim, dtype=precision.small)
        self.self_attn = SelfAttention(spec, precision)
        self.norm3 = AffineNorm(spec.dim, spec.eps, precision)
        self.cross_attn = CrossAttention(spec, precision)
        up = Linear(spec.dim, spec.ffn_dim, precision.matmul)
        self.ffn = nn.Sequential(up, GeluTanh(), Linear(spec.ffn_dim, spec.dim, precision.matmul))

    def advance(self, x: Tensor, inputs: BlockInputs, rows: int | None) -> None:
        """The whole block on x in place. Self-attention's keys and values are gone before the FFN starts."""
        modulation = (self.modulation[0] + inputs.modulation).unbind(0)
        self.self_attn(x, modulation[:3], inputs, rows)
        pairs = self.cross_attn.keys_and_values(inputs.text, inputs.image)
        for c in _chunks(x.shape[0], rows):
            self.cross_attn(x[c], self.norm3, pairs)
            self._feed_forward(x[c], modulation[3:])

    def _feed_forward(self, x: Tensor, modulation: Sequence[Tensor]) -> None:
        shift, scale, gate = modulation
        h = layer_norm_modulate(x, scale, shift, self.eps, 1.0, self.matmul)
        wide = self.ffn[0](h)
        del h  # nn.Sequential would hold it until the second product
        gelu_tanh_(wide)
        y = self.ffn[2](wide)
        del wide
        gated_add_(x, y, gate)


class Block(_BlockBody):
    """Main block: updates x in place."""

    def forward(self, x: Tensor, inputs: BlockInputs, rows: int | None) -> None:
        self.advance(x, inputs, rows)


class VaceBlock(_BlockBody):
    """Block of the VACE branch: updates the branch's own stream and returns the hint for a main block."""

    def __init__(self, spec: DiTSpec, precision: Precision, first: bool) -> None:
        super().__init__(spec, precision)
        if first:
            self.before_proj = Linear(spec.dim, spec.dim, precision.matmul)
        self.first = first
        self.after_proj = Linear(spec.dim, spec.dim, precision.matmul)

    def forward(self, stream: Tensor, x: Tensor, inputs: BlockInputs, rows: int | None) -> Tensor:
        """x: the main stream before any block, read by the first block only. -> hint [L, dim], not yet scaled."""
        if self.first:
            for c in _chunks(stream.shape[0], rows):
                start = self.before_proj(stream[c].to(self.matmul))
                start.add_(x[c])  # official adds two patch embeddings in the compute dtype
                stream[c].copy_(start)
                del start
        self.advance(stream, inputs, rows)
        hint = torch.empty(stream.shape, dtype=self.matmul, device=stream.device)
        for c in _chunks(stream.shape[0], rows):
            self.after_proj.into(hint[c], stream[c].to(self.matmul))
        return hint


class Head(nn.Module):
    """Final modulated norm and projection, float32 throughout."""

    def __init__(self, spec: DiTSpec, precision: Precision) -> None:
        super().__init__()
        self.eps, self.dtype = spec.eps, precision.small
        pt, ph, pw = spec.patch_size
        self.modulation = _parameter(1, 2, spec.dim, dtype=precision.small)
        self.head = Linear(spec.dim, pt * ph * pw * spec.out_dim, precision.small)

    def forward(self, x: Tensor, e: Tensor, rows: int | None) -> Tensor:
        """x [L, dim], e [1, dim] -> [L, patch volume * out_dim]."""
        shift, scale = (self.modulation[0] + e).unbind(0)
        out = torch.empty((x.shape[0], self.head.bias.shape[0]), dtype=self.dtype, device=x.device)
        for c in _chunks(x.shape[0], rows):
            h = layer_norm_modulate(x[c], scale, shift, self.eps, 1.0, self.dtype)
            self.head.into(out[c], h)
            del h
        return out


class ImageEmbedding(nn.Module):
    """CLIP features -> image tokens of width dim; flf2v joins both images and adds positions."""

    def __init__(self, spec: DiTSpec, precision: Precision) -> None:
        super().__init__()
        if spec.model_type == "flf2v":
            self.emb_pos = _parameter(1, 2 * _IMAGE_TOKENS, spec.clip_dim, dtype=precision.small)
        self.has_positions = spec.model_type == "flf2v"
        self.proj = nn.Sequential(
            AffineNorm(spec.clip_dim, _IMAGE_NORM_EPS, precision),
            Linear(spec.clip_dim, spec.clip_dim, precision.matmul),
            nn.GELU(),
            Linear(spec.clip_dim, spec.dim, precision.matmul),
            AffineNorm(spec.dim, _IMAGE_NORM_EPS, precision),
        )

    def forward(self, clip_fea: Tensor) -> Tensor:
        """[1 or 2, 257, clip_dim] -> [257 or 514, dim]."""
        tokens = clip_fea.flatten(0, 1).float()
        if self.has_positions:
            tokens = tokens + self.emb_pos[0]
        projected: Tensor = self.proj(tokens)
        return projected


class WanDiT(nn.Module):
    """Velocity prediction. Parameters are uninitialised until weights are loaded; blocks are reached through a walk."""

    def __init__(self, spec: DiTSpec, precision: Precision) -> None:
        super().__init__()
        self.spec, self.precision = spec, precision
        matmul, small, dim = precision.matmul, precision.small, spec.dim
        self.patch_embedding = PatchEmbedding(spec.in_dim, dim, spec.patch_size, matmul)
        self.text_embedding = nn.Sequential(Linear(spec.text_dim, dim, matmul), GeluTanh(), Linear(dim, dim, matmul))
        self.time_embedding = nn.Sequential(Linear(spec.freq_dim, dim, small), nn.SiLU(), Linear(dim, dim, small))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim, small))
        self.blocks = nn.ModuleList(Block(spec, precision) for _ in range(spec.num_layers))
        self.head = Head(spec, precision)
        if spec.has_image_branch:
            self.img_emb = ImageEmbedding(spec, precision)
        if spec.model_type == "vace":
            count = len(spec.vace_layers)
            self.vace_blocks = nn.ModuleList(VaceBlock(spec, precision, first=n == 0) for n in range(count))
            self.vace_patch_embedding = PatchEmbedding(spec.vace_in_dim, dim, spec.patch_size, matmul)

    def walk_order(self) -> list[nn.Module]:
        """Every block in the order of use: VACE block n directly before main block vace_layers[n]."""
        order: list[nn.Module] = []
        for index, block in enumerate(self.blocks):
            if index in self.spec.vace_layers:
                order.append(self.vace_blocks[self.spec.vace_layers.index(index)])
            order.append(block)
        return order

    @torch.no_grad()
    def forward(
        self,
        latent: Tensor,
        timestep: float,
        conditions: Sequence[Condition],
        *,
        rows_per_chunk: int | None = None,
        heads_per_group: int | None = None,
        walk: Walk = iter,
    ) -> list[Tensor]:
        """latent float32 [C,F,H,W] -> one velocity float32 [out_dim,F,H,W] per condition.

        All conditions pass a block before the next one is requested from the walk. rows_per_chunk: tokens handled
        at once (None: all), and heads_per_group: heads that attend at once, change memory but not the result.
        """
        self._check(latent, conditions, rows_per_chunk)
        e = self.time_embedding(self._sinusoid(timestep, latent.device))
        modulation = self.time_projection(e).view(6, self.spec.dim)
        tables = rotary_tables(self._grid(latent), self.spec.head_dim, latent.device)
        streams = [self._start(latent, c, modulation, tables, rows_per_chunk) for c in conditions]
        for stream in streams:
            stream.inputs = replace(stream.inputs, heads_per_group=heads_per_group)
        del tables, modulation
        for module in walk(self.walk_order()):
            for stream in streams:
                _pass(module, stream, rows_per_chunk)
        outputs = []
        while streams:
            x = streams.pop(0).x
            outputs.append(self._unpatchify(self.head(x, e, rows_per_chunk), latent))
            del x
        return outputs

    def _start(
        self,
        latent: Tensor,
        condition: Condition,
        modulation: Tensor,
        tables: tuple[Tensor, Tensor],
        rows: int | None,
    ) -> _Stream:
        parts = [latent] if condition.y is None else [latent, condition.y]
        x = self.patch_embedding(parts, rows)
        vace = None
        if condition.vace_context is not None:
            vace = self.vace_patch_embedding([condition.vace_context], rows)
        image = None if condition.clip_fea is None else self.img_emb(condition.clip_fea)
        inputs = BlockInputs(modulation, *tables, self._embed_text(condition.context), image)
        return _Stream(x, inputs, vace, condition.vace_scale)

    def _embed_text(self, context: Tensor) -> Tensor:
        """Zero-padded to text_len before the MLP: padding is attended to, as official does."""
        padded = torch.zeros(
            (self.spec.text_len, self.spec.text_dim), dtype=self.precision.matmul, device=context.device
        )
        padded[: context.shape[0]].copy_(context)
        embedded: Tensor = self.text_embedding(padded)
        return embedded

    def _sinusoid(self, timestep: float, device: torch.device) -> Tensor:
        """[1, freq_dim]: cosines then sines, angles in float64."""
        half = self.spec.freq_dim // 2
        exponents = torch.arange(half, dtype=torch.float64, device=device) / -half
        angles = torch.pow(10000.0, exponents) * timestep
        return torch.cat((angles.cos(), angles.sin())).to(self.precision.small).unsqueeze(0)

    def _grid(self, latent: Tensor) -> tuple[int, int, int]:
        pt, ph, pw = self.spec.patch_size
        _, frames, height, width = latent.shape
        return frames // pt, height // ph, width // pw

    def _unpatchify(self, tokens: Tensor, latent: Tensor) -> Tensor:
        """[L, patch volume * out_dim], channel fastest -> [out_dim,F,H,W]."""
        cells = tokens.view(*self._grid(latent), *self.spec.patch_size, self.spec.out_dim)
        video = cells.permute(6, 0, 3, 1, 4, 2, 5).contiguous()
        return video.view(self.spec.out_dim, *latent.shape[1:])

    def _check(self, latent: Tensor, conditions: Sequence[Condition], rows: int | None) -> None:
        spec = self.spec
        if any(size % patch for size, patch in zip(latent.shape[1:], spec.patch_size, strict=True)):
            raise InputError(f"latent {tuple(latent.shape)} is not a whole number of patches {spec.patch_size}")
        if rows is not None and rows < 1:
            raise InputError(f"rows_per_chunk is {rows}; it must be at least 1")
        for condition in conditions:
            if condition.context.shape[0] > spec.text_len:
                raise InputError(f"the prompt has {condition.context.shape[0]} tokens; at most {spec.text_len} fit")
            has_image = condition.y is not None and condition.clip_fea is not None
            if spec.has_image_branch and not has_image:
                raise InputError(f"a {spec.model_type} condition needs both y and clip_fea")
            if spec.model_type == "vace" and condition.vace_context is None:
                raise InputError("a vace condition needs vace_context")


def _pass(module: nn.Module, stream: _Stream, rows: int | None) -> None:
    """One condition through one block; a hint lives from its VACE block to the end of the main block after it."""
    if isinstance(module, VaceBlock):
        stream.hint = module(stream.vace, stream.x, stream.inputs, rows)
        return
    module(stream.x, stream.inputs, rows)
    if stream.hint is not None:
        if stream.vace_scale != 1.0:
            stream.hint.mul_(stream.vace_scale)
        stream.x.add_(stream.hint)
        stream.hint = None
