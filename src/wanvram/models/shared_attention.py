"""Self-attention of a rank that has some of the rows, and attends for some of the heads to all of them.

Keys and values are exchanged row chunk by row chunk as they are made, then queries chunk by chunk on their way to attention and back
(Ulysses). Where keys and values go round a ring, the queries of all chunks come first, and what each station adds is merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wanvram.kernels.elementwise import gated_add_, layer_norm_modulate, rms_norm_rope_
from wanvram.kernels.merge import merge_attention_
from wanvram.kernels.scaled_attention import attention, attention_with_sums
from wanvram.models.team import Team

if TYPE_CHECKING:
    from wanvram.models.dit_blocks import BlockInputs, RMSNorm, SelfAttention
    from wanvram.models.linear import Linear

__all__ = ["SharedAttention"]


class SharedAttention:
    """One self-attention for one stream. x [my rows, dim]; modulation: shift, scale, gate, each float32 [dim].

    Each exchange travels while the next rows are computed, and is waited for before the next starts.
    """

    def __init__(
        self, unit: SelfAttention, x: Tensor, modulation: Sequence[Tensor], inputs: BlockInputs, team: Team
    ) -> None:
        self.unit, self.x, self.modulation, self.inputs, self.team = unit, x, modulation, inputs, team
        self._travelling: Any = None

    def add(self) -> None:
        """x += gate * attention(norm(x))."""
        k = self._new(self.team.station_rows)
        v = torch.empty_like(k)
        for chunk, mine, piece in self.team.chunks():
            self._keys_and_values(mine, chunk, k[piece], v[piece])
        if self.team.is_ring:
            pair = [k, v]
            del k, v
            self._add_round(pair)
        else:
            self._add_chunks(k, v)

    def _keys_and_values(self, mine: slice, chunk: int, k: Tensor, v: Tensor) -> None:
        h = self._normed(mine)
        self._send(self._turned(h, self.unit.k, self.unit.norm_k, mine), k, chunk)
        t = self.unit.by_head(self.unit.v(h))
        del h
        self._send(t, v, chunk)

    def _queries(self, mine: slice, chunk: int, q: Tensor) -> None:
        h = self._normed(mine)
        t = self._turned(h, self.unit.q, self.unit.norm_q, mine)
        del h
        self._send(t, q, chunk)

    def _send(self, rows: Tensor, target: Tensor, chunk: int) -> None:
        self._land()
        self._travelling = self.team.to_heads(rows, target, chunk)

    def _land(self) -> None:
        self.team.wait(self._travelling)
        self._travelling = None

    def _add_chunks(self, k: Tensor, v: Tensor) -> None:
        """A chunk attends while the next one's queries come and the results of the one before go back."""
        chunks = list(self.team.chunks())
        coming, back = [self._coming(*chunks[0])], list[Any]()
        for chunk, mine, _ in chunks:
            self._land()
            q = coming.pop()
            if chunk + 1 < len(chunks):
                coming.append(self._coming(*chunks[chunk + 1]))
            attended = attention(q, k, v, self.inputs.how.backend)
            del q
            back.append((mine, chunk, self.team.to_rows(attended, chunk)))
            del attended
            if chunk:
                self._add_back(*back.pop(0))
        del k, v
        self._add_back(*back.pop())

    def _coming(self, chunk: int, mine: slice, piece: slice) -> Tensor:
        """The queries of a chunk on their way."""
        q = self._new(piece.stop - piece.start)
        self._queries(mine, chunk, q)
        return q

    def _add_back(self, mine: slice, chunk: int, coming: Any) -> None:
        y = self.unit.o(self.team.arrived(coming, chunk))
        gated_add_(self.x[mine], y, self.modulation[2])

    def _add_round(self, pair: list[Tensor]) -> None:
        """The same with keys and values of all stations. pair: mine, taken from the list, so that they go when they are used up."""
        q = self._new(self.team.station_rows)
        for chunk, mine, piece in self.team.chunks():
            self._queries(mine, chunk, q[piece])
        self._land()
        out = self._attended_round(q, pair)
        del q
        for chunk, mine, piece in self.team.chunks():
            self._add_back(mine, chunk, self.team.to_rows(out[piece].to(self.unit.o.bias.dtype), chunk))

    def _attended_round(self, q: Tensor, pair: list[Tensor]) -> Tensor:
        """float32, in q's shape: the sums of all stations take as long as the queries, so they come and go chunk by chunk."""
        asked = self.inputs.how.backend
        out, sums = None, None
        for k, v in self.team.stations(pair):
            if out is None or sums is None:
                part, sums = attention_with_sums(q, k, v, asked)
                out = part.float()
                del part, k, v
                continue
            for _, _, piece in self.team.chunks():
                part, part_sums = attention_with_sums(q[piece], k, v, asked)
                merge_attention_(out[piece], sums[:, piece], part, part_sums)
                del part, part_sums
            del k, v
        assert out is not None
        return out

    def _normed(self, mine: slice) -> Tensor:
        shift, scale, _ = self.modulation
        return layer_norm_modulate(self.x[mine], scale, shift, self.unit.eps, 1.0, self.unit.k.bias.dtype)

    def _turned(self, h: Tensor, project: Linear, norm: RMSNorm, mine: slice) -> Tensor:
        """Queries or keys [n, heads, head_dim] of these rows, normalised over their full width and turned by their places."""
        t, rope = project(h), (self.inputs.cos[mine], self.inputs.sin[mine])
        rms_norm_rope_(t, norm.weight, *rope, self.unit.num_heads, self.unit.eps)
        return self.unit.by_head(t)

    def _new(self, rows: int) -> Tensor:
        """[rows, my heads, head_dim]."""
        heads = self.team.my_heads
        shape = (rows, heads.stop - heads.start, self.x.shape[1] // self.unit.num_heads)
        return torch.empty(shape, dtype=self.unit.k.bias.dtype, device=self.x.device)
