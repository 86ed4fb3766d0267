"""Videos denoised together are those that are made one after the other, bit for bit; the memory they take is the predicted one."""

from __future__ import annotations

import json
import weakref
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.integration.test_strategies import FRAMES, inputs_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wanvram.cli.main import main
from wanvram.config import Measurement, Request, RunConfig, Strategy
from wanvram.engine.pipeline import Pipeline
from wanvram.engine.residency import Component
from wanvram.predict.simulate import simulate, simulated_device
from wanvram.record import RunRecord
from wanvram.recorder.recorder import Recorder
from wanvram.report.markdown import markdown_report
from wanvram.report.runs import find_runs
from wanvram.report.terminal import summarize
from wanvram.run.execute import make_device
from wanvram.run.weights import choose_weights
from wanvram.spans import Memory

# t2i is t2v with one frame; the others have conditions that all videos of a run share.
TASKS = ("t2v-1.3B", "t2i-14B", "i2v-14B", "flf2v-14B", "vace-1.3B")
PROMPTS = ("a cat", "two dogs on a boat", "", "rain")
Named = tuple[tuple[str, Any], ...]


class _Latents(Pipeline):
    """Keeps every latent that the VAE is given, in order."""

    latents: tuple[torch.Tensor, ...] = ()

    def _decode(self, component: Component, latent: torch.Tensor, sink: Any, stage: str) -> None:
        self.latents += (latent.clone(),)


def built(kind: type[Pipeline], task: str, strategy: Named, request: Named, device: str = "cpu") -> Pipeline:
    frames = 1 if task.startswith("t2i") else FRAMES
    asked = Request.for_task(task, frame_num=frames, **({"sample_steps": 3, "base_seed": 3} | dict(request)))
    how = Strategy(**({"precision": "fp32"} | dict(strategy)))
    config = RunConfig(name="x", description="", device=device, request=asked, strategy=how, weights="tiny")
    simulated = device == "simulated"
    place = simulated_device(config) if simulated else make_device(config)
    weights = choose_weights("tiny", simulated=simulated, task=task, seed=3)
    return kind(config, place, Recorder(place.meter, None, None), weights, inputs_of(task, frames))


def latents_of(task: str, strategy: Named, request: Named) -> tuple[torch.Tensor, ...]:
    pipeline = built(_Latents, task, strategy, request)
    assert isinstance(pipeline, _Latents)
    with pipeline.device.session():
        pipeline.run(lambda index: nullcontext())
    return pipeline.latents


@cache
def alone(task: str, prompt: str, seed: int, strategy: Named, request: Named) -> torch.Tensor:
    """The latent of a run of its own."""
    (latent,) = latents_of(task, strategy, (("prompt", prompt), ("base_seed", seed), *request))
    return latent


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, dict[str, Any], Named]:
    """How many videos, batch_size and micro_batch_size, and what else changes the order of the computation."""
    videos = draw(st.integers(1, len(PROMPTS)))
    together = draw(st.integers(1, videos))
    sizes = {"batch_size": together, "micro_batch_size": draw(st.sampled_from((None, *range(1, together + 1))))}
    chosen: dict[str, Any] = {
        "load_strategy": draw(st.sampled_from(("full", "block"))),
        "cfg": draw(st.sampled_from(("sequential", "joint"))),
        "offload": draw(st.booleans()),
        "attention_slicing": draw(st.booleans()),
    }
    if chosen["load_strategy"] == "block":
        chosen |= {"weights_in": draw(st.sampled_from(("pinned", "disk"))), "resident_blocks": draw(st.integers(0, 3))}
    return videos, sizes, tuple(chosen.items())


REQUESTS = st.fixed_dictionaries(
    {"sample_guide_scale": st.sampled_from((1.0, 5.0)), "sample_solver": st.sampled_from(("unipc", "dpm++"))}
).map(lambda given: tuple(given.items()))


@settings(max_examples=8)
@given(task=st.sampled_from(TASKS), batch=batches(), request=REQUESTS)
def test_prompts_denoised_together_give_the_latents_of_runs_of_their_own(
    task: str, batch: tuple[int, dict[str, Any], Named], request: Named
) -> None:
    videos, sizes, strategy = batch
    prompts = PROMPTS[:videos] if videos > 1 else ()
    sizes = sizes if prompts else {}  # of one prompt, videos differ by their seed
    together = latents_of(task, (*strategy, *sizes.items()), (("prompts", prompts), ("base_seed", 5), *request))
    assert len(together) == videos
    for prompt, latent in zip(prompts or ("",), together, strict=True):
        assert torch.equal(latent, alone(task, prompt, 5, strategy, request))


@settings(max_examples=8)
@given(task=st.sampled_from(TASKS), batch=batches(), request=REQUESTS)
def test_seeds_of_one_prompt_give_the_latents_of_runs_with_the_seeds_that_follow(
    task: str, batch: tuple[int, dict[str, Any], Named], request: Named
) -> None:
    _, sizes, strategy = batch
    together = latents_of(task, (*strategy, *sizes.items()), (("prompt", PROMPTS[0]), ("base_seed", 3), *request))
    assert len(together) == sizes["batch_size"]
    for number, latent in enumerate(together):
        assert torch.equal(latent, alone(task, PROMPTS[0], 3 + number, strategy, request))


def test_videos_of_one_batch_differ() -> None:
    first, second = latents_of("t2v-1.3B", (("batch_size", 2),), (("prompt", "a cat"),))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("together", "at_once", "passes"), [(1, 1, 8), (4, None, 8), (4, 2, 4), (4, 3, 4), (4, 4, 2)])
def test_weights_are_walked_once_for_as_many_videos_as_pass_together(
    together: int, at_once: int | None, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two forwards (guidance) of four videos in one step."""
    walks: list[str] = []
    walk = Component.walk

    def counted(self: Component, units: Any) -> Any:
        walks.append(self.name)
        return walk(self, units)

    monkeypatch.setattr(Component, "walk", counted)
    sizes = (("load_strategy", "block"), ("batch_size", together), ("micro_batch_size", at_once))
    latents_of("t2v-1.3B", sizes, (("prompts", PROMPTS), ("sample_steps", 1)))
    assert walks.count("dit") == passes


# --- memory ------------------------------------------------------------------------------------------------------------------


class _Storages(TorchDispatchMode):
    """Births (bytes) and deaths (-bytes) of storages, in order, while `watching`."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[int] = []
        self.watching = False
        self._known: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self._known:
                storage = leaf.untyped_storage()
                self._known.add(storage._cdata)
                self._log(storage.nbytes())
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes()).atexit = False
        return result

    def _gone(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self._log(-nbytes)

    def _log(self, nbytes: int) -> None:
        if self.watching and nbytes:
            self.events.append(nbytes)


class _Watched(Pipeline):
    """Looks at storages during denoising alone: what is loaded and decoded is not a batch's."""

    storages: _Storages

    def denoise_all(self, *given: Any) -> list[torch.Tensor]:
        self.storages.watching = True
        try:
            return super().denoise_all(*given)
        finally:
            self.storages.watching = False


def storage_events(device: str, task: str, strategy: Named, request: Named) -> list[int]:
    pipeline = built(_Watched, task, strategy, request, device)
    assert isinstance(pipeline, _Watched)
    pipeline.storages = _Storages()
    with pipeline.device.session(), pipeline.storages:
        pipeline.run(lambda index: nullcontext())
    return pipeline.storages.events


PLACES: list[dict[str, Any]] = [
    {"load_strategy": "full"},
    {"load_strategy": "block", "cfg": "joint", "resident_blocks": 1},
]


@pytest.mark.parametrize("strategy", PLACES, ids=["resident", "streamed-joint"])
@pytest.mark.parametrize(("task", "scale"), [("t2v-1.3B", 5.0), ("t2i-14B", 1.0), ("i2v-14B", 1.0), ("vace-1.3B", 5.0)])
def test_the_simulation_of_a_batch_takes_and_gives_back_what_the_batch_does(
    task: str, scale: float, strategy: dict[str, Any]
) -> None:
    """In the same order: the allocator model sees what a real allocator would."""
    chosen = (*strategy.items(), ("batch_size", 3), ("micro_batch_size", 2))
    asked = (("prompt", PROMPTS[0]), ("sample_guide_scale", scale), ("sample_steps", 2))
    real, predicted = (storage_events(device, task, chosen, asked) for device in ("cpu", "simulated"))
    assert len(real) > 100
    assert predicted == real


@pytest.mark.parametrize("load", ["full", "block"])
@pytest.mark.parametrize("task", ["t2v-1.3B", "i2v-14B"])
def test_the_simulation_of_a_stream_in_ram_takes_and_gives_back_what_the_run_does(task: str, load: str) -> None:
    chosen = (("load_strategy", load), ("residual_in", "pinned"), ("batch_size", 3), ("rows_per_chunk", 17))
    asked = (("prompt", PROMPTS[0]), ("sample_steps", 2))
    real, predicted = (storage_events(device, task, chosen, asked) for device in ("cpu", "simulated"))
    assert len(real) > 100
    assert predicted == real


# --- predicted ---------------------------------------------------------------------------------------------------------------


def predicted(
    task: str = "t2v-1.3B", *, size: str = "832*480", request: dict[str, Any] | None = None, **how: Any
) -> RunRecord:
    frames = 1 if task.startswith("t2i") else 5
    asked = Request.for_task(task, size=size, frame_num=frames, sample_steps=3, base_seed=0, **(request or {}))
    config = RunConfig(
        "x", "", "simulated", asked, Strategy(**({"offload": True} | how)), Measurement(profile_memory=False)
    )
    record, _ = simulate(config, video=True)
    assert record.failure is None, record.failure
    return record


def report_of(directory: Path, record: RunRecord) -> str:
    directory.mkdir()
    record.write(directory / "record.json")
    return markdown_report(find_runs([directory]))


def copied(record: RunRecord) -> int:
    return next(c.streamed_bytes for c in record.components if c.name == "dit")


def denoised(record: RunRecord) -> Memory:
    return next(s.peak for s in record.stages if s.part == "denoise")


def test_pictures_that_share_passes_take_less_time_each_and_a_stream_of_memory_more() -> None:
    sizes = {"task": "t2i-14B", "size": "1280*720", "load_strategy": "block"}
    alone, apart, shared = (
        predicted(**sizes), predicted(**sizes, batch_size=3), predicted(**sizes, batch_size=3, micro_batch_size=3)
    )  # fmt: skip
    stream = 80 * 45 * 5120 * 4  # tokens of a picture, float32
    first, third = denoised(apart).allocated_bytes, denoised(shared).allocated_bytes
    assert denoised(alone).allocated_bytes < first < third
    assert abs(third - first - 2 * stream) < stream / 8
    one, three = alone.step_seconds(), shared.step_seconds()
    assert one is not None
    assert three is not None
    assert three < 1.5 * one < apart.step_seconds()  # type: ignore[operator]
    assert copied(apart) == pytest.approx(3 * copied(alone), rel=0.01)
    assert copied(shared) == pytest.approx(copied(alone), rel=0.01)


def test_a_record_says_what_each_video_took_and_what_one_takes_of_the_whole(tmp_path: Path) -> None:
    record = predicted(batch_size=2, request={"prompts": ("a", "b", "c")})
    own, each = record.video_seconds(), record.seconds_each()
    assert [s.videos for s in record.stages if s.part == "denoise"] == [2, 1]
    assert record.together == 2
    assert len(own) == 3
    assert None not in own
    assert sum(time for time in own if time is not None) < record.times.in_all_seconds  # type: ignore[operator]
    assert each == pytest.approx(record.times.in_all_seconds / 3)  # type: ignore[operator]
    assert RunRecord.from_json(record.to_json()).to_json() == record.to_json()
    assert "3 videos, 2 together: " in summarize(record)
    text = report_of(tmp_path / "batch", record)
    assert "### Videos" in text
    assert "| 3 | " in text
    assert "### Videos" not in report_of(tmp_path / "one", predicted())


# --- guidance 1 --------------------------------------------------------------------------------------------------------------


def test_with_scale_1_a_step_takes_half_the_time_and_encodes_no_negative_prompt() -> None:
    guided, plain = predicted(), predicted(request={"sample_guide_scale": 1.0})
    assert plain.step_seconds() == pytest.approx(0.5 * guided.step_seconds(), rel=0.01)  # type: ignore[operator]
    assert denoised(plain).allocated_bytes < denoised(guided).allocated_bytes


def test_with_scale_1_the_negative_prompt_has_no_say_and_the_video_is_that_of_two_passes_up_to_rounding() -> None:
    plain = alone("t2v-1.3B", "a cat", 3, (), (("sample_guide_scale", 1.0),))
    other = alone("t2v-1.3B", "a cat", 3, (), (("sample_guide_scale", 1.0), ("negative_prompt", "a dog")))
    assert torch.equal(plain, other)
    beside = alone("t2v-1.3B", "a cat", 3, (), (("sample_guide_scale", 1.0 + 1e-7),))
    assert (plain - beside).abs().max() <= 1e-5 * plain.abs().max()


def test_joint_guidance_without_guidance_is_noted() -> None:
    request = Request.for_task("t2v-1.3B", sample_guide_scale=1.0)
    config = RunConfig("x", "", "simulated", request, Strategy(cfg="joint"))
    assert any("takes one pass" in note for note in config.notes())


# --- the command line --------------------------------------------------------------------------------------------------------


def generate(directory: Path, *flags: str) -> int:
    small = ("--weights", "tiny", "--frame_num", "5", "--size", "64*64", "--sample_steps", "2", "-o", str(directory))
    return main(["generate", *small, *flags])


def test_one_prompt_and_two_videos_are_two_files_with_seeds_one_apart(tmp_path: Path) -> None:
    both, first = tmp_path / "both", tmp_path / "first"
    assert generate(both, "--prompt", "a cat", "--base_seed", "7", "--batch_size", "2") == 0
    assert generate(first, "--prompt", "a cat", "--base_seed", "7") == 0
    made = [both / f"video-00{number}.mp4" for number in (1, 2)]
    assert made[0].read_bytes() == (first / "video.mp4").read_bytes()
    assert made[0].read_bytes() != made[1].read_bytes()
    assert [json.loads(path.with_suffix(".json").read_text())["seed"] for path in made] == [7, 8]
    record = RunRecord.read(both / "record.json")
    assert len(record.video_seconds()) == record.together == 2


def test_prompts_of_a_file_in_batches_are_the_files_of_the_run_without(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\nrain\n")
    flags = ("--prompt_file", str(prompts), "--base_seed", "1")
    assert generate(tmp_path / "plain", *flags) == 0
    assert generate(tmp_path / "batch", *flags, "--batch_size", "2", "--micro_batch_size", "2") == 0
    names = [f"video-00{number}.mp4" for number in (1, 2, 3)]
    plain, batch = ([(tmp_path / run / name).read_bytes() for name in names] for run in ("plain", "batch"))
    assert plain == batch


def test_the_two_prompts_of_a_file_are_no_batch_of_three(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    assert generate(tmp_path / "run", "--prompt_file", str(prompts), "--batch_size", "3") == 2
    assert "--batch_size: 3, but there are 2 prompts; give at most that many" in capsys.readouterr().err
