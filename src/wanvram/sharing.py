"""Who does what where several GPUs make one video: places of ranks, and shares of rows, heads and chunks. No torch.

Three axes, their product the world. Ranks are numbered with ulysses innermost, so that those that exchange most are neighbours, then
ring, then cfg. Nothing is padded: shares differ by at most one, the longer ones first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from wanvram.errors import require
from wanvram.knobs import FEW_ROWS

__all__ = [
    *(
        "ALONE",
        "ADDRESS_BYTES",
        "BUFFER_BYTES",
        "CFG",
        "HELD_BYTES",
        "LINKS",
        "PASSING",
        "RING",
        "SEQUENCE",
        "ULYSSES",
        "WEIGHTS",
        "WORLD",
    ),
    *("Place", "Sequence", "meetings", "parts", "rows_at_once", "size", "travelling"),
]

ULYSSES, RING, CFG = "ulysses", "ring", "cfg"
SEQUENCE = "sequence"  # ulysses and ring together: those that share one sequence
WORLD = "world"
WIDE = 5120  # numbers in a row of 14B
# Of each rank and each set of ranks that exchange by copies; the last 64 KiB of its 64 MiB are PyTorch's own.
BUFFER_BYTES, HELD_BYTES = 2**26 - 2**16, 2**26
ADDRESS_BYTES = 8  # of each member's buffer and of its signals, in two arrays that PyTorch's allocator holds
LINKS = ("nvlink", "pcie3", "pcie4", "pcie5", "host")  # what joins the GPUs; host: the RAM, without peer access


def parts(total: int, count: int) -> list[slice]:
    """`count` runs that make up `total` and differ by at most one."""
    short, longer = divmod(total, count)
    edges = [n * short + min(n, longer) for n in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def size(run: slice) -> int:
    length: int = run.stop - run.start
    return length


@dataclass(frozen=True)
class Place:
    """Rank `rank` of ulysses x ring x cfg of them. Each number is the axis's size; where on it the rank is says `index`."""

    rank: int = 0
    ulysses: int = 1
    ring: int = 1
    cfg: int = 1

    @property
    def world(self) -> int:
        return self.ulysses * self.ring * self.cfg

    def count(self, axis: str) -> int:
        return len(self.members(axis))

    def index(self, axis: str) -> int:
        """Where this rank is among `members(axis)`."""
        return self.members(axis).index(self.rank)

    def members(self, axis: str) -> tuple[int, ...]:
        """Ranks that differ from this one on that axis only, in its order; this one is among them."""
        shared = self.ulysses * self.ring
        if axis == WORLD:
            return tuple(range(self.world))
        if axis == SEQUENCE:
            start = self.rank - self.rank % shared
            return tuple(range(start, start + shared))
        step, count = {ULYSSES: (1, self.ulysses), RING: (self.ulysses, self.ring), CFG: (shared, self.cfg)}[axis]
        start = self.rank - self.rank // step % count * step
        return tuple(range(start, start + count * step, step))


ALONE = Place()
PASSING, WEIGHTS = "passing", "weights"  # exchanges beside the computation, which need a buffer of their own


def meetings(place: Place, *, weights: bool) -> dict[tuple[tuple[int, ...], str], str]:
    """Sets of ranks that need a buffer each to exchange by copies, (members, use) -> an axis that has them, the world first.

    weights: shares of them are gathered, too.
    """
    axes = [(WORLD, ""), (SEQUENCE, ""), (ULYSSES, ""), (RING, PASSING), (CFG, PASSING)]
    axes += [(WORLD, WEIGHTS)] if weights else []
    found: dict[tuple[tuple[int, ...], str], str] = {}
    for axis, use in axes:
        if place.count(axis) > 1:
            found.setdefault((place.members(axis), use), axis)
    return found


def rows_at_once(place: Place, tokens: int, rows: int) -> int:
    """Rows of a chunk of a rank's share of the tokens: equal chunks, none of them longer than `rows`, those of one GPU."""
    shares = place.count(SEQUENCE)
    if shares == 1:
        return rows
    share = -(-tokens // shares)
    return -(-share // -(-share // rows))


def travelling(place: Place, tokens: int, rows: int, width: int) -> int:
    """Rows of a rank that are exchanged, and attend, at once. rows: of one GPU's chunk, `width` numbers each.

    As many chunks as one GPU makes of the whole sequence, so that as many queries attend at once as there: an attention works in
    waves of tiles, 14B at 720P in 10.0 of them on an H200 with half of the heads. Chunks of half the rank's rows at once would do
    it in 9.1 that take as long as 10 (measured: 12.41 s a step, predicted without waves 11.28), and chunks of all of them would
    take more memory, as one travels while another attends. For that there are two at least: 14B at 480P and 25 frames, one chunk of
    one GPU, would take 8 % longer on two RTX 4090 (predicted). Few numbers are not worth the messages: 1.3B at 480P would wait for the
    host, which takes 0.2 ms for each.
    """
    whole = rows_at_once(place, tokens, rows)
    if whole * width < FEW_ROWS * WIDE:
        return whole
    share, chunks = -(-tokens // place.count(SEQUENCE)), max(2, -(-tokens // rows))
    mine = -(-share // chunks)
    return mine if mine >= FEW_ROWS // 2 else -(-whole // 2)


@dataclass(frozen=True)
class Sequence:
    """How the tokens of a video and the heads of its attention are shared by the ranks of a place.

    Rows go to the ranks of SEQUENCE in order: a ring station is the neighbouring rows of its ulysses ranks. chunk_rows: how
    many rows go through a block's row-wise work at once; every rank of a station has as many chunks. Raises InputError where a
    rank would have no row or no head.
    """

    place: Place
    tokens: int
    heads: int
    chunk_rows: int

    def __post_init__(self) -> None:
        place, shares = self.place, self.place.ulysses * self.place.ring
        require(
            place.ulysses <= self.heads,
            f"ulysses_size: {place.ulysses} GPUs cannot share {self.heads} heads; give at most {self.heads}",
        )
        require(
            shares <= self.tokens,
            f"ulysses_size x ring_size: {shares} GPUs cannot share {self.tokens} tokens; use fewer",
        )

    @cached_property
    def rows_by_rank(self) -> list[slice]:
        """Of SEQUENCE's members, in order."""
        return parts(self.tokens, self.place.ulysses * self.place.ring)

    @cached_property
    def rows(self) -> slice:
        """Mine."""
        return self.rows_by_rank[self.place.index(SEQUENCE)]

    @cached_property
    def heads_by_rank(self) -> list[slice]:
        """Of ULYSSES' members, in order."""
        return parts(self.heads, self.place.ulysses)

    @cached_property
    def my_heads(self) -> slice:
        """Those for which this rank attends."""
        return self.heads_by_rank[self.place.index(ULYSSES)]

    @property
    def stations(self) -> list[int]:
        """Rows of every ring station."""
        count = self.place.ulysses
        rows = [size(run) for run in self.rows_by_rank]
        return [sum(rows[start : start + count]) for start in range(0, len(rows), count)]

    @cached_property
    def chunks_by_rank(self) -> list[list[slice]]:
        """The row chunks of each of ULYSSES' members, counted from its own first row; as many for each."""
        start = self.place.index(RING) * self.place.ulysses
        rows = [size(run) for run in self.rows_by_rank[start : start + self.place.ulysses]]
        # A chunk of the shortest share has a row at least.
        count = min(-(-rows[0] // self.chunk_rows), rows[-1])
        return [parts(length, count) for length in rows]

    @cached_property
    def chunks(self) -> list[slice]:
        """Mine, counted from my first row."""
        return self.chunks_by_rank[self.place.index(ULYSSES)]

    @cached_property
    def pieces(self) -> list[slice]:
        """Where each chunk of all of ULYSSES' members together lies among the station's rows: one chunk's behind another's.

        Attention does not mind the order of keys, so nothing is put into the sequence's order.
        """
        edges, stop = [], 0
        for members in zip(*self.chunks_by_rank, strict=True):
            start, stop = stop, stop + sum(map(size, members))
            edges.append(slice(start, stop))
        return edges
