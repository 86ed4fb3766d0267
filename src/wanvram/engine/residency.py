"""Where a component's weights live and when they move: resident, streamed unit by unit, shared by ranks, or on the host.

A component's parameters are laid out in flat byte buffers: one for the shell, one per unit (a block, or a part of one) and one
per embedder. A flat buffer is one allocation, one copy and one free.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from itertools import groupby, islice

import torch
from torch import nn

from wanvram.engine.devices import Device
from wanvram.engine.layout import Layout
from wanvram.engine.packing import NOWHERE, Fp8
from wanvram.engine.peers import Peers
from wanvram.engine.pieces import Piece, parameter_of, piece_of
from wanvram.engine.repeats import Repeats
from wanvram.engine.shards import WHOLE, Shard, ShardHome, fill_run, touched
from wanvram.engine.streaming import Home, PacedHome, PinnedHome, SlotRing, StagedHome
from wanvram.errors import DeviceError
from wanvram.knobs import DIT_FSDP, WEIGHT_STORAGE, WEIGHTS_IN
from wanvram.recorder.interrupts import check
from wanvram.sharing import WORLD
from wanvram.units import human
from wanvram.weights.random import RandomSource
from wanvram.weights.sources import TensorSource

__all__ = ["Component"]


LONGEST_PERIOD = 20  # groups: VACE's blocks of 14B come again after 14, some on the device every 4th or 5th block


class Component:
    """A model whose parameters were built on `meta`, and the buffers that hold them.

    `units` are visited through `walk`, pass after pass. `embedders` are visited once, before, through `walk_embedders`, and are
    gone after it. The rest is the shell. Call exactly one of the `load_*` methods, then use the module through the walks,
    then `release`.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        units: Sequence[nn.Module],
        device: Device,
        embedders: Sequence[nn.Module] = (),
        *,
        fp8: Fp8 = NOWHERE,
        generated: bool = True,
    ) -> None:
        self.name = name
        self.module = module
        self.device = device
        self._generated = generated  # where there is no source: what it would do
        self.parameters = sum(p.numel() for p in module.parameters())
        names = {id(p): name for name, p in module.named_parameters()}
        self._units = {id(u): piece_of(u, module, names, fp8) for u in units}
        self._embedders = {id(e): piece_of(e, module, names) for e in embedders}
        placed = {id(p) for m in (*units, *embedders) for p in m.parameters()}
        shell = [(n, p) for n, p in module.named_parameters() if id(p) not in placed]
        self._shell = Piece(module, module, Layout.of(shell), tuple(shell))
        alike: dict[Hashable, Piece] = {}
        self._alike = {part: alike.setdefault(part.layout.geometry, part) for part in self._units.values()}
        self._bound: dict[tuple[Piece, int], list[nn.Parameter]] = {}  # by kind of unit and identity of a slot's bytes
        self._ring: SlotRing | None = None
        self._paced: PacedHome | None = None
        self._masters: dict[Piece, torch.Tensor] = {}
        self._read: set[Piece] = set()  # from disk, at least once
        self._source: TensorSource | None = None
        self._on_host = False
        self._in_ram = True  # the masters
        self._shard: Shard = WHOLE
        self._peers: Peers | None = None
        self._ranks = 1  # that keep weights in this machine's RAM, as it does
        self._room: torch.Tensor | None = None
        self._observe: Callable[[str], AbstractContextManager[object]] | None = None

    # --- loading -----------------------------------------------------------------------------------------------------------

    def load_resident(self, source: TensorSource | None) -> None:
        """Every parameter on the device, written there tensor by tensor: peaks at base memory plus nothing."""
        self._source = source
        for part in self._parts():
            self._place(part)
        self._make_room()

    def load_streamed(
        self,
        source: TensorSource | None,
        *,
        home: str = "pinned",
        resident_groups: int = 0,
        lanes: Sequence[int] = (),
        peers: Peers | None = None,
        everyone: bool = False,
    ) -> None:
        """The shell, two slots and some resident groups of units on the device, all else at `home`.

        home: pinned or pageable (RAM), disk (the source, read again in every pass), or device. Groups that stay resident are
        spread evenly, so that the copies between them are, too. lanes: which slot each unit passes through, where they do not
        take turns. peers: ranks that load and walk it together; then each has a run of every buffer at its home, and the slots
        are filled from all of them. everyone: all ranks load it, each the whole where there are no peers.
        """
        self._source = source
        self._ranks = self.device.place.world if everyone else 1
        if peers is not None:
            self._shard, self._peers, self._ranks = Shard(peers.index, peers.count), peers, peers.count
        if self._shell.nbytes:
            self._place(self._shell)
        for part in self._resident_units(resident_groups):
            self._place(part)
        streamed = [part for part in self._units.values() if part.flat is None]
        largest = max((part.nbytes for part in streamed), default=0)
        waiting = [*streamed, *self._embedders.values()]
        self._masters = {} if home == "disk" else self._fill_masters(waiting, home)
        if streamed:
            given = zip(self._units.values(), lanes, strict=True) if lanes else ()
            through = {part: lane for part, lane in given if part.flat is None}
            slot = self._shard.whole_bytes(largest)
            own = self._home(home, largest, paced=bool(lanes))
            self._ring = SlotRing(self.device, own, slot, through, self._slot_bytes)
        self._make_room()

    def load_host(self, source: TensorSource | None) -> None:
        """Every parameter in host RAM; the module then computes on the CPU."""
        self._source, self._on_host = source, True
        for part in self._parts():
            part.flat = self.device.host_empty((part.nbytes,), torch.uint8)
            if source is not None:
                self._fill(part, part.flat)
            part.bind(part.flat)

    def release(self) -> None:
        """Drops every buffer; the module is back on meta and may be loaded again."""
        ring, self._ring = self._ring, None
        try:
            if ring is not None:
                ring.close()
        finally:
            self._bound.clear()
            for part in self._parts():
                part.clear()
            self._masters.clear()
            self._paced = None
            self._source = self._room = None
            self._on_host = False
            self._shard, self._peers = WHOLE, None

    def _place(self, part: Piece) -> None:
        part.stays = True
        part.flat = self.device.empty((self._slot_bytes(part),), torch.uint8)
        self._fill_together(part, part.flat)
        if part.is_bound:
            part.bind(part.flat)

    def _slot_bytes(self, part: Piece) -> int:
        """On the device, all of it."""
        return self._shard.whole_bytes(part.nbytes)

    def _make_room(self) -> None:
        largest = max((part.room_bytes for part in self._units.values()), default=0)
        if largest:
            self._room = self.device.empty((largest,), torch.uint8)

    def _home(self, home: str, largest: int, *, paced: bool) -> Home:
        own: Home
        if home == "pinned" and paced and self._peers is None:  # a run is short enough, and gathered once it is whole
            own = self._paced = PacedHome(self.device, self._masters)
        elif home in ("pinned", "device"):
            own = PinnedHome(self.device, self._masters)
        else:
            read = self._read_from_disk if home == "disk" else self._read_from_ram
            own = StagedHome(self.device, self._shard.run_bytes(largest), read)
        return own if self._peers is None else ShardHome(self.device, own, self._shard, self._peers)

    def _read_from_ram(self, part: Piece, buffer: torch.Tensor) -> None:
        self.device.copy_on_host(buffer, self._masters[part])

    def _read_from_disk(self, part: Piece, buffer: torch.Tensor) -> None:
        if self._source is not None:
            self._fill_run(part, buffer)
        else:
            kept = self.weight_bytes if part in self._read else None
            self.device.read_from_disk(buffer.nbytes, self.name, kept, readers=self._shard.count)
            self._read.add(part)

    def _fill_masters(self, parts: Sequence[Piece], home: str) -> dict[Piece, torch.Tensor]:
        """Generated weights are made on the device, which is ten times as fast, one part at a time.

        Raises DeviceError if RAM cannot hold them all: the system would kill the process half-way.
        """
        sizes = {part: self._shard.run_bytes(part.nbytes) for part in parts}
        self._in_ram = home != "device"
        if self._in_ram:
            self._check_room(sum(sizes.values()))
        masters = {}
        for part, nbytes in sizes.items():
            if self._in_ram:
                master = self.device.host_empty((nbytes,), torch.uint8, pinned=home == "pinned")
            else:
                master = self.device.empty((nbytes,), torch.uint8)
            if self._makes:
                staging = self.device.empty((self._slot_bytes(part),), torch.uint8)
                self._fill(part, staging)
                self.device.copy(master, self._shard.mine(staging))
                del staging
            else:
                self._fill_run(part, master)
            masters[part] = master
        return masters

    def _check_room(self, needed: int) -> None:
        """Ranks take theirs of one RAM, once all have looked at it."""
        world = self.device.peers(WORLD)
        if self._ranks > 1:
            world.meet()
        room, needed = self.device.host_room(), needed * self._ranks
        if room is not None and needed > room:
            share = f"{DIT_FSDP.asked(True)}, " if self._ranks > self._shard.count else ""
            raise DeviceError(
                f"the weights of {self.name} need {human(needed)} of RAM and {human(room)} are available; use {share}"
                f"{WEIGHTS_IN.asked('disk')}, {WEIGHT_STORAGE.asked('fp8')}, or plan with --vram_budget, which knows the RAM"
            )
        if self._ranks > 1:
            world.meet()

    @property
    def _makes(self) -> bool:
        """Whether weights are made on the device, where each of their tensors is made whole."""
        return self._generated if self._source is None else isinstance(self._source, RandomSource)

    def _fill_together(self, part: Piece, flat: torch.Tensor) -> None:
        """All of the part into `flat` [_slot_bytes] on the device: every rank reads its run, and gets the others'."""
        if self._peers is None or self._makes:
            self._fill(part, flat)
        else:
            self._fill_run(part, self._shard.mine(flat))
            self._gather(flat)

    def _gather(self, flat: torch.Tensor) -> None:
        """In the computation's order, but behind what is coming for slots: two gathers must never be under way at once."""
        if self._peers is not None:
            self.device.wait(self.device.gather_beside(self._peers, flat, self.device.mark()))

    def _fill_run(self, part: Piece, run: torch.Tensor) -> None:
        """This rank's run of the part, as it is stored."""
        if self._peers is None:
            self._fill(part, run)
        elif part.packed is not None:
            packed = torch.empty((self._slot_bytes(part),), dtype=torch.uint8, device=run.device)
            self._fill(part, packed, touched(part.packed, self._shard.start(part.nbytes), run.nbytes))
            run.copy_(self._shard.mine(packed))
        elif self._source is None:
            self.device.loaded_weights(run, self.name, readers=self._shard.count)
        else:
            check()
            fill_run(part.layout, run, self._shard.start(part.nbytes), self._source)

    def _fill(self, part: Piece, flat: torch.Tensor, only: Container[str] | None = None) -> None:
        """The part's tensors from the source into `flat` [part.nbytes], packed if the part is. only: the names wanted."""
        check()
        plain = flat
        if part.packed is not None:
            plain = torch.empty((part.layout.nbytes,), dtype=torch.uint8, device=flat.device)
        if self._source is not None:
            for name, view in part.layout.views(plain):
                if only is None or name in only:
                    self._source.fill(name, view)
        elif self._generated:
            self.device.generated_weights()
        else:
            self.device.loaded_weights(flat, self.name)
        if part.packed is not None:
            part.packed.pack(plain, flat, only)

    def _parts(self) -> list[Piece]:
        shell = [self._shell] if self._shell.nbytes else []
        return [*shell, *self._embedders.values(), *self._units.values()]

    def _resident_units(self, count: int) -> list[Piece]:
        groups = list(dict.fromkeys(part.group for part in self._units.values()))
        count = min(count, len(groups))
        chosen = {g for i, g in enumerate(groups) if (i + 1) * count // len(groups) > i * count // len(groups)}
        return [part for part in self._units.values() if part.group in chosen]

    def between_rows(self, chunks: int) -> None:
        """One of so many chunks of the residual stream has been asked for: the next part of the weights may follow it."""
        if self._paced is not None:  # whole before the last chunk, which computes while nothing is awaited
            self._paced.advance(max(1, chunks - 1))

    # --- visiting ------------------------------------------------------------------------------------------------------------

    def observe(self, per_group: Callable[[str], AbstractContextManager[object]] | None) -> None:
        """`per_group(name)` is a context manager entered around the units of every group (the recorder's span)."""
        self._observe = per_group

    def walk(self, units: Sequence[nn.Module]) -> Iterator[nn.Module]:
        """Yields each unit with its weights in place; valid until the next is asked for."""
        parts = [self._units[id(unit)] for unit in units]
        visit = self._visit(parts)
        with closing(visit):
            if self._observe is None:
                yield from visit
                return
            for group, members in groupby(parts, key=lambda part: part.group):
                with self._observe(group):
                    yield from islice(visit, len(list(members)))
            # Lets the visit end by itself: closed at its last unit, it would not fill that unit's slot again.
            next(visit, None)

    def walk_alike(self, units: Sequence[nn.Module]) -> Iterator[nn.Module]:
        """The same, but a simulation leaves out groups of units that would do what those before them did (repeats.Repeats)."""
        if not self.device.repeats_itself or self._observe is not None:
            return self.walk(units)
        return self._visit([self._units[id(unit)] for unit in units], alike=True)

    def _visit(self, parts: Sequence[Piece], *, alike: bool = False) -> Generator[nn.Module, None, None]:
        streamed = [part for part in parts if part.flat is None]
        coming = self._ring.walk(streamed) if self._ring is not None else iter(())
        groups = [list(group) for _, group in groupby(parts, key=lambda part: part.group)]
        repeats = self._repeats(groups) if alike else None
        skipped = 0
        try:
            for number, group in enumerate(groups):
                if repeats is not None and not skipped:
                    skipped = self._skip(repeats, groups, number)
                if skipped:
                    skipped -= 1
                    continue
                for part in group:
                    check()
                    if part.is_bound:
                        yield part.module
                        continue
                    # Only the module holds the bytes, no local: release in the middle of a walk must free them.
                    self._bind(part, next(coming) if part.flat is None else part.flat)
                    try:
                        yield part.module
                    finally:
                        part.unbind()
            next(coming, None)  # the last unit is done: its slot may be filled for the next pass
        finally:
            if isinstance(coming, Generator):
                coming.close()

    def _bind(self, part: Piece, flat: torch.Tensor) -> None:
        """What passes through a slot finds it as units of its kind before it did: 30 views and parameters of a block are 0.7 ms."""
        if part.packing is not None:
            part.bind(flat, self._room)
            return
        key = self._alike[part], id(flat)
        if key not in self._bound:
            self._bound[key] = [parameter_of(view) for _, view in part.layout.views(flat)]
        part.bind_all(self._bound[key])

    def _repeats(self, groups: Sequence[Sequence[Piece]]) -> Repeats:
        work = [[part.work for part in group] for group in groups]
        return Repeats(self.device, work, range(1, LONGEST_PERIOD + 1), [len(_streamed(group)) for group in groups])

    def _skip(self, repeats: Repeats, groups: Sequence[Sequence[Piece]], number: int) -> int:
        """Groups from `number` on that are left out."""
        count, seconds = repeats.leave_out(number, self._ring.marks() if self._ring is not None else ())
        if count and self._ring is not None:
            left = [part for group in groups[number : number + count] for part in _streamed(group)]
            self._ring.skip(len(left), seconds)
            # One piece more is on its way; those of the last groups are read when they come.
            self._read |= {*left, *_streamed(groups[number + count])[:1]}
        return count

    def walk_embedders(self, modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
        """Yields each embedder with its weights in place. Afterwards it is gone, on the device and at its home."""
        for module in modules:
            part = self._embedders[id(module)]
            try:
                if part.flat is None:
                    part.flat = self.device.empty((self._slot_bytes(part),), torch.uint8)
                    part.bind(part.flat)
                    self._bring(part, part.flat)
                yield module
            finally:
                part.clear()

    def _bring(self, part: Piece, flat: torch.Tensor) -> None:
        """An embedder from its home, which then has it no more."""
        if part not in self._masters:
            self._fill_together(part, flat)
            return
        self.device.copy(self._shard.mine(flat), self._masters.pop(part))
        self._gather(flat)

    # --- sizes ---------------------------------------------------------------------------------------------------------------

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters in their storage dtypes, wherever they are."""
        return sum(part.nbytes for part in self._parts())

    @property
    def host_bytes(self) -> int:
        """Bytes of weights in host RAM now: none where they are resident or read from disk in every pass."""
        if self._on_host:
            return sum(part.flat.nbytes for part in self._parts() if part.flat is not None)
        return sum(master.nbytes for master in self._masters.values()) if self._in_ram else 0


def _streamed(group: Sequence[Piece]) -> list[Piece]:
    return [part for part in group if part.flat is None]
