"""The VAE against official outputs: every encode and decode call of the golden case, keys, shapes, parameter count."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from parity.golden import assert_close, load_case, load_json
from wanvram.models.vae import LATENT_MEAN, LATENT_STD, WanVAE
from wanvram.models.vae_blocks import Stream
from wanvram.specs import VAE, VAESpec

CASE = load_case("vae")


def spec_of(config: dict[str, Any]) -> VAESpec:
    return VAESpec(
        dim=config["dim"],
        z_dim=config["z_dim"],
        dim_mult=tuple(config["dim_mult"]),
        num_res_blocks=config["num_res_blocks"],
        temporal_downsample=tuple(config["temperal_downsample"]),
    )


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    model = WanVAE(spec_of(CASE.config))
    model.load_state_dict(CASE.weights(), strict=True)
    return model


def calls(op: str, mid: str | None = None) -> list[str]:
    """Names of the calls of this kind; with `mid`, of those that have this intermediate value recorded."""
    names = [call["name"] for call in CASE.calls() if call["op"] == op]
    return [name for name in names if mid is None or f"mid.{name}.{mid}" in CASE]


@pytest.mark.parametrize("name", calls("encode"))
def test_encoding_equals_official(vae: WanVAE, name: str) -> None:
    latent = vae.encode([CASE[f"input.{name}.x"][0]])
    assert_close(latent, CASE[f"output.{name}"][0], name)


@pytest.mark.parametrize("name", calls("decode"))
def test_decoding_equals_official(vae: WanVAE, name: str) -> None:
    video = torch.cat(list(vae.decode(CASE[f"input.{name}.z"][0])), dim=1)
    assert_close(video, CASE[f"output.{name}"][0], name)


@pytest.mark.parametrize("name", calls("encode", "encoder_out"))
def test_the_encoder_before_and_after_its_last_convolution_equals_official(vae: WanVAE, name: str) -> None:
    video = CASE[f"input.{name}.x"]
    stream = Stream(remember=video.shape[2] > 1)
    frames = [video[:, :, index : index + 1] for index in range(video.shape[2])]
    layout = torch.channels_last_3d
    outputs = [vae.encoder(frame.contiguous(memory_format=layout), stream) for frame in frames]
    joined = torch.cat([out for out in outputs if out is not None], dim=2)
    assert_close(joined, CASE[f"mid.{name}.encoder_out"], name)
    if f"mid.{name}.quant" in CASE:
        assert_close(vae.conv1.pointwise(joined), CASE[f"mid.{name}.quant"], name)


@pytest.mark.parametrize("name", calls("decode", "postquant"))
def test_the_decoder_input_equals_official(vae: WanVAE, name: str) -> None:
    z = CASE[f"input.{name}.z"][0]
    joined = torch.cat([vae._decoder_input(z[:, index]) for index in range(z.shape[1])], dim=2)
    assert_close(joined, CASE[f"mid.{name}.postquant"], name)


def test_the_latent_scaling_constants_are_official() -> None:
    assert_close(torch.tensor(LATENT_MEAN), CASE["input.mean"], "mean")
    assert_close(torch.tensor(LATENT_STD), CASE["input.std"], "std")


def test_the_full_size_model_has_the_official_keys_shapes_and_parameter_count() -> None:
    facts = load_json("full_size_keys")["vae"]
    with torch.device("meta"):
        model = WanVAE(VAE["wan2.1"])
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == facts["keys"]
    assert sum(p.numel() for p in model.parameters()) == facts["num_params"]
    assert spec_of(facts["constructor"]) == VAE["wan2.1"]
