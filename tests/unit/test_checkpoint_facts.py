"""Facts about checkpoints: the last header, digit and row that is read, what belongs to which layout, what a conversion says and keeps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import write_diffusers, write_official
from mapping_source import MappingSource
from wanvram.errors import CheckpointError, InputError
from wanvram.specs import DIT
from wanvram.weights import convert as converting
from wanvram.weights.convert import Conversion, convert, free_bytes, verify
from wanvram.weights.diffusers import LEADING_AXES, TABLES, RenamedSource, is_diffusers, official_names, open_diffusers
from wanvram.weights.official import (
    DIT_FILE,
    VAE_FILE,
    _described,
    _shape_of_dit,
    check_checkpoint,
    identify,
    layout,
    open_checkpoint,
    spec_beside,
    tokenizer_file,
)
from wanvram.weights.sources import MANIFEST, SafetensorsSource, check_file, check_keys, read_manifest, shown

# --- one file ----------------------------------------------------------------------------------------------------------------


def written(path: Path, header: Any, data: bytes = b"") -> SafetensorsSource:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return SafetensorsSource([path])


def test_a_file_of_no_tensors_is_one_and_what_has_no_room_for_a_table_is_not(tmp_path: Path) -> None:
    assert written(tmp_path / "a", b"{}").keys() == []
    assert written(tmp_path / "a", {"__metadata__": {"format": "pt"}}).keys() == []
    (tmp_path / "a").write_bytes((3).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="a header of 3 bytes"):
        SafetensorsSource([tmp_path / "a"])
    with pytest.raises(CheckpointError, match="a header of 1 bytes"):
        written(tmp_path / "a", b"1")


def of_shape(shape: list[int], nbytes: int) -> dict[str, Any]:
    return {"x": {"dtype": "U8", "shape": shape, "data_offsets": [0, nbytes]}}


def test_64_axes_and_numbers_of_20_digits_are_the_most(tmp_path: Path) -> None:
    assert written(tmp_path / "a", of_shape([1] * 64, 1), b"x").shape("x") == (1,) * 64
    with pytest.raises(CheckpointError, match="65 dimensions for x"):
        written(tmp_path / "a", of_shape([1] * 65, 1), b"x")
    with pytest.raises(CheckpointError, match="bytes for the shape"):
        written(tmp_path / "a", of_shape([10**19], 1), b"x")
    with pytest.raises(CheckpointError, match="no JSON"):
        written(tmp_path / "a", of_shape([10**20], 1), b"x")
    assert written(tmp_path / "a", of_shape([0, 5], 0)).shape("x") == (0, 5)


def test_tensors_lie_back_to_back_and_a_hole_or_an_overlap_is_told_by_its_byte(tmp_path: Path) -> None:
    def two(start: int) -> dict[str, Any]:
        return {
            "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
            "b": {"dtype": "U8", "shape": [4], "data_offsets": [start, start + 4]},
        }

    assert sorted(written(tmp_path / "a", two(4), b"x" * 8).keys()) == ["a", "b"]
    for start in (3, 5):
        length = len(json.dumps(two(start)))
        with pytest.raises(CheckpointError, match=f"a gap or overlap at byte {8 + length + 4:,}"):
            written(tmp_path / "a", two(start), b"x" * (start + 4))
    with pytest.raises(CheckpointError, match="its header tells of"):
        written(tmp_path / "a", two(4), b"x" * 9)


def test_the_first_and_the_last_row_are_rows_and_those_beside_them_are_not(tmp_path: Path) -> None:
    table = torch.arange(15.0).view(5, 3)
    save_file({"x": table}, tmp_path / "a.safetensors")
    for source in (SafetensorsSource([tmp_path / "a.safetensors"]), MappingSource({"x": table})):
        assert torch.equal(source.rows("x", [0, 4]), table[[0, 4]])
        for first in (0, 3):
            part = torch.empty(2, 3)
            source.fill_rows("x", part, first)
            assert torch.equal(part, table[first : first + 2])
        for index in (-1, 5):
            with pytest.raises(CheckpointError, match=f"x has 5 rows; row {index} was asked for"):
                source.rows("x", [2, index])
        with pytest.raises(CheckpointError, match="row 5 was asked for"):
            source.fill_rows("x", torch.empty(2, 3), 4)


def test_a_name_of_120_characters_is_shown_whole_and_a_longer_one_by_its_first_hundred() -> None:
    assert shown("x" * 120) == "x" * 120
    assert shown("x" * 121) == "x" * 100 + "... (121 characters)"


@pytest.mark.parametrize("start", [b"<!DOCTYPE html>", b"\n <html>", b"<?xml version"])
def test_a_web_page_is_told_whatever_it_begins_with(start: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(start)
    with pytest.raises(CheckpointError, match="a is a web page"):
        check_file(tmp_path / "a", "x")
    (tmp_path / "a").write_bytes(b"0123456789" * 3)
    assert check_file(tmp_path / "a", "x") == b"01234567890123456789"


def test_three_of_the_wrong_keys_are_named_and_more_are_counted() -> None:
    source = MappingSource({name: torch.ones(1) for name in "abcd"})
    with pytest.raises(CheckpointError, match=r"has 1 tensors: 1 missing: z; 4 unexpected: a, b, c, \.\.\.$"):
        check_keys({"z": (1,)}, source, "x")
    with pytest.raises(CheckpointError, match="3 unexpected: a, b, d; 1 of another shape: c "):
        check_keys({"c": (2,)}, source, "x")
    check_keys({"c": (1,)}, source, "x", ignored=["a", "b", "d", "e"])


# --- names -------------------------------------------------------------------------------------------------------------------


def test_the_decoder_has_four_levels_of_three_residual_blocks_and_an_upsampling() -> None:
    for level, layer, number in ((0, "resnets.0.conv1", "0.residual.2"), (3, "resnets.2.conv2", "14.residual.6")):
        assert official_names([f"decoder.up_blocks.{level}.{layer}.weight"], TABLES["vae"]) == {
            f"decoder.upsamples.{number}.weight": [f"decoder.up_blocks.{level}.{layer}.weight"]
        }
    upsampled = "decoder.up_blocks.1.upsamplers.0.time_conv.bias"
    assert official_names([upsampled], TABLES["vae"]) == {"decoder.upsamples.7.time_conv.bias": [upsampled]}
    fifth = "decoder.up_blocks.4.resnets.0.conv1.weight"
    assert official_names([fifth], TABLES["vae"]) == {fifth: [fifth]}


@pytest.mark.parametrize(("first", "count"), [(0, 9), (0, 1), (1, 1), (2, 4), (3, 3), (5, 4), (8, 1), (4, 2)])
def test_rows_of_a_tensor_in_parts_are_those_of_the_whole(first: int, count: int) -> None:
    whole = torch.arange(18.0).view(9, 2)
    source = RenamedSource(MappingSource({"q": whole[:2], "k": whole[2:5], "v": whole[5:]}), {"qkv": ["q", "k", "v"]})
    part = torch.full((count, 2), torch.nan)
    source.fill_rows("qkv", part, first)
    assert torch.equal(part, whole[first : first + count])
    assert source.shape("qkv") == (9, 2)


def test_axes_that_only_the_official_name_has_are_of_length_one_and_scalars_stay_scalars() -> None:
    names = {"c": list(LEADING_AXES)[:1], "p": list(LEADING_AXES)[1:], "s": ["s"]}
    values = [torch.arange(4.0), torch.arange(6.0).view(3, 2), torch.tensor(7.0)]
    theirs = [*LEADING_AXES, "s"]
    source = RenamedSource(MappingSource(dict(zip(theirs, values, strict=True))), names)
    assert [source.shape(key) for key in "cps"] == [(1, 1, 4), (1, 3, 2), ()]
    for key, value in zip("cps", values, strict=True):
        dest = torch.empty(source.shape(key))
        source.fill(key, dest)
        assert torch.equal(dest.view(value.shape), value)
        if key != "s":
            dest.zero_()
            source.fill_rows(key, dest, 0)
            assert torch.equal(dest.view(value.shape), value)


# --- layouts -----------------------------------------------------------------------------------------------------------------


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ((), "official"),
        ((DIT_FILE,), "official"),
        ((VAE_FILE.replace(".pth", ".safetensors"),), "official"),
        (("vae/x",), "diffusers"),
        (("vae/x", VAE_FILE), "official"),
        (("transformer/x",), "diffusers"),
        (("transformer/x", DIT_FILE), "official"),
        (("model_index.json", DIT_FILE), "diffusers"),
        ((MANIFEST, "model_index.json"), "converted"),
    ],
)
def test_a_folder_is_what_the_most_telling_of_its_files_says(names: tuple[str, ...], kind: str, tmp_path: Path) -> None:
    assert layout(touched(tmp_path, *names)) == kind
    assert is_diffusers(tmp_path) is any("/" in name or name == "model_index.json" for name in names)


def test_an_index_comes_before_a_whole_file_and_both_before_a_variant(tmp_path: Path) -> None:
    write_diffusers(tmp_path)
    folder = tmp_path / "transformer"
    (folder / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"damaged")
    assert open_diffusers(tmp_path, "dit").keys()
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text("damaged")
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        open_diffusers(tmp_path, "dit")


def test_a_folder_without_weights_or_with_two_variants_says_what_it_has(tmp_path: Path) -> None:
    touched(tmp_path, "transformer/config.json")
    expected = r"expected diffusion_pytorch_model\.safetensors or diffusion_pytorch_model\.safetensors\.index\.json"
    with pytest.raises(CheckpointError, match=f"transformer has no safetensors file; {expected}"):
        open_diffusers(tmp_path, "dit")
    touched(tmp_path, "transformer/b.safetensors", "transformer/a.safetensors")
    with pytest.raises(CheckpointError, match=rf"transformer has a\.safetensors, b\.safetensors; {expected}"):
        open_diffusers(tmp_path, "dit")


def test_the_tokenizer_lies_where_the_layout_has_it(tmp_path: Path) -> None:
    for name, write in (("a", write_official), ("b", write_diffusers)):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    assert tokenizer_file(tmp_path / "a") == tmp_path / "a/google/umt5-xxl/tokenizer.json"
    assert tokenizer_file(tmp_path / "b") == tmp_path / "b/tokenizer/tokenizer.json"
    (tmp_path / "b/tokenizer/tokenizer.json").unlink()
    check_checkpoint(tmp_path / "b", ["vae"])
    with pytest.raises(CheckpointError, match="the umt5-xxl tokenizer"):
        check_checkpoint(tmp_path / "b", ["vae", "text_encoder"])


def test_a_transformer_is_described_by_its_width_inputs_blocks_and_pictures() -> None:
    named = {"t2v-14B": "", "i2v-14B": " and 1 image", "flf2v-14B": " and 2 images", "vace-14B": " and 8 VACE blocks"}
    for name, more in named.items():
        spec = DIT[name]
        shape = (spec.dim, spec.in_dim, spec.num_layers, len(spec.vace_layers), spec.images)
        text = f"{spec.num_layers} blocks of width {spec.dim} for {spec.in_dim} input channels"
        assert _described(shape) == f"{text}{more} ({name})"
    assert _described((1, 2, 3, 0, 0)) == "3 blocks of width 1 for 2 input channels"
    nothing = MappingSource({"img_emb.proj.0.weight": torch.ones(1), "blocks.0.x": torch.ones(1)})
    assert _shape_of_dit(nothing) == (0, 0, 1, 0, 1)


def test_tiny_components_go_with_tiny_transformers(tmp_path: Path) -> None:
    assert spec_beside("vae", "tiny-i2v") == spec_beside("text_encoder", "tiny-t2v") == "tiny"
    assert spec_beside("dit", "tiny-i2v") == "tiny-i2v"
    assert "tiny" not in {spec_beside(name, "t2v-14B") for name in ("vae", "text_encoder", "image_encoder")}
    write_official(tmp_path)
    assert identify("vae", open_checkpoint(tmp_path, "vae")) == "tiny"
    with pytest.raises(CheckpointError, match="the weights are not those of vae "):
        identify("vae", open_checkpoint(tmp_path, "text_encoder"))


# --- conversion --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    write_official(tmp_path / "in")
    return tmp_path / "in"


def test_progress_counts_the_files_that_are_there(source: Path, tmp_path: Path) -> None:
    said: list[str] = []
    job = Conversion(source, "bf16", components=("dit",))
    manifest = convert(job, tmp_path / "out", said.append)
    total = len(manifest["files"])
    assert [line.rpartition("(")[2] for line in said] == [f"{n} of {total})" for n in range(1, total + 1)]
    assert {line.split()[0] for line in said} == set(manifest["files"])
    (tmp_path / "out" / said[0].split()[0]).unlink()
    said.clear()
    assert convert(job, tmp_path / "out", said.append) == manifest
    assert [line.rpartition("(")[2] for line in said] == [f"{total} of {total})"]
    said.clear()
    assert verify(tmp_path / "out", manifest, said.append) == total
    assert [line.rpartition("(")[2] for line in said] == [f"{n} of {total})" for n in range(1, total + 1)]


def test_a_file_is_on_the_disk_before_it_has_its_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    sync, move = os.fsync, os.replace
    monkeypatch.setattr(converting.os, "fsync", lambda file: (order.append("disk"), sync(file))[1])
    monkeypatch.setattr(converting.os, "replace", lambda a, b: (order.append(Path(b).suffix), move(a, b))[1])
    convert(Conversion(source, "bf16", components=("vae",)), tmp_path / "out")
    at = order.index(".safetensors")
    assert order[at - 1] == "disk"


def test_what_a_manifest_says_of_a_conversion(source: Path, tmp_path: Path) -> None:
    job = Conversion(source, "fp8", components=("vae", "text_encoder", "dit"), fp8_text_encoder=True)
    manifest = convert(job, tmp_path / "out")
    assert (manifest["precision"], manifest["complete"]) == ("fp8", True)
    assert sorted(manifest["fp8_components"]) == ["dit", "text_encoder"]
    assert manifest["models"] == {"dit": "tiny-t2v", "vae": "tiny", "text_encoder": "tiny"}
    assert manifest["source"]["files"][VAE_FILE] == [
        (source / VAE_FILE).stat().st_size,
        (source / VAE_FILE).stat().st_mtime_ns,
    ]
    assert list(manifest["files"]) == sorted(manifest["files"])
    parts = [entry["fp8"] for entry in manifest["files"].values() if "fp8" in entry]
    assert manifest["fp8"] == {name: max(part[name] for part in parts) for name in parts[0]}
    assert len({part["max_relative_rms_error"] for part in parts}) > 1
    assert "tokenizer/tokenizer.json" in manifest["files"]
    assert read_manifest(tmp_path / "out")["files"] == manifest["files"]


@pytest.mark.parametrize(
    ("precision", "text", "fp8"),
    [("fp8", False, ["dit"]), ("fp8", True, ["dit", "text_encoder"]), ("bf16", True, []), ("fp16", False, [])],
)
def test_which_components_are_stored_in_8_bits(precision: str, text: bool, fp8: list[str]) -> None:
    job = Conversion(Path("x"), precision, fp8_text_encoder=text)
    assert [name for name in ("dit", "text_encoder", "vae", "image_encoder") if job.uses_fp8(name)] == fp8
    assert not Conversion(Path("x"), "fp8").uses_fp8("text_encoder"), "of which nothing was said"


def test_a_tokenizer_file_that_is_whole_is_not_copied_again(source: Path, tmp_path: Path) -> None:
    job = Conversion(source, "bf16", components=("text_encoder",))
    convert(job, tmp_path / "out")
    path = tmp_path / "out/tokenizer/tokenizer.json"
    before = path.stat().st_ino, path.stat().st_mtime_ns
    convert(job, tmp_path / "out")
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == before
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    convert(job, tmp_path / "out")
    assert path.read_bytes() == (source / "google/umt5-xxl/tokenizer.json").read_bytes(), (
        "of the same size, but changed"
    )


def test_a_matrix_is_quantised_in_chunks_of_float32_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = converting.row_scales
    monkeypatch.setattr(converting, "row_scales", lambda values: (seen.append(len(values)), real(values))[1])
    for chunk, rows in ((4 * 8 * 2, [2, 2, 1]), (4 * 8 * 5, [5]), (1, [1] * 5)):
        monkeypatch.setattr(converting, "CHUNK_BYTES", chunk)
        seen.clear()
        converting._quantised(torch.ones(5, 8))
        assert seen == rows


def test_a_matrix_of_zeros_has_no_error_and_one_of_one_value_none_either() -> None:
    assert converting._quantised(torch.zeros(3, 4))[2] == (0.0, 0.0)
    assert converting._quantised(torch.full((3, 4), 2.0))[2] == (0.0, 0.0)


def test_the_space_of_a_folder_that_is_not_there_is_that_of_the_one_it_will_be_in(tmp_path: Path) -> None:
    there, later = free_bytes(tmp_path), free_bytes(tmp_path / "a/b/c")
    assert abs(there - later) < 2**30
    assert there > 0


@pytest.mark.parametrize("damage", ["text", "bytes", "hash", "list"])
def test_a_manifest_that_says_no_sizes_or_hashes_is_damaged(damage: str, source: Path, tmp_path: Path) -> None:
    job = Conversion(source, "bf16", components=("vae",))
    manifest = convert(job, tmp_path / "out")
    name = next(iter(manifest["files"]))
    if damage == "bytes":
        manifest["files"][name]["bytes"] = True
    elif damage == "hash":
        manifest["files"][name]["sha256"] = 5
    texts = {"text": "{", "list": "[]"}
    (tmp_path / "out" / MANIFEST).write_text(texts.get(damage) or json.dumps(manifest))
    with pytest.raises(InputError, match=f"{MANIFEST} is damaged; name another folder"):
        convert(job, tmp_path / "out")
    with pytest.raises(CheckpointError, match=f"{MANIFEST} is damaged"):
        read_manifest(tmp_path / "out")


@pytest.mark.parametrize(("changes", "said"), [({"complete": False}, "was interrupted"), ({"schema": 2}, "schema 2")])
def test_a_manifest_of_an_interrupted_or_later_conversion_is_not_read(
    changes: dict[str, Any], said: str, source: Path, tmp_path: Path
) -> None:
    manifest = convert(Conversion(source, "bf16", components=("vae",)), tmp_path / "out")
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(manifest | changes))
    with pytest.raises(CheckpointError, match=said):
        read_manifest(tmp_path / "out")
