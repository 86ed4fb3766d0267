"""Requests and configurations at their boundaries: the last value that is taken, the first that is refused, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from wanvram.config import Measurement, Request, RunConfig, Strategy
from wanvram.errors import InputError
from wanvram.request import Video, is_unicode
from wanvram.units import MIB

LONE = "\ud800"  # a lone surrogate, as a byte of the command line that is no UTF-8 becomes


def request(task: str = "t2v-1.3B", **given: Any) -> Request:
    return Request.for_task(task, **given)


def config(
    asked: Request | None = None, device: str = "simulated", strategy: Strategy | None = None, **given: Any
) -> RunConfig:
    return RunConfig("x", "", device, asked or request(), strategy or Strategy(), **given)


def refusal(make: Any) -> str:
    with pytest.raises(InputError) as caught:
        make()
    return str(caught.value)


def asked(**values: Any) -> dict[str, Any]:
    """A request as its constructor takes it."""
    plain = {
        "task": "t2v-1.3B",
        "size": "832*480",
        "frame_num": 5,
        "sample_steps": 2,
        "sample_shift": 5.0,
        "base_seed": 1,
    }
    plain |= {"sample_guide_scale": 5.0, "sample_solver": "unipc", "prompt": "a cat", "negative_prompt": ""}
    return plain | values


# --- limits of a request -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "allowed", "beyond", "said"),
    [
        ("sample_steps", 1, 0, "0 is outside 1..1000"),
        ("sample_steps", 1000, 1001, "1001 is outside 1..1000"),
        ("sample_shift", 0.01, 0.0099, "0.0099 is outside 0.01..100"),
        ("sample_shift", 100, 100.5, "100.5 is outside 0.01..100"),
        ("sample_guide_scale", -1000, -1000.5, "-1000.5 is outside -1000..1000"),
        ("sample_guide_scale", 1000, 1000.5, "1000.5 is outside -1000..1000"),
        ("base_seed", -1, -2, "-2 is outside -1..2^63-1"),
        ("base_seed", 2**63 - 1, 2**63, f"{2**63} is outside -1..2^63-1"),
        ("frame_num", 4093, 4097, "4097; at most 4093 frames in one video"),
        ("frame_num", 1, 2, "2 is not of the form 4n+1 (1, 5, 9, ..., 81)"),
        ("prompt", "x" * 20_000, "x" * 20_001, "20001 characters; at most 20000 (the model reads 512 tokens)"),
        ("negative_prompt", "", LONE, "is not UTF-8 text"),
        ("prompt_extend_method", "dashscope", "magic", "'magic'; choose local_qwen or dashscope"),
        ("prompt_extend_target_lang", "en", "fr", "'fr'; choose zh or en"),
        ("sample_solver", "dpm++", "euler", "'euler'; choose unipc or dpm++"),
    ],
)
def test_a_value_is_taken_up_to_its_limit_and_refused_beyond_in_one_sentence(
    key: str, allowed: object, beyond: object, said: str
) -> None:
    assert getattr(request(**{key: allowed}), key) == allowed
    assert refusal(lambda: request(**{key: beyond})) == f"{key}: {said}"


def test_an_unknown_task_is_refused_with_those_that_there_are() -> None:
    for make in (lambda: request("t2v-2B"), lambda: Request(**asked(task="t2v-2B"))):
        assert refusal(make).startswith("task: 't2v-2B' is unknown; choose one of ")


def test_one_image_has_one_frame_and_two_pictures_have_five_at_least() -> None:
    assert request("t2i-14B").frame_num == 1
    assert refusal(lambda: request("t2i-14B", frame_num=5)) == "frame_num: t2i-14B makes one image; frame_num must be 1"
    assert request("flf2v-14B", frame_num=5).frame_num == 5
    said = "frame_num: flf2v needs at least 5, the first and last differ"
    assert refusal(lambda: request("flf2v-14B", frame_num=1)) == said


@pytest.mark.parametrize(
    ("size", "tiny"), [("16*16", True), ("1280*1280", True), ("1296*16", False), ("24*16", False), ("16*24", False)]
)
def test_tiny_weights_make_any_size_in_whole_tokens_up_to_1280(size: str, tiny: bool) -> None:
    if tiny:
        assert config(request(size=size), weights="tiny").request.size == size
        assert "is not supported by t2v-1.3B" in refusal(lambda: config(request(size=size)))
    else:
        assert (
            refusal(lambda: request(size=size))
            == f"size: '{size}' is not supported by t2v-1.3B; choose 480*832, 832*480"
        )


def test_several_prompts_are_at_most_64_and_instead_of_one() -> None:
    assert len(request(prompts=("a",) * 64).prompts) == 64
    assert refusal(lambda: request(prompts=("a",) * 65)) == "prompts: 65; at most 64 in one run"
    assert (
        refusal(lambda: request(prompt="a", prompts=("b",))) == "prompts: given together with prompt; give one of them"
    )
    assert refusal(lambda: request(prompts=("a", LONE))) == "prompts: is not UTF-8 text"


def test_each_of_several_prompts_has_the_seed_and_of_one_prompt_each_video_has_its_own() -> None:
    two = request(prompts=("a", "b"), base_seed=7)
    assert two.all_prompts() == ("a", "b")
    assert two.videos(1) == two.videos(2) == (Video(0, 7), Video(1, 7))
    for one in (request(prompt="a", base_seed=7), request(prompts=("a",), base_seed=7)):
        assert one.all_prompts() == ("a",)
        assert one.videos(3) == (Video(0, 7), Video(0, 8), Video(0, 9))


def test_the_video_of_a_picture_has_its_ratio_and_the_area_of_the_size() -> None:
    wide = request("i2v-14B", size="832*480")
    assert (wide.width, wide.height) == (832, 480)
    width, height = wide.video_size((500, 1000))
    assert height == pytest.approx(2 * width, rel=0.05)
    assert width * height == pytest.approx(832 * 480, rel=0.05)


def test_guidance_is_any_scale_but_one() -> None:
    assert [request(sample_guide_scale=scale).guided for scale in (0.0, 1.0, 2.0)] == [True, False, True]


def test_nothing_is_extended_and_the_seed_is_random_unless_asked_for() -> None:
    plain = request()
    assert (plain.use_prompt_extend, plain.prompt_extend_optional, plain.base_seed) == (False, False, -1)
    bare = Request(**asked())
    assert (bare.use_prompt_extend, bare.prompt_extend_optional) == (False, False)


# --- files of a request ------------------------------------------------------------------------------------------------------


def test_a_file_that_the_task_does_not_read_is_refused_by_the_name_of_who_does() -> None:
    assert refusal(lambda: request(image="a.png")) == "image: t2v-1.3B does not read it; only i2v does"
    assert refusal(lambda: request("i2v-14B", src_ref_images=("a.png",))) == (
        "src_ref_images: i2v-14B does not read it; only vace does"
    )
    assert request("i2v-14B", image="a.png").image == "a.png"
    assert request("vace-1.3B", src_ref_images=("a.png", "b.png")).src_ref_images == ("a.png", "b.png")


def test_a_file_name_that_is_empty_or_no_unicode_is_refused() -> None:
    assert refusal(lambda: request("i2v-14B", image="")) == "image: is empty; give a file"
    assert (
        refusal(lambda: request("vace-1.3B", src_ref_images=("a.png", ""))) == "src_ref_images: is empty; give a file"
    )
    assert refusal(lambda: request("i2v-14B", image=f"a{LONE}")) == (
        "image: 'a\\ud800' is not a UTF-8 file name; rename the file"
    )
    assert request("i2v-14B", image="ü.png").image == "ü.png"


def test_a_mask_needs_its_video_and_two_pictures_come_together() -> None:
    assert refusal(lambda: request("vace-1.3B", src_mask="m.mp4")) == "src_mask: needs src_video, whose parts it marks"
    assert request("vace-1.3B", src_video="v.mp4").src_mask is None
    assert request("vace-1.3B", src_video="v.mp4", src_mask="m.mp4").src_mask == "m.mp4"
    said = "first_frame, last_frame: only one is given; flf2v needs both"
    for given in ({"first_frame": "a.png"}, {"last_frame": "a.png"}):
        assert refusal(lambda given=given: request("flf2v-14B", **given)) == said  # type: ignore[misc]
    assert request("flf2v-14B", first_frame="a.png", last_frame="b.png").last_frame == "b.png"
    assert request("flf2v-14B").first_frame is None


def test_surrogates_are_no_unicode_and_their_neighbours_are() -> None:
    assert [is_unicode(f"é{c}") for c in ("\ud7ff", "\ud800", "\udbff", "\udfff", "\ue000")] == [
        True,
        False,
        False,
        False,
        True,
    ]


# --- the configuration around it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".", "..", "", "a/b", "a\\b", "a\0b", "a\nb"])
def test_a_name_that_is_no_plain_file_name_is_refused(name: str) -> None:
    said = f"name: '{name}' names the run directory; use a plain file name"
    assert refusal(lambda: RunConfig(name, "", "auto", request())) == said


@pytest.mark.parametrize("key", ["name", "description", "weights", "gpu"])
def test_a_text_that_is_no_unicode_is_refused_by_its_key(key: str) -> None:
    texts = {"name": "x", "description": "", "device": "auto", "request": request()}
    assert refusal(lambda: RunConfig(**(texts | {key: LONE}))) == f"{key}: '\\ud800' is not UTF-8 text"


def test_a_name_has_at_most_200_bytes() -> None:
    assert len(RunConfig("x" * 200, "", "auto", request()).name) == 200
    assert refusal(lambda: RunConfig("x" * 201, "", "auto", request())) == "name: is too long; at most 200 bytes"


def test_weights_are_named() -> None:
    assert refusal(lambda: config(weights="")) == "weights: is empty; choose random, tiny or a checkpoint directory"


def test_a_cap_is_a_mebibyte_at_least() -> None:
    assert config(memory_limit_bytes=MIB).memory_limit_bytes == MIB
    assert refusal(lambda: config(memory_limit_bytes=MIB - 1)).startswith(
        f"memory_limit_bytes: {MIB - 1} must be at least {MIB}, in bytes"
    )


def test_the_cpu_computes_in_no_fp16_and_chooses_no_attention() -> None:
    half = Strategy(precision="fp16")
    assert refusal(lambda: config(device="cpu", strategy=half)).startswith("precision: fp16 has no fast CPU kernels")
    assert config(device="cuda", strategy=half).strategy == half
    assert config(device="cpu", strategy=Strategy(precision="bf16")).device == "cpu"
    flash = Strategy(attention_backend="flash")
    assert refusal(lambda: config(device="cpu", strategy=flash)) == (
        "attention_backend: flash computes on NVIDIA GPUs; with device cpu leave it at auto"
    )
    assert config(device="cuda", strategy=flash).strategy == flash
    copies = Strategy(ulysses_size=2, exchange_by="copies")
    assert refusal(lambda: config(device="cpu", strategy=copies)) == (
        "exchange_by: copies is how GPUs exchange; with device cpu leave it at auto"
    )
    assert config(device="cuda", strategy=copies).gpus == 2


def test_an_unknown_device_or_link_is_refused_with_those_that_there_are() -> None:
    assert refusal(lambda: config(device="tpu")) == "device: 'tpu'; choose one of auto, cuda, cpu, simulated"
    assert refusal(lambda: config(link="wire")).startswith("link: 'wire'; choose one of nvlink")
    assert [config(device=device).device for device in ("auto", "cuda", "cpu")] == ["auto", "cuda", "cpu"]


def test_gpus_share_no_more_heads_than_the_transformer_has() -> None:
    assert config(strategy=Strategy(ulysses_size=12)).gpus == 12
    assert refusal(lambda: config(strategy=Strategy(ulysses_size=13))) == (
        "ulysses_size: 13 GPUs cannot share 12 heads; give at most 12"
    )
    assert "cannot share 4 heads; give at most 4" in refusal(
        lambda: config(strategy=Strategy(ulysses_size=12), weights="tiny")
    )


def test_resident_blocks_are_at_most_all_of_them() -> None:
    def resident(blocks: int) -> Strategy:
        return Strategy(load_strategy="block", resident_blocks=blocks)

    assert config(strategy=resident(30)).strategy.resident_blocks == 30
    assert refusal(lambda: config(strategy=resident(31))) == (
        "resident_blocks: 31, but the transformer of t2v-1.3B has 30 blocks; give at most that many"
    )
    assert config(strategy=resident(31), weights="tiny").strategy.resident_blocks == 31


def test_two_gpus_share_two_guidance_passes_and_not_one() -> None:
    alone = request(sample_guide_scale=1.0)
    assert config(strategy=Strategy(cfg_size=2)).gpus == 2
    assert config(alone).gpus == 1
    assert "cfg_size: 2 GPUs share two guidance passes" in refusal(lambda: config(alone, strategy=Strategy(cfg_size=2)))


def test_the_stream_of_a_source_video_does_not_wait_in_ram() -> None:
    pinned, vace = Strategy(residual_in="pinned"), request("vace-1.3B")
    assert config(strategy=pinned).strategy == pinned
    assert config(vace).request == vace
    assert "residual_in: pinned keeps one stream, and vace-1.3B has a second one" in refusal(
        lambda: config(vace, strategy=pinned)
    )


def test_as_many_videos_are_made_together_as_there_are_prompts_or_seeds_of_one() -> None:
    two, one = request(prompts=("a", "b")), request(base_seed=2**63 - 3)
    assert len(config(two, strategy=Strategy(batch_size=2)).videos()) == 2
    assert refusal(lambda: config(two, strategy=Strategy(batch_size=3))) == (
        "batch_size: 3, but there are 2 prompts; give at most that many"
    )
    assert [video.seed for video in config(one, strategy=Strategy(batch_size=3)).videos()][-1] == 2**63 - 1
    assert refusal(lambda: config(one, strategy=Strategy(batch_size=4))) == (
        f"base_seed: {2**63 - 3} leaves no seed for 4 videos; the last is 2^63-1"
    )


def test_what_has_no_effect_is_noted_and_what_has_is_not() -> None:
    assert config().notes() == []
    assert config(strategy=Strategy(gradient_checkpointing=True)).notes() == [
        "gradient_checkpointing has no effect: inference keeps no gradients"
    ]
    joint = Strategy(cfg="joint")
    assert config(strategy=joint).notes() == []
    assert config(request(sample_guide_scale=1.0)).notes() == []
    (note,) = config(request(sample_guide_scale=1.0), strategy=joint).notes()
    assert note.startswith("cfg has no effect with sample_guide_scale 1")
    assert config(link="pcie4").notes() == ["link: pcie4 has no effect on one GPU; it joins several"]
    assert config(link="pcie4", strategy=Strategy(ulysses_size=2)).notes() == []
    assert config(strategy=Strategy(ring_size=2)).notes() == []


# --- measurement and YAML ----------------------------------------------------------------------------------------------------


def test_without_a_word_memory_is_recorded_every_tenth_step_and_nothing_else() -> None:
    assert Measurement() == Measurement(True, 10, False, None, False, None)
    assert (Measurement().is_traced, Measurement().trace_directory) == (False, "trace")
    assert Measurement(trace=True).is_traced
    inside = Measurement(trace_path="a/b")
    assert (inside.is_traced, inside.trace_directory) == (True, "a/b")
    assert Measurement(log_interval=1, keep_every=0) == Measurement(log_interval=1, keep_every=0)


@pytest.mark.parametrize("path", ["", ".", "/etc", "a/../b", "..", "C:x", "a\\b", "a\0b"])
def test_a_trace_stays_in_the_run_directory(path: str) -> None:
    assert refusal(lambda: Measurement(trace_path=path)).startswith(f"trace_path: '{path}' leaves the run directory")


def test_the_yaml_has_the_sections_in_their_order_and_texts_as_they_are_written() -> None:
    made = config(request(prompts=("猫", "a")), strategy=Strategy(vae_tile=30))
    text = made.to_yaml()
    assert "猫" in text
    assert list(yaml.safe_load(text)) == ["name", "description", "model_config", "optimization", "logging", "request"]
    assert RunConfig.from_dict(yaml.safe_load(text)) == made


def test_absent_sections_are_the_defaults() -> None:
    plain = RunConfig.from_dict({"name": "x"})
    assert (plain.device, plain.description, plain.request.task, plain.weights) == ("auto", "", "t2v-14B", "random")
    assert (plain.strategy, plain.measurement) == (Strategy(), Measurement())


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"sample_steps": "4"}, "request.sample_steps: '4' is not a whole number (write it without quotes)"),
        ({"sample_shift": "4"}, "request.sample_shift: '4' is not a whole number or a number (write"),
        ({"sample_steps": True}, "request.sample_steps: True is not a whole number"),
        ({"sample_shift": False}, "request.sample_shift: False is not a whole number or a number"),
        ({"use_prompt_extend": 1}, "request.use_prompt_extend: 1 is not true or false"),
        ({"image": 5}, "request.image: 5 is not text or null"),
        ({"prompts": [1]}, "request.prompts: 1 is not text"),
        ({"prompts": "a"}, "request.prompts: 'a' is not a list"),
        (
            {"sample_steps": "y" * 78},
            f"request.sample_steps: '{'y' * 78}' is not a whole number (write it without quotes)",
        ),
        (
            {"sample_steps": "y" * 79},
            f"request.sample_steps: '{'y' * 76}... is not a whole number (write it without quotes)",
        ),
        ({"framenum": 5}, "request.framenum: unknown key; did you mean frame_num? allowed: task, size, frame_num"),
        ({"vae_tile": 5}, "request.vae_tile: unknown key; it belongs under optimization; allowed: task, size"),
        ({"zzz": 5}, "request.zzz: unknown key; allowed: task, size"),
    ],
)
def test_a_wrong_value_or_key_is_said_by_its_section_and_kind(request_: dict[str, Any], said: str) -> None:
    assert refusal(lambda: RunConfig.from_dict({"name": "x", "request": request_})).startswith(said)


def test_a_whole_number_is_a_number_and_a_boolean_where_one_is_asked_for() -> None:
    given = {"sample_shift": 4, "use_prompt_extend": True, "task": "t2v-1.3B", "prompts": ["a"]}
    read = RunConfig.from_dict({"name": "x", "request": given}).request
    assert (read.sample_shift, read.use_prompt_extend, read.prompts) == (4, True, ("a",))


def test_a_section_is_a_mapping_and_the_whole_is_one() -> None:
    assert refusal(lambda: RunConfig.from_dict([])) == "the configuration is not a mapping of sections"
    assert refusal(lambda: RunConfig.from_dict({"name": "x", "logging": None})) == "logging: None is not a section"
    assert refusal(lambda: RunConfig.from_dict({"description": "d"})) == "name: is missing; it names the run directory"
    assert refusal(lambda: RunConfig.from_dict({"name": "x", "modelconfig": {}})).startswith(
        "modelconfig: unknown key; did you mean model_config? allowed: name, description, model_config"
    )
