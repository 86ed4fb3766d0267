"""Builds each component on `meta`, decides from the Strategy how it is loaded, and runs the text encoder where it lives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from wanvram.config import RunConfig
from wanvram.engine.devices import Device
from wanvram.engine.packing import NOWHERE, Fp8
from wanvram.engine.residency import Component
from wanvram.knobs import PRECISION, PRODUCT_PRECISION, RESIDUAL_IN, WEIGHT_STORAGE
from wanvram.models.clip import CLIPVision
from wanvram.models.dit import WanDiT
from wanvram.models.dit_regrouped import RegroupedDiT
from wanvram.models.precision import PRECISIONS
from wanvram.models.t5 import T5Encoder, Walk
from wanvram.models.vae import WanVAE
from wanvram.specs import CLIP, DIT, T5, VAE, CLIPSpec, DiTSpec, T5Spec, VAESpec
from wanvram.tasks import TASKS
from wanvram.weights.sources import TensorSource, check_keys
from wanvram.weights.tokenizer import Tokenizer

__all__ = ["ModelSpecs", "Parts", "Weights", "model_specs"]

T5_DTYPE = torch.bfloat16  # as the official checkpoint is stored and run
CLIP_DTYPE = torch.float16  # as official runs it


@dataclass(frozen=True)
class ModelSpecs:
    dit: DiTSpec
    text_encoder: T5Spec
    vae: VAESpec
    image_encoder: CLIPSpec


def model_specs(task: str, *, tiny: bool) -> ModelSpecs:
    """Specs of a task's components; `tiny` has the same structure with small dimensions."""
    facts = TASKS[task]
    dit = DIT[facts.dit]
    keys = {model.kind: model.tiny if tiny else model.spec for model in facts.family.components}
    return ModelSpecs(
        DIT["tiny-" + dit.model_type] if tiny else dit,
        T5[keys["text_encoder"]],
        VAE[keys["vae"]],
        CLIP[keys["image_encoder"]],
    )


class Weights(Protocol):
    """Where tensors come from. `source` is None when there are no values (simulated)."""

    tiny: bool

    def source(self, component: str) -> TensorSource | None: ...

    def tokenizer(self, spec: T5Spec) -> Tokenizer: ...

    def shapes_for(self, component: str, shapes: dict[str, tuple[int, ...]]) -> None:
        """Tells generated weights which tensors exist, before `source` is asked."""


@dataclass(frozen=True)
class _Built:
    """A module on meta, its units in the order of use, and the checkpoint's tensors it does without."""

    module: nn.Module
    units: list[nn.Module]
    unused: tuple[str, ...] = ()
    embedders: Sequence[nn.Module] = ()
    extra: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    lanes: Sequence[int] = ()  # the slot each unit is streamed through, where they do not take turns


class Parts:
    """Builds and loads the components of one configuration."""

    def __init__(self, config: RunConfig, device: Device, weights: Weights) -> None:
        self.config = config
        self.device = device
        self.weights = weights
        self.specs = model_specs(config.request.task, tiny=weights.tiny)
        self.tokenizer = weights.tokenizer(self.specs.text_encoder)
        self._builders: dict[str, Callable[[], _Built]] = {
            "text_encoder": self._text_encoder,
            "image_encoder": self._image_encoder,
            "dit": self._dit,
            "vae": self._vae,
            "vae_encoder": lambda: self._vae(decoder=False),
            "vae_decoder": lambda: self._vae(encoder=False),
        }

    def load(self, name: str) -> Component:
        """Component with its weights placed as the strategy says. Raises CheckpointError for wrong weights.

        `vae_encoder` and `vae_decoder` are the halves of `vae`, for runs that need one at a time.
        """
        model = self.config.request.facts.family.component_of(name)
        with self.device.building(), torch.device("meta"):
            built = self._builders[model.kind if name == model.name else name]()
        name, is_dit = model.name, model.kind == "dit"
        expected = {key: tuple(p.shape) for key, p in built.module.named_parameters()} | dict(built.extra)
        self.weights.shapes_for(name, expected)
        source = self.weights.source(name)
        if source is not None:
            check_keys(expected, source, name, ignored=[k for k in source.keys() if k.startswith(built.unused)])  # noqa: SIM118
        strategy = self.config.strategy
        fp8 = Fp8(WEIGHT_STORAGE.of(strategy) == "fp8", PRODUCT_PRECISION.of(strategy) == "fp8") if is_dit else NOWHERE
        generated = self.config.weights in ("random", "tiny")
        component = Component(
            name, built.module, built.units, self.device, built.embedders, fp8=fp8, generated=generated
        )
        streamed = strategy.load_strategy == "block"
        shared = strategy.dit_fsdp if is_dit else model.kind == "text_encoder" and strategy.t5_fsdp
        if model.kind == "text_encoder" and strategy.t5_cpu:
            component.load_host(source)
        elif built.units and (streamed or shared):
            resident, home = strategy.resident_blocks if is_dit else 0, strategy.weights_in if streamed else "device"
            peers = self.device.weight_peers() if shared else None
            component.load_streamed(
                source, home=home, resident_groups=resident, lanes=built.lanes, peers=peers, everyone=is_dit
            )
        else:
            component.load_resident(source)
        return component

    def encode(self, component: Component, texts: Sequence[str], walk: Walk) -> list[torch.Tensor]:
        """Texts -> contexts [tokens, dim] on the device, all in one pass of the weights.

        The 2 GiB embedding table stays on the host: only the texts' rows are read.
        """
        module, spec = component.module, self.specs.text_encoder
        assert isinstance(module, T5Encoder)
        rows = [self._embedding_rows(self.tokenizer.encode(text), spec) for text in texts]
        if not self.config.strategy.t5_cpu:
            return module.encode([self.device.upload(r) for r in rows], walk=walk)
        with self.device.computing_on_host():
            contexts = module.encode(rows, walk=walk)
        return [self.device.upload(context) for context in contexts]

    def stand_in_contexts(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Uninitialised, in place of what `encode` gives."""
        lengths = [len(self.tokenizer.encode(text)) for text in texts]
        return [self.device.empty((length, self.specs.text_encoder.dim), T5_DTYPE) for length in lengths]

    def stand_in_features(self, pictures: int) -> torch.Tensor:
        """Uninitialised, in place of what CLIP gives for so many pictures."""
        return self.device.empty(
            (pictures, self.specs.image_encoder.tokens, self.specs.dit.clip_dim), self._clip_dtype()
        )

    def _clip_dtype(self) -> torch.dtype:
        return CLIP_DTYPE if self.device.computes_half else torch.float32

    def _embedding_rows(self, ids: list[int], spec: T5Spec) -> torch.Tensor:
        source = self.weights.source("text_encoder")
        if source is None:
            return self.device.host_empty((len(ids), spec.dim), T5_DTYPE)
        return source.rows("token_embedding.weight", ids).to(T5_DTYPE)

    def _text_encoder(self) -> _Built:
        spec = self.specs.text_encoder
        module = T5Encoder(spec, T5_DTYPE)
        del module.token_embedding
        return _Built(module, list(module.blocks), extra={"token_embedding.weight": (spec.vocab_size, spec.dim)})

    def _image_encoder(self) -> _Built:
        module = CLIPVision(self.specs.image_encoder, self._clip_dtype())
        return _Built(module, module.walk_order(), tuple(module.unused_keys()))

    def _dit(self) -> _Built:
        kind = RegroupedDiT if RESIDUAL_IN.of(self.config.strategy) == "pinned" else WanDiT
        module = kind(self.specs.dit, PRECISIONS[PRECISION.of(self.config.strategy)])
        lanes = module.lanes() if isinstance(module, RegroupedDiT) else ()
        return _Built(module, module.walk_order(), embedders=module.embedders(), lanes=lanes)

    def _vae(self, *, encoder: bool = True, decoder: bool = True) -> _Built:
        module = WanVAE(self.specs.vae, PRECISIONS[self.config.strategy.vae_precision].matmul)
        if not encoder:
            del module.encoder
            del module.conv1
            return _Built(module, [], ("encoder.", "conv1."))
        if not decoder:
            del module.decoder
            del module.conv2
            return _Built(module, [], ("decoder.", "conv2."))
        return _Built(module, [])
