"""`estimate --diffusers DIR`: pipelines from their configurations alone; what is not known or not allowed is a sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline_folders import KINDS, write_pipeline
from wanvram.cli.main import main
from wanvram.errors import InputError
from wanvram.foreign import components
from wanvram.foreign.pipeline_folder import MAX_JSON_BYTES, read_pipeline_folder
from wanvram.foreign.pipeline_run import OFFLOADS, PipelineCall, run_pipeline
from wanvram.foreign.session import SimulatedRun, simulated_gpu

SMALL = PipelineCall(height=64, width=64, num_frames=5)


def simulated(folder: Path, call: PipelineCall = SMALL, gpu: str = "h200", vram: str | None = None) -> SimulatedRun:
    with simulated_gpu(gpu, vram=vram) as run:
        run_pipeline(read_pipeline_folder(folder), call, run)
    return run


def change(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | values), encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_of_pipelines_runs_from_its_configurations(kind: str, tmp_path: Path) -> None:
    video = kind in ("WanPipeline", "LTXPipeline")
    run = simulated(write_pipeline(tmp_path / "p", kind), PipelineCall(64, 64, 9 if video else None))
    calls = {stage.name: stage.calls for stage in run.stages}
    main_part = "unet" if "unet" in KINDS[kind] else "transformer"
    assert calls[main_part] >= 3
    assert calls["vae.decode"] == calls["load"] == 1
    assert run.stages[0].name == "load"
    assert run.peak.allocated_bytes >= max(stage.peak_allocated_bytes for stage in run.stages) > 0
    assert not torch.cuda.is_available()


def test_loading_takes_the_parameters_of_all_components_in_their_types(tmp_path: Path) -> None:
    import diffusers
    from transformers import UMT5Config, UMT5EncoderModel

    parts = KINDS["WanPipeline"]
    with torch.device("meta"):
        models = {
            "text_encoder": UMT5EncoderModel(UMT5Config(**parts["text_encoder"][2])),
            "transformer": diffusers.WanTransformer3DModel(**parts["transformer"][2] or {}),
            "vae": diffusers.AutoencoderKLWan(**parts["vae"][2] or {}),
        }
    expected = 0
    for name, model in models.items():
        kept = set(getattr(model, "_keep_in_fp32_modules", None) or ()) if name == "transformer" else set()
        for key, parameter in model.named_parameters():
            wide = name == "vae" or kept & set(key.split("."))
            expected += -(-parameter.numel() * (4 if wide else 2) // 512) * 512
    run = simulated(write_pipeline(tmp_path / "p"), PipelineCall(64, 64, 5, vae_dtype="fp32"))
    load = run.stages[0]
    buffers = load.end.allocated_bytes - expected
    assert 0 <= buffers < 0.1 * expected, (load.end.allocated_bytes, expected)


def test_offloading_keeps_the_weights_on_the_host_while_they_are_loaded(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "p")
    loaded = {}
    for offload in OFFLOADS:
        run = simulated(folder, PipelineCall(64, 64, 5, offload))
        loaded[offload] = run.stages[0].end.allocated_bytes
        assert run.fits
        assert {stage.name: stage.calls for stage in run.stages}["transformer"] == 6
    assert loaded["none"] > 100_000
    assert max(loaded[name] for name in OFFLOADS[1:]) < loaded["none"] / 10


def test_a_card_that_is_too_small_is_said_and_the_run_ends(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "p")
    run = simulated(folder, PipelineCall(480, 832, 81), "rtx4060", "900MiB")
    assert not run.fits
    assert run.refused_bytes > 0


def test_a_tokenizer_whose_files_are_there_is_the_real_one(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    folder = write_pipeline(tmp_path / "p", "FluxPipeline")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 3, "<unk>": 1, "<pad>": 0}, unk_token="<unk>"))
    made.save(str(folder / "tokenizer_2" / "tokenizer.json"))
    (folder / "tokenizer_2" / "tokenizer_config.json").write_text('{"pad_token": "<pad>", "unk_token": "<unk>"}')
    change(folder, "model_index.json", tokenizer_2=["transformers", "PreTrainedTokenizerFast"])
    assert simulated(folder, PipelineCall(64, 64)).fits
    saved = json.loads((folder / "tokenizer_2" / "tokenizer.json").read_text())
    replacing = {"type": "Replace", "pattern": {"String": "."}, "content": "." * 100}
    saved["normalizer"] = {"type": "Sequence", "normalizers": [replacing] * 4}  # 5 GiB, then SIGABRT
    (folder / "tokenizer_2" / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(InputError, match=r"tokenizer in .*tokenizer_2 is damaged: reading it ends the process"):
        simulated(folder, PipelineCall(64, 64))


# --- what is refused ---------------------------------------------------------------------------------------------------------

HOSTILE: list[tuple[str, dict[str, Any], str]] = [
    ("model_index.json", {"vae": ["os", "system"]}, "vae .*os is neither diffusers nor transformers"),
    ("model_index.json", {"vae": ["diffusers", "__loader__"]}, "vae is a list of 2"),
    ("model_index.json", {"vae": ["diffusers.models", "AutoencoderKLWan"]}, "vae is a list of 2"),
    ("model_index.json", {"vae": ["diffusers", "AutoencoderOfTomorrow"]}, "has no class AutoencoderOfTomorrow"),
    ("model_index.json", {"vae": ["diffusers", "WanPipeline"]}, "WanPipeline is no model, scheduler"),
    ("model_index.json", {"vae": ["diffusers", "logging"]}, "has no class logging"),
    ("model_index.json", {"vae": ["wan", "pipeline_wan"]}, "has no class pipeline_wan"),
    ("model_index.json", {"_class_name": "OnnxRuntimeModel"}, "OnnxRuntimeModel is no pipeline"),
    ("model_index.json", {"_class_name": "../evil"}, "_class_name is '../evil'"),
    ("model_index.json", {"_class_name": ["WanPipeline", "pipeline.py"]}, "_class_name is a list"),
    ("model_index.json", {"../vae": ["diffusers", "AutoencoderKLWan"]}, "no name of a component"),
    ("model_index.json", {"vae": [None, None]}, "WanPipeline cannot be run"),
    ("model_index.json", {f"x{n}": ["diffusers", "A"] for n in range(40)}, "names 45 components"),
    ("transformer/config.json", {"num_layers": 10_000_000}, "over 500 modules"),
    ("transformer/config.json", {"num_layers": 10**15}, "is too large for a configuration"),
    ("transformer/config.json", {"num_layers": "many"}, r"component transformer \(diffusers.WanTransformer3DModel\)"),
    ("transformer/config.json", {"quantization_config": {"quant_method": "gguf"}}, "quantized weights"),
    ("text_encoder/config.json", {"d_model": -1}, "component text_encoder"),
    ("text_encoder/config.json", {"num_heads": 0.5}, "component text_encoder"),
    ("scheduler/scheduler_config.json", {"solver_type": "evil"}, "component scheduler"),
]


@pytest.mark.parametrize(("file", "values", "sentence"), HOSTILE, ids=lambda value: str(value)[:50])
def test_what_cannot_be_built_is_a_sentence_that_names_it(
    file: str, values: dict[str, Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(components, "MAX_MODULES", 500)
    folder = write_pipeline(tmp_path / "p")
    change(folder, file, **values)
    with pytest.raises(InputError, match=sentence):
        simulated(folder)
    assert not torch.cuda.is_available()


def test_code_that_a_configuration_names_is_not_looked_at(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "p")
    plain = simulated(folder).peak
    evil = {"auto_map": {"AutoModel": "evil.Model"}, "_attn_implementation": "someone/kernel", "dtype": "float64"}
    change(folder, "text_encoder/config.json", **evil)
    (folder / "text_encoder" / "evil.py").write_text("raise SystemExit('run')", encoding="utf-8")
    assert simulated(folder).peak == plain


def test_a_missing_damaged_or_endless_file_is_a_sentence(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "p")
    path = folder / "vae" / "config.json"
    for content, sentence in (
        (b"{" * 5000, "vae/config.json is no readable JSON"),
        (b"[1, 2]", "vae/config.json is a list of 2"),
        (b"\xff\xfe", "is no text"),
        (b" " * (MAX_JSON_BYTES + 1), "which is the most that is read"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=sentence):
            simulated(folder)
    path.unlink()
    with pytest.raises(InputError, match=r"vae/config\.json cannot be read"):
        simulated(folder)
    os.mkfifo(path)
    with pytest.raises(InputError, match="not a regular file"):
        simulated(folder)


def test_what_a_pipeline_needs_beside_is_named(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "p", "FluxPipeline")
    with pytest.raises(InputError, match="--num_frames: FluxPipeline takes no num_frames"):
        simulated(folder, PipelineCall(64, 64, 5))
    change(folder, "model_index.json", _class_name="FluxControlNetPipeline")
    with pytest.raises(InputError, match="FluxControlNetPipeline needs a component controlnet"):
        simulated(folder, PipelineCall(64, 64))


# --- the command -------------------------------------------------------------------------------------------------------------


def test_the_command_reports_and_writes_a_run_that_analyze_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = write_pipeline(tmp_path / "Wan"), tmp_path / "run"
    size = ["--height", "64", "--width", "64", "--num_frames", "5", "--offload", "model"]
    assert main(["estimate", "--diffusers", str(folder), *size, "--gpu", "rtx4090", "--json", "-o", str(out)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [stage["name"] for stage in document["stages"]] == ["load", "text_encoder", "transformer", "vae.decode"]
    assert main(["analyze", str(out), "--json"]) == 0
    analysis = json.loads(capsys.readouterr().out)
    assert analysis["peak"]["allocated_bytes"] == document["peak"]["allocated_bytes"]
    assert analysis["config"]["description"].startswith("--diffusers Wan --height 64")
    assert main(["report", str(out), "--format", "text"]) == 0
    assert "--advice" not in capsys.readouterr().out
    assert main(["analyze", str(out), "--advice"]) == 2


def test_the_command_says_with_3_that_it_does_not_fit(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "Wan")
    arguments = ["--diffusers", str(folder), "--height", "480", "--width", "832", "--vram", "900MiB"]
    assert main(["estimate", *arguments]) == 3
