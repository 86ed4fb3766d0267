"""The Wan2.1 diffusion transformer (t2v, i2v, flf2v, vace): official weights and arithmetic, one sample at a time.

Owns the parameters under their official state-dict names, and the order in which temporaries are born and die. A run first
asks `prepare` for everything that does not change from step to step or depends on the timestep alone (time, text and image
embeddings: 0.7 GiB of weights at 14B that no step needs again), then `velocity` for every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from wanvram.errors import InputError
from wanvram.models.dit_blocks import (
    Attending,
    Block,
    BlockInputs,
    GeluTanh,
    Head,
    ImageEmbedding,
    PatchEmbedding,
    VaceBlock,
)
from wanvram.models.linear import Linear
from wanvram.models.precision import Precision
from wanvram.models.rotary import rotary_tables
from wanvram.specs import DiTSpec

__all__ = ["Attending", "Block", "Condition", "Prepared", "Time", "VaceBlock", "Walk", "WanDiT"]

Walk = Callable[[Sequence[nn.Module]], Iterator[nn.Module]]


@dataclass(frozen=True)
class Condition:
    """What one forward is conditioned on. context is unpadded [tokens, text_dim]."""

    context: Tensor
    y: Tensor | None = None  # i2v, flf2v: mask and image latents [20,F,H,W]
    clip_fea: Tensor | None = None  # i2v: [1,257,clip_dim]; flf2v: [2,257,clip_dim], first then last image
    vace_context: Tensor | None = None  # vace: [96,F,H,W]
    vace_scale: float = 1.0


@dataclass(frozen=True)
class Time:
    """A timestep's embedding, float32: e [1, dim] for the head, modulation [6, dim] for the blocks."""

    e: Tensor
    modulation: Tensor


@dataclass(frozen=True)
class Prepared:
    """A condition after its embeddings: text [text_len, dim], image [257 or 514, dim]."""

    text: Tensor
    image: Tensor | None
    y: Tensor | None
    vace_context: Tensor | None
    vace_scale: float


@dataclass
class _Stream:
    """One condition on its way through the blocks."""

    x: Tensor
    inputs: BlockInputs
    vace: Tensor | None
    vace_scale: float


# A unit of weights, and what is done with it for a stream and the rows of a chunk.
_Visit = tuple[nn.Module, Callable[[_Stream, int | None], None]]


class WanDiT(nn.Module):
    """Velocity prediction. Parameters are uninitialised until weights are loaded; large ones are reached through a walk."""

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
        if spec.has_source_branch:
            count = len(spec.vace_layers)
            self.vace_blocks = nn.ModuleList(VaceBlock(spec, precision, first=n == 0) for n in range(count))
            self.vace_patch_embedding = PatchEmbedding(spec.vace_in_dim, dim, spec.patch_size, matmul)

    def embedders(self) -> list[nn.Module]:
        """What `prepare` walks: the modules that no step needs."""
        image = [self.img_emb] if self.spec.has_image_branch else []
        return [self.time_embedding, self.time_projection, self.text_embedding, *image]

    def walk_order(self) -> list[nn.Module]:
        """Every unit that `velocity` walks, in the order of use."""
        return [unit for unit, _ in self._visits()]

    def _visits(self) -> list[_Visit]:
        """VACE block n comes before main block vace_layers[n], its output projection directly after it."""
        visits: list[_Visit] = []
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            vace: VaceBlock | None = None
            if index in self.spec.vace_layers:
                found = self.vace_blocks[self.spec.vace_layers.index(index)]
                assert isinstance(found, VaceBlock)
                vace = found
                if vace.first:
                    visits.append((vace.before_proj, partial(_begin, vace)))
                visits += [(unit, partial(_on_vace, vace, unit)) for unit in vace.units()]
            visits += [(unit, partial(_on_main, block, unit)) for unit in block.units()]
            if vace is not None:
                visits.append((vace.after_proj, partial(_add_hint, vace)))
        return visits

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
        """`prepare` and `velocity` of one timestep, with the embedders in place."""
        (time,), prepared = self.prepare([timestep], conditions)
        latents = [latent] * len(prepared)
        how = Attending(heads_per_group)
        return self.velocity(latents, time, prepared, rows_per_chunk=rows_per_chunk, attending=how, walk=walk)

    @torch.no_grad()
    def prepare(
        self, timesteps: Sequence[float], conditions: Sequence[Condition], *, walk: Walk = iter
    ) -> tuple[list[Time], list[Prepared]]:
        """One Time per timestep and one Prepared per condition. Each embedder is used before the next is asked for."""
        for condition in conditions:
            self._check(condition)
        device = conditions[0].context.device
        visit = walk(self.embedders())
        next(visit)
        e = [self.time_embedding(self._sinusoid(t, device)) for t in timesteps]
        next(visit)
        times = [Time(v, self.time_projection(v).view(6, self.spec.dim)) for v in e]
        next(visit)
        texts = [self._embed_text(condition.context) for condition in conditions]
        images: list[Tensor | None] = [None] * len(conditions)
        if self.spec.has_image_branch:
            next(visit)
            images = [self.img_emb(condition.clip_fea) for condition in conditions]
        for _ in visit:
            """Lets the walk end."""
        prepared = [
            Prepared(text, image, c.y, c.vace_context, c.vace_scale)
            for text, image, c in zip(texts, images, conditions, strict=True)
        ]
        return times, prepared

    @torch.no_grad()
    def velocity(
        self,
        latents: Sequence[Tensor],
        time: Time,
        conditions: Sequence[Prepared],
        *,
        rows_per_chunk: int | None = None,
        attending: Attending | None = None,
        walk: Walk = iter,
    ) -> list[Tensor]:
        """One latent float32 [C,F,H,W] per condition, all of one shape -> as many velocities float32 [out_dim,F,H,W].

        All of them pass a unit before the next one is requested from the walk, each computed alone. rows_per_chunk: tokens
        handled at once (None: all), changes memory but not the result.
        """
        first, how = latents[0], attending or Attending()
        self._check_latents(latents, rows_per_chunk)
        rows = how.team.rows if how.team else None
        tables = rotary_tables(self._grid(first), self.spec.head_dim, first.device, rows)
        streams = []
        for latent, condition in zip(latents, conditions, strict=True):
            inputs = BlockInputs(time.modulation, *tables, condition.text, condition.image, how)
            streams.append(self._start(latent, condition, inputs, rows_per_chunk))
        del tables, inputs
        advance_of = {id(unit): advance for unit, advance in self._visits()}
        for unit in walk(self.walk_order()):
            for stream in streams:
                advance_of[id(unit)](stream, rows_per_chunk)
        outputs = []
        while streams:
            x = streams.pop(0).x
            tokens = self.head(x, time.e, rows_per_chunk)
            outputs.append(self._unpatchify(how.team.whole(tokens) if how.team else tokens, first))
            del tokens, x
        return outputs

    def _start(self, latent: Tensor, condition: Prepared, inputs: BlockInputs, rows: int | None) -> _Stream:
        parts = [latent] if condition.y is None else [latent, condition.y]
        of = inputs.how.team.rows if inputs.how.team else None
        x = self.patch_embedding(parts, rows, of)
        vace = None
        if condition.vace_context is not None:
            vace = self.vace_patch_embedding([condition.vace_context], rows, of)
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

    def _check_latents(self, latents: Sequence[Tensor], rows: int | None) -> None:
        latent, patch = latents[0], self.spec.patch_size
        if any(other.shape != latent.shape for other in latents):
            raise InputError(f"latents have the shapes {[tuple(other.shape) for other in latents]}; they must have one")
        if any(size % p for size, p in zip(latent.shape[1:], patch, strict=True)):
            raise InputError(f"latent {tuple(latent.shape)} is not a whole number of patches {patch}")
        if rows is not None and rows < 1:
            raise InputError(f"rows_per_chunk is {rows}; it must be at least 1")

    def _check(self, condition: Condition) -> None:
        spec = self.spec
        if condition.context.shape[0] > spec.text_len:
            raise InputError(f"the prompt has {condition.context.shape[0]} tokens; at most {spec.text_len} fit")
        has_image = condition.y is not None and condition.clip_fea is not None
        if spec.has_image_branch and not has_image:
            raise InputError(f"a {spec.model_type} condition needs both y and clip_fea")
        if spec.has_source_branch and condition.vace_context is None:
            raise InputError("a vace condition needs vace_context")


def _on_main(block: Block, unit: nn.Module, stream: _Stream, rows: int | None) -> None:
    block.advance(unit, stream.x, stream.inputs, rows)


def _begin(block: VaceBlock, stream: _Stream, rows: int | None) -> None:
    block.begin(stream.vace, stream.x, rows)  # type: ignore[arg-type]


def _on_vace(block: VaceBlock, unit: nn.Module, stream: _Stream, rows: int | None) -> None:
    block.advance(unit, stream.vace, stream.inputs, rows)  # type: ignore[arg-type]


def _add_hint(block: VaceBlock, stream: _Stream, rows: int | None) -> None:
    block.add_hint(stream.x, stream.vace, stream.vace_scale, rows)  # type: ignore[arg-type]
