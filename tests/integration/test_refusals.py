"""A run that cannot happen fails before anything is planned or written, and says what is missing and what would help."""

from __future__ import annotations

import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from checkpoints import tiny_models, write_download
from wanvram.cli.main import main
from wanvram.engine.stage_progress import Count, Done, counted
from wanvram.machine import usable_gpu
from wanvram.machine.usable_gpu import what_hides_the_gpu
from wanvram.report.event_text import event_text
from wanvram.run.progress import StageProgress
from wanvram.run_events import RunEvent

T2V = ["--task", "t2v-1.3B", "--size", "832*480", "--prompt", "x"]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("download")
    write_download(folder, "tiny-t2v")
    return folder


# --- the checkpoint, then the GPU ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [[], ["--vram_budget", "8GiB"], ["--vram_budget", "auto"]])
def test_generate_looks_at_the_checkpoint_folder_first(
    budget: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *T2V, "--ckpt_dir", "./nope", *budget]) == 2
    assert capsys.readouterr().err == (
        "wanvram: --ckpt_dir ./nope does not exist; give a checkpoint directory, random or tiny\n"
    )
    (tmp_path / "empty").mkdir()
    assert main(["generate", *T2V, "--ckpt_dir", "empty", *budget]) == 2
    assert "models_t5_umt5-xxl-enc-bf16.pth does not exist" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_mistyped_folder_is_told_without_importing_torch(tmp_path: Path) -> None:
    code = "import sys; from wanvram.cli.main import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, "generate", *T2V, "--ckpt_dir", "nope"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert result.stdout == "2 False\n"


@pytest.mark.parametrize("device", [[], ["--device", "cuda"]])
def test_generate_without_a_usable_gpu_fails_and_writes_nothing(
    device: list[str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tiny_models():
        assert main(["generate", *T2V, "--ckpt_dir", str(checkpoint), *device, "-o", "out/run"]) == 1
    assert main(["generate", *T2V, "--weights", "random", *device]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == second
    assert first.startswith("wanvram: nothing was generated: ")
    assert first.endswith("`wanvram estimate` predicts memory and time without a GPU.")
    assert list(tmp_path.iterdir()) == []


def test_a_profile_on_a_real_device_looks_at_the_checkpoint_before_it_plans(capsys: pytest.CaptureFixture[str]) -> None:
    baseline = Path(__file__).parents[1] / "configs" / "baseline.yaml"
    Path("run.yaml").write_text(baseline.read_text(encoding="utf-8").replace("fp16", "fp32"), encoding="utf-8")
    budget = ["--weights", "nope", "--vram_budget", "1MiB"]
    assert main(["profile", "run.yaml", "--device", "cpu", *budget]) == 2
    assert "--ckpt_dir nope does not exist" in capsys.readouterr().err


def test_a_simulated_generate_says_at_its_end_that_nothing_was_generated(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--weights", "tiny", "--device", "simulated"]
    said = "Nothing was generated: the device is simulated, which computes sizes and no pixels.\n"
    assert main([*command, "-o", "a"]) == 0
    assert capsys.readouterr().out.endswith(said)
    assert main([*command, "-o", "b", "--json"]) == 0
    printed = capsys.readouterr()
    assert (printed.out.count("\n"), printed.err.endswith(said)) == (1, True)
    assert not list(Path().glob("*/*.mp4"))


class FakeNvml:
    """The driver's library as far as it is asked; cuda 12040 is CUDA 12.4."""

    class NVMLError(Exception):
        pass

    def __init__(self, count: int | None = 1, cuda: int = 13000) -> None:
        self.count, self.cuda = count, cuda

    def nvmlInit(self) -> None:
        if self.count is None:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlSystemGetDriverVersion(self) -> str:
        return "550.1"

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return self.cuda

    def nvmlDeviceGetCount(self) -> int:
        return int(self.count or 0)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index


CASES: dict[str, tuple[str | None, FakeNvml, str | None, str, str]] = {
    "a CPU build": (
        None,
        FakeNvml(1),
        None,
        r"torch \S+ is a CPU build.*sees 1 GPU",
        "^install the CUDA build of torch",
    ),
    "a CPU build without a GPU": (
        None,
        FakeNvml(None),
        None,
        "no NVIDIA driver answers here either",
        "on a machine with",
    ),
    "no driver": ("13.0", FakeNvml(None), None, "^no NVIDIA driver answers here$", "install the driver"),
    "no GPU": (
        "13.0",
        FakeNvml(0),
        None,
        "the NVIDIA driver 550.1 sees no GPU",
        "give this machine or container a GPU",
    ),
    "an old driver": ("13.0", FakeNvml(1, 12040), None, "too old: it runs CUDA 12.4, .* is built for 13.0", "CUDA 12 "),
    "hidden": ("13.0", FakeNvml(2), "", "CUDA_VISIBLE_DEVICES is '', which hides the 2 GPU", "change or unset it"),
    "hidden by -1": ("13.0", FakeNvml(2), "-1", "CUDA_VISIBLE_DEVICES is '-1', which hides", "change or unset it"),
    "another reason": ("13.0", FakeNvml(1), "0", r"cannot start CUDA \(it does not say why\)", "wanvram check"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_hides_the_gpu_is_named_with_what_would_help(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built_for, nvml, visible, why, remedy = CASES[case]
    monkeypatch.setattr(usable_gpu.torch, "version", SimpleNamespace(cuda=built_for))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    obstacle = what_hides_the_gpu(nvml)
    assert obstacle is not None
    assert re.search(why, obstacle.why), obstacle
    assert re.search(remedy, obstacle.remedy), obstacle


def test_nothing_hides_a_gpu_that_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert what_hides_the_gpu(FakeNvml()) is None


# --- what runs without a GPU -----------------------------------------------------------------------------------------------


def test_the_command_alone_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("usage: wanvram ")
    assert (all(verb in printed.out for verb in ("generate", "estimate", "check")), printed.err) == (True, "")


TRY = ["generate", "--weights", "tiny"]


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ([], "fp32"),
        (["--device", "cpu"], "fp32"),
        (["--precision", "bf16"], "bf16"),
        (["--device", "simulated"], "fp16"),
    ],
)
def test_on_the_cpu_the_default_precision_is_one_that_runs(flags: list[str], precision: str) -> None:
    assert main([*TRY, *flags, "-o", "run"]) == 0
    config = yaml.safe_load(Path("run/config.yaml").read_text(encoding="utf-8"))
    assert config["model_config"]["precision"] == precision
    small = {key: config["request"][key] for key in ("size", "frame_num", "sample_steps")}
    assert small == {"size": "128*80", "frame_num": 9, "sample_steps": 4}


def test_fp16_on_the_cpu_is_refused_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TRY, "--precision", "fp16"]) == 2
    assert capsys.readouterr().err.startswith("wanvram: --precision: fp16 has no fast CPU kernels; use bf16 or fp32")


@pytest.mark.parametrize("task", ["t2i-14B", "i2v-14B", "flf2v-14B", "vace-1.3B"])
def test_every_task_has_a_first_try_with_tiny_weights(task: str) -> None:
    assert main([*TRY, "--task", task, "-o", "run"]) == 0
    assert len(list(Path("run").glob("video.mp4")) + list(Path("run").glob("image.png"))) == 1


@pytest.mark.parametrize("size", ["100*80", "16*2048", "96*064", "0*16"])
def test_tiny_weights_make_sizes_in_multiples_of_16_and_others_only_official_ones(
    size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TRY, "--size", size]) == 2
    assert f"--size: '{size}' is not supported by t2v-1.3B" in capsys.readouterr().err
    assert main(["estimate", "--task", "t2v-1.3B", "--size", "96*64"]) == 2
    assert "--size: '96*64' is not supported by t2v-1.3B" in capsys.readouterr().err


def test_a_configuration_of_tiny_weights_is_generated_on_the_cpu_and_can_be_estimated() -> None:
    text = "{name: small, request: {weights: tiny, task: t2v-1.3B, size: 64*32, frame_num: 5, sample_steps: 1}}"
    Path("small.yaml").write_text(text, encoding="utf-8")
    assert main(["generate", "--config", "small.yaml", "-o", "run"]) == 0
    assert Path("run/video.mp4").is_file()
    assert main(["estimate", "--config", "small.yaml"]) == 0


def test_a_budget_for_tiny_weights_is_refused_because_plans_are_of_full_size_models(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*TRY, "--vram_budget", "8GiB"]) == 2
    assert "--vram_budget: a plan is of full-size models" in capsys.readouterr().err


# --- how far it is -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("tile", [[], ["--vae_tile", "8"]])
def test_every_stage_says_how_far_it_is(device: str, tile: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--weights", "tiny", "--task", "i2v-14B", "--device", device, "--precision", "fp32", *tile]
    assert main(["generate", *flags, "-o", "run"]) == 0
    said = capsys.readouterr().err
    tiles = 2 if tile else 1  # 16 x 10 latent pixels: two rows of two tiles
    for stage in ("encode_text: 2 of 2 blocks", "encode_image: 1 of 1 blocks", "denoise: 4 of 4 steps"):
        assert stage in said
    assert f"encode_video: {9 * tiles**2} of {9 * tiles**2} frames" in said
    assert ("decode: 4 of 4 tiles" if tile else "decode: 9 of 9 frames") in said
    assert ("simulated" in said) == (device == "simulated")


def test_of_a_vace_run_references_and_both_halves_of_the_source_count(capsys: pytest.CaptureFixture[str]) -> None:
    main([*TRY, "-o", "source"])
    main([*TRY, "--task", "vace-1.3B", "--src_video", "source/video.mp4", "-o", "run"])
    assert "encode_video: 18 of 18 frames" in capsys.readouterr().err


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The sentences of a stage whose reports come at the given seconds."""

    def tell(moments: list[float], *, simulated: bool, total: int = 81) -> list[str]:
        clock = iter([0.0, *moments])
        monkeypatch.setattr("wanvram.run.progress.time.monotonic", lambda: next(clock))
        events: list[RunEvent] = []
        count = Count(StageProgress(events.append, simulated=simulated), "decode", total, "frames")
        for _ in moments:
            count.add(4)
        return [event_text(event) for event in events]

    return tell


def test_the_time_left_is_that_of_the_frames_since_the_first_report(told: Callable[..., list[str]]) -> None:
    said = told([5.0, 6.0, 9.0], simulated=False)
    assert said == ["decode: 4 of 81 frames", "decode: 12 of 81 frames, 0.50 s each, 34.5 s left"]


def test_a_simulation_tells_only_its_own_end(told: Callable[..., list[str]]) -> None:
    said = told([5.0, 6.0, 9.0], simulated=True)
    assert said[-1] == "decode: 12 of 81 frames simulated; the simulation has 34.5 s left"
    assert told([0.1, 0.2], simulated=True, total=8) == ["decode: 8 of 8 frames simulated"]


def test_counting_holds_no_piece_while_it_is_worked_on() -> None:
    class Piece:
        pass

    reports: list[Done] = []
    pieces: Any = (Piece() for _ in range(3))
    for piece in counted(pieces, Count(reports.append, "s", 3, "pieces"), lambda _: 1):
        gone = weakref.ref(piece)
        del piece
        assert gone() is None
    assert [(done.number, done.left) for done in reports] == [(1, 2), (2, 1), (3, 0)]
