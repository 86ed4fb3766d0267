"""Checkpoint folders of tiny models in the exact layouts that people have, and the models shrunk so that the real loader takes them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from wanvram import specs
from wanvram.media import sources as media
from wanvram.tasks import TASKS
from wanvram.weights.official import (
    CLIP_FILE,
    COMPONENTS,
    DIT_FILE,
    T5_FILE,
    TOKENIZER_FILE,
    VAE_FILE,
    blueprint,
)

TINY_DITS = ("tiny-t2v", "tiny-i2v", "tiny-flf2v", "tiny-vace")
TINY_SIZE = "96*64"  # width*height; 24 tokens a latent frame

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


# --- values -----------------------------------------------------------------------------------------------------------------


def tensors(component: str, dit: str) -> dict[str, Tensor]:
    """Values of the tiny model with this transformer, in the dtypes of a download; the head of CLIP is there too."""
    module, _ = blueprint(component, dit if component == "dit" else "tiny")
    shapes = {key: tuple(p.shape) for key, p in module.named_parameters()}
    if component == "image_encoder":
        last = {k.replace("transformer.0.", "transformer.1."): s for k, s in shapes.items() if "transformer.0." in k}
        shapes |= last | {"visual.post_norm.weight": (40,), "visual.post_norm.bias": (40,), "visual.head": (40, 24)}
    dtype = torch.bfloat16 if component == "text_encoder" else torch.float32
    generator = torch.Generator().manual_seed(COMPONENTS.index(component))
    return {key: _values(key, shape, generator).to(dtype) for key, shape in shapes.items()}


def _values(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Nothing at zero or one, and of a size that keeps a picture: matrices preserve variance, norms are near 1."""
    values = torch.randn(shape, generator=generator)
    if key.endswith("gamma") or (key.endswith("weight") and len(shape) == 1):
        return 1.0 + 0.1 * values
    if "embedding" in key and len(shape) == 2:
        return values
    return values / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 and shape[0] > 1 else 0.2 * values


# --- layouts ----------------------------------------------------------------------------------------------------------------


def write_official(
    folder: Path,
    dit: str = "tiny-t2v",
    *,
    sharded: bool = False,
    pth: bool = True,
    components: Sequence[str] = COMPONENTS,
) -> None:
    """The weights and the tokenizer of an official download of a tiny model."""
    for component, name in (("text_encoder", T5_FILE), ("image_encoder", CLIP_FILE), ("vae", VAE_FILE)):
        if component not in components:
            continue
        values = tensors(component, dit)
        if component == "image_encoder":
            values |= {"textual.norm.weight": torch.ones(3), "log_scale": torch.ones(())}
        if pth:
            torch.save(values, folder / name)
        else:
            save_file(values, (folder / name).with_suffix(".safetensors"))
    _write_safetensors(folder, DIT_FILE, tensors("dit", dit), sharded=sharded)
    write_tokenizer(folder / TOKENIZER_FILE)
    (folder / TOKENIZER_FILE).with_name("spiece.model").write_bytes(b"pieces")


def write_download(folder: Path, dit: str, *, sharded: bool = False) -> None:
    """Every file of an official download: only image tasks have CLIP, and its text tokenizer, which nothing reads."""
    spec = specs.DIT[dit]
    write_official(
        folder,
        dit,
        sharded=sharded,
        components=[c for c in COMPONENTS if c != "image_encoder" or spec.has_image_branch],
    )
    names = ["google/umt5-xxl"]
    if spec.has_image_branch:
        names.append("xlm-roberta-large")
        write_tokenizer(folder / "xlm-roberta-large/tokenizer.json")
        (folder / "xlm-roberta-large/sentencepiece.bpe.model").write_bytes(b"pieces")
    for name in names:
        (folder / name / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
        (folder / name / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    config = {"_class_name": "VaceWanModel" if dit == "tiny-vace" else "WanModel", "_diffusers_version": "0.30.0"}
    values = {name: getattr(spec, name) for name in ("model_type", "dim", "ffn_dim", "freq_dim", "num_heads")}
    (folder / "config.json").write_text(json.dumps(config | values | {"num_layers": spec.num_layers, "eps": spec.eps}))
    (folder / "LICENSE.txt").write_text("Apache License")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")


def write_diffusers(folder: Path, dit: str = "tiny-t2v", *, sharded: bool = False) -> None:
    """The exact layout of a Diffusers folder of a tiny model."""
    files = ("model", "model", "diffusion_pytorch_model", "diffusion_pytorch_model")
    folders = ("text_encoder", "image_encoder", "transformer", "vae")
    for component, name, stem in zip(COMPONENTS, folders, files, strict=True):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        _write_safetensors(folder / name, f"{stem}.safetensors", as_diffusers(component, dit), sharded=sharded)
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    write_tokenizer(folder / "tokenizer/tokenizer.json")


def as_diffusers(component: str, dit: str) -> dict[str, Tensor]:
    """The tensors of a component under the names and in the shapes of Diffusers and transformers."""
    result: dict[str, Tensor] = {}
    for key, tensor in tensors(component, dit).items():
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


def _write_safetensors(folder: Path, name: str, values: Mapping[str, Tensor], *, sharded: bool) -> None:
    if not sharded:
        save_file(dict(values), folder / name)
        return
    stem = name.removesuffix(".safetensors")
    weight_map = {key: f"{stem}-0000{1 + n % 3}-of-00003.safetensors" for n, key in enumerate(sorted(values))}
    for shard in set(weight_map.values()):
        save_file({key: values[key] for key in values if weight_map[key] == shard}, folder / shard)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_tokenizer(path: Path) -> None:
    """A small tokenizer of the kind of umT5's, Unigram with byte fallback, whose ids fit the tiny vocabulary."""
    words = ["cat", "dog", "the", "on", "a"]
    letters = "▁abcdefghijklmnopqrstuvwxyz.,"
    pieces = ["<pad>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    scored = [(piece, -10.0) for piece in pieces] + [("▁" + word, -2.0) for word in words]
    assert len({piece for piece, _ in scored}) == len(scored) <= specs.T5["tiny"].vocab_size
    tokenizer = tokenizers.Tokenizer(models.Unigram(scored, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


# --- models -----------------------------------------------------------------------------------------------------------------


@contextmanager
def tiny_models() -> Iterator[None]:
    """All seven tasks with tiny models behind their own names, and 96*64 among their sizes: nothing else differs."""
    with ExitStack() as patches:
        for table, changed in (
            (specs.DIT, {name: specs.DIT["tiny-" + specs.DIT[name].model_type] for name in TASKS}),
            (TASKS, {name: replace(task, sizes=(*task.sizes, TINY_SIZE)) for name, task in TASKS.items()}),
            (specs.T5, {"umt5-xxl": specs.T5["tiny"]}),
            (specs.VAE, {"wan2.1": specs.VAE["tiny"]}),
            (specs.CLIP, {"vit-h-14": specs.CLIP["tiny"]}),
            (media.SEQUENCE_LENGTHS, {96 * 64: 24 * 3}),  # three latent frames, nine of video
        ):
            patches.enter_context(patch.dict(table, changed))
        yield
