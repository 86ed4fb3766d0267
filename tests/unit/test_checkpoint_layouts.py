"""Every layout of a checkpoint folder gives the same tensors under the official names, and names what is wrong with it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints import NAMES, TINY_DITS, as_diffusers, tensors, write_diffusers, write_official
from mapping_source import MappingSource
from parity.golden import DIRECTORY
from wanvram.errors import CheckpointError
from wanvram.weights.diffusers import TABLES, RenamedSource, official_names
from wanvram.weights.official import (
    CLIP_FILE,
    COMPONENTS,
    DIT_INDEX,
    T5_FILE,
    TOKENIZER_FILE,
    VAE_FILE,
    check_checkpoint,
    check_model,
    identify,
    layout,
    open_checkpoint,
    tokenizer_file,
)
from wanvram.weights.sources import TensorSource

FULL_SIZE = json.loads((DIRECTORY / "full_size_keys.json").read_text())
FULL_MODELS = [("dit", name) for name in FULL_SIZE if name.rpartition("-")[2] in ("1.3B", "14B")] + [
    ("text_encoder", "umt5-xxl-encoder"),
    ("image_encoder", "clip-full-file"),
    ("vae", "vae"),
]


@pytest.mark.parametrize(("component", "model"), FULL_MODELS)
def test_the_tables_lead_from_every_diffusers_name_to_one_official_name_and_back(component: str, model: str) -> None:
    keys = [k for k in FULL_SIZE[model]["keys"] if component != "image_encoder" or k.startswith("visual.")]
    keys = [key for key in keys if key != "visual.head"]  # a projection that Wan does not use
    expected = {key: NAMES[component](key) for key in keys}
    theirs = [name for names in expected.values() for name in names]
    assert len(set(theirs)) == len(theirs)
    assert official_names(reversed(theirs), TABLES[component]) == expected


def test_names_that_no_table_has_stay_as_they_are_and_known_leftovers_are_dropped() -> None:
    keys = ["strange.weight", "blocks.0.attn2.norm_added_q.weight", "proj_out.bias"]
    assert official_names(keys, TABLES["dit"]) == {
        "strange.weight": ["strange.weight"],
        "head.head.bias": ["proj_out.bias"],
    }
    leftovers = ["vision_model.embeddings.position_ids", "visual_projection.weight"]
    assert official_names(leftovers, TABLES["image_encoder"]) == {}


@pytest.mark.parametrize("names", [["shared.weight"], ["encoder.embed_tokens.weight"]])
def test_the_embedding_is_read_under_either_of_its_names(names: list[str]) -> None:
    assert official_names(names, TABLES["text_encoder"]) == {"token_embedding.weight": names}


def test_of_both_names_of_the_embedding_the_first_is_read() -> None:
    both = ["encoder.embed_tokens.weight", "shared.weight"]
    assert official_names(both, TABLES["text_encoder"]) == {"token_embedding.weight": ["shared.weight"]}


# --- folders of tiny models ------------------------------------------------------------------------------------------------


def filled(source: TensorSource, key: str, dtype: torch.dtype = torch.float32) -> Tensor:
    dest = torch.full(source.shape(key), torch.nan, dtype=dtype)
    source.fill(key, dest)
    return dest


@pytest.mark.parametrize("dit", TINY_DITS)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("write", [write_official, write_diffusers])
def test_every_layout_gives_the_same_values_under_the_official_names(
    tmp_path: Path, write: Callable[..., None], sharded: bool, dit: str
) -> None:
    write(tmp_path, dit, sharded=sharded)
    assert layout(tmp_path) == ("official" if write is write_official else "diffusers")
    for component in COMPONENTS:
        source = open_checkpoint(tmp_path, component)
        expected = tensors(component, dit)
        assert set(expected) - set(source.keys()) <= {"visual.head"}
        assert set(source.keys()) <= set(expected)
        for key in source.keys():  # noqa: SIM118 (a source is not a mapping)
            assert torch.equal(filled(source, key), expected[key].float()), key
        assert identify(component, source) == (dit if component == "dit" else "tiny")
    check_checkpoint(tmp_path, COMPONENTS, dit)
    assert tokenizer_file(tmp_path).is_file()


def test_the_embedding_rows_of_either_layout_are_the_table_rows(tmp_path: Path) -> None:
    for name, write in (("a", write_official), ("b", write_diffusers)):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
        rows = open_checkpoint(tmp_path / name, "text_encoder").rows("token_embedding.weight", [7, 0, 299, 7])
        assert torch.equal(rows, tensors("text_encoder", "tiny-t2v")["token_embedding.weight"][[7, 0, 299, 7]])


def test_fused_projections_can_be_filled_into_another_dtype(tmp_path: Path) -> None:
    write_diffusers(tmp_path)
    source = open_checkpoint(tmp_path, "image_encoder")
    key = "visual.transformer.0.attn.to_qkv.weight"
    expected = tensors("image_encoder", "tiny-t2v")[key].half()
    assert torch.equal(filled(source, key, torch.float16), expected)
    with pytest.raises(CheckpointError, match=r"to_qkv\.weight has shape \[120, 40\] instead of \[120, 41\]"):
        source.fill(key, torch.empty(120, 41))


def test_parts_that_do_not_fit_together_are_refused() -> None:
    parts = MappingSource({"a": torch.ones(2, 3), "b": torch.ones(2, 4)})
    with pytest.raises(CheckpointError, match="the parts of ab have the shapes"):
        RenamedSource(parts, {"ab": ["a", "b"]}).shape("ab")
    with pytest.raises(CheckpointError, match="no tensor c"):
        RenamedSource(parts, {}).shape("c")


@pytest.mark.parametrize("names", ["official", "transformers"])
def test_safetensors_stand_in_for_the_official_pth_files(tmp_path: Path, names: str) -> None:
    write_official(tmp_path, pth=False)
    if names == "transformers":
        save_file(as_diffusers("text_encoder", "tiny-t2v"), (tmp_path / T5_FILE).with_suffix(".safetensors"))
    check_checkpoint(tmp_path, COMPONENTS, "tiny-t2v")
    source = open_checkpoint(tmp_path, "text_encoder")
    assert torch.equal(filled(source, "norm.weight"), tensors("text_encoder", "")["norm.weight"].float())


# --- what can be wrong -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {"official": tmp_path_factory.mktemp("official"), "diffusers": tmp_path_factory.mktemp("diffusers")}
    write_official(made["official"], "tiny-i2v", sharded=True)
    write_diffusers(made["diffusers"], "tiny-i2v", sharded=True)
    return made


WEIGHT_FILES = [
    ("official", T5_FILE),
    ("official", CLIP_FILE),
    ("official", VAE_FILE),
    ("official", "diffusion_pytorch_model-00002-of-00003.safetensors"),
    ("official", DIT_INDEX),
    ("official", TOKENIZER_FILE),
    ("diffusers", "text_encoder/model-00001-of-00003.safetensors"),
    ("diffusers", "image_encoder/model-00003-of-00003.safetensors"),
    ("diffusers", "transformer/diffusion_pytorch_model-00001-of-00003.safetensors"),
    ("diffusers", "vae/diffusion_pytorch_model-00001-of-00003.safetensors"),
    ("diffusers", "tokenizer/tokenizer.json"),
]


DAMAGES = [
    (kind, name, damage)
    for kind, name in WEIGHT_FILES
    for damage in ("missing", "truncated", "empty", "pointer")
    if (Path(name).name, damage) != ("tokenizer.json", "truncated")  # its own reader tells a truncated one
]


@pytest.mark.parametrize(("kind", "name", "damage"), DAMAGES)
def test_a_damaged_file_is_named_before_anything_is_loaded(
    tmp_path: Path, folders: dict[str, Path], kind: str, name: str, damage: str
) -> None:
    folder = tmp_path / "ckpt"
    shutil.copytree(folders[kind], folder)
    path = folder / name
    if damage == "missing":
        path.unlink()
        expected = r"(does not exist|has no transformer weights); expected "
    elif damage == "truncated":
        os.truncate(path, path.stat().st_size - 9)
        expected = r"is (truncated or )?damaged.*; expected"
    elif damage == "empty":
        os.truncate(path, 0)
        expected = "is empty; expected"
    else:
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        expected = "is a Git LFS pointer"
    with pytest.raises(CheckpointError, match=expected) as caught:
        check_checkpoint(folder, COMPONENTS)
    assert path.name in str(caught.value)


def test_the_first_problem_is_told_and_the_others_are_named(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    with pytest.raises(CheckpointError, match=r"text_encoder does not exist.*\(dit, vae: not usable either\)"):
        check_checkpoint(tmp_path, ["text_encoder", "dit", "vae"])


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the checkpoint folder .*nowhere does not exist; expected an official"):
        open_checkpoint(tmp_path / "nowhere", "vae")


def test_a_diffusers_folder_without_safetensors_or_with_two_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    with pytest.raises(CheckpointError, match=r"vae has no safetensors file; expected diffusion_pytorch_model\."):
        open_checkpoint(tmp_path, "vae")
    save_file({"quant_conv.bias": torch.ones(1)}, tmp_path / "vae/a.fp16.safetensors")
    assert open_checkpoint(tmp_path, "vae").keys() == ["conv1.bias"]
    save_file({"quant_conv.bias": torch.ones(1)}, tmp_path / "vae/b.safetensors")
    with pytest.raises(CheckpointError, match=r"vae has a\.fp16\.safetensors, b\.safetensors; expected"):
        open_checkpoint(tmp_path, "vae")


def _full_size(model: str) -> MappingSource:
    keys = FULL_SIZE[model]["keys"]
    return MappingSource({key: torch.empty(shape, device="meta") for key, shape in keys.items()})


@pytest.mark.parametrize("model", [model for component, model in FULL_MODELS if component == "dit"])
def test_a_full_size_transformer_is_recognised(model: str) -> None:
    assert identify("dit", _full_size(model)) == model


def test_a_smaller_transformer_given_as_the_14b_one_is_told_with_what_it_is() -> None:
    expected = (
        "the transformer is not that of t2v-14B: it has 30 blocks of width 1536 for 16 input channels (t2v-1.3B) "
        "instead of 40 blocks of width 5120 for 16 input channels (t2v-14B)"
    )
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        check_model("dit", _full_size("t2v-1.3B"), "t2v-14B")


def test_transformers_of_the_same_size_for_other_tasks_are_told_apart() -> None:
    with pytest.raises(CheckpointError, match=r"36 input channels and 2 images \(flf2v-14B\) instead of"):
        check_model("dit", _full_size("flf2v-14B"), "i2v-14B")
    with pytest.raises(CheckpointError, match=r"and 15 VACE blocks \(vace-1\.3B\) instead of"):
        check_model("dit", _full_size("vace-1.3B"), "t2v-1.3B")


def test_an_unknown_transformer_is_described() -> None:
    source = MappingSource({"patch_embedding.weight": torch.empty(8, 16, 1, 2, 2), "blocks.0.x": torch.empty(1)})
    with pytest.raises(
        CheckpointError, match=r"none of t2v-1\.3B, .* it has 1 blocks of width 8 for 16 input channels"
    ):
        identify("dit", source)


def test_another_model_in_the_place_of_a_component_is_refused(tmp_path: Path) -> None:
    write_official(tmp_path)
    torch.save(tensors("vae", ""), tmp_path / T5_FILE)
    with pytest.raises(
        CheckpointError, match=rf"^{re.escape(str(tmp_path))}: .* not those of text_encoder tiny, .* 22 tensors"
    ):
        check_checkpoint(tmp_path, ["text_encoder"], "tiny-t2v")
    with pytest.raises(CheckpointError, match=r"not those of text_encoder umt5-xxl"):
        identify("text_encoder", open_checkpoint(tmp_path, "text_encoder"))
