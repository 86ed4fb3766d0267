"""Shards: ranks that keep a run of every buffer each compute as one that keeps all, and read no row that is not theirs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from mapping_source import MappingSource
from toy_component import (
    HIDDEN,
    CountingDevice,
    CountingSource,
    Model,
    assert_same_results,
    finish,
    on_meta,
    padded_bytes,
    reading_threads,
)
from wanvram.engine.devices import CpuDevice
from wanvram.engine.layout import ALIGNMENT_BYTES, Layout
from wanvram.engine.packing import Fp8, Packing
from wanvram.engine.residency import Component
from wanvram.engine.shards import Shard, fill_run, touched
from wanvram.errors import DeviceError
from wanvram.sharing import Place
from wanvram.weights.diffusers import RenamedSource
from wanvram.weights.random import CPU_PERIOD, RandomSource
from wanvram.weights.sources import SafetensorsSource, TensorSource

pytestmark = pytest.mark.timeout(120)  # a rank that waits for another for ever must fail, not hang
SHARED_HOMES = ("pinned", "pageable", "disk", "device")
T = TypeVar("T")


class Together:
    """As many ranks as threads of this process."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.barrier = threading.Barrier(count)
        self.flats: list[Tensor | None] = [None] * count

    def run(self, work: Callable[[ThreadPeers], T]) -> list[T]:
        with ThreadPoolExecutor(self.count) as ranks:
            return list(ranks.map(work, [ThreadPeers(self, index) for index in range(self.count)]))


class ThreadPeers:
    """engine.peers.Peers, as far as weights need it. Parts that nobody sent stay as they were."""

    def __init__(self, together: Together, index: int) -> None:
        self.together = together
        self.index = index
        self.count = together.count
        self.gathered = 0

    def gather(self, whole: Tensor, counts: Sequence[int]) -> None:
        self.together.flats[self.index] = whole
        self.together.barrier.wait(60)
        for flat, mine, theirs in zip(self.together.flats, whole.split(list(counts)), range(self.count), strict=True):
            if flat is not None and theirs != self.index:
                mine.copy_(flat.split(list(counts))[theirs])
        self.together.barrier.wait(60)
        self.gathered += 1


# --- runs ---------------------------------------------------------------------------------------------------------------------


@given(nbytes=st.integers(0, 10**6).map(lambda n: n * ALIGNMENT_BYTES), count=st.integers(1, 9))
def test_runs_are_equal_aligned_and_hold_the_buffer_with_less_than_an_alignment_each_to_spare(
    nbytes: int, count: int
) -> None:
    shards = [Shard(index, count) for index in range(count)]
    (each,) = {shard.run_bytes(nbytes) for shard in shards}
    assert each % ALIGNMENT_BYTES == 0
    assert [shard.start(nbytes) for shard in shards] == [each * index for index in range(count)]
    assert 0 <= shards[0].whole_bytes(nbytes) - nbytes < count * ALIGNMENT_BYTES
    assert shards[0].whole_bytes(nbytes) == count * each


def test_a_single_shard_is_the_buffer_itself() -> None:
    assert Shard().run_bytes(512) == Shard().whole_bytes(512) == 512


def _tensors(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    made = {f"t{number}": torch.randn(shape).to(dtype) for number, shape in enumerate(shapes)}
    return {name: t.to(memory_format=torch.channels_last_3d) if t.dim() == 5 else t for name, t in made.items()}


def _by_runs(layout: Layout, source: TensorSource, count: int) -> Tensor:
    runs = []
    for shard in (Shard(index, count) for index in range(count)):
        run = torch.zeros(shard.run_bytes(layout.nbytes), dtype=torch.uint8)
        fill_run(layout, run, shard.start(layout.nbytes), source)
        runs.append(run)
    return torch.cat(runs)[: layout.nbytes]


def _whole(layout: Layout, source: TensorSource) -> Tensor:
    flat = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for name, view in layout.views(flat):
        source.fill(name, view)
    return flat


SHAPES = st.lists(
    st.one_of(
        st.just(()),
        st.tuples(st.integers(0, 900)),
        st.tuples(st.integers(1, 60), st.integers(1, 200)),
        st.tuples(st.just(1), st.integers(1, 40), st.integers(1, 60)),
        st.tuples(st.integers(1, 30), st.integers(1, 5), st.just(1), st.integers(1, 3), st.integers(1, 3)),
    ),
    min_size=1,
    max_size=6,
)


@given(shapes=SHAPES, count=st.integers(2, 7), stored=st.sampled_from(["same", "float32"]))
@settings(max_examples=200)
def test_runs_read_apart_are_the_buffer_read_at_once(
    shapes: list[tuple[int, ...]], count: int, stored: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    wanted = _tensors(shapes, torch.bfloat16)
    layout = Layout.of(list(wanted.items()))
    path = tmp_path_factory.mktemp("runs") / "w.safetensors"
    save_file({n: t.contiguous().to(torch.float32 if stored != "same" else t.dtype) for n, t in wanted.items()}, path)
    for source in (MappingSource(wanted), SafetensorsSource([path])):
        assert torch.equal(_by_runs(layout, source, count), _whole(layout, source))


def test_a_tensor_that_lies_in_pieces_in_the_file_is_read_by_runs_too() -> None:
    pieces = {name: torch.randn(rows, 33) for name, rows in (("q", 40), ("k", 17), ("v", 31))}
    source = RenamedSource(MappingSource(pieces), {"qkv": ["q", "k", "v"], "alone": ["k"]})
    layout = Layout.of([("qkv", torch.empty(88, 33)), ("alone", torch.empty(17, 33))])
    for count in (2, 3, 5, 8):
        assert torch.equal(_by_runs(layout, source, count), _whole(layout, source))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_are_the_same_by_runs(dtype: torch.dtype) -> None:
    shapes = {"a.weight": (CPU_PERIOD // 500, 1001), "a.bias": (1001,), "norm.weight": (700,), "b.weight": (50, 40)}
    source = RandomSource(shapes, 7)
    layout = Layout.of([(name, torch.empty(shape, dtype=dtype, device="meta")) for name, shape in shapes.items()])
    assert torch.equal(_by_runs(layout, source, 3), _whole(layout, source))


class RowsRead(MappingSource):
    """Bytes asked for, in the source's own dtype."""

    read = 0

    def fill(self, key: str, dest: Tensor) -> None:
        self.read += dest.nbytes
        super().fill(key, dest)

    def fill_rows(self, key: str, dest: Tensor, first: int) -> None:
        self.read += dest.nbytes
        super().fill_rows(key, dest, first)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_together_the_ranks_read_the_file_once_and_a_row_twice_where_a_run_ends(count: int) -> None:
    tensors = {name: torch.randn(96, 128) for name in ("ffn.0", "ffn.2")} | {"bias": torch.randn(128)}
    source, layout = RowsRead(tensors), Layout.of(list(tensors.items()))
    _by_runs(layout, source, count)
    assert 0 <= source.read - sum(t.nbytes for t in tensors.values()) <= (count - 1) * 128 * 4


def test_rows_that_a_tensor_has_not_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4, 3)}, tmp_path / "w.safetensors")
    for source in (MappingSource({"a": torch.zeros(4, 3)}), SafetensorsSource([tmp_path / "w.safetensors"])):
        with pytest.raises(Exception, match="has 4 rows; row 4 was asked for"):
            source.fill_rows("a", torch.empty(2, 3), 3)
    with pytest.raises(Exception, match=r"has shape \[4, 3\], without \[2, 3\] from row 3 on"):
        RandomSource({"a": (4, 3)}, 0).fill_rows("a", torch.empty(2, 3), 3)


# --- ranks --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("home", SHARED_HOMES)
@pytest.mark.parametrize("resident_groups", [0, 2])
def test_ranks_that_share_weights_give_exactly_the_result_of_plain_weights(
    home: str, count: int, resident_groups: int, generator: torch.Generator
) -> None:
    plain = Model().requires_grad_(False)
    inputs = torch.randn(1, 3, 2, 4, 4, generator=generator), torch.randn(6, generator=generator)

    def rank(peers: ThreadPeers) -> int:
        device = CpuDevice()
        with torch.no_grad():
            model, component = on_meta(device)
            source = MappingSource(plain.state_dict())
            component.load_streamed(source, home=home, resident_groups=resident_groups, peers=peers)  # type: ignore[arg-type]
            assert_same_results(model, component, plain, inputs)
            component.release()
        return peers.gathered

    assert len(set(Together(count).run(rank))) == 1
    assert not reading_threads()


class ReadingDevice(CpuDevice):
    """Reads weights in a thread."""

    copies_beside = True


@pytest.mark.parametrize("home", ["pageable", "disk"])
def test_ranks_whose_threads_read_at_their_own_pace_gather_in_one_order(home: str, generator: torch.Generator) -> None:
    plain = Model().requires_grad_(False)
    inputs = torch.randn(1, 3, 2, 4, 4, generator=generator), torch.randn(6, generator=generator)

    def rank(peers: ThreadPeers) -> None:
        with torch.no_grad():
            model, component = on_meta(ReadingDevice())
            component.load_streamed(MappingSource(plain.state_dict()), home=home, peers=peers)  # type: ignore[arg-type]
            assert_same_results(model, component, plain, inputs, passes=4)
            component.release()

    Together(3).run(rank)
    assert not reading_threads()


@pytest.mark.parametrize("count", [2, 3])
def test_what_ranks_keep_is_one_model_together_and_two_units_each_on_the_device(count: int) -> None:
    plain = Model()
    kept = padded_bytes(*plain.embedders(), *plain.units())
    largest = max(padded_bytes(unit) for unit in plain.units())

    def rank(peers: ThreadPeers) -> CountingDevice:
        device = CountingDevice()
        _, component = on_meta(device)
        component.load_streamed(CountingSource(plain.state_dict()), peers=peers)  # type: ignore[arg-type]
        assert component.host_bytes == sum(device.pinned)
        return device

    devices = Together(count).run(rank)
    pieces = len(plain.embedders()) + len(plain.units())
    assert 0 <= sum(sum(device.pinned) for device in devices) - kept < count * ALIGNMENT_BYTES * pieces
    for device in devices:
        _shell, *slots = device.on_device
        assert len(slots) == 2
        assert all(0 <= slot - largest < count * ALIGNMENT_BYTES for slot in slots)


class SmallDevice(CpuDevice):
    """With so much RAM, bytes; counts how often its rank met the others."""

    def __init__(self, room: int, world: Together | None = None) -> None:
        super().__init__()
        self.room, self.met = room, 0
        self.place = Place(0, ulysses=world.count if world else 1)

    def host_room(self) -> int:
        return self.room

    def peers(self, axis: str) -> Any:
        return self

    def meet(self) -> None:
        self.met += 1


def test_all_ranks_take_of_one_ram_which_is_looked_at_before() -> None:
    plain = Model()
    needed, together = padded_bytes(*plain.embedders(), *plain.units()), Together(2)

    def rank(peers: ThreadPeers, room: int, *, share: bool = True) -> int:
        device = SmallDevice(room, together)
        _, component = on_meta(device)
        component.load_streamed(
            MappingSource(plain.state_dict()),
            peers=peers if share else None,
            everyone=True,  # type: ignore[arg-type]
        )
        return device.met

    assert together.run(partial(rank, room=needed + 2 * 256 * 10)) == [2, 2]
    assert together.run(partial(rank, room=2 * needed, share=False)) == [2, 2]
    with pytest.raises(DeviceError, match=r"toy need .* of RAM and .* are available; use --weights_in disk"):
        together.run(partial(rank, room=needed - 256))
    with pytest.raises(
        DeviceError, match=r"toy need .* of RAM and .* are available; use --dit_fsdp True, --weights_in"
    ):
        together.run(partial(rank, room=2 * needed - 256, share=False))


def test_shards_on_the_device_are_no_host_memory() -> None:
    def rank(peers: ThreadPeers) -> int:
        device = CountingDevice()
        _, component = on_meta(device)
        component.load_streamed(MappingSource(Model().state_dict()), home="device", peers=peers)  # type: ignore[arg-type]
        assert not device.pinned
        assert not device.on_host
        return component.host_bytes

    assert Together(2).run(rank) == [0, 0]


@pytest.mark.parametrize("home", SHARED_HOMES)
def test_generated_weights_are_those_of_one_rank(home: str) -> None:
    shapes = {key: tuple(p.shape) for key, p in Model().named_parameters()}

    def weights(peers: ThreadPeers | None) -> list[Tensor]:
        with torch.no_grad():
            model, component = on_meta(CpuDevice())
            component.load_streamed(RandomSource(shapes, 3), home=home, peers=peers)  # type: ignore[arg-type]
            seen = [p.clone() for unit in component.walk_embedders(model.embedders()) for p in unit.parameters()]
            seen += [p.clone() for unit in component.walk(model.units()) for p in unit.parameters()]
            return [*seen, model.patch.weight.clone()]

    alone = weights(None) if home != "device" else Together(1).run(weights)[0]
    for shared in Together(3).run(weights):
        assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


@pytest.mark.parametrize("home", SHARED_HOMES)
@pytest.mark.parametrize("made", [False, True])
def test_fp8_weights_are_those_of_one_rank(home: str, made: bool) -> None:
    state = Model().state_dict()

    def weights(peers: ThreadPeers | None) -> list[Tensor]:
        with torch.device("meta"):
            model = Model()
        source: TensorSource = MappingSource(state)
        if made:
            source = RandomSource({key: tuple(t.shape) for key, t in state.items()}, 3)
        with torch.no_grad():
            component = Component("toy", model, model.units(), CpuDevice(), model.embedders(), fp8=Fp8(stored=True))
            component.load_streamed(source, home=home, peers=peers)  # type: ignore[arg-type]
            return [p.clone() for unit in component.walk(model.units()) for p in unit.parameters()]

    alone = weights(None) if home != "device" else Together(1).run(weights)[0]
    for shared in Together(3).run(weights):
        assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_a_matrix_is_packed_by_every_rank_that_keeps_something_of_it_or_of_its_scales() -> None:
    packing = Packing.of(Layout.of([(n, torch.empty(64, 64, dtype=torch.bfloat16)) for n in "abc"]))
    assert packing.stored.nbytes == 3 * (4096 + 256)
    assert touched(packing, 0, 4096) == {"a"}
    assert touched(packing, 4096, 256) == {"a"}
    assert touched(packing, 4096, 512) == {"a", "b"}
    assert touched(packing, 2 * 4352 + 4096, 4096) == {"c"}


def test_a_walk_broken_off_on_all_ranks_goes_on_with_another() -> None:
    plain = Model(HIDDEN).requires_grad_(False)

    def rank(peers: ThreadPeers) -> None:
        model, component = on_meta(CpuDevice())
        component.load_streamed(MappingSource(plain.state_dict()), peers=peers)  # type: ignore[arg-type]
        walk = component.walk(model.units())
        for _ in range(3):
            next(walk)
        walk.close()
        for index, unit in zip((4, 0, 7), component.walk([model.units()[i] for i in (4, 0, 7)]), strict=True):
            assert torch.equal(unit.weight, plain.units()[index].weight)
        finish(component.walk(model.units()))
        component.release()

    Together(2).run(rank)
