"""A checkpoint in each layout people have, read by the real loader, becomes a video for every task, through the command line.

The models are tiny (tests/checkpoints.py); the files, the loader, the media and the encoder are those of a real run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from checkpoints import TINY_SIZE, tiny_models, write_diffusers, write_download
from parity.golden import load_json
from wanvram.cli.main import main
from wanvram.tasks import TASKS
from wanvram.version import __version__
from wanvram.weights.official import CLIP_FILE

DITS = {"t2v": "tiny-t2v", "t2i": "tiny-t2v", "i2v": "tiny-i2v", "flf2v": "tiny-flf2v", "vace": "tiny-vace"}
IMAGE_TASKS = ("i2v-14B", "flf2v-14B")
LAYOUT_TASKS = ("t2v-1.3B", "i2v-14B", "vace-1.3B")
PROMPT = "a cat on the dog."
Runs = Callable[..., Path]


def picture(path: Path, width: int, height: int, seed: int = 0) -> str:
    """Soft blobs of colour."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return str(path)


def video(path: Path, frames: int, *, mask: bool = False) -> str:
    """96x64 at 16 fps: a blob that moves, or a mask whose right half is white."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(frames):
            pixels = np.full((64, 96, 3), 0 if mask else 40 + 20 * index, np.uint8)
            pixels[:, 48:] = 255 if mask else pixels[:, 48:]
            pixels[20:40, 8 * index : 8 * index + 20, 0] = 0 if mask else 250
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return str(path)


def media_flags(task: str, folder: Path) -> list[str]:
    """What a user gives for this task; files are written where they are missing."""
    if task == "i2v-14B":
        return ["--image", picture(folder / "square.png", 80, 80)]
    if task == "flf2v-14B":
        first, last = picture(folder / "first.jpg", 120, 80, 1), picture(folder / "last.webp", 60, 70, 2)
        return ["--first_frame", first, "--last_frame", last]
    if task == "vace-1.3B":
        source, mask = video(folder / "source.mp4", 6), video(folder / "mask.mp4", 6, mask=True)
        references = f"{picture(folder / 'a.png', 50, 90, 3)},{picture(folder / 'b.png', 90, 50, 4)}"
        return ["--src_video", source, "--src_mask", mask, "--src_ref_images", references]
    if task == "vace-14B":
        return ["--src_ref_images", picture(folder / "c.png", 64, 64, 5)]
    return []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """(task, layout) -> folder. official: the 14B transformers in shards, as they are downloaded; converted: to bf16."""

    @cache
    def make(task: str, layout: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{layout}-{task}")
        dit = DITS[TASKS[task].kind]
        if layout.startswith("official"):
            write_download(folder, dit, sharded=task.endswith("14B"))
            if layout == "official, CLIP in half precision" and (folder / CLIP_FILE).exists():
                clip = torch.load(folder / CLIP_FILE, weights_only=True)
                torch.save({key: value.half() for key, value in clip.items()}, folder / CLIP_FILE)
        elif layout == "diffusers":
            write_diffusers(folder, dit, sharded=True)
        else:
            with tiny_models():
                arguments = [str(make(task, "official")), "--precision", "bf16", "--task", task, "-o", str(folder)]
                assert main(["convert", *arguments]) == 0
        return folder

    return make


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str, str], Path]) -> Runs:
    """Run directory of a task; further flags come after the usual ones. The same call is run once."""

    @cache
    def run(task: str, *flags: str, layout: str = "official", precision: str = "fp32", prompt: str = PROMPT) -> Path:
        directory = tmp_path_factory.mktemp("run") / "out"
        how = ["--device", "cpu", "--precision", precision, "--sample_steps", "2", "--base_seed", "3"]
        what = ["--task", task, "--size", TINY_SIZE, "--frame_num", "1" if task == "t2i-14B" else "5"]
        given = [*media_flags(task, directory.parent), *(["--prompt", prompt] if prompt else [])]
        where = ["--ckpt_dir", str(checkpoint(task, layout)), "-o", str(directory)]
        with tiny_models():
            assert main(["generate", *what, *how, *given, *where, *flags]) == 0
        return directory

    return run


def made(directory: Path) -> Path:
    """The only video or picture of a run."""
    (path,) = [*directory.glob("video*.mp4"), *directory.glob("image*.png")]
    return path


def frames_of(path: Path) -> np.ndarray:
    """int16 [frames, height, width, 3], so that differences do not wrap."""
    if path.suffix == ".png":
        return np.asarray(Image.open(path).convert("RGB"))[None].astype(np.int16)
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)]).astype(np.int16)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def largest_difference(a: Path, b: Path) -> int:
    return int(np.abs(frames_of(made(a)) - frames_of(made(b))).max())


# --- every task -------------------------------------------------------------------------------------------------------------

SIZES = {"i2v-14B": (64, 64), "flf2v-14B": (96, 64)}  # of the picture's aspect, within the area of 96*64


@pytest.mark.parametrize("task", [task for task in TASKS if task != "t2i-14B"])
def test_a_task_makes_the_video_that_was_asked_for(task: str, generated: Runs) -> None:
    path = made(generated(task))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.average_rate, len(container.streams)) == (16, 1)
    width, height = SIZES.get(task, (96, 64))
    frames = frames_of(path)
    assert frames.shape == (5, height, width, 3)
    assert frames.std() > 5, "a picture, not one grey"


def test_text_to_image_makes_a_png(generated: Runs) -> None:
    path = made(generated("t2i-14B"))
    with Image.open(path) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (96, 64))
    assert frames_of(path).std() > 5


@pytest.mark.parametrize("task", TASKS)
def test_the_record_has_every_component_that_ran_and_no_other(task: str, generated: Runs) -> None:
    record = read_json(generated(task) / "record.json")
    encoder = ["image_encoder"] if task in IMAGE_TASKS else []
    names = [component["name"] for component in record["components"]]
    assert sorted(names) == sorted(["text_encoder", *encoder, "dit", "vae"])
    assert all(component["base_bytes"] > 0 for component in record["components"])
    stages = [stage["name"] for stage in record["stages"] if stage["kind"] == "stage"]
    video_stage = ["encode_video"] if task in IMAGE_TASKS or task.startswith("vace") else []
    expected = [
        "encode_text",
        *(["encode_image"] if encoder else []),
        *video_stage,
        "prepare",
        "denoise",
        "decode",
        "save",
    ]
    assert stages == expected
    assert record["failure"] is None


def test_the_vace_blocks_are_part_of_the_transformer(generated: Runs) -> None:
    def dit(task: str) -> Any:
        record = read_json(generated(task) / "record.json")
        (stage,) = [s for s in record["stages"] if s["name"] == "denoise"]
        blocks = {block["name"] for step in stage["children"] for block in step["children"]}
        return next(c for c in record["components"] if c["name"] == "dit")["parameters"], blocks

    (plain, plain_blocks), (vace, vace_blocks) = dit("t2v-1.3B"), dit("vace-1.3B")
    assert vace > plain
    assert {"vace block 0", "vace block 1"} <= vace_blocks - plain_blocks


@pytest.mark.parametrize("task", TASKS)
def test_the_sidecar_says_how_to_make_it_again(task: str, generated: Runs) -> None:
    path = made(generated(task))
    sidecar = read_json(path.with_suffix(".json"))
    assert sidecar["file"] == path.name
    assert (sidecar["prompt"], sidecar["prompt_given"], sidecar["seed"]) == (PROMPT, PROMPT, 3)
    assert sidecar["negative_prompt"] == TASKS[task].negative_prompt
    assert (sidecar["wanvram"], sidecar["device"]) == (__version__, "cpu")
    assert sidecar["frames_per_second"] == (None if task == "t2i-14B" else 16)
    request = sidecar["config"]["request"]
    assert (request["task"], request["size"], request["sample_steps"]) == (task, TINY_SIZE, 2)


def test_the_configuration_of_a_sidecar_makes_the_same_video_again(generated: Runs, tmp_path: Path) -> None:
    first = generated("vace-1.3B")
    config = tmp_path / "again.yaml"
    config.write_text(yaml.safe_dump(read_json(made(first).with_suffix(".json"))["config"]))
    with tiny_models():
        assert main(["generate", "--config", str(config), "-o", str(tmp_path / "out")]) == 0
    assert largest_difference(first, tmp_path / "out") == 0


# --- what decides the result ------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_video_and_another_another(generated: Runs) -> None:
    first = generated("t2v-1.3B")
    assert largest_difference(first, generated("t2v-1.3B", "--force")) == 0
    assert largest_difference(first, generated("t2v-1.3B", "--base_seed", "4")) > 20


DECIDING = [
    ("t2v-1.3B", ["--prompt", "the dog"]),
    ("t2v-1.3B", ["--negative_prompt", "the dog"]),
    ("t2v-1.3B", ["--negative_prompt", ""]),  # no negative prompt, not the default one
    ("t2v-1.3B", ["--sample_solver", "dpm++"]),
    ("t2v-1.3B", ["--sample_shift", "1.5"]),
    ("t2v-1.3B", ["--sample_guide_scale", "2"]),
    ("i2v-14B", ["--image", "other.png"]),
    ("flf2v-14B", ["--first_frame", "other.png"]),
    ("flf2v-14B", ["--last_frame", "other.png"]),
    ("vace-1.3B", ["--src_video", "other.mp4"]),
    ("vace-1.3B", ["--src_mask", "other.mp4"]),
    ("vace-1.3B", ["--src_ref_images", "other.png"]),
]


@pytest.mark.parametrize(("task", "flags"), DECIDING, ids=lambda value: value if isinstance(value, str) else value[0])
def test_what_the_user_gives_changes_the_video(task: str, flags: list[str], generated: Runs, tmp_path: Path) -> None:
    flag, value = flags
    if value == "other.png":
        value = picture(tmp_path / value, 120, 80 if task == "flf2v-14B" else 120, seed=9)
    if value == "other.mp4":
        value = video(tmp_path / value, 5)
    assert largest_difference(generated(task), generated(task, flag, value)) > 1


def test_several_prompts_give_one_video_each_as_if_run_alone(generated: Runs, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPT}\n\nthe dog\n", encoding="utf-8")
    both = generated("t2v-1.3B", "--prompt_file", str(file), prompt="")
    assert sorted(p.name for p in both.glob("video*")) == [
        "video-001.json",
        "video-001.mp4",
        "video-002.json",
        "video-002.mp4",
    ]
    alone = made(generated("t2v-1.3B")), made(generated("t2v-1.3B", "--prompt", "the dog"))
    for number, (path, prompt) in enumerate(zip(alone, (PROMPT, "the dog"), strict=True), 1):
        assert np.array_equal(frames_of(both / f"video-00{number}.mp4"), frames_of(path))
        assert read_json(both / f"video-00{number}.json")["prompt"] == prompt
    loads = [s["name"] for s in read_json(both / "record.json")["stages"] if s["kind"] == "load"]
    assert len(loads) == len(set(loads)) == 3


def test_a_batch_of_one_prompt_gives_the_videos_of_the_seeds_that_follow(generated: Runs) -> None:
    both = generated("t2v-1.3B", "--base_seed", "7", "--batch_size", "2", "--micro_batch_size", "2")
    alone = [made(generated("t2v-1.3B", "--base_seed", seed)) for seed in ("7", "8")]
    for number, path in enumerate(alone, 1):
        assert np.array_equal(frames_of(both / f"video-00{number}.mp4"), frames_of(path))
        assert read_json(both / f"video-00{number}.json")["seed"] == 6 + number
    assert not np.array_equal(*(frames_of(path) for path in alone))


def test_save_file_is_where_the_video_and_its_sidecar_are(generated: Runs, tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "cat.mkv"
    directory = generated("t2v-1.3B", "--save_file", str(target))
    assert {p.name for p in target.parent.iterdir()} == {"cat.mkv", "cat.json"}
    assert not list(directory.glob("video*"))
    assert np.array_equal(frames_of(target), frames_of(made(generated("t2v-1.3B"))))


def test_a_flag_overrides_the_configuration_file(
    generated: Runs, checkpoint: Callable[[str, str], Path], tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    request = {"task": "t2v-1.3B", "size": TINY_SIZE, "frame_num": 9, "sample_steps": 2, "base_seed": 7}
    request |= {"prompt": "the dog", "weights": str(checkpoint("t2v-1.3B", "official"))}
    file.write_text(
        yaml.safe_dump({"name": "mine", "model_config": {"device": "cpu", "precision": "fp32"}, "request": request})
    )
    flags = ["--frame_num", "5", "--base_seed", "3", "--prompt", PROMPT]
    with tiny_models():
        assert main(["generate", "--config", str(file), *flags, "-o", str(tmp_path / "out")]) == 0
    used = read_json(tmp_path / "out" / "record.json")["config"]
    assert used["name"] == "mine"
    assert {key: used["request"][key] for key in ("frame_num", "base_seed", "prompt", "sample_steps")} == {
        "frame_num": 5,
        "base_seed": 3,
        "prompt": PROMPT,
        "sample_steps": 2,
    }
    assert largest_difference(tmp_path / "out", generated("t2v-1.3B")) == 0


def test_a_prompt_file_replaces_the_prompt_of_the_configuration_and_a_prompt_its_prompts(
    checkpoint: Callable[[str, str], Path], tmp_path: Path
) -> None:
    request = {"task": "t2v-1.3B", "size": TINY_SIZE, "frame_num": 1, "sample_steps": 1}
    request |= {"prompt": "the dog", "weights": str(checkpoint("t2v-1.3B", "official"))}
    config = {"name": "mine", "model_config": {"device": "cpu", "precision": "fp32"}, "request": request}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(config))
    request["prompts"], request["prompt"] = ["the dog", "the cat"], ""
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "prompts.txt").write_text("\ufeffa cat\r\na dog\r\n", encoding="utf-8")  # as Windows writes it
    with tiny_models():
        for name, flags in (("one", ["--prompt_file", str(tmp_path / "prompts.txt")]), ("two", ["--prompt", "a"])):
            file, out = str(tmp_path / f"{name}.yaml"), str(tmp_path / name)
            assert main(["generate", "--config", file, *flags, "-o", out]) == 0
    prompts = [read_json(tmp_path / f"one/video-00{n}.json")["prompt"] for n in (1, 2)]
    assert prompts == ["a cat", "a dog"]
    assert read_json(tmp_path / "two/video.json")["prompt"] == "a"


def test_an_empty_prompt_is_a_prompt_as_it_is_officially(generated: Runs) -> None:
    directory = generated("t2v-1.3B", "--prompt", "")
    assert read_json(directory / "video.json")["prompt"] == ""
    assert largest_difference(directory, generated("t2v-1.3B")) > 1


def test_without_offload_every_component_is_loaded_first_and_the_video_is_the_same(generated: Runs) -> None:
    def spans(directory: Path) -> list[tuple[str, str]]:
        return [(s["kind"], s["name"]) for s in read_json(directory / "record.json")["stages"]]

    leaving, staying = generated("i2v-14B"), generated("i2v-14B", "--offload_model", "False")
    kinds = [kind for kind, _ in spans(staying)]
    assert kinds == ["load"] * 4 + ["stage"] * 7
    assert [name for _, name in spans(leaving)].count("load vae") == 2  # its halves, one at a time
    assert largest_difference(leaving, staying) == 0


@pytest.fixture
def no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """DashScope at an address of this machine where nothing listens."""
    from wanvram.prompt import dashscope

    monkeypatch.setenv("DASH_API_KEY", "key")
    monkeypatch.setenv("DASH_API_URL", "http://127.0.0.1:9/compatible-mode/v1")
    monkeypatch.setattr(dashscope, "BACKOFF_S", 0.0)


@pytest.mark.usefixtures("no_service")
def test_a_failed_extension_ends_the_run_unless_the_prompt_may_be_used_as_it_is(
    generated: Runs, checkpoint: Callable[[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extend = ["--use_prompt_extend", "--prompt_extend_method", "dashscope"]
    allowed = generated("t2v-1.3B", *extend, "--prompt_extend_optional")
    assert largest_difference(allowed, generated("t2v-1.3B")) == 0
    assert any("the prompt was used as it is" in note for note in read_json(allowed / "record.json")["notes"])
    capsys.readouterr()
    what = ["--task", "t2v-1.3B", "--size", TINY_SIZE, "--frame_num", "1", "--device", "cpu", "--precision", "fp32"]
    where = ["--ckpt_dir", str(checkpoint("t2v-1.3B", "official")), "-o", str(tmp_path / "out")]
    with tiny_models():
        assert main(["generate", *what, *extend, *where, "--prompt", PROMPT]) == 1
    assert "prompt extension failed: 127.0.0.1:9 cannot be reached" in capsys.readouterr().out
    assert not (tmp_path / "out/video.mp4").exists()


# --- every layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", LAYOUT_TASKS)
def test_the_diffusers_layout_of_the_same_weights_gives_the_same_video(task: str, generated: Runs) -> None:
    assert largest_difference(generated(task), generated(task, layout="diffusers")) <= 1


@pytest.mark.parametrize("task", LAYOUT_TASKS)
def test_a_converted_checkpoint_gives_the_video_of_its_source(task: str, generated: Runs) -> None:
    # Conversion stores CLIP as CUDA runs it, in float16; on the CPU it computes in float32 with what the file has.
    source = generated(task, layout="official, CLIP in half precision", precision="bf16")
    assert largest_difference(source, generated(task, layout="converted", precision="bf16")) <= 1
    assert largest_difference(source, generated(task)) > 0, "bf16 is another precision"


def test_the_weights_of_the_checkpoint_decide_the_video(generated: Runs, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "other"
    folder.mkdir()
    write_download(folder, "tiny-t2v")
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file(weights | {"head.head.bias": weights["head.head.bias"] + 1}, path)
    assert largest_difference(generated("t2v-1.3B"), generated("t2v-1.3B", "--ckpt_dir", str(folder))) > 1


# --- predictions at full size ------------------------------------------------------------------------------------------------

FULL_SIZE = load_json("full_size_keys")
SHORT = {task: {"frame_num": 1 if task == "t2i-14B" else 5, "sample_steps": 3} for task in TASKS}


def check_full_size(record: Any, task: str) -> None:
    """Every component with the official number of parameters."""
    counts = {component["name"]: component["parameters"] for component in record["components"]}
    dit = FULL_SIZE["t2v-14B" if task == "t2i-14B" else task]
    assert counts["dit"] == dit["num_params"]
    assert set(counts) == {"text_encoder", "dit", "vae"} | ({"image_encoder"} if task in IMAGE_TASKS else set())
    assert record["device"] == "simulated:h200"
    assert record["failure"] is None
    assert all(c["base_bytes"] > 0 and c["activation_bytes"] > 0 for c in record["components"])


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_estimated_at_full_size(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--{key}={value}" for key, value in SHORT[task].items()]
    assert main(["estimate", "--task", task, "--size", "832*480", *flags, "--json"]) == 0
    check_full_size(json.loads(capsys.readouterr().out), task)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_profiled_at_full_size_with_what_the_user_gives(task: str, tmp_path: Path) -> None:
    flags = media_flags(task, tmp_path)
    given: dict[str, Any] = {
        flag.removeprefix("--"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)
    }
    if "src_ref_images" in given:
        given["src_ref_images"] = given["src_ref_images"].split(",")
    request = {"task": task, "size": "480*832"} | SHORT[task] | given
    strategy = {"device": "simulated", "precision": "bf16", "load_strategy": "block", "offload": True}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"name": "a", "model_config": strategy, "request": request}))
    assert main(["profile", str(tmp_path / "a.yaml"), "-o", str(tmp_path / "out")]) == 0
    check_full_size(read_json(tmp_path / "out/record.json"), task)


def test_the_prompt_extender_is_estimated_too(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    flags = ["--task", "t2v-1.3B", "--size", "832*480", "--frame_num", "1", "--sample_steps", "1"]
    extend = ["--use_prompt_extend", "--prompt_extend_model", "Qwen2.5_3B"]
    assert main(["estimate", *flags, *extend, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    (extender,) = [c for c in record["components"] if c["name"] == "prompt_extender"]
    assert extender["parameters"] == pytest.approx(3.09e9, rel=0.01)
    assert extender["base_bytes"] == pytest.approx(2 * extender["parameters"], rel=0.03)  # and unsplit ends of blocks
    assert 0 < extender["activation_bytes"] < extender["base_bytes"] / 4
