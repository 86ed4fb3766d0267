"""The commands as a user meets them: a real video on the CPU, predictions, and what bad input says."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wanvram.cli.main import main

TINY = ["--weights", "tiny", "--device", "cpu", "--task", "t2v-1.3B", "--size", "832*480", "--precision", "fp32"]
SHORT = ["--size", "128*80", "--frame_num", "5", "--sample_steps", "2", "--base_seed", "3", "--prompt", "a cat"]
BASELINE = Path(__file__).parent.parent / "configs" / "baseline.yaml"


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "wanvram", *arguments], capture_output=True, text=True, timeout=240, check=False
    )


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "run"
    assert main(["generate", *TINY, *SHORT, "-o", str(directory)]) == 0
    return directory


def test_a_tiny_model_writes_a_video_that_a_player_opens(tiny_run: Path) -> None:
    import av

    with av.open(str(tiny_run / "video.mp4")) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 16)
    assert [(f.width, f.height) for f in frames] == [(128, 80)] * 5


def test_videos_that_lie_elsewhere_are_among_the_files_that_are_said_to_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--size", "16*16", "--frame_num", "1", "--sample_steps", "1", "--prompt", "x", "--batch_size", "2"]
    where = ["-o", str(tmp_path / "run"), "--save_file", str(tmp_path / "shown" / "cat.mp4")]
    assert main(["generate", *TINY, *small, *where]) == 0
    said = [line.removeprefix("Wrote ") for line in capsys.readouterr().out.splitlines() if line.startswith("Wrote ")]
    assert [str(tmp_path / "shown" / f"cat-00{n}.mp4") for n in (1, 2)] == [p for p in said if p.endswith(".mp4")]
    assert all(Path(path).is_file() for path in said)


def test_the_run_directory_holds_the_record_the_events_and_the_configuration(tiny_run: Path) -> None:
    assert {p.name for p in tiny_run.iterdir()} == {
        "record.json",
        "memory_events.json",
        "config.yaml",
        "environment.json",
        "video.mp4",
        "video.json",
    }
    record = json.loads((tiny_run / "record.json").read_text())
    names = [stage["name"] for stage in record["stages"]]
    assert names == [
        "load text_encoder",
        "encode_text",
        "load dit",
        "prepare",
        "denoise",
        "load vae",
        "decode",
        "save",
    ]
    assert [c["name"] for c in record["components"]] == ["text_encoder", "dit", "vae"]
    assert all(c["activation_bytes"] > 0 and c["base_bytes"] > 0 for c in record["components"])
    events = json.loads((tiny_run / "memory_events.json").read_text())
    assert len(events) >= 2 * len(names)


def test_a_run_is_not_overwritten_without_force(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *TINY, *SHORT, "-o", str(tiny_run)]) == 2
    assert "--force" in capsys.readouterr().err


def test_the_baseline_is_predicted_at_full_size_without_a_gpu(tmp_path: Path) -> None:
    start = time.monotonic()
    result = run_command("profile", str(BASELINE), "--device", "simulated", "-o", str(tmp_path / "run"), "--json")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["device"] == "simulated:h200"
    assert record["schema"] == 1
    assert record["peak"]["device_bytes"] > record["peak"]["reserved_bytes"] >= record["peak"]["allocated_bytes"]
    assert time.monotonic() - start < 60


def test_estimate_says_with_its_exit_code_that_a_run_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--task", "t2v-1.3B", "--size", "832*480", "--frame_num", "5", "--sample_steps", "3"]
    assert main(["estimate", *flags, "--load_strategy", "full", "--vram", "1GiB"]) == 3
    out = capsys.readouterr().out
    assert "oom" in out
    assert "SIMULATED" in out
    assert main(["estimate", *flags, "--vram", "12GiB"]) == 0


@pytest.mark.parametrize("steps", [9, 10, 11, 12])
def test_simulating_a_few_steps_predicts_the_same_peaks_as_simulating_all(steps: int) -> None:
    from dataclasses import replace

    from wanvram.config import load_config
    from wanvram.engine import pipeline
    from wanvram.predict.simulate import simulate

    config = load_config(BASELINE)
    request = replace(config.request, frame_num=5, sample_steps=steps)
    config = replace(config, device="simulated", weights="tiny", request=request)
    short, _ = simulate(config)
    original = pipeline.SIMULATED_STEPS
    try:
        pipeline.SIMULATED_STEPS = 100
        full, _ = simulate(config)
    finally:
        pipeline.SIMULATED_STEPS = original
    a, b = ([(s.name, s.start, s.peak, s.end) for s in r.stages] for r in (short, full))
    assert a == b
    denoise = next(s for s in short.stages if s.name == "denoise")
    assert sum(child.repeats for child in denoise.children) == steps


def test_loading_any_component_peaks_at_its_base_memory() -> None:
    from dataclasses import replace

    from wanvram.config import load_config
    from wanvram.predict.simulate import simulate

    config = load_config(BASELINE)
    strategy = replace(config.strategy, load_strategy="full")
    request = replace(config.request, frame_num=5, sample_steps=1)
    record, _ = simulate(replace(config, device="simulated", strategy=strategy, request=request))
    loads = [s for s in record.stages if s.kind == "load"]
    assert len(loads) == 3
    for span in loads:
        assert span.peak.allocated_bytes == span.end.allocated_bytes, span.name


BAD_YAML = {
    "malformed": ("name: [", "line"),
    "unknown key": ("name: x\nmodel_config: {precison: bf16}", "precision"),
    "wrong type": ("name: x\noptimization: {attention_slicing: 'yes please'}", "attention_slicing"),
    "bad frames": ("name: x\nrequest: {task: t2v-1.3B, size: 832*480, frame_num: 80}", "4n+1"),
    "bad size": ("name: x\nrequest: {task: t2v-1.3B, size: 1280*720}", "832*480"),
    "several GPUs": (
        "name: x\nrequest: {task: t2v-1.3B, size: 832*480}\noptimization: {ulysses_size: 2, parallel_degree: 3}",
        "parallel_degree",
    ),
    "alias bomb": ("a: &a [x,x]\nb: &b [*a,*a]\nname: *b", ""),
    "executes code": ("name: !!python/object/apply:os.system ['touch /tmp/wanvram-pwned']", ""),
}


@pytest.mark.parametrize("case", BAD_YAML)
def test_a_bad_configuration_is_one_sentence_and_exit_code_2(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, mentions = BAD_YAML[case]
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert main(["profile", str(path), "--device", "simulated", "-o", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "bad.yaml" in message
    assert mentions in message
    assert "Traceback" not in message
    assert not Path("/tmp/wanvram-pwned").exists()


class _Executes:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch /tmp/wanvram-pwned",)


@pytest.mark.parametrize("content", ["missing", "truncated", "executing pickle"])
def test_a_bad_checkpoint_is_named_and_never_executed(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "ckpt"
    checkpoint.mkdir()
    (checkpoint / "google" / "umt5-xxl").mkdir(parents=True)
    (checkpoint / "google" / "umt5-xxl" / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}})
    )
    file = checkpoint / "models_t5_umt5-xxl-enc-bf16.pth"
    if content == "truncated":
        file.write_bytes(b"PK\x03\x04 and no more")
    if content == "executing pickle":
        file.write_bytes(pickle.dumps(_Executes()))
    flags = ["--task", "t2v-1.3B", "--size", "832*480", "--device", "cpu", "--precision", "fp32"]
    code = main(["generate", *flags, "--ckpt_dir", str(checkpoint), "-o", str(tmp_path / "out")])
    assert code == 2
    message = capsys.readouterr().err
    assert "models_t5_umt5-xxl-enc-bf16.pth" in message
    assert not Path("/tmp/wanvram-pwned").exists()


def test_cuda_without_cuda_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert main(["profile", str(BASELINE), "--device", "cuda", "-o", str(tmp_path / "out")]) == 1
    assert "--device simulated" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_written_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    code = main(["profile", str(BASELINE), "--device", "simulated", "-o", str(tmp_path / "file" / "out")])
    assert code == 1
    assert "cannot write" in capsys.readouterr().err


def test_a_full_disk_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code = main(["profile", str(BASELINE), "--device", "simulated", "--weights", "tiny", "-o", str(tmp_path / "out")])
    assert code == 1
    assert "No space left" in capsys.readouterr().err


def test_running_out_of_memory_is_a_recorded_result(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    code = main(["profile", str(BASELINE), "--device", "simulated", "--vram", "1GiB", "-o", str(directory)])
    assert code == 3
    record = json.loads((directory / "record.json").read_text())
    assert record["failure"]["kind"] == "oom"
    assert record["failure"]["stage"]
    assert record["failure"]["requested_bytes"] > 0
    assert record["failure"]["alive"]
    assert record["stages"], "what was recorded before the failure is kept"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_keeps_the_events_it_had_logged(sent: signal.Signals, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    command = [sys.executable, "-m", "wanvram", "generate", *TINY, "--frame_num", "81", "--sample_steps", "50"]
    process = subprocess.Popen(
        [*command, "-o", str(directory)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job of a script ignores it
    )
    events = directory / "memory_events.json"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (events.exists() and events.read_text().count('"name"') >= 3):
        time.sleep(0.1)
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"Traceback" not in stderr
    assert len(json.loads(events.read_text())) >= 3
    assert not (directory / "video.mp4").exists()
    if sent is signal.SIGINT:
        assert json.loads((directory / "record.json").read_text())["failure"]["kind"] == "interrupted"


def test_json_prints_one_document_and_nothing_else() -> None:
    flags = ["--task", "t2v-1.3B", "--size", "832*480", "--frame_num", "5", "--sample_steps", "2", "--json"]
    result = run_command("estimate", *flags)
    assert result.returncode == 0
    assert json.loads(result.stdout)["schema"] == 1


def test_every_verb_has_help_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (
        "profile",
        "estimate",
        "generate",
        "plan",
        "report",
        "convert",
        "compare",
        "check",
        "analyze",
        "simulate",
        "harvest",
    ):
        with pytest.raises(SystemExit) as caught:
            main([verb, "--help"])
        assert caught.value.code == 0
        assert "examples:" in capsys.readouterr().out


def test_bf16_on_a_card_without_it_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--task", "t2v-1.3B", "--size", "832*480", "--precision", "bf16", "--gpu", "t4"]
    assert main(["estimate", *flags]) == 2
    assert "use fp16" in capsys.readouterr().err
