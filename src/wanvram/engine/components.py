"""Builds each component on `meta`, decides from the Strategy how it is loaded, and runs the text encoder where it lives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from wanvram.config import RunConfig
from wanvram.engine.devices import Device
from wanvram.engine.residency import Component
from wanvram.models.dit import WanDiT
from wanvram.models.precision import PRECISIONS
from wanvram.models.t5 import T5Encoder
from wanvram.models.vae import WanVAE
from wanvram.specs import DIT, T5, VAE, DiTSpec, T5Spec, VAESpec
from wanvram.tasks import TASKS
from wanvram.weights.sources import TensorSource, check_keys
from wanvram.weights.tokenizer import Tokenizer

__all__ = ["ModelSpecs", "Parts", "Weights", "model_specs"]

T5_DTYPE = torch.bfloat16  # as the official checkpoint is stored and run
VAE_DTYPE = torch.float32


@dataclass(frozen=True)
class ModelSpecs:
    dit: DiTSpec
    text_encoder: T5Spec
    vae: VAESpec


def model_specs(task: str, *, tiny: bool) -> ModelSpecs:
    """Specs of a task's components; `tiny` has the same structure with small dimensions."""
    dit = DIT[TASKS[task].dit]
    if tiny:
        return ModelSpecs(DIT["tiny-" + dit.model_type], T5["tiny"], VAE["tiny"])
    return ModelSpecs(dit, T5["umt5-xxl"], VAE["wan2.1"])


class Weights(Protocol):
    """Where tensors come from. `source` is None when there are no values (simulated)."""

    tiny: bool

    def source(self, component: str) -> TensorSource | None: ...

    def tokenizer(self, spec: T5Spec) -> Tokenizer: ...

    def shapes_for(self, component: str, shapes: dict[str, tuple[int, ...]]) -> None:
        """Tells generated weights which tensors exist, before `source` is asked."""
        ...


class Parts:
    """Builds and loads the components of one configuration."""

    def __init__(self, config: RunConfig, device: Device, weights: Weights) -> None:
        self.config = config
        self.device = device
        self.weights = weights
        self.specs = model_specs(config.request.task, tiny=weights.tiny)
        self.tokenizer = weights.tokenizer(self.specs.text_encoder)
        self._builders: dict[str, Callable[[], tuple[nn.Module, list[nn.Module]]]] = {
            "text_encoder": self._text_encoder,
            "dit": self._dit,
            "vae": self._vae,
        }

    def load(self, name: str) -> Component:
        """Component with its weights placed as the strategy says. Raises CheckpointError for wrong weights."""
        with self.device.building(), torch.device("meta"):
            module, blocks = self._builders[name]()
        expected = {key: tuple(p.shape) for key, p in module.named_parameters()}
        if name == "text_encoder":
            expected["token_embedding.weight"] = (self.specs.text_encoder.vocab_size, self.specs.text_encoder.dim)
        self.weights.shapes_for(name, expected)
        source = self.weights.source(name)
        if source is not None:
            unused = [key for key in list(source.keys()) if name == "vae" and key.startswith(("encoder.", "conv1."))]
            check_keys(expected, source, name, ignored=unused)
        component = Component(name, module, blocks, self.device)
        strategy = self.config.strategy
        if name == "text_encoder" and strategy.t5_cpu:
            component.load_host(source)
        elif blocks and strategy.load_strategy == "block":
            component.load_streamed(source, pinned=self.device.kind != "cpu")
        else:
            component.load_resident(source)
        return component

    def encode(self, component: Component, text: str) -> torch.Tensor:
        """Text -> context [tokens, dim] on the device. The 2 GiB embedding table stays on the host: only the text's rows are read."""
        ids = self.tokenizer.encode(text)
        spec = self.specs.text_encoder
        rows = self._embedding_rows(ids, spec)
        if self.config.strategy.t5_cpu:
            with self.device.computing_on_host():
                context = component.module(rows, walk=component.walk)
            return self.device.upload(context)
        return component.module(self.device.upload(rows), walk=component.walk)

    def _embedding_rows(self, ids: list[int], spec: T5Spec) -> torch.Tensor:
        source = self.weights.source("text_encoder")
        if source is None:
            return self.device.host_empty((len(ids), spec.dim), T5_DTYPE)
        return source.rows("token_embedding.weight", ids).to(T5_DTYPE)

    def _text_encoder(self) -> tuple[nn.Module, list[nn.Module]]:
        module = T5Encoder(self.specs.text_encoder, T5_DTYPE)
        del module.token_embedding
        return module, list(module.blocks)

    def _dit(self) -> tuple[nn.Module, list[nn.Module]]:
        module = WanDiT(self.specs.dit, PRECISIONS[self.config.strategy.precision])
        return module, module.walk_order()

    def _vae(self) -> tuple[nn.Module, list[nn.Module]]:
        module = WanVAE(self.specs.vae, VAE_DTYPE)
        del module.encoder
        del module.conv1
        return module, []
