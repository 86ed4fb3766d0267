"""Whole runs on several ranks: the video of one process, and of every rank the allocator events that are simulated for it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from tests.integration.test_strategies import _Frames, inputs_of
from tests.logged_device import LoggedDevice, simulated_events
from tests.rank_processes import on_ranks, once

from wanvram.config import Request, RunConfig, Strategy
from wanvram.engine.devices import SimulatedDevice
from wanvram.engine.pipeline import Pipeline
from wanvram.predict.simulate import simulated_device
from wanvram.recorder.recorder import Recorder
from wanvram.run.weights import choose_weights

pytestmark = pytest.mark.timeout(900)  # the first test of so many ranks runs all cases of them
TOLERANCE = 1e-5  # of the latent's largest value
STREAMED = {"load_strategy": "block", "offload": True}
RESIDENT = {"load_strategy": "full", "offload": True}
SHARDS = {"dit_fsdp": True, "t5_fsdp": True}
STAGES = ("prepare", "denoise", "denoise 2", "decode", "decode 2")


@dataclass(frozen=True)
class Case:
    """sizes: ulysses, ring, cfg."""

    task: str
    sizes: tuple[int, int, int]
    strategy: tuple[tuple[str, Any], ...]
    request: tuple[tuple[str, Any], ...] = ()

    @property
    def world(self) -> int:
        ulysses, ring, cfg = self.sizes
        return ulysses * ring * cfg

    def config(self, device: str) -> RunConfig:
        given: dict[str, Any] = {"prompt": "a cat", **dict(self.request)}
        request = Request.for_task(self.task, frame_num=9, sample_steps=2, base_seed=3, **given)
        ulysses, ring, cfg = self.sizes
        chosen = {name: value for name, value in self.strategy if self.world > 1 or name not in SHARDS}
        how = Strategy(precision="fp32", ulysses_size=ulysses, ring_size=ring, cfg_size=cfg, **chosen)
        return RunConfig("x", "", device, request, how, weights="tiny")

    def __str__(self) -> str:
        ulysses, ring, cfg = self.sizes
        told = " ".join(str(value) for _, value in (*self.strategy, *self.request))
        return f"{self.task} ulysses {ulysses} ring {ring} cfg {cfg} {told}"


def case(task: str, *sizes: int, request: dict[str, Any] | None = None, **strategy: Any) -> Case:
    ulysses, ring, cfg = sizes
    return Case(task, (ulysses, ring, cfg), tuple(strategy.items()), tuple((request or {}).items()))


PLAIN = (
    case("t2v-1.3B", 2, 1, 1, **STREAMED, vae_tile=8),
    case("t2v-1.3B", 2, 1, 1, **RESIDENT, rows_per_chunk=7),
    case("t2v-1.3B", 1, 2, 1, **STREAMED, rows_per_chunk=7),
    case("t2v-1.3B", 1, 2, 1, **RESIDENT, vae_tile=8),
    case("t2v-1.3B", 1, 1, 2, **STREAMED, vae_tile=8),
    case("t2v-1.3B", 1, 1, 2, **RESIDENT),
    case("t2v-1.3B", 2, 1, 1, load_strategy="block", offload=False, weights_in="pageable", resident_blocks=1),
    case("t2v-1.3B", 2, 1, 1, request={"prompts": ("a cat", "two dogs"), "prompt": ""}, **STREAMED, batch_size=2),
    case(
        "t2v-1.3B",
        1,
        1,
        2,
        request={"prompts": ("a cat", "two dogs"), "prompt": ""},
        **STREAMED,
        batch_size=2,
        micro_batch_size=2,
    ),
    case("t2v-1.3B", 2, 1, 1, request={"sample_guide_scale": 1.0}, **STREAMED),
    case("t2v-1.3B", 2, 1, 1, **STREAMED, cfg="joint"),
    case("i2v-14B", 2, 1, 1, **STREAMED),
    case("i2v-14B", 1, 1, 2, **STREAMED),
    case("flf2v-14B", 1, 2, 1, **STREAMED),
    case("vace-1.3B", 2, 1, 1, **STREAMED, rows_per_chunk=7, vae_tile=8),
    case("vace-1.3B", 1, 1, 2, **STREAMED),
    case("t2v-1.3B", 4, 1, 1, **STREAMED, vae_tile=8),
    case("t2v-1.3B", 2, 2, 1, **STREAMED, rows_per_chunk=5),
    case("t2v-1.3B", 1, 4, 1, **RESIDENT, rows_per_chunk=5),
    case("t2v-1.3B", 2, 1, 2, **STREAMED, rows_per_chunk=5),
    case("t2v-1.3B", 1, 2, 2, **RESIDENT),
    case("i2v-14B", 2, 1, 2, **STREAMED),
    case("flf2v-14B", 4, 1, 1, **STREAMED),
    case("vace-1.3B", 2, 2, 1, **STREAMED, rows_per_chunk=5),
    case("t2v-1.3B", 1, 3, 1, **STREAMED),
)


def sharing(plain: Case) -> Case:
    return replace(plain, strategy=(*plain.strategy, *SHARDS.items()))


SHARING = tuple(map(sharing, (*PLAIN[:3], *PLAIN[4:7], PLAIN[12], PLAIN[15], PLAIN[19], PLAIN[-1])))
CASES = (*PLAIN, *SHARING)


@dataclass
class Made:
    """What a rank made: latents as the decoder got them, frames as they were to be written, events of each stage."""

    latents: list[torch.Tensor]
    frames: list[torch.Tensor]
    events: dict[str, list[int]] = field(default_factory=dict)


class _Latents(Pipeline):
    """Keeps what the decoder is given, or would be on a rank that does not decode."""

    latents: list[torch.Tensor]

    def decode_all(self, parts: Any, latents: list[torch.Tensor], open_sink: Any) -> None:
        self.latents = [latent.clone() for latent in latents] if self.device.kind == "cpu" else []
        super().decode_all(parts, latents, open_sink)


class _Stages:
    """Hears of stages; `counts`: how many events there were when each began and ended."""

    def __init__(self, device: LoggedDevice | SimulatedDevice) -> None:
        self.device, self.events, self._open = device, dict[str, list[int]](), list[tuple[str, int]]()

    def begin(self, name: str, kind: str, component: str | None) -> None:
        self._open.append((name, len(self._log())))

    def end(self) -> None:
        name, start = self._open.pop()
        if name in STAGES:
            simulated = isinstance(self.device, SimulatedDevice)
            self.events[name] = simulated_events(self.device, start) if simulated else self._log()[start:]

    def _log(self) -> list[Any]:
        events = self.device.memory.events if isinstance(self.device, SimulatedDevice) else self.device.births.events
        assert events is not None
        return events


def run(case: Case, device: LoggedDevice | SimulatedDevice) -> Made:
    simulated = isinstance(device, SimulatedDevice)
    config = case.config("simulated" if simulated else "cpu")
    stages = _Stages(device)
    weights = choose_weights("tiny", simulated=simulated, task=case.task, seed=3)
    inputs = inputs_of(case.task, 9, 48, 80)
    recorder = Recorder(device.meter, None, None, stages)
    pipeline, sink = _Latents(config, device, recorder, weights, inputs), _Frames()
    with device.session():
        pipeline.run(lambda index: nullcontext(None if simulated else sink))
    return Made(pipeline.latents, sink.frames, stages.events)


def runs(rank: int, cases: tuple[Case, ...]) -> dict[Case, Made]:
    results = {}
    for case in cases:
        device = LoggedDevice()
        device.place = case.config("cpu").place(rank)
        results[case] = run(case, device)
    return results


@cache
def together(world: int) -> list[dict[Case, Made]]:
    cases = tuple(case for case in CASES if case.world == world)
    made: list[dict[Case, Made]] = once(f"shared-runs-{world}", lambda: on_ranks(world, runs, cases))
    return made


@cache
def alone(case: Case) -> Made:
    return run(replace(case, sizes=(1, 1, 1)), LoggedDevice())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_ranks_together_make_the_video_of_one_process(case: Case) -> None:
    ranks, one = [results[case] for results in together(case.world)], alone(case)
    assert len(one.latents) == len(ranks[0].latents) > 0
    for number, latent in enumerate(one.latents):
        assert all(torch.equal(rank.latents[number], ranks[0].latents[number]) for rank in ranks)
        error = (ranks[0].latents[number] - latent).abs().max() / latent.abs().max()
        assert error == 0 if case.sizes[:2] == (1, 1) else error <= TOLERANCE
    frames, expected = torch.cat(ranks[0].frames), torch.cat(one.frames)
    assert (frames.int() - expected.int()).abs().max() <= (0 if case.sizes[:2] == (1, 1) else 1)
    assert not any(rank.frames for rank in ranks[1:])


@pytest.mark.parametrize("case", SHARING, ids=str)
def test_ranks_that_share_weights_make_the_same_bits_as_those_that_do_not(case: Case) -> None:
    plain = next(other for other in PLAIN if sharing(other) == case)
    for mine, theirs in zip(together(case.world), together(case.world), strict=True):
        assert all(map(torch.equal, mine[case].latents, theirs[plain].latents))
        assert all(map(torch.equal, mine[case].frames, theirs[plain].frames))


def ranks_of() -> list[tuple[Case, int]]:
    return [(case, rank) for case in CASES for rank in range(case.world)]


@pytest.mark.parametrize(("case", "rank"), ranks_of(), ids=str)
def test_the_events_of_a_rank_are_those_that_are_simulated_for_it(case: Case, rank: int) -> None:
    device = simulated_device(case.config("simulated"), rank=rank, keep_events=True, unlimited=True)
    device.computes_half = False  # as the CPU: pictures are seen in float32
    simulated, real = run(case, device).events, together(case.world)[rank][case].events
    assert list(simulated) == list(real)
    for stage, events in real.items():
        assert simulated[stage] == events, stage
    assert len(real["denoise"]) > 100
