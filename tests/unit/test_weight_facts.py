"""Facts about stored weights: variants in shards, what a converted file holds where, how large packed slots are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from checkpoints import TINY_DITS, write_diffusers, write_official
from toy_component import CountingDevice, Model
from wanvram.config import Measurement, Request, RunConfig, Strategy
from wanvram.engine.layout import ALIGNMENT_BYTES
from wanvram.engine.packing import Fp8
from wanvram.engine.residency import Component
from wanvram.errors import CheckpointError
from wanvram.kernels.scaled_products import LARGEST
from wanvram.models.dit import WanDiT
from wanvram.models.precision import BF16
from wanvram.predict.simulate import simulate
from wanvram.specs import DIT
from wanvram.weights import convert as converting
from wanvram.weights.convert import Conversion, convert, verify
from wanvram.weights.diffusers import is_diffusers, open_diffusers
from wanvram.weights.official import check_checkpoint, open_checkpoint
from wanvram.weights.sources import MANIFEST

HALF = torch.bfloat16


def test_a_variant_in_shards_is_read_where_nothing_else_is_there(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "variant").mkdir()
    for name in ("plain", "variant"):
        write_diffusers(tmp_path / name, sharded=True)
    folder = tmp_path / "variant/transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    named = {shard: shard.replace(".safetensors", ".fp16.safetensors") for shard in set(index["weight_map"].values())}
    for old, new in named.items():
        (folder / old).rename(folder / new)
    index["weight_map"] = {key: named[shard] for key, shard in index["weight_map"].items()}
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(index))
    check_checkpoint(tmp_path / "variant", ["dit"], "tiny-t2v")
    one, other = (open_checkpoint(tmp_path / name, "dit") for name in ("plain", "variant"))
    assert sorted(one.keys()) == sorted(other.keys())
    for key in one.keys():  # noqa: SIM118
        values = [torch.empty(source.shape(key)) for source in (one, other)]
        for source, value in zip((one, other), values, strict=True):
            source.fill(key, value)
        assert torch.equal(*values), key


def test_two_variants_in_shards_are_no_choice_of_ours(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    for variant in ("fp16", "bf16"):
        (tmp_path / f"transformer/diffusion_pytorch_model.safetensors.index.{variant}.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.bf16\.json, .*index\.fp16\.json; expected"):
        open_diffusers(tmp_path, "dit")


def test_a_folder_with_nothing_but_a_model_index_is_diffusers_and_its_missing_parts_are_named_so(
    tmp_path: Path,
) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert is_diffusers(tmp_path)
    with pytest.raises(CheckpointError, match="expected a Diffusers component folder"):
        open_diffusers(tmp_path, "vae")


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("dit", TINY_DITS)
def test_every_tensor_of_a_converted_file_lies_at_a_multiple_of_its_element(
    tmp_path: Path, dit: str, precision: str
) -> None:
    (tmp_path / "in").mkdir()
    write_official(tmp_path / "in", dit)
    convert(Conversion(tmp_path / "in", precision, components=("dit",)), tmp_path / "out")
    sizes = {"F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4}
    kinds: set[str] = set()
    for path in (tmp_path / "out/dit").glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header: dict[str, Any] = json.loads(data[8 : 8 + length])
        assert length % 8 == 0
        places = sorted(entry["data_offsets"] for key, entry in header.items() if key != "__metadata__")
        assert [start for start, _ in places] == [0, *(end for _, end in places[:-1])], "no holes"
        assert places[-1][1] == len(data) - 8 - length
        for key, entry in header.items():
            if key != "__metadata__":
                kinds.add(entry["dtype"])
                assert entry["data_offsets"][0] % sizes[entry["dtype"]] == 0, key
    assert len(kinds) > 1


def test_the_error_of_a_matrix_of_several_chunks_is_that_of_its_worst_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converting, "CHUNK_BYTES", 4 * 8 * 2)  # two rows of eight
    generator = torch.Generator().manual_seed(3)
    exact = torch.full((2, 8), 2.0)  # each its row's largest: without an error
    worst = torch.rand(2, 8, generator=generator) + 0.5
    matrix = torch.cat([exact, worst, exact])
    stored, scale, (error, rms) = converting._quantised(matrix)
    off = (stored.float() * scale[:, None] - matrix).abs()
    assert error == pytest.approx(float((off / (scale[:, None] * LARGEST)).max()))
    assert error == converting._quantised(worst)[2][0] > 0.005
    assert rms == pytest.approx(float(off.square().sum().sqrt() / matrix.square().sum().sqrt()))


def test_a_scale_that_is_not_float32_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_official(tmp_path / "in")
    convert(Conversion(tmp_path / "in", "fp8", components=("dit",)), tmp_path / "out")
    path = next(p for p in (tmp_path / "out/dit").glob("blocks.0*.safetensors"))
    values = load_file(path)
    name = next(key for key in values if key.endswith(".scale"))
    values[name] = values[name].to(HALF)
    save_file(values, path)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    manifest["files"][f"dit/{path.name}"]["bytes"] = path.stat().st_size
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="is not one float32 for each row of"):
        open_checkpoint(tmp_path / "out", "dit")


def test_verifying_names_a_file_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_official(tmp_path / "in")
    manifest = convert(Conversion(tmp_path / "in", "bf16", components=("vae",)), tmp_path / "out")
    name = next(iter(manifest["files"]))
    (tmp_path / "out" / name).unlink()
    with pytest.raises(CheckpointError, match="is not what was written; delete it and run"):
        verify(tmp_path / "out", manifest)


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def stored_bytes(unit: nn.Module) -> int:
    """Of a unit packed: a byte for each weight of a matrix in half precision and a float32 for each of its rows."""
    total = 0
    for p in unit.parameters():
        packed = p.dim() == 2 and p.dtype.itemsize == 2
        total += aligned(p.numel()) + aligned(4 * p.shape[0]) if packed else aligned(p.numel() * p.dtype.itemsize)
    return total


@pytest.mark.parametrize("home", ["pinned", "pageable", "disk"])
def test_a_slot_for_packed_weights_is_as_large_as_the_largest_stored_part(home: str) -> None:
    device = CountingDevice()
    with torch.device("meta"):
        model = Model((512, 4096)).to(HALF)
    component = Component("toy", model, model.units(), device, model.embedders(), fp8=Fp8(stored=True), generated=False)
    component.load_streamed(None, home=home)
    largest, plain = (max(size(unit) for unit in model.units()) for size in (stored_bytes, plain_bytes))
    assert largest < 0.7 * plain
    assert device.on_device[1:] == [largest, largest, plain], "two slots, and one place to unpack"
    masters = [*map(stored_bytes, model.units()), *map(plain_bytes, model.embedders())]
    buffers = [largest] * 2
    on_host, pinned = {"pinned": ([], masters), "pageable": (masters, buffers), "disk": ([], buffers)}[home]
    assert (device.on_host, device.pinned) == (on_host, pinned)


def plain_bytes(unit: nn.Module) -> int:
    return sum(aligned(p.numel() * p.dtype.itemsize) for p in unit.parameters())


def test_a_whole_simulated_run_streams_packed_weights_through_slots_of_half_the_size() -> None:
    request = Request.for_task("t2v-1.3B", size="832*480", frame_num=5, sample_steps=2)
    base: dict[str, int] = {}
    for storage in ("same", "fp8"):
        strategy = Strategy(load_strategy="block", offload=True, weight_storage=storage)
        record, _ = simulate(RunConfig("x", "", "simulated", request, strategy, Measurement(profile_memory=False)))
        base[storage] = next(c.base_bytes for c in record.components if c.name == "dit")
    with torch.device("meta"):
        units = WanDiT(DIT["t2v-1.3B"], BF16).walk_order()
    plain, stored = (max(size(unit) for unit in units) for size in (plain_bytes, stored_bytes))
    assert base["fp8"] - base["same"] == 2 * stored + plain - 2 * plain
