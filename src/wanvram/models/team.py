"""What a transformer knows of the ranks that share its sequence. Without a team a rank has all rows and all heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

__all__ = ["Team"]


class Team(Protocol):
    """Ranks that share rows, and heads while they attend. Lengths are in rows."""

    @property
    def rows(self) -> slice:
        """Mine of the sequence: x, rotary tables and patches are of these."""

    @property
    def my_heads(self) -> slice:
        """Those I attend for."""

    @property
    def station_rows(self) -> int:
        """Rows that my heads see without a ring: those of the ranks that exchange heads with me."""

    @property
    def is_ring(self) -> bool:
        """Whether keys and values of other stations come by."""

    def chunks(self) -> Iterator[tuple[int, slice, slice]]:
        """(number, my rows of it, where its rows of all ranks lie among the station's)."""

    def to_heads(self, rows: Tensor, target: Tensor, chunk: int) -> Any:
        """A chunk's rows [n,H,D], every rank its own, -> target [station's rows of the chunk, my heads, D]: starts it.

        rows may go at once. Returns a mark for `wait`, as `to_rows` does; each is waited for once, in the order of their starts.
        """

    def wait(self, mark: Any) -> None: ...

    def to_rows(self, attended: Tensor, chunk: int) -> Any:
        """The way back of [station's rows of the chunk, my heads, D]: starts it; returns what `arrived` takes."""

    def arrived(self, coming: Any, chunk: int) -> Tensor:
        """What `to_rows` started is here: new [n, H*D] of my rows."""

    def stations(self, pair: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values [rows, my heads, D] of every station; the next ones travel while these are used.

        pair: mine, which come first and are taken from the list. Two pairs are alive at once, if the caller drops what it got.
        """

    def whole(self, tokens: Tensor) -> Tensor:
        """My rows [n, width] -> new [all rows, width]."""
