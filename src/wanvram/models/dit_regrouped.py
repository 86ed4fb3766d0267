"""The same transformer where its residual stream waits elsewhere and only some rows of it are on the device at a time.

A block touches the stream by row chunks alone, but in seven loops. Here they are two: queries, attention and its projection; then
cross-attention, feed-forward and the keys and values of the next block, or the head. So the stream comes by twice a block, behind
the most work, and the units of weights are those of the loops. Row by row the operations and their order are the plain ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wanvram.models.dit import Attending, Prepared, Time, Walk, WanDiT
from wanvram.models.dit_blocks import Block, BlockInputs
from wanvram.models.rotary import rotary_tables

__all__ = ["RegroupedDiT", "RowStream"]

Rows = Callable[[slice, Tensor], None]  # (where, these rows of the stream) -> what a loop does with them


class RowStream(Protocol):
    """A residual stream float32 [L, dim] that comes by chunk by chunk."""

    def rows(self, *, reads: bool = True, writes: bool = True) -> Iterator[tuple[slice, Tensor]]:
        """(where, its rows) of every chunk in order, to be changed in place before the next is asked for.

        reads: they come as they were written last, else with any values. writes: what they are now is kept.
        """


class RegroupedDiT(WanDiT):
    """One stream at a time, all heads at once, no source video. Same parameters, same velocities bit for bit."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        blocks = self._pairs()
        gathered = [nn.ModuleList(_keys_of(blocks[0][0]))]
        for block, following in blocks:
            attend = block.self_attn
            gathered.append(nn.ModuleList([attend.q, attend.o, attend.norm_q]))
            gathered.append(nn.ModuleList([block.cross_attn, block.ffn, *(_keys_of(following) if following else ())]))
        # A tuple of modules is no part of the module: every parameter keeps its one name.
        self._gathered = tuple(gathered)

    def walk_order(self) -> list[nn.Module]:
        """The first block's keys and values; then of every block what attends, and the rest with the next one's keys."""
        return list(self._gathered)

    def lanes(self) -> list[int]:
        """A slot for the smaller units and one for the larger: each is filled while the other's unit computes."""
        return [0, *(lane for _ in self.blocks for lane in (0, 1))]

    def _pairs(self) -> list[tuple[Block, Block | None]]:
        """Each block with the one after it."""
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        return list(zip(blocks, [*blocks[1:], None], strict=True))

    @torch.no_grad()
    def velocity(
        self,
        latents: Sequence[Tensor],
        time: Time,
        conditions: Sequence[Prepared],
        *,
        attending: Attending | None = None,
        walk: Walk = iter,
        stream: RowStream | None = None,
        **unused: Any,
    ) -> list[Tensor]:
        """As WanDiT's, of one latent, in the stream's chunks and all heads at once: unused are the numbers of both."""
        assert stream is not None
        self._check_latents(latents, None)
        ((latent, condition),) = zip(latents, conditions, strict=True)
        cos, sin = rotary_tables(self._grid(latent), self.spec.head_dim, latent.device)
        inputs = BlockInputs(time.modulation, cos, sin, condition.text, condition.image, attending or Attending())
        length, volume = cos.shape[0], self.head.head.bias.shape[0]
        make = partial(torch.empty, device=latent.device)
        k, v = (make((length, self.spec.dim), dtype=self.precision.matmul) for _ in range(2))
        parts = [latent] if condition.y is None else [latent, condition.y]
        visit = walk(self.walk_order())
        next(visit)
        _begin(self, parts, stream, _keys_into(self._pairs()[0][0], k, v, inputs))
        for block, following in self._pairs():
            next(visit)
            _attend(block, k, v, inputs, stream)
            next(visit)
            if following is not None:
                _rest(block, inputs, stream.rows(), _keys_into(following, k, v, inputs))
                continue
            out = make((length, volume), dtype=self.precision.small)
            _rest(block, inputs, stream.rows(writes=False), self._head_into(out, time))
        for _ in visit:
            """Lets the walk end."""
        return [self._unpatchify(out, latent)]

    def _head_into(self, out: Tensor, time: Time) -> Rows:
        modulation = self.head.modulated(time.e)
        return lambda c, x: self.head.rows_into(out[c], x, modulation)


def _keys_of(block: Block) -> list[nn.Module]:
    attend = block.self_attn
    return [attend.k, attend.v, attend.norm_k]


def _keys_into(block: Block, k: Tensor, v: Tensor, inputs: BlockInputs) -> Rows:
    """Writes rows of a block's keys and values [L, dim]."""
    modulation = block.modulated(inputs)[:3]
    return lambda c, x: block.self_attn.keys_and_values_into(k, v, x, c, modulation, inputs)


def _begin(model: WanDiT, parts: Sequence[Tensor], through: RowStream, then: Rows) -> None:
    """The latent's patches become the stream."""
    embedding = model.patch_embedding
    patches, weight = embedding.unfold(parts), embedding.matrix()
    for c, x in through.rows(reads=False):
        embedding.rows_into(x, patches[c], weight)
        then(c, x)


def _attend(block: Block, k: Tensor, v: Tensor, inputs: BlockInputs, through: RowStream) -> None:
    modulation = block.modulated(inputs)[:3]
    k, v = (block.self_attn.by_head(t) for t in (k, v))
    for c, x in through.rows():
        block.self_attn.attend_rows(x, c, k, v, modulation, inputs)


def _rest(block: Block, inputs: BlockInputs, rows: Iterator[tuple[slice, Tensor]], then: Rows) -> None:
    """Cross-attention and feed-forward, and what else these rows of the stream are for while they are here."""
    modulation = block.modulated(inputs)[3:]
    pairs = block.cross_attn.keys_and_values(inputs.text, inputs.image)
    for c, x in rows:
        block.cross_attn.attend_rows(x, block.norm3, pairs, inputs.how.backend)
        block.ffn.add_rows(x, modulation)
        then(c, x)
