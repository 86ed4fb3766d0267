"""Folders that people take for a checkpoint: each is read, or named with what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints import as_diffusers, tensors, write_diffusers, write_official, write_tokenizer
from wanvram.errors import CheckpointError
from wanvram.run.weights import choose_weights
from wanvram.weights.convert import Conversion, convert
from wanvram.weights.official import COMPONENTS, DIT_FILE, TOKENIZER_FILE, check_checkpoint, layout, open_checkpoint

Files = dict[str, dict[str, Tensor]]
ONE = torch.ones(1)


def prefixed(prefix: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in values.items()}


def write(folder: Path, files: Files) -> None:
    for name, values in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(values, folder / name)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(folder, ["text_encoder", "dit", "vae"], "tiny-t2v")
    assert len(str(caught.value)) < 1200
    return str(caught.value)


# --- read -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "net."])
@pytest.mark.parametrize("nested", [False, True])
def test_comfyui_s_single_files_are_read_under_any_name(tmp_path: Path, prefix: str, nested: bool) -> None:
    at = (lambda folder: f"{folder}/") if nested else (lambda folder: "")
    write(tmp_path, {
        at("diffusion_models") + "wan2.1_t2v_fp16.safetensors": prefixed(prefix, tensors("dit", "tiny-i2v")),
        at("text_encoders") + "umt5_xxl_fp16.safetensors":
            as_diffusers("text_encoder", "") | {"spiece_model": torch.ones(9, dtype=torch.uint8)},
        at("clip_vision") + "clip_vision_h.safetensors": as_diffusers("image_encoder", ""),
        at("vae") + "wan_2.1_vae.safetensors": tensors("vae", ""),
    })  # fmt: skip
    write_tokenizer(tmp_path / TOKENIZER_FILE)
    assert layout(tmp_path) == "comfy"
    check_checkpoint(tmp_path, COMPONENTS, "tiny-i2v")
    source, expected = open_checkpoint(tmp_path, "dit"), tensors("dit", "tiny-i2v")
    key = "blocks.0.self_attn.q.weight"
    dest = torch.empty(source.shape(key))
    source.fill(key, dest)
    assert torch.equal(dest, expected[key])


def test_a_single_file_under_the_official_name_is_read_without_its_prefix(tmp_path: Path) -> None:
    write_official(tmp_path)
    write(tmp_path, {DIT_FILE: prefixed("model.diffusion_model.", tensors("dit", "tiny-t2v"))})
    check_checkpoint(tmp_path, COMPONENTS, "tiny-t2v")
    manifest = convert(Conversion(tmp_path, "bf16"), tmp_path.parent / "converted")
    assert manifest["complete"]


def test_comfyui_s_files_beside_official_ones_are_read_and_two_of_a_component_are_not(tmp_path: Path) -> None:
    write_official(tmp_path)
    (tmp_path / "Wan2.1_VAE.pth").unlink()
    write(tmp_path, {"wan_2.1_vae.safetensors": tensors("vae", "")})
    check_checkpoint(tmp_path, COMPONENTS, "tiny-t2v")
    write(tmp_path, {"vae/another.safetensors": tensors("vae", "")})
    with pytest.raises(CheckpointError, match=r"has 2 files of the vae: .*; leave the one to use"):
        open_checkpoint(tmp_path, "vae")


def test_a_diffusers_folder_without_its_index_is_one_still(tmp_path: Path) -> None:
    write_diffusers(tmp_path)
    (tmp_path / "model_index.json").unlink()
    assert layout(tmp_path) == "diffusers"
    check_checkpoint(tmp_path, COMPONENTS, "tiny-t2v")


def test_a_file_of_all_components_is_read(tmp_path: Path) -> None:
    whole = prefixed("model.diffusion_model.", tensors("dit", "tiny-t2v"))
    whole |= prefixed("first_stage_model.", tensors("vae", ""))
    whole |= prefixed("text_encoders.umt5xxl.transformer.", as_diffusers("text_encoder", ""))
    write(tmp_path, {"wan-all-in-one.safetensors": {key: value.clone() for key, value in whole.items()}})
    write_tokenizer(tmp_path / TOKENIZER_FILE)
    check_checkpoint(tmp_path, ["text_encoder", "dit", "vae"], "tiny-t2v")


# --- named ------------------------------------------------------------------------------------------------------------


def test_comfyui_s_files_without_the_others_say_what_belongs_beside_them(tmp_path: Path) -> None:
    write(tmp_path, {
        "wan2.1_t2v.safetensors": prefixed("model.diffusion_model.", tensors("dit", "tiny-t2v")),
        "wan_2.1_vae.safetensors": tensors("vae", ""),
    })  # fmt: skip
    said = refusal(tmp_path)
    assert "holds ComfyUI's single files: wan2.1_t2v.safetensors (dit), wan_2.1_vae.safetensors (vae)" in said
    assert "umt5_xxl_fp16.safetensors" in said
    assert "tokenizer.json" in said


def test_a_single_file_of_a_strange_size_says_that_it_is_comfyui_s(tmp_path: Path) -> None:
    values = {"patch_embedding.weight": torch.ones(2, 16, 1, 2, 2), "blocks.0.self_attn.q.weight": torch.ones(2, 2)}
    write(tmp_path, {DIT_FILE: prefixed("model.diffusion_model.", values)})
    assert "ComfyUI's single files" in refusal(tmp_path)
    with pytest.raises(CheckpointError, match=r"the transformer is none of .*ComfyUI's single files"):
        convert(Conversion(tmp_path, "bf16"), tmp_path.parent / "converted")


LORAS = [
    ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "diffusion_model.blocks.0.self_attn.q.lora_B.weight"),
    ("lora_unet_blocks_0_self_attn_q.lora_down.weight", "lora_unet_blocks_0_self_attn_q.alpha"),
    ("blocks.0.self_attn.q.lora_up.weight", "blocks.0.self_attn.q.diff_b"),
    ("transformer.blocks.0.attn1.to_q.lora_A.default.weight", "transformer.blocks.0.attn1.to_q.lora_B.default.weight"),
    ("diffusion_model.blocks.0.ffn.0.lokr_w1", "diffusion_model.blocks.0.ffn.0.lokr_w2"),
    ("lora_unet_blocks_0_ffn_0.hada_w1_a", "lora_unet_blocks_0_ffn_0.hada_w1_b"),
    ("blocks.0.self_attn.q.lora.up.weight", "blocks.0.self_attn.q.lora.down.weight"),
]


@pytest.mark.parametrize("keys", LORAS)
@pytest.mark.parametrize("name", [DIT_FILE, "my_style.safetensors", "pytorch_lora_weights.safetensors"])
def test_a_lora_is_named(tmp_path: Path, keys: tuple[str, str], name: str) -> None:
    write(tmp_path, {name: dict.fromkeys(keys, ONE.clone()) | {keys[1]: ONE.clone()}})
    said = refusal(tmp_path)
    assert f"{name} is a LoRA (2 tensors such as" in said
    assert "give the checkpoint folder" in said
    with pytest.raises(CheckpointError, match="is a LoRA"):
        convert(Conversion(tmp_path, "bf16"), tmp_path.parent / "converted")


QUANTISED = ["scaled_fp8", "blocks.0.ffn.0.scale_weight", "blocks.0.ffn.0.comfy_quant", "blocks.0.ffn.0.weight.absmax"]


@pytest.mark.parametrize("key", QUANTISED)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scaled_fp8_and_other_quantised_weights_are_named(tmp_path: Path, key: str, prefix: str) -> None:
    values = prefixed(prefix, tensors("dit", "tiny-t2v") | {key: ONE})
    write(tmp_path, {"wan2.1_fp8_scaled.safetensors": values})
    assert "fp8_scaled.safetensors is quantised (scaled fp8 or the like" in refusal(tmp_path)
    write_official(tmp_path)
    write(tmp_path, {DIT_FILE: values})
    assert "is quantised" in refusal(tmp_path)


def test_plain_fp8_weights_are_read(tmp_path: Path) -> None:
    write_official(tmp_path)
    values = {k: v.to(torch.float8_e4m3fn) if v.dim() == 2 else v for k, v in tensors("dit", "tiny-t2v").items()}
    write(tmp_path, {DIT_FILE: values})
    check_checkpoint(tmp_path, COMPONENTS, "tiny-t2v")


def _gguf(folder: Path) -> None:
    (folder / "wan2.1-t2v-14b-Q4_K_M.gguf").write_bytes(b"GGUF\x03\0\0\0")


def _gguf_named_otherwise(folder: Path) -> None:
    (folder / DIT_FILE).write_bytes(b"GGUF\x03\0\0\0")
    (folder / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"GGUF\x03\0\0\0")


def _wan22_two(folder: Path) -> None:
    for name in ("high_noise_model", "low_noise_model"):
        write(folder, {f"{name}/diffusion_pytorch_model.safetensors": {"a": ONE}})
    (folder / "Wan2.1_VAE.pth").write_bytes(b"PK\x03\x04")


def _wan22_small(folder: Path) -> None:
    (folder / "Wan2.2_VAE.pth").write_bytes(b"PK\x03\x04")
    (folder / "config.json").write_text('{"model_type": "ti2v", "in_dim": 48}')


def _wan22_diffusers(folder: Path) -> None:
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline", "boundary_ratio": 0.875}')
    (folder / "transformer").mkdir()
    (folder / "transformer_2").mkdir()


def _hub_cache(folder: Path) -> None:
    snapshot = folder / "snapshots" / "37ec512624d61f7aa208f7ea8140a131f93afc9a"
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "blobs" / "abc.incomplete").write_bytes(b"")


def _hub(folder: Path) -> None:
    _hub_cache(folder / "models--Wan-AI--Wan2.1-T2V-1.3B")
    (folder / "models--gpt2" / "refs").mkdir(parents=True)


def _unfinished(folder: Path) -> None:
    (folder / ".cache/huggingface/download").mkdir(parents=True)
    (folder / ".cache/huggingface/download/diffusion_pytorch_model.safetensors.abc.incomplete").write_bytes(b"x")
    (folder / "config.json").write_text("{}")


def _unfinished_elsewhere(folder: Path) -> None:
    (folder / "models_t5_umt5-xxl-enc-bf16.pth.aria2").write_bytes(b"x")


def _too_high(folder: Path) -> None:
    (folder / "Wan2.1-T2V-1.3B").mkdir()
    write_official(folder / "Wan2.1-T2V-1.3B")


@pytest.mark.parametrize(
    ("make", "said", "do"),
    [
        (_gguf, "holds GGUF files (wan2.1-t2v-14b-Q4_K_M.gguf)", "give an official Wan2.1 download"),
        (_gguf_named_otherwise, "is a GGUF file, which is not read", "expected"),
        (_wan22_two, "holds Wan2.2 (a transformer for high and one for low noise", "give a checkpoint of Wan2.1"),
        (_wan22_small, "holds Wan2.2 (another VAE or input", "give a checkpoint of Wan2.1"),
        (_wan22_diffusers, "holds Wan2.2", "give a checkpoint of Wan2.1"),
        (_hub_cache, "is a model in the hub's cache", "snapshots/37ec512624d61f7aa208f7ea8140a131f93afc9a"),
        (_hub, "is the hub's cache of 2 models", "snapshots/37ec512624d61f7aa208f7ea8140a131f93afc9a"),
        (_unfinished, "is a download that did not finish", "Run the same download again"),
        (_unfinished_elsewhere, "is a download that did not finish", "Run the same download again"),
        (_too_high, "holds no checkpoint itself", "give the folder"),
    ],
)
def test_what_a_folder_is_and_what_to_do_is_said_on_a_gpu_and_on_the_simulated_device(
    tmp_path: Path, make: Callable[[Path], None], said: str, do: str
) -> None:
    make(tmp_path)
    message = refusal(tmp_path)
    assert said in message
    assert do in message
    with pytest.raises(CheckpointError) as caught:
        convert(Conversion(tmp_path, "bf16"), tmp_path.parent / "converted")
    assert said in str(caught.value)
    for simulated in (False, True):
        if make is _gguf_named_otherwise and simulated:
            continue
        with pytest.raises(CheckpointError) as caught:
            choose_weights(str(tmp_path), simulated=simulated, task="t2v-1.3B")
        assert said in str(caught.value)


def test_one_component_of_a_diffusers_folder_leads_to_the_folder_above(tmp_path: Path) -> None:
    write_diffusers(tmp_path)
    said = refusal(tmp_path / "transformer")
    assert f"is one component of a Diffusers folder; give the folder above it, {tmp_path}" in said


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"lora.safetensors": {"a.lora_A.weight": ONE, "a.lora_B.weight": ONE.clone()}, "m.safetensors": {"a": ONE}},
    )
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for name, said in (("lora", "is a LoRA"), ("m", "is a file; give the folder that holds it")):
        assert said in refusal(tmp_path / f"{name}.safetensors")
    assert "is a GGUF file" in refusal(tmp_path / "m.gguf")


def test_leftovers_beside_a_whole_checkpoint_are_no_hindrance(tmp_path: Path) -> None:
    write_official(tmp_path)
    for make in (_unfinished, _unfinished_elsewhere, _gguf):
        make(tmp_path)
    write(tmp_path, {"loras/style.safetensors": {"a.lora_A.weight": ONE, "a.lora_B.weight": ONE.clone()}})
    check_checkpoint(tmp_path, COMPONENTS, "tiny-t2v")


def test_an_empty_folder_and_one_that_is_not_there_say_what_is_expected(tmp_path: Path) -> None:
    assert "does not exist; expected a PyTorch state dict" in refusal(tmp_path)
    assert "expected an official Wan2.1 download" in refusal(tmp_path / "nowhere")
    (tmp_path / "model_index.json").write_text(json.dumps([1]))
    assert "text_encoder does not exist; expected a Diffusers component folder" in refusal(tmp_path)
