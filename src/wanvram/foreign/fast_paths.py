"""PyTorch's fast paths of nn.MultiheadAttention and nn.TransformerEncoderLayer, as their CUDA sources take memory.

Taken in eval mode without gradients, where nothing but plain tensors comes in: attention.cu and transformer.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from wanvram.foreign.memory import ForeignMemory

__all__ = ["FastPaths", "without_modes"]

_HEAD = 8  # dimensions of a head must be a multiple of this for fused attention


def without_modes(plain: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """torch.overrides.has_torch_function that does not count the simulation's own mode, which would lead off the fast paths."""

    def asked(arguments: Any) -> bool:
        kinds = (type(None), torch.Tensor, torch.nn.Parameter)
        return plain(arguments) and any(type(argument) not in kinds for argument in arguments)

    return asked


class FastPaths:
    def __init__(self, memory: ForeignMemory) -> None:
        self.memory = memory

    def multihead(self, query: Any, key: Any, value: Any, width: int, heads: int, *rest: Any) -> Any:
        """aten._native_multi_head_attention of [B,T,D]; rest: both weights with biases, mask, need_weights, average."""
        defaults: tuple[Any, ...] = (None, True, True)
        w_in, b_in, w_out, b_out, mask, *asked = (*rest, *defaults[len(rest) - 4 :])
        weights, average = asked[0], asked[1]
        with self.memory:
            if query is key and key is value and width // heads % _HEAD == 0 and not weights:
                return self._fused(query, width, heads, (w_in, b_in, w_out, b_out, mask)), None
            return self._apart((query, key, value), width, heads, (w_in, b_in, w_out, b_out), (weights, average))

    def _fused(self, x: Any, width: int, heads: int, weights: Any) -> Any:
        w_in, b_in, w_out, b_out, mask = weights
        parts = torch.nn.functional.linear(x, w_in, b_in).chunk(3, -1)
        q, k, v = (part.view(x.shape[0], -1, heads, width // heads).transpose(1, 2) for part in parts)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return torch.nn.functional.linear(y.transpose(1, 2).reshape(x.shape[0], -1, width), w_out, b_out)

    def _apart(self, inputs: Any, width: int, heads: int, weights: Any, asked: Any) -> Any:
        """One buffer for q, k and v, the scores and their softmax; the result of the second product lies in q's place."""
        w_in, _, w_out, b_out = weights
        batch, rows, _ = inputs[0].shape
        if inputs[0] is inputs[1] is inputs[2]:
            projected = torch.matmul(inputs[0], w_in.t())
        else:
            projected = torch.cat([torch.matmul(x, w.t()) for x, w in zip(inputs, w_in.chunk(3), strict=True)], dim=2)
        packed = projected.new_empty((3, batch * heads, rows, width // heads))
        del projected
        q, k, v = packed
        scores = torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1)
        torch.bmm(scores, v, out=q)
        joined = q.view(batch, heads, rows, -1).transpose(1, 2).reshape(batch * rows, width)
        out = torch.addmm(b_out, joined, w_out.t()).view(batch, rows, width)
        del joined
        if not asked[0]:
            return out, None
        scores = scores.view(batch, heads, rows, rows)
        return out, scores.sum(1).div_(heads) if asked[1] else scores

    def encoder_layer(self, x: Any, width: int, heads: int, *rest: Any) -> Any:
        """aten._transformer_encoder_layer_fwd of [B,T,D]."""
        *attention, gelu, first, eps, n1, c1, n2, c2, w1, b1, w2, b2 = rest[:15]
        mask = rest[15] if len(rest) > 15 else None
        norm = torch.nn.functional.layer_norm
        with self.memory:
            y = norm(x, (width,), n1, c1, eps) if first else x
            y = self.multihead(y, y, y, width, heads, *attention, mask, False)[0]
            y.add_(x)
            y = y if first else norm(y, (width,), n1, c1, eps)
            before = y
            y = norm(y, (width,), n2, c2, eps) if first else y
            inner = torch._addmm_activation(b1, y.view(-1, width), w1.t(), use_gelu=gelu)
            del y
            y = torch.addmm(b2, inner, w2.t()).view(x.shape)
            del inner
            y.add_(before)
            return y if first else norm(y, (width,), n2, c2, eps)
