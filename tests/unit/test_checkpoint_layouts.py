"""Every layout of a checkpoint folder gives the same tensors under the official names, and names what is wrong with it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from parity.golden import DIRECTORY
from wanvram.errors import CheckpointError
from wanvram.weights.diffusers import TABLES, RenamedSource, official_names
from wanvram.weights.official import (
    CLIP_FILE,
    COMPONENTS,
    DIT_FILE,
    DIT_INDEX,
    T5_FILE,
    TOKENIZER_FILE,
    VAE_FILE,
    blueprint,
    check_checkpoint,
    check_model,
    identify,
    layout,
    open_checkpoint,
    tokenizer_file,
)
from wanvram.weights.sources import MappingSource, TensorSource

TINY_DITS = ("tiny-t2v", "tiny-i2v", "tiny-flf2v", "tiny-vace")


# The Diffusers names by the rules of diffusers' own conversion script and the module trees of transformers, written
# independently of the tables under test: replacements in order, official -> Diffusers.
DIT_REPLACEMENTS = [
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
    ("modulation", "scale_shift_table"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("norm2", "placeholder"),
    ("norm3", "norm2"),
    ("placeholder", "norm3"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    ("self_attn.", "attn1."),
    ("cross_attn.", "attn2."),
    ("before_proj", "proj_in"),
    ("after_proj", "proj_out"),
    (".q.", ".to_q."),
    (".k.", ".to_k."),
    (".v.", ".to_v."),
    (".o.", ".to_out.0."),
    (".k_img.", ".add_k_proj."),
    (".v_img.", ".add_v_proj."),
    (".norm_k_img.", ".norm_added_k."),
]
T5_REPLACEMENTS = [
    ("token_embedding", "shared"),
    ("blocks.", "encoder.block."),
    ("pos_embedding.embedding", "layer.0.SelfAttention.relative_attention_bias"),
    ("attn.", "layer.0.SelfAttention."),
    ("norm1", "layer.0.layer_norm"),
    ("norm2", "layer.1.layer_norm"),
    ("ffn.gate.0", "layer.1.DenseReluDense.wi_0"),
    ("ffn.fc1", "layer.1.DenseReluDense.wi_1"),
    ("ffn.fc2", "layer.1.DenseReluDense.wo"),
]
CLIP_REPLACEMENTS = [
    ("visual.", "vision_model."),
    ("cls_embedding", "embeddings.class_embedding"),
    ("pos_embedding", "embeddings.position_embedding.weight"),
    ("patch_embedding", "embeddings.patch_embedding"),
    ("pre_norm", "pre_layrnorm"),
    ("post_norm", "post_layernorm"),
    ("transformer", "encoder.layers"),
    (".norm1", ".layer_norm1"),
    (".norm2", ".layer_norm2"),
    ("mlp.0", "mlp.fc1"),
    ("mlp.2", "mlp.fc2"),
    ("attn.proj", "self_attn.out_proj"),
]
RESIDUAL_REPLACEMENTS = [
    ("residual.0", "norm1"),
    ("residual.2", "conv1"),
    ("residual.3", "norm2"),
    ("residual.6", "conv2"),
    ("shortcut", "conv_shortcut"),
]


def _replaced(key: str, replacements: list[tuple[str, str]]) -> str:
    for old, new in replacements:
        key = key.replace(old, new)
    return key


def _vae_name(key: str) -> str:
    parts = key.split(".")
    if parts[0] in ("conv1", "conv2"):
        return key.replace("conv1", "quant_conv").replace("conv2", "post_quant_conv")
    side, layer, rest = parts[0], parts[1], ".".join(parts[2:])
    if layer == "conv1":
        return f"{side}.conv_in.{rest}"
    if layer == "head":
        return f"{side}.norm_out.gamma" if rest == "0.gamma" else f"{side}.conv_out.{rest[2:]}"
    number, rest = int(parts[2]), _replaced(".".join(parts[3:]), RESIDUAL_REPLACEMENTS)
    if layer == "middle":
        return f"{side}.mid_block.{('resnets.0', 'attentions.0', 'resnets.1')[number]}.{rest}"
    if layer == "downsamples":
        return f"{side}.down_blocks.{number}.{rest}"
    block, place = divmod(number, 4)
    return f"{side}.up_blocks.{block}.{f'resnets.{place}' if place < 3 else 'upsamplers.0'}.{rest}"


def _clip_name(key: str) -> list[str]:
    names = [key.replace("attn.to_qkv", f"self_attn.{letter}_proj") for letter in "qkv"] if "to_qkv" in key else [key]
    return [_replaced(name, CLIP_REPLACEMENTS) for name in names]


def _t5_name(key: str) -> str:
    return "encoder.final_layer_norm.weight" if key == "norm.weight" else _replaced(key, T5_REPLACEMENTS)


NAMES: dict[str, Callable[[str], list[str]]] = {
    "dit": lambda key: [_replaced(key, DIT_REPLACEMENTS)],
    "text_encoder": lambda key: [_t5_name(key)],
    "image_encoder": _clip_name,
    "vae": lambda key: [_vae_name(key)],
}
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


def _tensors(component: str, dit: str) -> dict[str, Tensor]:
    """Values of the tiny model with this transformer, in the dtypes of a download; the head of CLIP is there too."""
    module, _ = blueprint(component, dit if component == "dit" else "tiny")
    shapes = {key: tuple(p.shape) for key, p in module.named_parameters()}
    if component == "image_encoder":
        last = {k.replace("transformer.0.", "transformer.1."): s for k, s in shapes.items() if "transformer.0." in k}
        shapes |= last | {"visual.post_norm.weight": (40,), "visual.post_norm.bias": (40,), "visual.head": (40, 24)}
    dtype = torch.bfloat16 if component == "text_encoder" else torch.float32
    generator = torch.Generator().manual_seed(COMPONENTS.index(component))
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}


def write_official(folder: Path, dit: str = "tiny-t2v", *, sharded: bool = False, pth: bool = True) -> None:
    """The exact layout of an official download of a tiny model."""
    for component, name in (("text_encoder", T5_FILE), ("image_encoder", CLIP_FILE), ("vae", VAE_FILE)):
        tensors = _tensors(component, dit)
        if component == "image_encoder":
            tensors |= {"textual.norm.weight": torch.ones(3), "log_scale": torch.ones(())}
        if pth:
            torch.save(tensors, folder / name)
        else:
            save_file(tensors, (folder / name).with_suffix(".safetensors"))
    _write_safetensors(folder, DIT_FILE, _tensors("dit", dit), sharded=sharded)
    (folder / TOKENIZER_FILE).parent.mkdir(parents=True)
    (folder / TOKENIZER_FILE).write_text('{"version": "1.0"}')
    (folder / TOKENIZER_FILE).with_name("spiece.model").write_bytes(b"pieces")


def write_diffusers(folder: Path, dit: str = "tiny-t2v", *, sharded: bool = False) -> None:
    """The exact layout of a Diffusers folder of a tiny model."""
    files = ("model", "model", "diffusion_pytorch_model", "diffusion_pytorch_model")
    folders = ("text_encoder", "image_encoder", "transformer", "vae")
    for component, name, stem in zip(COMPONENTS, folders, files, strict=True):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        _write_safetensors(folder / name, f"{stem}.safetensors", _as_diffusers(component, dit), sharded=sharded)
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer.json").write_text('{"version": "1.0"}')


def _as_diffusers(component: str, dit: str) -> dict[str, Tensor]:
    result = {}
    for key, tensor in _tensors(component, dit).items():
        names = NAMES[component](key)
        parts = tensor.chunk(len(names))
        if key == "visual.head":
            names, parts = ["visual_projection.weight"], (tensor.t().contiguous(),)
        if key in ("visual.cls_embedding", "visual.pos_embedding"):
            parts = (tensor.squeeze(),)
        result |= {name: part.clone() for name, part in zip(names, parts, strict=True)}
    if component == "text_encoder":
        result["encoder.embed_tokens.weight"] = result["shared.weight"].clone()
    return result


def _write_safetensors(folder: Path, name: str, tensors: Mapping[str, Tensor], *, sharded: bool) -> None:
    if not sharded:
        save_file(dict(tensors), folder / name)
        return
    stem = name.removesuffix(".safetensors")
    weight_map = {key: f"{stem}-0000{1 + n % 3}-of-00003.safetensors" for n, key in enumerate(sorted(tensors))}
    for shard in set(weight_map.values()):
        save_file({key: tensors[key] for key in tensors if weight_map[key] == shard}, folder / shard)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


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
        expected = _tensors(component, dit)
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
        assert torch.equal(rows, _tensors("text_encoder", "tiny-t2v")["token_embedding.weight"][[7, 0, 299, 7]])


def test_fused_projections_can_be_filled_into_another_dtype(tmp_path: Path) -> None:
    write_diffusers(tmp_path)
    source = open_checkpoint(tmp_path, "image_encoder")
    key = "visual.transformer.0.attn.to_qkv.weight"
    expected = _tensors("image_encoder", "tiny-t2v")[key].half()
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
        save_file(_as_diffusers("text_encoder", "tiny-t2v"), (tmp_path / T5_FILE).with_suffix(".safetensors"))
    check_checkpoint(tmp_path, COMPONENTS, "tiny-t2v")
    source = open_checkpoint(tmp_path, "text_encoder")
    assert torch.equal(filled(source, "norm.weight"), _tensors("text_encoder", "")["norm.weight"].float())


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
    torch.save(_tensors("vae", ""), tmp_path / T5_FILE)
    with pytest.raises(
        CheckpointError, match=rf"^{re.escape(str(tmp_path))}: .* not those of text_encoder tiny, .* 22 tensors"
    ):
        check_checkpoint(tmp_path, ["text_encoder"], "tiny-t2v")
    with pytest.raises(CheckpointError, match=r"not those of text_encoder umt5-xxl"):
        identify("text_encoder", open_checkpoint(tmp_path, "text_encoder"))
