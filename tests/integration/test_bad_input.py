"""Bad input for every flag of `wanvram generate`: a sentence and exit code 2, before any model is loaded, and nothing left behind.

Every case is a complete good call with one thing wrong; a test shows that the good calls reach the models.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from checkpoints import TINY_SIZE, tiny_models, write_tokenizer
from given_files import write_checkpoints, write_media, write_texts
from pipeline_folders import write_pipeline
from wanvram.cli import generate
from wanvram.cli.main import main
from wanvram.engine.components import Parts
from wanvram.foreign.measured import MeasuredDevice, MeasuredTable
from wanvram.weights.official import CLIP_FILE, DIT_FILE, T5_FILE, TOKENIZER_FILE, VAE_FILE


class Loaded(BaseException):
    """A model was about to be loaded."""


# --- the user's files -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_media(folder)
    write_texts(folder)
    write_checkpoints(folder)
    return folder


# --- calls ------------------------------------------------------------------------------------------------------------------

# What a good call of each kind gives; {files} is the folder of files.
GOOD: dict[str, list[str]] = {
    "t2v": ["--task", "t2v-1.3B"],
    "i2v": ["--task", "i2v-14B", "--image", "{files}/good.png"],
    "flf2v": ["--task", "flf2v-14B", "--first_frame", "{files}/good.png", "--last_frame", "{files}/good.png"],
    "vace": ["--task", "vace-1.3B", "--src_video", "{files}/good.mp4", "--src_mask", "{files}/good.mp4"],
}
COMMON = ["--size", TINY_SIZE, "--frame_num", "5", "--sample_steps", "1", "--precision", "fp32", "--device", "cpu"]


def call(kind: str, flags: Sequence[str], files: Path, out: Path) -> int:
    """Exit code of the good call with `flags` after it; a None among them takes the flag before it out of the good call."""
    good = [*GOOD[kind], *COMMON, "--prompt", "a cat", "--ckpt_dir", "{files}/" + kind, "-o", str(out)]
    for flag in [f.removeprefix("-without") for f in flags if f.startswith("-without")]:
        where = good.index(flag)
        del good[where : where + 2]
    given = [f for f in flags if not f.startswith("-without")]
    arguments = [text.replace("{files}", str(files)) for text in (*good, *given)]
    with tiny_models(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parts, "load", _refuse_to_load)
        for name in ("DASH_API_KEY", "DASHSCOPE_API_KEY"):
            patch.delenv(name, raising=False)
        try:
            return main(["generate", *arguments])
        except SystemExit as exit:
            return int(str(exit.code))


def _refuse_to_load(*_: Any) -> None:
    raise Loaded


@pytest.mark.parametrize("kind", GOOD)
def test_a_good_call_reaches_the_models(kind: str, files: Path, tmp_path: Path) -> None:
    with pytest.raises(Loaded):
        call(kind, [], files, tmp_path / "out")


ALLOWED = {
    "empty prompt": ("t2v", ["--prompt", ""]),
    "empty negative prompt": ("t2v", ["--negative_prompt", ""]),
    "prompt of exactly the longest length": ("t2v", ["--prompt", "x" * 20_000]),
    "prompt file": ("t2v", ["-without--prompt", "--prompt_file", "{files}/prompts.txt"]),
    "frames of the source decide": ("vace", ["--frame_num", "81"]),
    "vace from text alone": ("vace", ["-without--src_video", "-without--src_mask"]),
    "existing save file with --force": ("t2v", ["--save_file", "{files}/existing.mp4", "--force"]),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_what_looks_odd_but_means_something_is_allowed(case: str, files: Path, tmp_path: Path) -> None:
    kind, flags = ALLOWED[case]
    with pytest.raises(Loaded):
        call(kind, flags, files, tmp_path / "out")


# --- what is refused --------------------------------------------------------------------------------------------------------

Case = tuple[
    str, list[str], str
]  # kind of the good call, what is given after it, what the sentence must say (a pattern)

PICTURES = {
    "absent.png": "does not exist",
    "folder.png": "is not a file",
    "text.png": "is not an image",
    "empty.png": "is not an image",
    "video.png": "is not an image",
    "one.png": "is 1x1; both sides need at least 32 pixels",
    "giant.png": "is 20000x20000, 400,000,000 pixels; at most 64,000,000",
    "cut.png": "is truncated or damaged",
}
VIDEOS = {
    "absent.mp4": "does not exist",
    "folder.png": "is not a file",
    "text.mp4": "is not a video",
    "empty.mp4": "is not a video",
    "picture.mp4": "is not a video",
    "small.mp4": "is 8x8; both sides must be 16 to 8192 pixels",
    "cut.mp4": "has no video stream",
}
PICTURE_FLAGS = {"image": "i2v", "first_frame": "flf2v", "last_frame": "flf2v", "src_ref_images": "vace"}

MEDIA: list[Case] = [
    *(
        (kind, [f"--{flag}", f"{{files}}/{name}"], rf"--{flag} \S*{re.escape(name)} {sentence}")
        for flag, kind in PICTURE_FLAGS.items()
        for name, sentence in PICTURES.items()
    ),
    *(
        ("vace", [f"--{flag}", f"{{files}}/{name}"], rf"--{flag} \S*{re.escape(name)} {sentence}")
        for flag in ("src_video", "src_mask")
        for name, sentence in VIDEOS.items()
    ),
    *((kind, [f"--{flag}", ""], f"--{flag}: is empty; give a file") for flag, kind in PICTURE_FLAGS.items()),
    *(("vace", [f"--{flag}", ""], f"--{flag}: is empty; give a file") for flag in ("src_video", "src_mask")),
    ("vace", ["--src_ref_images", "{files}/good.png,"], "--src_ref_images: is empty"),
    ("vace", ["--src_ref_images", "{files}/good.png,{files}/text.png"], r"text\.png is not an image"),
    ("i2v", ["--image", "{files}/thin.png"], r"--image \S+ is too long and thin: .* 0x\d+; sides must be 16 to 16384"),
    ("flf2v", ["--first_frame", "{files}/wide.png"], "--last_frame .*is 80x80, of too different a shape .*40000x32"),
    (
        "flf2v",
        ["--first_frame", "{files}/large.png", "--last_frame", "{files}/thin.png"],
        "--last_frame .*is 32x40000, of too different a shape .*1000x999",
    ),
    ("i2v", ["-without--image"], "--image: i2v-14B makes a video from it; give a picture"),
    ("flf2v", ["-without--last_frame"], "only one is given; flf2v needs both"),
    ("flf2v", ["-without--first_frame"], "only one is given; flf2v needs both"),
    ("flf2v", ["-without--first_frame", "-without--last_frame"], "--first_frame and --last_frame: flf2v-14B"),
    ("vace", ["-without--src_video"], "--src_mask: needs src_video"),
    *(
        ("t2v", [f"--{flag}", "{files}/good.png"], f"--{flag}: t2v-1.3B does not read it")
        for flag in (*PICTURE_FLAGS, "src_video", "src_mask")
    ),
    ("t2v", ["--image", ""], "--image: t2v-1.3B does not read it"),
    ("i2v", ["--image", "caf\udce9.png"], "--image: .* is not a UTF-8 file name"),
    ("i2v", ["--image", "x" * 300 + ".png"], "--image x+.png does not exist"),
]

NUMBERS: list[Case] = [
    *(("t2v", ["--frame_num", n], r"--frame_num: \S+ is not of the form 4n\+1") for n in ("4", "0", "-3")),
    ("t2v", ["--frame_num", "4097"], "--frame_num: 4097; at most 4093"),
    ("t2v", ["--frame_num", "five"], "--frame_num: invalid int value"),
    ("flf2v", ["--frame_num", "1"], "--frame_num: flf2v needs at least 5"),
    ("t2v", ["--task", "t2i-14B"], "--frame_num: t2i-14B makes one image"),
    *(("t2v", ["--sample_steps", n], r"--sample_steps: \S+ is outside 1\.\.1000") for n in ("0", "-1", "1001")),
    ("t2v", ["--sample_steps", "1.5"], "--sample_steps: invalid int value"),
    *(("t2v", [f"--sample_shift={x}"], r"--sample_shift: \S+ is outside") for x in ("nan", "inf", "0", "-1", "-inf")),
    ("t2v", ["--sample_shift", "big"], "--sample_shift: invalid float value"),
    *(
        ("t2v", [f"--sample_guide_scale={x}"], "--sample_guide_scale: .* is outside -1000")
        for x in ("nan", "inf", "-inf")
    ),
    ("t2v", ["--sample_guide_scale", ""], "--sample_guide_scale: invalid float value"),
    ("t2v", ["--sample_solver", "euler"], "--sample_solver: invalid choice: 'euler'.*unipc.*dpm"),
    *(("t2v", ["--base_seed", n], r"--base_seed: \S+ is outside -1") for n in ("-2", str(2**63))),
    ("t2v", ["--base_seed", "x"], "--base_seed: invalid int value"),
    ("t2v", ["--task", "t2v-5B"], "--task: invalid choice: 't2v-5B'.*t2v-14B"),
    *(
        (
            "t2v",
            ["--size", size],
            rf"--size: '{re.escape(size)}' is not supported by t2v-1\.3B; choose 480\*832, 832\*480",
        )
        for size in ("1280x720", "1280*720", "", "96*-64", "cat")
    ),
]

TEXTS: list[Case] = [
    ("t2v", ["--prompt", "x" * 100_000], "--prompt: 100000 characters; at most 20000"),
    ("t2v", ["--prompt", "\udcff"], "--prompt: is not UTF-8 text"),
    ("t2v", ["--negative_prompt", "x" * 100_000], "--negative_prompt: 100000 characters"),
    ("t2v", ["--prompt_file", "{files}/prompts.txt"], "--prompt_file: given together with prompt"),
    *(
        ("t2v", ["-without--prompt", "--prompt_file", "{files}/" + name], f"--prompt_file{sentence}")
        for name, sentence in {
            "absent.txt": r" \S+ cannot be read: No such file",
            "folder.png": r" \S+ cannot be read: it is a directory",
            "no-prompts.txt": r" \S+: holds no prompt",
            "binary.txt": r" \S+ is no text: byte 128 is not UTF-8",
            "nul.txt": r" \S+: is not text but binary",
            "long-prompt.txt": ": 100000 characters",
            "many-prompts.txt": ": 65; at most 64",
        }.items()
    ),
    ("t2v", ["--use_prompt_extend", "maybe"], "--use_prompt_extend: 'maybe' is not a boolean"),
    ("t2v", ["--prompt_extend_optional", "maybe"], "--prompt_extend_optional: 'maybe' is not a boolean"),
    ("t2v", ["--prompt_extend_method", "magic"], "--prompt_extend_method: invalid choice"),
    ("t2v", ["--prompt_extend_target_lang", "fr"], "--prompt_extend_target_lang: invalid choice"),
    ("t2v", ["--use_prompt_extend", "--prompt_extend_method", "dashscope"], "set DASH_API_KEY or DASHSCOPE_API_KEY"),
]

HOW: list[Case] = [
    ("t2v", ["--precision", "int8"], "--precision: invalid choice"),
    ("t2v", ["--precision", "fp16"], "--precision: fp16 has no fast CPU kernels; use bf16 or fp32"),
    ("t2v", ["--load_strategy", "lazy"], "--load_strategy: invalid choice"),
    *(
        ("t2v", [f"--{flag}", "perhaps"], f"--{flag}: 'perhaps' is not a boolean; write True or False")
        for flag in (
            *("offload_model", "t5_cpu", "attention_slicing", "gradient_checkpointing", "expandable_segments"),
            *("t5_fsdp", "dit_fsdp"),
        )
    ),
    ("t2v", ["--attention", "magic"], "--attention: invalid choice"),
    ("t2v", ["--attention", "fa4", "--precision", "fp32"], "--attention: fa4 computes 16-bit numbers only"),
    (
        "t2v",
        ["--attention", "fa4", "--precision", "bf16"],
        "fa4 computes on NVIDIA GPUs; with device cpu leave it at auto",
    ),
    *(("t2v", ["--rows_per_chunk", n], "--rows_per_chunk: .* at least 1") for n in ("0", "-5")),
    ("t2v", ["--cfg", "none"], "--cfg: invalid choice"),
    ("t2v", ["--weights_in", "cloud"], "--weights_in: invalid choice"),
    (
        "t2v",
        ["--weights_in", "disk", "--load_strategy", "full"],
        "--weights_in: has no meaning with load_strategy full",
    ),
    ("t2v", ["--resident_blocks", "-1"], "--resident_blocks: -1 must be at least 0"),
    ("t2v", ["--batch_size", "0"], "--batch_size: 0 must be at least 1"),
    ("t2v", ["--batch_size", "65"], "--batch_size: 65; at most 64 videos in one run"),
    ("t2v", ["--micro_batch_size", "2"], "--micro_batch_size: 2 videos cannot pass a block together"),
    ("t2v", ["--residual_in", "disk"], "--residual_in: invalid choice"),
    *(
        ("t2v", ["--residual_in", "pinned", *flags], f"--residual_in: pinned {why}")
        for flags, why in (
            (["--attention_slicing", "True"], "makes keys and values of all heads in one go"),
            (["--cfg", "joint"], "takes one stream at a time through the blocks; use cfg sequential"),
            (["--batch_size", "2", "--micro_batch_size", "2"], "takes one stream at a time through the blocks"),
        )
    ),
    ("vace", ["--residual_in", "pinned"], "--residual_in: pinned keeps one stream, and vace-1.3B has a second one"),
    ("t2v", ["--weight_storage", "int4"], "--weight_storage: invalid choice"),
    ("t2v", ["--product_precision", "int8"], "--product_precision: invalid choice"),
    (
        "t2v",
        ["--product_precision", "fp8", "--precision", "fp16"],
        "--product_precision: fp8 gives its results in bf16",
    ),
    (
        "t2v",
        ["--product_precision", "fp8", "--precision", "bf16", "--device", "simulated", "--gpu", "rtx3090"],
        "product_precision: fp8 is computed on cards of compute capability 8.9 or newer; .* has 8.6; use same",
    ),
    ("t2v", ["--vae_tile", "4"], "--vae_tile: 4 must be at least 8"),
    ("t2v", ["--vae_precision", "fp8"], "--vae_precision: invalid choice"),
    ("t2v", ["--exchange_by", "copies"], "--exchange_by: copies is how several GPUs exchange"),
    *(
        ("t2v", ["--exchange_by", way, "--gpus", "2"], f"{way} is how GPUs exchange; with device cpu leave it at auto")
        for way in ("copies", "nccl")
    ),
    ("t2v", ["--exchange_by", "mpi", "--gpus", "2"], "--exchange_by: invalid choice"),
    ("t2v", ["--gpus", "2147483648"], "--gpus: 2147483648; at most 128 GPUs make a video together"),
    ("t2v", ["--ring_size", "64", "--ulysses_size", "3"], "at most 128 make a video together"),
    ("t2v", ["--gpus", "0"], "--gpus: 0 must be at least 1"),
    ("t2v", ["--gpus", "4", "--ulysses_size", "2"], "--gpus: 4, but cfg_size, ring_size and ulysses_size"),
    (
        "t2v",
        ["--gpus", "4", "--attention_slicing", "True"],
        "4 GPUs cannot share the work: ulysses_size: 2 GPUs attend",
    ),
    *(("t2v", [f"--{n}_size", "0"], f"--{n}_size: 0 must be at least 1") for n in ("cfg", "ulysses", "ring")),
    ("t2v", ["--ulysses_size", "5"], "--ulysses_size: 5 GPUs cannot share 4 heads; give at most 4"),
    ("t2v", ["--cfg_size", "3"], "--cfg_size: 3 GPUs cannot share two guidance passes"),
    ("t2v", ["--cfg_size", "2", "--cfg", "joint"], "--cfg_size: 2 GPUs make a guidance pass each"),
    ("t2v", ["--cfg_size", "2", "--sample_guide_scale", "1"], "--cfg_size: 2 GPUs share two guidance passes"),
    *(
        (
            "t2v",
            [f"--{n}_size", "2", "--attention_slicing", "True"],
            f"--{n}_size: 2 GPUs attend for all of their heads",
        )
        for n in ("ulysses", "ring")
    ),
    *(
        ("t2v", [f"--{flag}", "True"], f"--{flag}: true; several GPUs share weights")
        for flag in ("t5_fsdp", "dit_fsdp")
    ),
    ("t2v", ["--device", "tpu"], "--device: invalid choice"),
    ("t2v", ["--device", "simulated", "--gpu", "rtx9"], "rtx9"),
    ("t2v", ["--device", "simulated", "--link", "ethernet"], "--link: invalid choice"),
    *(
        ("t2v", [f"--vram={text}"], rf"--vram: '{text}' is not an amount of memory; write for example 8GiB")
        for text in ("0", "abc", "", "-8GiB", "nan")
    ),
    ("t2v", ["--vram", "9" * 400 + "G"], "--vram: '9+' is more memory than there is"),
    ("t2v", ["--vram", "8"], r"--vram: 8 what\? write 8GiB"),
    ("t2v", ["--vram_budget", "7.5"], r"--vram_budget: 7\.5 what\? write 7\.5GiB"),
    ("t2v", ["--vram_budget", "8GiB", "--ram", "32"], r"--ram: 32 what\? write 32GiB"),
]

BUDGET: list[Case] = [
    ("t2v", ["--vram_budget", "abc"], "'abc' is not an amount of memory"),
    ("t2v", ["--vram_budget", ""], "'' is not an amount of memory"),
    ("t2v", ["--vram_budget", "8GiB", "--ram", "abc"], "'abc' is not an amount of memory"),
    ("t2v", ["--vram_budget", "8GiB", "--vram", "8GiB"], "--vram_budget and --vram: give one of them"),
]

WHERE: list[Case] = [
    ("t2v", ["-without--ckpt_dir"], "--ckpt_dir is required"),
    ("t2v", ["--ckpt_dir", ""], "--ckpt_dir is required"),
    *(
        ("t2v", ["--ckpt_dir", name], rf"--ckpt_dir \S+ {what}; give a checkpoint directory, random or tiny")
        for name, what in {
            "{files}/absent": "does not exist",
            "x" * 300: "does not exist",
        }.items()
    ),
    ("t2v", ["--ckpt_dir", "{files}/good.png"], r"good\.png is a file; give the folder that holds it"),
    ("t2v", ["--ckpt_dir", "random"], "full-size random weights on the CPU would take hours"),
    (
        "t2v",
        ["--ckpt_dir", "{files}/nothing"],
        rf"{re.escape(T5_FILE)} does not exist.*\(dit, vae: not usable either\)",
    ),
    *(
        ("i2v", ["--ckpt_dir", f"{{files}}/{damage}{number}"], sentence.format(re.escape(name)))
        for number, name in enumerate((T5_FILE, VAE_FILE, CLIP_FILE, DIT_FILE, TOKENIZER_FILE))
        for damage, sentence in (("missing", "{0}.*expected|expected {0}"), ("cut", "{0} is (truncated or )?damaged"))
    ),
    ("flf2v", ["--ckpt_dir", "{files}/shard"], "diffusion_pytorch_model-00002-of-00003.safetensors does not exist"),
    ("i2v", ["--ckpt_dir", "{files}/flf2v"], r"36 input channels and 2 images \(\S+\) instead of .* 1 image \(\S+\)"),
    ("t2v", ["--ckpt_dir", "{files}/vace"], "and 2 VACE blocks .* instead of"),
    ("vace", ["--ckpt_dir", "{files}/t2v"], "instead of .* and 2 VACE blocks"),
    ("t2v", ["--ckpt_dir", "{files}/swapped"], "not those of text_encoder umt5-xxl"),
    ("t2v", ["--keep_every", "-1"], "--keep_every: -1 must be at least 0"),
    ("t2v", ["--resume", "{files}/none"], "--output: the run of --resume has its own; leave it out"),
    ("t2v", ["--save_file", "{files}/new.avi"], r"--save_file \S+: its name must end in \.mp4 or \.mkv or \.mov"),
    ("t2v", ["--save_file", ""], "--save_file .*its name must end in"),
    ("t2v", ["--task", "t2i-14B", "--frame_num", "1", "--save_file", "{files}/new.jpg"], r"must end in \.png"),
    ("t2v", ["--save_file", "{files}/existing.mp4"], r"--save_file \S+existing\.mp4 exists; give --force"),
    ("t2v", ["--save_file", "{files}/sidecar.mp4"], r"--save_file \S+sidecar\.json exists; give --force"),
    ("t2v", ["--save_file", "{files}/folder.mp4", "--force"], r"--save_file \S+folder\.mp4 is a directory"),
    ("t2v", ["--save_file", "x" * 300 + ".mp4"], "--save_file x+...: its name is too long"),
    ("t2v", ["--device", "simulated", "--save_file", "{files}/a.mp4"], "nothing is generated on the simulated device"),
    ("t2v", ["-o", "{files}/a-file"], "-o .*a-file is a file; name a directory"),
    ("t2v", ["--output", "{files}/a-file", "--force"], "-o .*a-file is a file; name a directory"),
    ("t2v", ["--config", "{files}/absent.yaml"], r"absent\.yaml cannot be read: No such file"),
    ("t2v", ["--config", "{files}/folder.png"], r"folder\.png cannot be read: it is a directory"),
    ("t2v", ["--config", "{files}/bad.yaml"], r"bad\.yaml: is not valid YAML at line \d"),
    ("t2v", ["--config", "{files}/list.yaml"], r"list\.yaml: the configuration is not a mapping"),
    ("t2v", ["--config", "{files}/unknown.yaml"], r"unknown\.yaml: request\.sampel_steps: .*did you mean sample_steps"),
    ("t2v", ["--config", "{files}/binary.yaml"], r"binary\.yaml is no text: byte 128 is not UTF-8"),
    ("t2v", ["--config", "{files}/frames.yaml"], r"frames\.yaml: request\.frame_num: 4 is not of the form"),
    *(("t2v", [f"--{flag}=yes"], f"--{flag}: ignored explicit argument") for flag in ("force", "json", "debug")),
    ("t2v", ["--fast"], "unrecognized arguments: --fast"),
    ("t2v", ["cat.png"], "unrecognized arguments: cat.png"),
]

REFUSED = [*MEDIA, *NUMBERS, *TEXTS, *HOW, *BUDGET, *WHERE]


def check_sentence(message: str) -> None:
    """One or two sentences on one line, and no traceback."""
    assert message.endswith("\n")
    assert message.count("\n") == 1, message
    assert "Traceback" not in message
    assert message.startswith("wanvram")
    assert len(re.findall(r"\.(?= [A-Z])", message)) <= 1, message


def _id(case: Case) -> str:
    return " ".join([case[0], *(Path(text).name[:24] for text in case[1])])


@pytest.mark.parametrize(("kind", "flags", "sentence"), REFUSED, ids=map(_id, REFUSED))
def test_bad_input_is_a_sentence_and_exit_code_2_before_any_model_is_loaded(
    kind: str, flags: list[str], sentence: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(kind, flags, files, tmp_path / "out") == 2
    captured = capsys.readouterr()
    check_sentence(captured.err)
    assert re.search(sentence, captured.err), captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists(), "a refused run leaves nothing behind"


def test_every_flag_of_generate_has_a_case() -> None:
    parser = argparse.ArgumentParser()
    generate.prepare_parser(parser)
    given = {text.partition("=")[0].removeprefix("-without") for _, flags, _ in REFUSED for text in flags}
    options = [action.option_strings for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    untested = [names for names in options if not given & set(names)]
    assert [names for names in untested if names != ["--prompt_extend_model"]] == []  # it has a test of its own


def test_a_missing_extension_model_is_refused_before_any_model_is_loaded(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    flags = ["--use_prompt_extend", "--prompt_extend_model", "{files}/absent"]
    assert call("t2v", flags, files, tmp_path / "out") == 2
    message = capsys.readouterr().err.splitlines()[-1] + "\n"  # before it comes progress
    check_sentence(message)
    assert re.search(r"files\d+/absent", message)


def test_a_run_directory_in_use_is_refused_with_its_files(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/video.mp4").write_bytes(b"precious")
    assert call("t2v", [], files, tmp_path / "out") == 2
    message = capsys.readouterr().err
    check_sentence(message)
    assert "already holds a run (video.mp4)" in message
    assert "--force" in message
    assert (tmp_path / "out/video.mp4").read_bytes() == b"precious"


def test_a_refused_save_file_leaves_the_earlier_run_alone_even_with_force(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/video.mp4").write_bytes(b"precious")
    assert call("t2v", ["--force", "--save_file", "{files}/new.avi"], files, tmp_path / "out") == 2
    assert (tmp_path / "out/video.mp4").read_bytes() == b"precious"
    check_sentence(capsys.readouterr().err)


@pytest.mark.parametrize("name", ["environment.mp4", "record.mp4", "memory_events.mkv"])
def test_a_save_file_whose_description_would_replace_a_file_of_the_run_is_refused(
    name: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("t2v", ["--force", "--save_file", str(tmp_path / "out" / name)], files, tmp_path / "out") == 2
    message = capsys.readouterr().err
    check_sentence(message)
    assert "would replace a file of the run" in message


def test_a_tokenizer_with_more_tokens_than_the_model_is_a_sentence(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is found when a prompt needs such a token, after the text encoder was loaded."""
    folder = tmp_path / "ckpt"
    shutil.copytree(files / "t2v", folder)
    path = folder / TOKENIZER_FILE
    write_tokenizer(path)
    content = json.loads(path.read_text())
    content["model"]["vocab"] += [[f"<{n}>", -20.0] for n in range(200)] + [["▁zebra", -1.0]]
    path.write_text(json.dumps(content))
    arguments = [*GOOD["t2v"], *COMMON, "--prompt", "zebra", "--ckpt_dir", str(folder), "-o", str(tmp_path / "out")]
    with tiny_models():
        assert main(["generate", *arguments]) == 2
    message = capsys.readouterr().err.splitlines()[-1] + "\n"
    check_sentence(message)
    assert "token_embedding.weight" in message


SAME_AS_GENERATE: list[tuple[list[str], str]] = [
    (["--frame_num", "4"], r"--frame_num: 4 is not of the form"),
    (["--size", "1280x720"], "--size: '1280x720' is not supported"),
    (["--sample_shift", "nan"], "--sample_shift: nan is outside"),
    (["--task", "i2v-14B", "--image", "{files}/giant.png"], "--image .*giant.png is 20000x20000"),
    (["--task", "i2v-14B", "--image", "{files}/thin.png"], "--image .*thin.png is too long and thin"),
    (["--task", "vace-1.3B", "--src_video", "{files}/text.mp4"], "--src_video .*text.mp4 is not a video"),
    (["--gpu", "rtx9"], "rtx9"),
]


@pytest.mark.parametrize(("flags", "sentence"), SAME_AS_GENERATE, ids=lambda value: str(value)[:40])
def test_an_estimate_refuses_the_same(
    flags: list[str], sentence: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--task", "t2v-1.3B", "--size", "832*480", *(f.replace("{files}", str(files)) for f in flags)]
    assert main(["estimate", *arguments, "-o", str(out)]) == 2
    message = capsys.readouterr().err
    check_sentence(message)
    assert re.search(sentence, message)
    assert not out.exists()


# --- other people's code -----------------------------------------------------------------------------------------------------

# verb, what follows it ({f}: a folder with a pipeline of diffusers, a script and damaged files), what is said
FOREIGN: list[tuple[str, list[str], str]] = [
    ("estimate", ["--diffusers", "{f}/absent"], "--diffusers .*absent has no model_index.json"),
    ("estimate", ["--diffusers", "{f}"], "has no model_index.json"),
    ("estimate", ["--diffusers", "{f}/Wan", "--height", "0"], r"--height: 0 is outside 1\.\.16384"),
    ("estimate", ["--diffusers", "{f}/Wan", "--height", "100000"], "--height: 100000 is outside"),
    ("estimate", ["--diffusers", "{f}/Wan", "--height", "tall"], "argument --height: invalid int value"),
    ("estimate", ["--diffusers", "{f}/Wan", "--width", "-64"], "--width: -64 is outside"),
    ("estimate", ["--diffusers", "{f}/Wan", "--width", "65"], "height. and .width. have to be divisible by 16"),
    ("estimate", ["--diffusers", "{f}/Wan", "--num_frames", "99999"], r"--num_frames: 99999 is outside 1\.\.4096"),
    ("estimate", ["--diffusers", "{f}/Wan", "--offload", "disk"], "argument --offload: invalid choice"),
    ("estimate", ["--diffusers", "{f}/Wan", "--dtype", "fp8"], "argument --dtype: invalid choice"),
    ("estimate", ["--diffusers", "{f}/Wan", "--vae_dtype", "fp8"], "argument --vae_dtype: invalid choice"),
    ("estimate", ["--diffusers", "{f}/Wan", "--task", "t2v-14B"], "--task says nothing about --diffusers"),
    ("estimate", ["--diffusers", "{f}/Wan", "--size", "832*480"], "--size says nothing about --diffusers"),
    ("estimate", ["--diffusers", "{f}/Wan", "--offload_model", "True"], "--offload_model says nothing about --diffus"),
    ("estimate", ["--diffusers", "{f}/Wan", "--memory_viz", "{f}/a.pickle"], "--memory_viz says nothing"),
    ("estimate", ["--diffusers", "{f}/Wan", "--gpu", "rtx9"], "rtx9"),
    ("estimate", ["--diffusers", "{f}/Wan", "--vram", "much"], "--vram"),
    ("estimate", ["--diffusers", "{f}/Wan", "--measured", "{f}/absent.json"], r"absent\.json cannot be read"),
    ("estimate", ["--diffusers", "{f}/Wan", "--measured", "{f}/text.json"], r"text\.json is no table that wanvram"),
    ("estimate", ["--diffusers", "{f}/Wan", "-o", "{f}"], "is not empty; give --force"),
    ("estimate", ["--offload", "model"], "--offload belongs to --diffusers DIR, which is missing"),
    ("estimate", ["--num_frames", "81"], "--num_frames belongs to --diffusers DIR"),
    ("estimate", ["--measured", "{f}/h200.json"], "--measured belongs to --diffusers DIR"),
    ("simulate", ["{f}/absent.py"], r"absent\.py is no file"),
    ("simulate", ["--gpu", "rtx9", "{f}/script.py"], "rtx9"),
    ("simulate", ["--vram", "much", "{f}/script.py"], "--vram"),
    ("simulate", ["-o", "{f}", "{f}/script.py"], "is not empty; give --force"),
    ("simulate", ["--measured", "{f}", "{f}/script.py"], "it is a directory"),
    ("simulate", ["--measured", "{f}/text.json", "{f}/script.py"], "is no table that wanvram harvest wrote"),
    ("simulate", ["--gpu", "rtx4090", "--measured", "{f}/h200.json", "{f}/script.py"], r"H200 \(sm_90\), not of"),
    ("harvest", ["-o", "{f}/text.json", "{f}/script.py"], "exists; give --force to replace it"),
    ("harvest", ["--force", "-o", "{f}/text.json", "{f}/absent.py"], "absent.py is no file"),
]


@pytest.mark.parametrize(("verb", "flags", "sentence"), FOREIGN, ids=lambda value: str(value)[:60])
def test_bad_input_of_what_simulates_foreign_code_is_a_sentence_and_exit_code_2(
    verb: str,
    flags: list[str],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    write_pipeline(tmp_path / "Wan")
    (tmp_path / "script.py").write_text("raise SystemExit('the script ran')", encoding="utf-8")
    (tmp_path / "text.json").write_text("words", encoding="utf-8")
    MeasuredTable(MeasuredDevice("NVIDIA H200", (9, 0), 132, "2.11.0", 91900), ()).write(tmp_path / "h200.json")
    before = sorted(tmp_path.rglob("*"))
    try:
        code = main([verb, *(flag.replace("{f}", str(tmp_path)) for flag in flags)])
    except SystemExit as ended:
        code = int(str(ended.code))
    assert code == 2
    captured = capsys.readouterr()
    check_sentence(captured.err)
    assert re.search(sentence, captured.err), captured.err
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before
