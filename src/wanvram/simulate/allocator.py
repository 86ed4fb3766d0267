"""A model of PyTorch's CUDA caching allocator, exact to the byte: same segments, splits, merges, retries. No torch.

Rules read from c10/cuda/CUDACachingAllocator.cpp (2.11 to 2.13) and checked against complete histories of an H200
(tests/golden/allocator_*.json.gz). What a model cannot know is the order of addresses cudaMalloc returns; see `_Addresses`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from wanvram.errors import OutOfMemory
from wanvram.units import human

__all__ = ["AllocatorSettings", "CachingAllocator", "SegmentView"]

MIN_BLOCK = 512
SMALL_SIZE = 1024 * 1024
SMALL_BUFFER = 2 * 1024 * 1024
MIN_LARGE_ALLOC = 10 * 1024 * 1024
LARGE_BUFFER = 20 * 1024 * 1024
ROUND_LARGE = 2 * 1024 * 1024
ADDRESS_STEP = 32 * 1024 * 1024
_LAST_ADDRESS = 1 << 62  # addresses only have to be ordered; reservations of 9/8 of the device need room


@dataclass(frozen=True)
class AllocatorSettings:
    """The part of PYTORCH_CUDA_ALLOC_CONF that decides sizes."""

    expandable_segments: bool = False


class _Block:
    """A range of device addresses; neighbours inside one segment are linked."""

    __slots__ = ("address", "allocated", "expandable", "mapped", "next", "pool", "prev", "size")

    def __init__(self, address: int, size: int, pool: _Pool, *, expandable: bool, mapped: bool = True) -> None:
        self.address = address
        self.size = size
        self.pool = pool
        self.expandable = expandable
        self.mapped = mapped
        self.allocated = False
        self.prev: _Block | None = None
        self.next: _Block | None = None


@dataclass
class _Pool:
    """Free blocks ordered by (size, address), unmapped ranges by address; one per (small or large, stream)."""

    small: bool
    page: int
    free: list[tuple[int, int]] = field(default_factory=list)
    unmapped: list[int] = field(default_factory=list)
    at: dict[int, _Block] = field(default_factory=dict)

    def add(self, block: _Block) -> None:
        insort(self.free, (block.size, block.address))
        self.at[block.address] = block

    def remove(self, block: _Block) -> None:
        del self.free[bisect_left(self.free, (block.size, block.address))]
        del self.at[block.address]

    def add_unmapped(self, block: _Block) -> None:
        insort(self.unmapped, block.address)
        self.at[block.address] = block

    def remove_unmapped(self, block: _Block) -> None:
        del self.unmapped[bisect_left(self.unmapped, block.address)]
        del self.at[block.address]


class _Addresses:
    """Where cudaMalloc puts segments, which decides ties between equal free blocks.

    Seen in H200 histories: new ranges lie below all others, each a multiple of 32 MiB; what is left of one, and what was freed,
    is used again. The driver's own allocations, which lie between ours, are not known: of 168 stage peaks one differs for that.
    """

    def __init__(self) -> None:
        self._lowest = _LAST_ADDRESS
        self._gaps: dict[int, int] = {}  # address -> size

    def take(self, size: int) -> int:
        fitting = [(room, address) for address, room in self._gaps.items() if room >= size]
        if fitting:
            room, address = min(fitting)
            del self._gaps[address]
        else:
            room = -(-size // ADDRESS_STEP) * ADDRESS_STEP
            self._lowest = address = self._lowest - room
        if room > size:
            self._gaps[address + size] = room - size
        return address

    def give_back(self, address: int, size: int) -> None:
        size += self._gaps.pop(address + size, 0)
        before = next((start for start, room in self._gaps.items() if start + room == address), None)
        if before is None:
            self._gaps[address] = size
        else:
            self._gaps[before] += size


@dataclass(frozen=True)
class SegmentView:
    """One reserved range and its blocks (address, size, state: allocated, free or unmapped) for maps and fragmentation."""

    address: int
    size: int
    small: bool
    stream: int
    blocks: tuple[tuple[int, int, str], ...]


class CachingAllocator:
    """malloc and free of one device.

    total_bytes: what the device can give this process. limit_bytes: cap on reserved memory (per_process_memory_fraction).
    on_segment: called with ('segment_alloc' | 'segment_free' | 'segment_map' | 'segment_unmap', address, size, stream).
    """

    def __init__(
        self,
        settings: AllocatorSettings | None = None,
        *,
        total_bytes: int | None = None,
        limit_bytes: int | None = None,
        on_segment: Callable[[str, int, int, int], None] | None = None,
    ) -> None:
        self.settings = settings or AllocatorSettings()
        self.total_bytes = total_bytes
        self.limit_bytes = limit_bytes
        self.on_segment = on_segment
        self.allocated_bytes = self.reserved_bytes = 0
        self.peak_allocated_bytes = self.peak_reserved_bytes = 0
        self.alloc_retries = 0
        self._pools: dict[tuple[bool, int], _Pool] = {}
        self._live: dict[int, tuple[_Block, int]] = {}
        self._heads: dict[int, tuple[_Block, int]] = {}  # first block of every segment, with its stream
        self._awaited: set[int] = set()
        self._addresses = _Addresses()

    # --- public ------------------------------------------------------------------------------------------------------------

    def malloc(self, size: int, stream: int = 0) -> int:
        """Handle of a block of at least `size` bytes. Raises OutOfMemory after one retry with the cache given back."""
        rounded = MIN_BLOCK if size < MIN_BLOCK else -(-size // MIN_BLOCK) * MIN_BLOCK
        pool = self._pool(rounded, stream)
        block = self._best_fit(pool, rounded)
        if block is None:
            block = self._new_block(pool, rounded, stream)
        if block is None:
            self.alloc_retries += 1
            self.empty_cache()
            block = self._new_block(pool, rounded, stream)
        if block is None:
            raise self._out_of_memory(rounded)
        self._split(block, rounded)
        block.allocated = True
        self._live[block.address] = (block, stream)
        self.allocated_bytes += block.size
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes
        return block.address

    def free(self, handle: int) -> None:
        """Gives the block back to its pool, merged with free neighbours."""
        block, _ = self._live.pop(handle)
        block.allocated = False
        if handle in self._awaited:
            self._awaited.remove(handle)
        else:
            self.allocated_bytes -= block.size
        self._merge_with_neighbours(block)
        block.pool.add(block)

    def await_stream(self, handle: int) -> None:
        """Freed, and no longer counted as allocated, while another stream still uses it: `free` gives it back when that has passed."""
        self._awaited.add(handle)
        self.allocated_bytes -= self._live[handle][0].size

    def empty_cache(self) -> None:
        """Gives whole free segments (or whole pages of expandable ones) back to the driver; large pools first."""
        for key in sorted(self._pools, key=lambda k: (k[0], k[1])):
            pool = self._pools[key]
            for _, address in list(pool.free):
                block = pool.at[address]
                if block.expandable:
                    self._unmap(block, key[1])
                elif block.prev is None and block.next is None:
                    self._release(block, key[1])

    def reset_peaks(self) -> None:
        self.peak_allocated_bytes = self.allocated_bytes
        self.peak_reserved_bytes = self.reserved_bytes

    def state(self) -> Hashable:
        """Free, unmapped and live blocks and peaks: the same state and the same calls lead to the same state."""
        pools = [(key, tuple(pool.free), tuple(pool.unmapped)) for key, pool in sorted(self._pools.items())]
        live = frozenset((address, block.size) for address, (block, _) in self._live.items())
        peaks = self.peak_allocated_bytes, self.peak_reserved_bytes, self.alloc_retries
        return tuple(pools), live, frozenset(self._awaited), peaks

    def segments(self) -> list[SegmentView]:
        """Every segment with its blocks, by address."""
        views: list[SegmentView] = []
        for head, stream in self._heads.values():
            blocks, mapped, block = [], 0, _first(head)
            start = block.address
            while block is not None:
                state = "allocated" if block.allocated else "free" if block.mapped else "unmapped"
                blocks.append((block.address, block.size, state))
                mapped += block.size if block.mapped else 0
                block = block.next  # type: ignore[assignment]
            views.append(SegmentView(start, mapped, head.pool.small, stream, tuple(blocks)))
        return sorted(views, key=lambda view: view.address)

    # --- finding and splitting ---------------------------------------------------------------------------------------------

    def _pool(self, rounded: int, stream: int) -> _Pool:
        small = rounded <= SMALL_SIZE
        pool = self._pools.get((small, stream))
        if pool is None:
            pool = self._pools[small, stream] = _Pool(small, SMALL_BUFFER if small else LARGE_BUFFER)
        return pool

    def _best_fit(self, pool: _Pool, size: int) -> _Block | None:
        index = bisect_left(pool.free, (size, 0))
        if index == len(pool.free):
            return None
        block = pool.at[pool.free[index][1]]
        if block.expandable:
            # A block's growable tail counts as its own: a closed hole is preferred to the end of the segment.
            for _, address in pool.free[index + 1 :]:
                following = pool.at[address]
                if _growable(following) >= _growable(block):
                    break
                block = following
        pool.remove(block)
        return block

    def _split(self, block: _Block, size: int) -> None:
        least = MIN_BLOCK if block.pool.small or block.expandable else SMALL_SIZE + 1
        if block.size - size < least:
            return
        block.pool.add(_cut(block, size))

    def _merge_with_neighbours(self, block: _Block) -> None:
        for neighbour in (block.prev, block.next):
            if neighbour is None or neighbour.allocated or neighbour.mapped != block.mapped:
                continue
            if neighbour.mapped:
                block.pool.remove(neighbour)
            else:
                block.pool.remove_unmapped(neighbour)
            self._absorb(block, neighbour)

    def _absorb(self, block: _Block, neighbour: _Block) -> None:
        block.size += neighbour.size
        if neighbour is block.prev:
            if neighbour.address in self._heads:
                self._heads[neighbour.address] = (block, self._heads[neighbour.address][1])
            block.address, block.prev = neighbour.address, neighbour.prev
            if block.prev is not None:
                block.prev.next = block
        else:
            block.next = neighbour.next
            if block.next is not None:
                block.next.prev = block

    # --- segments ----------------------------------------------------------------------------------------------------------

    def _new_block(self, pool: _Pool, size: int, stream: int) -> _Block | None:
        if size <= SMALL_SIZE:
            segment = SMALL_BUFFER
        elif size < MIN_LARGE_ALLOC:
            segment = LARGE_BUFFER
        else:
            segment = -(-size // ROUND_LARGE) * ROUND_LARGE
        if self.limit_bytes is not None and self.reserved_bytes + segment > self.limit_bytes:
            return None
        if self.settings.expandable_segments:
            return self._expand(pool, size, stream)
        if not self._device_has(segment):
            return None
        block = _Block(self._addresses.take(segment), segment, pool, expandable=False)
        self._heads[block.address] = (block, stream)
        self._grow("segment_alloc", block.address, segment, stream)
        return block

    def _release(self, block: _Block, stream: int) -> None:
        """Gives a free block that is a whole segment back to the driver."""
        block.pool.remove(block)
        del self._heads[block.address]
        self._addresses.give_back(block.address, block.size)
        self._shrink("segment_free", block.address, block.size, stream)

    def _expand(self, pool: _Pool, size: int, stream: int) -> _Block | None:
        """Maps pages after a free tail, or at the start of an unmapped range, until `size` bytes are in one block."""
        block = self._expandable_room(pool, size, stream)
        if not block.mapped and not self._map(block, min(block.size, size), stream):
            return None
        while block.size < size:
            tail = block.next
            assert tail is not None
            if not self._map(tail, min(size - block.size, tail.size), stream):
                return None
            block = tail
        pool.remove(block)
        return block

    def _expandable_room(self, pool: _Pool, size: int, stream: int) -> _Block:
        for address in pool.unmapped:
            block = pool.at[address]
            if block.prev is not None and not block.prev.allocated:
                block = block.prev
            room, following = 0, block
            while following is not None and not following.allocated and room < size:
                room += following.size
                following = following.next  # type: ignore[assignment]
            if room >= size:
                return block
        reservation = -(-max((self.total_bytes or 1 << 40) * 9 // 8, size) // pool.page) * pool.page
        block = _Block(self._addresses.take(reservation), reservation, pool, expandable=True, mapped=False)
        self._heads[block.address] = (block, stream)
        pool.add_unmapped(block)
        return block

    def _map(self, block: _Block, size: int, stream: int) -> bool:
        """Maps whole pages covering the first `size` bytes of an unmapped block; the block becomes free memory."""
        pool = block.pool
        mapped = min(-(-size // pool.page) * pool.page, block.size)
        if not self._device_has(mapped):
            return False
        pool.remove_unmapped(block)
        if mapped < block.size:
            pool.add_unmapped(_cut(block, mapped))
        block.mapped = True
        start = block.address
        self._merge_with_neighbours(block)
        pool.add(block)
        self._grow("segment_map", start, mapped, stream)
        return True

    def _unmap(self, block: _Block, stream: int) -> None:
        """Gives back the whole pages inside a free block; rims smaller than a page stay."""
        pool = block.pool
        origin = _first(block).address
        start = origin + -(-(block.address - origin) // pool.page) * pool.page
        end = origin + (block.address + block.size - origin) // pool.page * pool.page
        if start >= end:
            return
        pool.remove(block)
        if start > block.address:
            rim, block = block, _cut(block, start - block.address)
            pool.add(rim)
        if end < block.address + block.size:
            pool.add(_cut(block, end - start))
        block.mapped = False
        self._merge_with_neighbours(block)
        if block.prev is None and block.next is None:
            self._heads.pop(block.address)
        else:
            pool.add_unmapped(block)
        self._shrink("segment_unmap", start, end - start, stream)

    # --- the device --------------------------------------------------------------------------------------------------------

    def _device_has(self, size: int) -> bool:
        return self.total_bytes is None or self.reserved_bytes + size <= self.total_bytes

    def _grow(self, event: str, address: int, size: int, stream: int) -> None:
        self.reserved_bytes += size
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        if self.on_segment is not None:
            self.on_segment(event, address, size, stream)

    def _shrink(self, event: str, address: int, size: int, stream: int) -> None:
        self.reserved_bytes -= size
        if self.on_segment is not None:
            self.on_segment(event, address, size, stream)

    def _out_of_memory(self, requested: int) -> OutOfMemory:
        limits = [limit for limit in (self.limit_bytes, self.total_bytes) if limit is not None]
        limit = min(limits) if limits else None
        return OutOfMemory(
            f"tried to allocate {human(requested)} with {human(self.allocated_bytes)} allocated and "
            f"{human(self.reserved_bytes)} reserved; the allocator may use {human(limit or 0)}",
            requested_bytes=requested,
            allocated_bytes=self.allocated_bytes,
            reserved_bytes=self.reserved_bytes,
            limit_bytes=limit,
        )


def _growable(block: _Block) -> int:
    tail = block.next
    return block.size + (tail.size if tail is not None and not tail.mapped else 0)


def _first(block: _Block) -> _Block:
    while block.prev is not None:
        block = block.prev
    return block


def _cut(block: _Block, size: int) -> _Block:
    """What is behind the first `size` bytes of a block becomes the next one."""
    rest = _Block(block.address + size, block.size - size, block.pool, expandable=block.expandable, mapped=block.mapped)
    rest.prev, rest.next = block, block.next
    if rest.next is not None:
        rest.next.prev = rest
    block.size, block.next = size, rest
    return rest
