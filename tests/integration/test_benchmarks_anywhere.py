"""What the benchmarks ask for and call of the engine, by their tiny forms on the CPU, and without one on a simulated H200.

They are run on a GPU, by hand and months apart; a function of the engine that changed would be noticed only there.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import attention_backends
import batches
import beside_diffusers
import beside_diffusers_offload as offload
import fit_card
import fp8_products
import killed_and_resumed
import numerics
import other_process
import overhead
import predict_vs_measure
import pytest
import ranks_killed
import ranks_numerics
import same_video
import several_gpus
import tiled_vae
import torch

from wanvram import simulated_gpu
from wanvram.cli.flags import config_from_flags
from wanvram.cli.main import build_parser
from wanvram.config import Measurement, RunConfig
from wanvram.engine.devices import CpuDevice
from wanvram.engine.pipeline import Pipeline
from wanvram.specs import DIT

OWN = [part for part in offload.PARTS if part.startswith("our_")]
PINS = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)


@pytest.mark.parametrize("part", OWN)
def test_an_own_part_beside_diffusers_runs_on_the_cpu(
    part: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    offload.run_here(replace(offload.TINY["tiny"], shape=(2, 4, 12), tile=8, repeats=1), part)
    said = capsys.readouterr().out
    assert json.loads(said.partition("DONE ")[2])["seconds"] > 0


@pytest.mark.parametrize("part", ["our_dit", "our_vae"])
def test_an_own_part_beside_diffusers_runs_on_a_simulated_gpu(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: PINS)  # of pinned memory the simulated card knows PyTorch's own
    monkeypatch.setenv("WANVRAM_KERNELS", "reference")  # Triton, where it is installed, would look for a driver
    monkeypatch.setitem(beside_diffusers.SHAPES, "1.3B", (2, 60, 104))
    monkeypatch.setitem(beside_diffusers.REPEATS, "1.3B", 1)
    with simulated_gpu("h200"), torch.no_grad():
        found = beside_diffusers.PARTS[part]("1.3B")
    assert found["base_mib"] > 300
    assert found["activation_mib"] > 1


def test_tiles_of_the_vae_are_timed_on_a_simulated_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: PINS)
    monkeypatch.setenv("WANVRAM_KERNELS", "reference")
    monkeypatch.setattr(tiled_vae, "SIZES", {"96*64": (8, 12)})
    given = {"ways": ["decode"], "sizes": ["96*64"], "tiles": [8], "frames": 5, "repeats": 3}
    args = argparse.Namespace(**given, precision="fp32", profile=False, idle_bytes=None)
    with simulated_gpu("h200"), torch.no_grad():
        rows = list(tiled_vae.rows(args))
    assert [(row["way"], row["tile"], row["peak_bytes"] > 2**20) for row in rows] == [
        ("decode", None, True),
        ("decode", 8, True),
    ]
    assert all(row["seconds"] == sorted(row["all_seconds"])[1] for row in rows)


def test_a_run_is_recorded_in_three_ways(tmp_path: Path) -> None:
    config = overhead.config_of(argparse.Namespace(tiny=True, steps=2, device="cpu"))
    config = replace(config, request=replace(config.request, size="96*64"), measurement=Measurement())
    found = {way: overhead.one_run(way, config, CpuDevice(), tmp_path) for way in overhead.WAYS}
    assert [found[way]["spans"] > 0 for way in overhead.WAYS] == [True, True, False]
    assert len({run["peak_allocated_bytes"] for run in found.values()}) == 1


def test_a_way_to_hold_the_weights_gives_the_resident_video() -> None:
    args = argparse.Namespace(weights="tiny", task="t2v-1.3B", frames=1, steps=1, device="cpu", precision="fp32")
    args.without_text = True
    plain, streamed = (same_video.run(same_video.WAYS[way], args) for way in ("resident", "pinned, tiled VAE"))
    row = {"way": "pinned, tiled VAE"} | same_video.compared(streamed, plain)
    assert same_video.breaches_of(row, "fp32") == []


def test_precisions_are_compared_on_a_tiny_model() -> None:
    spec = DIT["tiny-t2v"]
    weights, inputs = numerics.weights_of(spec), numerics.inputs_of((1, 4, 6), spec, "cpu")
    exact, sliced = (numerics.ours(spec, weights, "fp32", inputs, "cpu", sliced=way) for way in (False, True))
    assert numerics.error(sliced, exact)["max"] < 1e-5


def test_a_configuration_that_a_benchmark_makes_is_one() -> None:
    fp8 = argparse.Namespace(attention="fa4", steps=3)
    made = [case["config"] for case in fit_card.CASES] + predict_vs_measure.BUILT_IN
    made += [case.config(backend) for case in attention_backends.CASES for backend in ("cudnn", "fa4")]
    made += [fp8_products.config_of(case, "fp8", fp8) for case in attention_backends.CASES]
    made += [other_process.configuration(tiny) for tiny in (False, True)]
    planned = json.loads((Path(fit_card.__file__).with_name("advice_cases.json")).read_text(encoding="utf-8"))
    made += [row[when] for row in planned for when in ("before", "after")]
    assert len([RunConfig.from_dict(config) for config in made]) > 30


def test_a_command_that_a_benchmark_types_is_one(tmp_path: Path) -> None:
    killed = argparse.Namespace(tiny=False, checkpoint=None)
    typed = [batches.words_of(case, tmp_path, tiny=tiny) for case in batches.CASES for tiny in (False, True)]
    typed += [["--task", "t2v-14B", *several_gpus.STREAMED, *flags] for flags in several_gpus.ways(4).values()]
    typed += [ranks_killed.WANVRAM[4:] + size for size in (ranks_killed.FULL, ranks_killed.TINY)]
    typed += [killed_and_resumed.command(killed, tmp_path, 1)[4:]]
    for words in typed:
        asked = build_parser().parse_args(["generate", *words])
        weights = "tiny" if "tiny" in words else "random"
        config_from_flags(asked, device="simulated", weights=weights, gpu="h200", memory_limit_bytes=None)


def test_the_latents_of_a_typed_command_are_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipeline, "_decode", Pipeline._decode)  # and so put back: the benchmark changes it
    case = next(case for case in batches.CASES if case.name == "seeds")
    words = ["generate", *batches.words_of(case, tmp_path, tiny=True), "-o", str(tmp_path / "run")]
    assert batches.typed(tmp_path / "hashes.json", words) == 0
    assert len(set(json.loads((tmp_path / "hashes.json").read_text(encoding="utf-8")))) == 2


def test_one_rank_alone_is_as_far_from_exact_as_one_gpu() -> None:
    args = argparse.Namespace(model="tiny-t2v", precision="bf16", latent=(1, 4, 6))
    found = ranks_numerics.measured(args, CpuDevice())
    assert found["ulysses 1 ring 1"]["from exact"] == found["one from exact"] > 0
