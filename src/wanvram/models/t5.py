"""The umT5 text encoder: one prompt of L valid tokens at a time, no padding.

Official pads to 512 and masks the padding with the most negative float32: its softmax weight is exactly 0 for every
valid row, so leaving the padding out gives the same valid rows. All parameters share one dtype, as in the checkpoint
(bfloat16); norms and the softmax compute in float32 and round their result to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from wanvram.specs import T5Spec

__all__ = ["T5Block", "T5Encoder", "position_buckets"]

Walk = Callable[[Sequence[nn.Module]], Iterator[nn.Module]]

EPS = 1e-6


def position_buckets(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket of each distance key - query (int64): positive distances use the upper half of the buckets.

    In each half the first half is one bucket per distance, the rest grow geometrically up to max_distance. The
    smallest distance of every bucket is found in integers, so no logarithm can round to the wrong side, and nothing
    but comparisons runs on the device.
    """
    half = num_buckets // 2
    exact = half // 2
    geometric = half - exact
    starts = list(range(1, exact + 1))
    for bucket in range(1, geometric):  # smallest n with (n / exact)^geometric >= (max_distance / exact)^bucket
        bound = max_distance**bucket * exact ** (geometric - bucket)
        starts.append(next(n for n in range(exact, max_distance + 1) if n**geometric >= bound))
    magnitude = distance.abs()
    buckets = (distance > 0).long() * half
    for start in starts:
        buckets += magnitude >= start
    return buckets


def _table(rows: int, width: int, dtype: torch.dtype) -> nn.Embedding:
    """An uninitialised embedding: PyTorch's own initialisation, on meta, imports its compiler (0.7 s to 3 s)."""
    return nn.Embedding(rows, width, _weight=torch.empty((rows, width), dtype=dtype))


class T5Norm(nn.Module):
    """x / rms(x) in float32, rounded to the weight's dtype, times the weight."""

    def __init__(self, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(dim=-1, keepdim=True) + EPS)
        return (x * scale).to(self.weight.dtype).mul_(self.weight)


class Attention(nn.Module):
    """Unscaled dot products plus a position bias."""

    def __init__(self, spec: T5Spec, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = spec.num_heads
        self.q = nn.Linear(spec.dim, spec.dim_attn, bias=False, dtype=dtype)
        self.k = nn.Linear(spec.dim, spec.dim_attn, bias=False, dtype=dtype)
        self.v = nn.Linear(spec.dim, spec.dim_attn, bias=False, dtype=dtype)
        self.o = nn.Linear(spec.dim_attn, spec.dim, bias=False, dtype=dtype)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """bias [heads, L, L] is overwritten."""
        length = x.shape[0]
        q, k, v = (part(x).view(length, self.heads, -1).transpose(0, 1) for part in (self.q, self.k, self.v))
        scores = bias.add_(torch.bmm(q, k.transpose(1, 2)))
        # A softmax of bfloat16 computes in float32 and rounds its result: same numbers as official's cast to float32
        # and back, without the float32 copies (2 x 67 MB at 512 tokens).
        mixed = torch.bmm(torch.softmax(scores, dim=-1), v)
        projected: Tensor = self.o(mixed.transpose(0, 1).reshape(length, -1))
        return projected


class T5FeedForward(nn.Module):
    """fc2(fc1(x) * gelu(gate(x))), GELU in its tanh form."""

    def __init__(self, spec: T5Spec, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(spec.dim, spec.dim_ffn, bias=False, dtype=dtype), nn.GELU("tanh"))
        self.fc1 = nn.Linear(spec.dim, spec.dim_ffn, bias=False, dtype=dtype)
        self.fc2 = nn.Linear(spec.dim_ffn, spec.dim, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(self.gate(x).mul_(self.fc1(x)))
        return result


class RelativePosition(nn.Module):
    """One bias per head and distance bucket."""

    def __init__(self, spec: T5Spec, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = _table(spec.num_buckets, spec.num_heads, dtype)

    def forward(self, buckets: Tensor) -> Tensor:
        """buckets [L, L] (query, key) -> contiguous bias [heads, L, L]."""
        table = self.embedding.weight.t()
        return table.index_select(1, buckets.flatten()).view(-1, *buckets.shape)


class T5Block(nn.Module):
    """Self-attention and feed-forward, each on the normed stream and added to it."""

    def __init__(self, spec: T5Spec, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1 = T5Norm(spec.dim, dtype)
        self.attn = Attention(spec, dtype)
        self.norm2 = T5Norm(spec.dim, dtype)
        self.ffn = T5FeedForward(spec, dtype)
        self.pos_embedding = RelativePosition(spec, dtype)

    def forward(self, x: Tensor, buckets: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), self.pos_embedding(buckets))
        return x.add_(self.ffn(self.norm2(x)))


class T5Encoder(nn.Module):
    """Embedded tokens [L, dim] -> features [L, dim].

    `token_embedding` belongs to the checkpoint but not to forward: its 256384 rows (1.96 GiB in bfloat16) stay on the
    host, which looks up the few rows a prompt needs.
    """

    def __init__(self, spec: T5Spec, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = spec
        self.token_embedding = _table(spec.vocab_size, spec.dim, dtype)
        self.blocks = nn.ModuleList(T5Block(spec, dtype) for _ in range(spec.num_layers))
        self.norm = T5Norm(spec.dim, dtype)

    def walk_order(self) -> list[nn.Module]:
        """Every block in the order of use."""
        return list(self.blocks)

    @torch.no_grad()
    def forward(self, embedded: Tensor, *, walk: Walk = iter) -> Tensor:
        """One text; see `encode`."""
        return self.encode([embedded], walk=walk)[0]

    @torch.no_grad()
    def encode(self, texts: Sequence[Tensor], *, walk: Walk = iter) -> list[Tensor]:
        """Texts [L_i, dim] -> features [L_i, dim]. All of them pass a block before the next one is asked for.

        walk(blocks) yields the blocks in order, each ready to run until then.
        """
        streams = list(texts)
        buckets = [self._buckets(x) for x in streams]
        for block in walk(self.walk_order()):
            for index in range(len(streams)):
                streams[index] = block(streams[index], buckets[index])
        return [self.norm(x) for x in streams]

    def _buckets(self, embedded: Tensor) -> Tensor:
        """[L, L]: the bucket of each key's distance from each query."""
        positions = torch.arange(embedded.shape[0], device=embedded.device)
        distance = positions[None, :] - positions[:, None]
        return position_buckets(distance, self.spec.num_buckets, self.spec.max_distance)
