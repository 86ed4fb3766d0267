"""The Diffusers layout of the same models: one folder per component, other tensor names, read under the official names.

Source of the names: diffusers `scripts/convert_wan_to_diffusers.py`, `WanTransformer3DModel`, `WanVACETransformer3DModel`
and `AutoencoderKLWan`; transformers `UMT5EncoderModel` and `CLIPVisionModel`. tests/unit/test_checkpoint_layouts.py
holds the tables against every official key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

from torch import Tensor

from wanvram.errors import CheckpointError
from wanvram.tasks import WAN21
from wanvram.weights.sources import SafetensorsSource, TensorSource
from wanvram.weights.stored import Shape

__all__ = ["FOLDERS", "TABLES", "RenamedSource", "is_diffusers", "official_names", "open_diffusers"]

FOLDERS = {model.name: model.folder for model in WAN21.components}

Table = tuple[tuple[str, str], ...]

# Diffusers name -> official name. `#` is a block number, `*` the rest of the name (weight or bias). Several names with the
# same official name are concatenated along the first axis in the order of the table.
_OF_BOTH = (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"), ("norm_q", "norm_q"), ("norm_k", "norm_k"))
_DIT_BLOCK = (
    *((f"attn1.{theirs}.*", f"self_attn.{official}.*") for theirs, official in _OF_BOTH),
    *((f"attn2.{theirs}.*", f"cross_attn.{official}.*") for theirs, official in _OF_BOTH),
    ("attn2.add_k_proj.*", "cross_attn.k_img.*"),
    ("attn2.add_v_proj.*", "cross_attn.v_img.*"),
    ("attn2.norm_added_k.*", "cross_attn.norm_k_img.*"),
    ("norm2.*", "norm3.*"),  # official numbers the norms by function, diffusers in the order of use
    ("ffn.net.0.proj.*", "ffn.0.*"),
    ("ffn.net.2.*", "ffn.2.*"),
    ("scale_shift_table", "modulation"),
)
DIT: Table = (
    ("patch_embedding.*", "patch_embedding.*"),
    ("condition_embedder.text_embedder.linear_1.*", "text_embedding.0.*"),
    ("condition_embedder.text_embedder.linear_2.*", "text_embedding.2.*"),
    ("condition_embedder.time_embedder.linear_1.*", "time_embedding.0.*"),
    ("condition_embedder.time_embedder.linear_2.*", "time_embedding.2.*"),
    ("condition_embedder.time_proj.*", "time_projection.1.*"),
    ("condition_embedder.image_embedder.norm1.*", "img_emb.proj.0.*"),
    ("condition_embedder.image_embedder.ff.net.0.proj.*", "img_emb.proj.1.*"),
    ("condition_embedder.image_embedder.ff.net.2.*", "img_emb.proj.3.*"),
    ("condition_embedder.image_embedder.norm2.*", "img_emb.proj.4.*"),
    ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    ("scale_shift_table", "head.modulation"),
    ("proj_out.*", "head.head.*"),
    ("vace_patch_embedding.*", "vace_patch_embedding.*"),
    ("vace_blocks.#.proj_in.*", "vace_blocks.#.before_proj.*"),
    ("vace_blocks.#.proj_out.*", "vace_blocks.#.after_proj.*"),
    *((f"blocks.#.{theirs}", f"blocks.#.{official}") for theirs, official in _DIT_BLOCK),
    *((f"vace_blocks.#.{theirs}", f"vace_blocks.#.{official}") for theirs, official in _DIT_BLOCK),
)
T5: Table = (
    ("shared.weight", "token_embedding.weight"),
    ("encoder.block.#.layer.0.layer_norm.weight", "blocks.#.norm1.weight"),
    ("encoder.block.#.layer.0.SelfAttention.q.weight", "blocks.#.attn.q.weight"),
    ("encoder.block.#.layer.0.SelfAttention.k.weight", "blocks.#.attn.k.weight"),
    ("encoder.block.#.layer.0.SelfAttention.v.weight", "blocks.#.attn.v.weight"),
    ("encoder.block.#.layer.0.SelfAttention.o.weight", "blocks.#.attn.o.weight"),
    ("encoder.block.#.layer.0.SelfAttention.relative_attention_bias.weight", "blocks.#.pos_embedding.embedding.weight"),
    ("encoder.block.#.layer.1.layer_norm.weight", "blocks.#.norm2.weight"),
    ("encoder.block.#.layer.1.DenseReluDense.wi_0.weight", "blocks.#.ffn.gate.0.weight"),
    ("encoder.block.#.layer.1.DenseReluDense.wi_1.weight", "blocks.#.ffn.fc1.weight"),
    ("encoder.block.#.layer.1.DenseReluDense.wo.weight", "blocks.#.ffn.fc2.weight"),
    ("encoder.final_layer_norm.weight", "norm.weight"),
)
CLIP: Table = (
    ("vision_model.embeddings.class_embedding", "visual.cls_embedding"),
    ("vision_model.embeddings.position_embedding.weight", "visual.pos_embedding"),
    ("vision_model.embeddings.patch_embedding.weight", "visual.patch_embedding.weight"),
    ("vision_model.pre_layrnorm.*", "visual.pre_norm.*"),  # their spelling
    ("vision_model.encoder.layers.#.layer_norm1.*", "visual.transformer.#.norm1.*"),
    ("vision_model.encoder.layers.#.self_attn.q_proj.*", "visual.transformer.#.attn.to_qkv.*"),
    ("vision_model.encoder.layers.#.self_attn.k_proj.*", "visual.transformer.#.attn.to_qkv.*"),
    ("vision_model.encoder.layers.#.self_attn.v_proj.*", "visual.transformer.#.attn.to_qkv.*"),
    ("vision_model.encoder.layers.#.self_attn.out_proj.*", "visual.transformer.#.attn.proj.*"),
    ("vision_model.encoder.layers.#.layer_norm2.*", "visual.transformer.#.norm2.*"),
    ("vision_model.encoder.layers.#.mlp.fc1.*", "visual.transformer.#.mlp.0.*"),
    ("vision_model.encoder.layers.#.mlp.fc2.*", "visual.transformer.#.mlp.2.*"),
    ("vision_model.post_layernorm.*", "visual.post_norm.*"),
)
_RESIDUAL = (
    ("norm1.gamma", "residual.0.gamma"),
    ("conv1.*", "residual.2.*"),
    ("norm2.gamma", "residual.3.gamma"),
    ("conv2.*", "residual.6.*"),
    ("conv_shortcut.*", "shortcut.*"),
)
_RESAMPLE = (("resample.1.*", "resample.1.*"), ("time_conv.*", "time_conv.*"))
# Official numbers the decoder's layers through: each of the four levels has three residual blocks and an upsampling.
_UP_LAYERS = tuple(
    (f"decoder.up_blocks.{level}.{layer}", f"decoder.upsamples.{4 * level + number}", parts)
    for level in range(4)
    for number, (layer, parts) in enumerate(
        [("resnets.0", _RESIDUAL), ("resnets.1", _RESIDUAL), ("resnets.2", _RESIDUAL), ("upsamplers.0", _RESAMPLE)]
    )
)
VAE: Table = (
    ("quant_conv.*", "conv1.*"),
    ("post_quant_conv.*", "conv2.*"),
    *((f"encoder.down_blocks.#.{a}", f"encoder.downsamples.#.{b}") for a, b in (*_RESIDUAL, *_RESAMPLE)),
    *((f"{theirs}.{a}", f"{official}.{b}") for theirs, official, parts in _UP_LAYERS for a, b in parts),
    *(
        (f"{side}.{theirs}", f"{side}.{official}")
        for side in ("encoder", "decoder")
        for theirs, official in (
            ("conv_in.*", "conv1.*"),
            *((f"mid_block.resnets.0.{a}", f"middle.0.{b}") for a, b in _RESIDUAL),
            ("mid_block.attentions.0.*", "middle.1.*"),
            *((f"mid_block.resnets.1.{a}", f"middle.2.{b}") for a, b in _RESIDUAL),
            ("norm_out.gamma", "head.0.gamma"),
            ("conv_out.*", "head.2.*"),
        )
    ),
)
TABLES: dict[str, Table] = {"dit": DIT, "text_encoder": T5, "image_encoder": CLIP, "vae": VAE}

# The same tensor under a second name: read only where the first is not in the file.
ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}
# In some files, never used: diffusers and transformers skip them too.
UNUSED = re.compile(
    r"blocks\.\d+\.attn2\.norm_added_q\..*|vision_model\.embeddings\.position_ids|visual_projection\.weight"
)
# Official gives these so many leading axes of length 1 more.
LEADING_AXES = {"vision_model.embeddings.class_embedding": 2, "vision_model.embeddings.position_embedding.weight": 1}


@cache
def _patterns(table: Table) -> tuple[tuple[re.Pattern[str], list[str]], ...]:
    """Each row as (expression for the whole Diffusers name, the official name cut at its `#` and `*`)."""
    return tuple(
        (re.compile(re.escape(theirs).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)")), re.split("[#*]", official))
        for theirs, official in table
    )


def official_names(keys: Iterable[str], table: Table) -> dict[str, list[str]]:
    """Official name -> the Diffusers names it is made of, in order. A name the table lacks stands for itself."""
    present = set(keys)
    found: dict[str, list[tuple[int, str]]] = {}
    for key in sorted(present):
        first = ALIASES.get(key)
        if UNUSED.fullmatch(key) or first in present:
            continue
        for number, (expression, pieces) in enumerate(_patterns(table)):
            match = expression.fullmatch(first or key)
            if match:
                rest = (value + piece for value, piece in zip(match.groups(), pieces[1:], strict=True))
                found.setdefault(pieces[0] + "".join(rest), []).append((number, key))
                break
        else:
            found.setdefault(key, []).append((0, key))
    return {official: [key for _, key in sorted(parts)] for official, parts in found.items()}


class RenamedSource:
    """Some tensors of another source under the official names; parts of one tensor are written behind each other."""

    def __init__(self, source: TensorSource, names: Mapping[str, Sequence[str]]) -> None:
        self._source = source
        self._names = {official: tuple(parts) for official, parts in names.items()}

    def keys(self) -> list[str]:
        return list(self._names)

    def files(self) -> list[Path]:
        return self._source.files()

    def shape(self, key: str) -> Shape:
        parts = self._parts(key)
        shapes = [self._source.shape(part) for part in parts]
        if len({shape[1:] for shape in shapes}) > 1:
            raise CheckpointError(f"the parts of {key} have the shapes {shapes}, which do not fit together")
        joined = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()
        return (*[1] * LEADING_AXES.get(parts[0], 0), *joined)

    def fill(self, key: str, dest: Tensor) -> None:
        shape, parts = self.shape(key), self._parts(key)
        if shape != tuple(dest.shape):
            raise CheckpointError(f"{key} has shape {list(shape)} instead of {list(dest.shape)}")
        dest = dest.detach()
        for _ in range(LEADING_AXES.get(parts[0], 0)):
            dest = dest.squeeze(0)
        start = 0
        for part in parts:
            count = self._source.shape(part)[0] if len(parts) > 1 else 0
            self._source.fill(part, dest.narrow(0, start, count) if count else dest)
            start += count

    def fill_rows(self, key: str, dest: Tensor, first: int) -> None:
        parts = self._parts(key)
        if parts[0] in LEADING_AXES:  # a single row
            self.fill(key, dest)
            return
        start, stop = 0, first + dest.shape[0]
        for part in parts:
            end = start + self._source.shape(part)[0]
            begin, until = max(first, start), min(stop, end)
            if begin < until:
                self._source.fill_rows(part, dest.detach()[begin - first : until - first], begin - start)
            start = end

    def rows(self, key: str, indices: Sequence[int]) -> Tensor:
        """Only of tensors that are one piece: no lookup table is made of several."""
        (part,) = self._parts(key)
        return self._source.rows(part, indices)

    def _parts(self, key: str) -> tuple[str, ...]:
        if key not in self._names:
            raise CheckpointError(f"there is no tensor {key} in the checkpoint")
        return self._names[key]


def is_diffusers(ckpt_dir: Path) -> bool:
    return (ckpt_dir / "model_index.json").exists() or any((ckpt_dir / folder).is_dir() for folder in FOLDERS.values())


def open_diffusers(ckpt_dir: Path, component: str) -> RenamedSource:
    """One component of a Diffusers folder under its official names. Raises CheckpointError."""
    folder = ckpt_dir / FOLDERS[component]
    path = _weights_file(folder)
    single = path.suffix == ".safetensors"
    source = SafetensorsSource([path]) if single else SafetensorsSource.from_index(path)
    return RenamedSource(source, official_names(source.keys(), TABLES[component]))


def _weights_file(folder: Path) -> Path:
    """The index or the only safetensors file; a variant (`.fp16.`) is taken where nothing else is there."""
    stem = "diffusion_pytorch_model" if folder.name in ("transformer", "vae") else "model"
    default = f"{stem}.safetensors"
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} does not exist; expected a Diffusers component folder with {default} or shards"
        )
    for name in (f"{default}.index.json", default):
        if (folder / name).exists():
            return folder / name
    others = sorted(folder.glob("*.safetensors.index.*json")) or sorted(folder.glob("*.safetensors"))
    if len(others) != 1:
        names = ", ".join(path.name for path in others) or "no safetensors file"
        raise CheckpointError(f"{folder} has {names}; expected {default} or {default}.index.json")
    return others[0]
