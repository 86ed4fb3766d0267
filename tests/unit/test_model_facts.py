"""Facts about pictures on their way through the models: which rows attend when, which tiles meet where, what is counted as done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from wanvram.config import Request, RunConfig, Strategy
from wanvram.engine.components import Parts, model_specs
from wanvram.engine.devices import CpuDevice
from wanvram.engine.repeats import Repeats
from wanvram.engine.residency import Component
from wanvram.engine.shared_stages import SharedStages
from wanvram.engine.stage_progress import Count, Done
from wanvram.engine.vae_stages import decode, encode
from wanvram.models import dit_blocks
from wanvram.models.conditioning import boundary_mask, letterbox, mask_channels, mask_frames, unit
from wanvram.models.dit_blocks import Attending, BlockInputs, PatchEmbedding, SelfAttention, VaceBlock, chunks
from wanvram.models.precision import FP32
from wanvram.models.rotary import rotary_tables
from wanvram.models.vae import WanVAE
from wanvram.models.vae_tiles import Area, Halos, Stretch, as_frame, as_rows, grid
from wanvram.predict.simulate import simulated_device
from wanvram.recorder.recorder import Recorder
from wanvram.run.weights import NoWeights
from wanvram.sharing import Place
from wanvram.specs import DIT, VAE, WAN21_GEOMETRY

SPEC = DIT["tiny-t2v"]


def drawn(module: Any, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.2, generator=generator)
    return module.requires_grad_(False)


def noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the transformer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [slice(0, 5), slice(7, 8), slice(11, 60)])
def test_the_positions_of_some_tokens_are_theirs_among_all(of: slice) -> None:
    whole, some = (rotary_tables((3, 4, 5), 32, "cpu", part) for part in (None, of))
    for table, part in zip(whole, some, strict=True):
        assert torch.equal(table[of], part)


@pytest.mark.parametrize("patch", [(2, 2, 4), (1, 2, 2)])
def test_patches_are_embedded_as_the_convolution_of_the_same_weight(patch: tuple[int, int, int]) -> None:
    embedding = drawn(PatchEmbedding(5, 7, patch, torch.float32))
    parts = [noise(2, 4, 6, 8), noise(3, 4, 6, 8, seed=3)]
    wanted = F.conv3d(torch.cat(parts)[None], embedding.weight, embedding.bias, stride=patch)[0].flatten(1).t()
    for rows, of in ((None, None), (3, None), (2, slice(1, 5))):
        assert (embedding(parts, rows, of) - (wanted if of is None else wanted[of])).abs().max() < 1e-5


def test_chunks_cover_all_rows_once_and_none_beyond() -> None:
    assert list(chunks(7, 3)) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(chunks(7, None)) == list(chunks(7, 9)) == [slice(0, 7)]


@pytest.mark.parametrize("scale", [1.0, 1.1, 0.5, -2.0])
@pytest.mark.parametrize("rows", [None, 2])
def test_a_hint_is_added_in_its_strength(scale: float, rows: int | None) -> None:
    block = drawn(VaceBlock(DIT["tiny-vace"], FP32, first=True))
    width = DIT["tiny-vace"].dim
    x, stream = noise(5, width), noise(5, width, seed=4)
    wanted = x + scale * F.linear(stream, block.after_proj.weight, block.after_proj.bias)
    block.add_hint(x, stream, scale, rows)
    assert (x - wanted).abs().max() < 1e-5


def test_only_the_first_block_of_the_branch_has_a_projection_before() -> None:
    spec = DIT["tiny-vace"]
    assert [hasattr(VaceBlock(spec, FP32, first), "before_proj") for first in (True, False)] == [True, False]
    block = drawn(VaceBlock(spec, FP32, first=True))
    stream, x = noise(5, spec.dim), noise(5, spec.dim, seed=4)
    wanted = F.linear(stream, block.before_proj.weight, block.before_proj.bias) + x
    block.begin(stream, x, 2)
    assert (stream - wanted).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("heads", "rows", "most"), [(1, 3, 3 * SPEC.num_heads), (SPEC.num_heads, 3, 3), (1, None, 120)]
)
def test_queries_of_few_heads_attend_so_many_at_once_that_they_are_as_many_bytes(
    heads: int, rows: int | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    attended: list[tuple[int, int]] = []
    real = dit_blocks.attention

    def seen(q: Tensor, *others: Any) -> Tensor:
        attended.append((q.shape[0], q.shape[1]))
        return real(q, *others)

    monkeypatch.setattr(dit_blocks, "attention", seen)
    cos, sin = rotary_tables((4, 5, 6), SPEC.dim // SPEC.num_heads, "cpu")
    how = Attending(heads_per_group=heads)
    inputs = BlockInputs(torch.zeros(6, SPEC.dim), cos, sin, torch.zeros(1, SPEC.dim), None, how)
    layer = drawn(SelfAttention(SPEC, FP32))
    x = noise(120, SPEC.dim)
    layer(x, [torch.zeros(SPEC.dim), torch.zeros(SPEC.dim), torch.ones(SPEC.dim)], inputs, rows)
    assert {count for _, count in attended} == {heads}
    assert min(count for count, _ in attended) > 0
    assert max(count for count, _ in attended) == most
    assert sum(count * width for count, width in attended) == 120 * SPEC.num_heads


# --- pictures ----------------------------------------------------------------------------------------------------------------


def test_bytes_become_numbers_from_minus_one_to_one() -> None:
    picture = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1).expand(1, 3, 3)
    assert unit(picture)[0, 0].tolist() == pytest.approx([-1.0, -0.6, 1.0])
    assert unit(picture).shape == (3, 1, 3)


def test_a_given_last_frame_is_the_last_of_its_four() -> None:
    assert boundary_mask(3, 1, 1, last=True).flatten(1).tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 1]]
    assert boundary_mask(2, 1, 1, last=False, group=3).flatten(1).tolist() == [[1, 0]] * 3


def test_masks_are_sampled_in_the_middle_of_what_they_stand_for() -> None:
    assert mask_frames(9, 3) == [1, 4, 7]
    assert mask_frames(5, 2) == [1, 3]
    assert mask_frames(81, 21)[:3] == [1, 5, 9]


def test_a_reference_is_centred_and_its_surroundings_are_white() -> None:
    canvas = letterbox(torch.zeros(3, 10, 10), 20, 60)
    assert canvas[:, :, 20:40].abs().max() == 0
    assert canvas[:, :, :20].min() == canvas[:, :, 40:].min() == 1
    same = torch.zeros(3, 20, 60)
    assert letterbox(same, 20, 60) is same


def test_a_mask_s_channels_are_the_pixels_of_a_cell_row_by_row() -> None:
    mask = torch.arange(32 * 48).view(32, 48).float()
    cells = mask_channels(mask, WAN21_GEOMETRY)
    assert cells.shape == (64, 4, 6)
    for channel in (0, 9, 63):
        row, column = divmod(channel, 8)
        assert torch.equal(cells[channel], mask[row::8, column::8])


# --- tiles -------------------------------------------------------------------------------------------------------------------


def test_what_a_layer_reads_of_its_input_ends_at_the_picture_s_edge() -> None:
    assert [Stretch(*span, 10).grown()[:2] for span in ((0, 4), (1, 9), (5, 10))] == [(0, 5), (0, 10), (4, 10)]
    assert Stretch(3, 7, 10).halved() == Stretch(1, 4, 5)
    assert Stretch(2, 4, 10).halved() == Stretch(1, 2, 5)
    assert Stretch(1, 3, 5).strided() == Stretch(2, 7, 10)
    assert Stretch(3, 5, 5).strided() == Stretch(6, 10, 10)
    area = Area(Stretch(1, 3, 5), Stretch(2, 6, 7))
    assert area.scaled(8) == Area(Stretch(8, 24, 40), Stretch(16, 48, 56))
    assert area.size == (2, 4)
    assert torch.equal(area.of(torch.arange(35).view(5, 7)), torch.arange(35).view(5, 7)[1:3, 2:6])


def test_what_is_left_out_of_a_larger_area_is_told_by_side() -> None:
    inner, outer = Area(Stretch(3, 6, 20), Stretch(7, 9, 20)), Area(Stretch(1, 7, 20), Stretch(4, 13, 20))
    assert tuple(inner.within(outer)) == (2, 1, 3, 4)


def test_tiles_of_one_pixel_are_the_smallest() -> None:
    from wanvram.errors import InputError

    assert len(list(grid(2, 3, (1, 1)))) == 6
    for tile in ((0, 3), (3, 0)):
        with pytest.raises(InputError, match="is empty: use 1x1 or more"):
            list(grid(2, 3, tile))


def test_a_layer_without_a_halo_of_its_own_cannot_be_tiled() -> None:
    with pytest.raises(TypeError, match="Linear needs the whole picture"):
        Halos(next(grid(2, 2, (2, 2)))).back([torch.nn.Linear(1, 1)])


def test_a_frame_and_its_rows_are_the_same_memory() -> None:
    frame = noise(1, 3, 1, 4, 5).contiguous(memory_format=torch.channels_last_3d)
    rows = as_rows(frame)
    assert rows.shape == (4, 5, 3)
    assert torch.equal(rows[2, 4], frame[0, :, 0, 2, 4])
    assert torch.equal(as_frame(rows), frame)
    assert as_frame(rows).data_ptr() == frame.data_ptr()


# --- the two jobs of the VAE -------------------------------------------------------------------------------------------------


class Post:
    """The other ranks as letters: what is sent to the first waits until it is received."""

    def __init__(self) -> None:
        self.sent: list[Tensor] = []
        self.waited = 0

    def send(self, tensor: Tensor, rank: int) -> Tensor:
        assert rank == 0
        self.sent.append(tensor)
        return tensor

    def wait(self, mark: Any) -> None:
        self.waited += 1

    def receive(self, tensor: Tensor, rank: int) -> None:
        tensor.copy_(self.of[rank].pop(0))

    of: dict[int, list[Tensor]]


class Ranked(CpuDevice):
    def __init__(self, rank: int, world: int, post: Post) -> None:
        super().__init__()
        self.place, self.post = Place(rank, ulysses=world), post

    def peers(self, axis: str) -> Any:
        return self.post


class Counted:
    """A stage that counts, and what had come of it whenever it said so."""

    def __init__(self) -> None:
        self.told: list[Done] = []

    def __call__(self, total: int, unit_of: str) -> Count:
        return Count(self.told.append, "decode", total, unit_of)


def vae(device: CpuDevice) -> Component:
    return Component("vae", drawn(WanVAE(VAE["tiny"])), [], device)


def decoded(device: CpuDevice, z: Tensor, tile: int | None, counted: Counted | None = None) -> list[Tensor]:
    recorder = Recorder(device.meter, None, None)
    more = [] if counted is None else [counted]
    with device.session():
        frames = list(decode(vae(device), SharedStages(device), recorder, z, tile, *more))
    assert {span.component for span in recorder.spans} == {"vae"}
    return frames


def test_frames_count_when_they_have_come_down_the_last_two_groups_at_the_end() -> None:
    counted = Counted()
    frames = decoded(CpuDevice(), noise(16, 4, 2, 3), None, counted)
    assert [len(group) for group in frames] == [1, 4, 4, 4]
    assert [(done.number, done.total, done.unit) for done in counted.told] == [
        (1, 13, "frames"),
        (5, 13, "frames"),
        (9, 13, "frames"),
        (13, 13, "frames"),
    ]


def test_a_group_of_frames_is_handed_over_as_soon_as_the_next_is_computed() -> None:
    device = CpuDevice()
    recorder = Recorder(device.meter, None, None)
    computed: list[int] = []
    with device.session():
        frames = decode(vae(device), SharedStages(device), recorder, noise(16, 4, 2, 3), None)
        computed.extend(len(recorder.spans) for _ in frames)
    assert computed == [2, 3, 4, 4]


def test_tiles_count_one_by_one_and_the_last_hands_over_group_after_group() -> None:
    device, counted = CpuDevice(), Counted()
    z = noise(16, 3, 2, 3)
    whole = decoded(device, z, None)
    recorder = Recorder(device.meter, None, None)
    seen: list[tuple[int, int]] = []
    frames = []
    with device.session():
        for group in decode(vae(device), SharedStages(device), recorder, z, 2, counted):
            seen.append((len(recorder.spans), len(counted.told)))
            frames.append(group.clone())
    assert [(done.number, done.total, done.unit) for done in counted.told] == [(1, 2, "tiles"), (2, 2, "tiles")]
    assert seen == [(1, 1), (1, 1), (2, 2)], "inside the second tile, and the last group after it"
    assert (torch.cat(frames).int() - torch.cat(whole).int()).abs().max() <= 1
    assert [span.name for span in recorder.spans] == ["tile 0", "tile 1"]


@pytest.mark.parametrize("world", [2, 3])
def test_tiles_of_several_ranks_are_the_frames_of_one(world: int) -> None:
    z = noise(16, 3, 3, 5)
    alone = torch.cat([group.clone() for group in decoded(CpuDevice(), z, 2)])
    post = Post()
    post.of = {}
    for rank in range(1, world):
        other, counted = Post(), Counted()
        assert decoded(Ranked(rank, world, other), z, 2, counted) == []
        tiles = len(range(rank, 6, world))
        assert [(done.number, done.total) for done in counted.told] == [(n + 1, tiles) for n in range(tiles)]
        assert other.waited == len(other.sent) == tiles, "each before the next is sent, and the last at the end"
        post.of[rank] = other.sent
    counted = Counted()
    frames = decoded(Ranked(0, world, post), z, 2, counted)
    assert torch.equal(torch.cat([group.clone() for group in frames]), alone)
    assert not any(post.of.values())
    assert [done.total for done in counted.told] == [len(range(0, 6, world))] * len(range(0, 6, world))


def simulated_decode() -> tuple[int, float, list[Any], int]:
    """Groups shown, seconds, spans, and pieces that were placed."""
    request = Request.for_task("t2v-1.3B", size="832*480", frame_num=5)
    run = RunConfig("x", "", "simulated", request, Strategy(), weights="tiny")
    device = simulated_device(run)
    recorder = Recorder(device.meter, None, None)
    with device.session():
        component = Parts(run, device, NoWeights(tiny=True)).load("vae_decoder")
        latent = device.empty((16, 26, 4, 8), torch.float32)
        frames = decode(component, SharedStages(device), recorder, latent, 4)
        shown = sum(len(group) for group in frames)
    placed = device.clock.copied.nbytes
    return shown, device.clock.now(), [(span.peak, span.end) for span in recorder.spans], placed


def test_a_simulation_leaves_out_frames_of_all_tiles_but_the_last_and_says_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left_out: list[int] = []
    real = Repeats.leave_out

    def seen(self: Repeats, *asked: Any) -> tuple[int, float]:
        count, seconds = real(self, *asked)
        left_out.append(count)
        return count, seconds

    monkeypatch.setattr(Repeats, "leave_out", seen)
    shown, seconds, spans, placed = simulated_decode()
    assert sum(left_out) > 10
    monkeypatch.setattr(Repeats, "leave_out", lambda *_: (0, 0.0))
    whole = simulated_decode()
    assert shown == whole[0] == 4 * 25 + 1
    assert seconds == pytest.approx(whole[1], rel=1e-9)
    assert (spans, placed) == whole[2:]


def test_a_video_encoded_in_tiles_is_that_of_whole_frames() -> None:
    device = CpuDevice()
    video = noise(3, 5, 16, 24)
    with device.session():
        component = vae(device)
        whole, tiled = (encode(component, device, lambda: [video], tile) for tile in (None, 2))
    assert whole.shape == tiled.shape == (16, 2, 2, 3)
    assert (whole - tiled).abs().max() < 1e-4 * whole.abs().max()


def test_tiny_models_have_the_structure_of_their_task_and_full_ones_its_sizes() -> None:
    tiny, full = (model_specs("i2v-14B", tiny=small) for small in (True, False))
    assert (tiny.dit, full.dit) == (DIT["tiny-i2v"], DIT["i2v-14B"])
    assert tiny.vae == VAE["tiny"] != full.vae
