"""`wanvram convert`: what it writes loads as the source does; it resumes, refuses what it must, and states its error."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unit.test_checkpoint_layouts import filled, write_diffusers, write_official
from wanvram.cli.convert import prepare_parser, run
from wanvram.errors import CheckpointError, InputError, OutputError
from wanvram.weights import convert as module
from wanvram.weights.convert import Conversion, convert, verify
from wanvram.weights.official import COMPONENTS, blueprint, check_checkpoint, open_checkpoint, tokenizer_file
from wanvram.weights.sources import MANIFEST

HALF_STEP = 16 / 448  # of a row's largest value: fp8's values from 256 to 448 are 32 apart


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_official(folder, "tiny-vace", sharded=True)
    return folder


def _dtypes(component: str, model: str, precision: str) -> dict[str, torch.dtype]:
    built, _ = blueprint(component, model, precision)
    return {key: p.dtype for key, p in built.named_parameters()}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("dit", ["tiny-t2v", "tiny-flf2v", "tiny-vace"])
def test_a_converted_folder_loads_as_its_source_does(tmp_path: Path, dit: str, precision: str) -> None:
    (tmp_path / "in").mkdir()
    write_diffusers(tmp_path / "in", dit)
    manifest = convert(Conversion(tmp_path / "in", precision), tmp_path / "out")
    components = [c for c in COMPONENTS if c != "image_encoder" or dit == "tiny-flf2v"]
    assert manifest["models"] == {c: dit if c == "dit" else "tiny" for c in components}
    check_checkpoint(tmp_path / "out", components, dit)
    for component in components:
        before, after = open_checkpoint(tmp_path / "in", component), open_checkpoint(tmp_path / "out", component)
        dtypes = _dtypes(component, dit if component == "dit" else "tiny", precision)
        assert sorted(after.keys()) == sorted(dtypes)
        for key, dtype in dtypes.items():
            assert torch.equal(filled(after, key, dtype), filled(before, key, dtype)), key
    assert tokenizer_file(tmp_path / "out").read_text() == tokenizer_file(tmp_path / "in").read_text()


def test_every_block_is_a_file_of_its_own_in_the_dtypes_of_the_model(source: Path, tmp_path: Path) -> None:
    manifest = convert(Conversion(source, "bf16"), tmp_path)
    files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert files == set(manifest["files"]) | {MANIFEST}
    assert {name for name in files if name.startswith("dit/")} == {
        "dit/shell.safetensors",
        *(f"dit/blocks.{n}.safetensors" for n in range(4)),
        *(f"dit/vace_blocks.{n}.safetensors" for n in range(2)),
    }
    assert Counter(entry["component"] for entry in manifest["files"].values())["tokenizer"] == 2
    dtypes = _dtypes("dit", "tiny-vace", "bf16")
    for name in files - {MANIFEST}:
        assert (tmp_path / name).stat().st_size == manifest["files"][name]["bytes"]
        if name.startswith("dit/"):
            tensors = load_file(tmp_path / name)  # the library reads what is written here
            assert set(tensors) == set(manifest["files"][name]["keys"])
            assert all(tensor.dtype == dtypes[key] for key, tensor in tensors.items())
    assert json.loads((tmp_path / MANIFEST).read_text()) == manifest
    assert verify(tmp_path, manifest) == len(files) - 1


def test_fp8_keeps_every_weight_within_half_a_step_and_states_the_largest_error(source: Path, tmp_path: Path) -> None:
    manifest = convert(Conversion(source, "fp8", components=("dit",)), tmp_path)
    before, after = open_checkpoint(source, "dit"), open_checkpoint(tmp_path, "dit")
    assert sorted(after.keys()) == sorted(_dtypes("dit", "tiny-vace", "bf16"))
    worst = 0.0
    for key, dtype in _dtypes("dit", "tiny-vace", "bf16").items():
        exact, loaded = filled(before, key), filled(after, key)
        if "blocks." in key and exact.dim() == 2:
            worst = max(worst, float(((loaded - exact).abs() / exact.abs().amax(1, keepdim=True)).max()))
            assert torch.equal(filled(after, key, torch.bfloat16), loaded.bfloat16())
            assert torch.equal(after.rows(key, [3, 1]), loaded[[3, 1]])
        else:
            assert torch.equal(loaded, exact.to(dtype).float()), key
    assert 0.02 < worst <= HALF_STEP * 1.001
    assert manifest["fp8"]["max_error_of_row_maximum"] == pytest.approx(worst, rel=1e-5)
    assert 0.005 < manifest["fp8"]["max_relative_rms_error"] < 0.05
    assert manifest["fp8_components"] == ["dit"]


def test_fp8_stores_one_byte_per_weight_and_one_float_per_row(source: Path, tmp_path: Path) -> None:
    convert(Conversion(source, "fp8", components=("dit", "text_encoder"), fp8_text_encoder=True), tmp_path)
    with safe_open(str(tmp_path / "text_encoder/blocks.1.safetensors"), "pt") as file:
        kinds = {key.removeprefix("blocks.1."): file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert kinds["ffn.fc1.weight"] == torch.float8_e4m3fn
    assert kinds["ffn.fc1.weight.scale"] == torch.float32
    assert kinds["norm1.weight"] == kinds["pos_embedding.embedding.weight"] == torch.bfloat16
    assert len([kind for kind in kinds.values() if kind == torch.float8_e4m3fn]) == 7


def test_fp8_of_zero_rows_and_of_extreme_rows_is_exact_at_their_largest_value() -> None:
    matrix = torch.zeros(3, 5)
    matrix[1], matrix[2, 2] = 1e-30, -3e38
    stored, scale, (worst, _) = module._quantised(matrix)
    assert torch.equal((stored.float() * scale.unsqueeze(1))[[0, 1]], matrix[[0, 1]])
    assert (stored.float() * scale.unsqueeze(1))[2, 2] == pytest.approx(-3e38, rel=1e-6)
    assert worst < 1e-6


class _Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 5])
def test_an_interrupted_conversion_goes_on_after_its_last_whole_file(source: Path, tmp_path: Path, after: int) -> None:
    job, seen, out = Conversion(source, "bf16"), [], tmp_path / "out"

    def kill(message: str) -> None:
        seen.append(message)
        if len(seen) == after:
            raise _Killed

    with pytest.raises(_Killed):
        convert(job, out, progress=kill)
    (out / "vae").mkdir()
    (out / "vae/shell.safetensors.part").write_bytes(b"what a killed process leaves")
    with pytest.raises(CheckpointError, match=r"was interrupted; run the same `wanvram convert` again"):
        open_checkpoint(out, "dit")
    done = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert len(done) == after
    manifest = convert(job, out, progress=seen.append)
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())
    total = len([name for name in manifest["files"] if name.endswith(".safetensors")])
    assert len(seen) == total
    assert seen[-1].endswith(f"({total} of {total})")
    assert not list(out.rglob("*.part"))
    straight = convert(job, tmp_path / "straight")
    assert manifest["files"] == straight["files"]


def test_a_finished_conversion_is_not_repeated_but_a_lost_file_is(source: Path, tmp_path: Path) -> None:
    job, seen = Conversion(source, "bf16", components=("dit",)), []
    convert(job, tmp_path)
    convert(job, tmp_path, progress=seen.append)
    assert seen == []
    os.truncate(tmp_path / "dit/blocks.1.safetensors", 100)
    manifest = convert(job, tmp_path, progress=seen.append)
    assert [message.split()[0] for message in seen] == ["dit/blocks.1.safetensors"]
    assert verify(tmp_path, manifest) == len(manifest["files"])


def test_verify_names_a_file_whose_content_changed(source: Path, tmp_path: Path) -> None:
    manifest = convert(Conversion(source, "bf16", components=("vae",)), tmp_path)
    path = tmp_path / "vae/shell.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"vae/shell\.safetensors is not what was written; delete it"):
        verify(tmp_path, manifest)


def test_an_output_that_holds_something_else_is_refused_and_kept(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something that is no conversion"):
        convert(Conversion(source, "bf16"), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(InputError, match="holds something that is no conversion"):
        convert(Conversion(source, "bf16"), source)


@pytest.mark.parametrize("change", ["precision", "components", "source"])
def test_an_output_of_another_conversion_is_refused(tmp_path: Path, change: str) -> None:
    (tmp_path / "in").mkdir()
    write_official(tmp_path / "in")
    convert(Conversion(tmp_path / "in", "bf16", components=("vae",)), tmp_path / "out")
    job = Conversion(tmp_path / "in", "bf16", components=("vae",))
    if change == "precision":
        job = Conversion(tmp_path / "in", "fp16", components=("vae",))
    elif change == "components":
        job = Conversion(tmp_path / "in", "bf16", components=("vae", "text_encoder"))
    else:
        os.utime(tmp_path / "in/Wan2.1_VAE.pth", (1, 1))
    with pytest.raises(InputError, match=r"out holds another conversion \((precision|models|source) .* instead of"):
        convert(job, tmp_path / "out")


def test_a_disk_without_the_space_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_free(count: int, job: Conversion, output: Path) -> None:
        with monkeypatch.context() as patched:
            patched.setattr("wanvram.weights.convert.free_bytes", lambda _: count)
            convert(job, output)

    out = tmp_path / "out"
    with pytest.raises(OutputError, match=r"needs [\d.]+ MiB in .*out; the disk has 0\.1 MiB free"):
        with_free(100_000, Conversion(source, "bf16"), out)
    assert not out.exists()
    manifest = convert(Conversion(source, "bf16", components=("dit",)), out)
    needed = sum(entry["bytes"] for entry in manifest["files"].values())
    with_free(needed, Conversion(source, "bf16", components=("dit",)), tmp_path / "exact")
    with_free(0, Conversion(source, "bf16", components=("dit",)), out)  # nothing is left to write


def test_values_that_the_precision_cannot_hold_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_official(tmp_path / "in")
    path = tmp_path / "in/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["blocks.2.ffn.0.weight"][5, 5] = 70000.0
    save_file(tensors, path)
    with pytest.raises(
        CheckpointError, match=r"blocks\.2\.ffn\.0\.weight is not finite in torch\.float16; choose bf16"
    ):
        convert(Conversion(tmp_path / "in", "fp16", components=("dit",)), tmp_path / "out")
    convert(Conversion(tmp_path / "in", "bf16", components=("dit",)), tmp_path / "other")


def test_the_wrong_transformer_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\(tiny-vace\) instead of 40 blocks of width 5120 .* \(t2v-14B\)"):
        convert(Conversion(source, "bf16", dit="t2v-14B"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_converted_folder_is_not_converted_again(source: Path, tmp_path: Path) -> None:
    convert(Conversion(source, "bf16", components=("vae",)), tmp_path / "once")
    with pytest.raises(CheckpointError, match="was already converted"):
        convert(Conversion(tmp_path / "once", "fp16"), tmp_path / "twice")


def test_a_component_that_was_not_converted_is_named(source: Path, tmp_path: Path) -> None:
    convert(Conversion(source, "bf16", components=("vae",)), tmp_path)
    with pytest.raises(CheckpointError, match="was converted without dit; it holds vae"):
        open_checkpoint(tmp_path, "dit")


@pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "empty"])
def test_a_damaged_converted_file_is_named(source: Path, tmp_path: Path, damage: str) -> None:
    convert(Conversion(source, "bf16", components=("dit",)), tmp_path)
    path = tmp_path / "dit/blocks.3.safetensors"
    size = path.stat().st_size
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, {"truncated": size - 1, "longer": size + 1, "empty": 0}[damage])
    with pytest.raises(
        CheckpointError, match=r"blocks\.3\.safetensors .*expected .*bytes|blocks\.3\.safetensors is trunc"
    ):
        check_checkpoint(tmp_path, ["dit"])


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "dit/../../x", "dit//x", "dit/a/b", ""])
def test_a_manifest_cannot_reach_outside_its_folder(tmp_path: Path, name: str) -> None:
    entry = {"component": "dit", "bytes": 1, "sha256": ""}
    (tmp_path / MANIFEST).write_text(json.dumps({"schema": 1, "complete": True, "files": {name: entry}}))
    with pytest.raises(CheckpointError, match=r"wanvram\.json is damaged \(the file"):
        open_checkpoint(tmp_path, "dit")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"schema": 1, "files": 3}', '{"schema": 1, "files": {"a/b": 3}}']
)
def test_a_damaged_manifest_is_named(tmp_path: Path, source: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=r"wanvram\.json is (damaged|empty)"):
        open_checkpoint(tmp_path, "dit")
    with pytest.raises(InputError, match=r"wanvram\.json is damaged; name another folder"):
        convert(Conversion(source, "bf16", components=("vae",)), tmp_path)


def test_a_manifest_of_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"schema": 99, "files": {}}')
    with pytest.raises(CheckpointError, match="has the schema 99; this wanvram reads 1"):
        open_checkpoint(tmp_path, "dit")


def test_a_scale_without_its_matrix_is_refused(source: Path, tmp_path: Path) -> None:
    convert(Conversion(source, "fp8", components=("dit",)), tmp_path)
    path = tmp_path / "dit/blocks.0.safetensors"
    key = "blocks.0.ffn.0.weight.scale"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes().replace(key.encode(), b"blocks.0.ffn.X.weight.scale"))
    assert path.stat().st_size == size
    with pytest.raises(CheckpointError, match=r"ffn\.X\.weight\.scale is not one float32 for each row"):
        open_checkpoint(tmp_path, "dit")


# --- the command -----------------------------------------------------------------------------------------------------------------


def _command(*words: object) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    prepare_parser(parser)
    return run(parser.parse_args([str(word) for word in words]))


def test_the_command_prints_one_json_document(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [source, "--precision", "fp8", "-o", tmp_path / "out", "--components", "vae,dit", "--verify", "--json"]
    assert _command(*words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["models"] == {"dit": "tiny-vace", "vae": "tiny"}
    assert printed["verified_files"] == len(printed["files"]) == 8
    assert printed["complete"] is True
    assert printed["output"] == str(tmp_path / "out")


def test_the_command_tells_of_files_size_and_error(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _command(source, "--precision", "fp8", "-o", tmp_path / "out", "--components", "dit") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("7 files, ")
    assert "fp8: no weight is off by more than 3." in captured.out
    assert captured.out.endswith(f"Wrote {tmp_path / 'out'}\n")
    assert "dit/blocks.0.safetensors" in captured.err
    assert "(7 of 7)" in captured.err


def test_flags_without_effect_or_meaning_are_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="--fp8_text_encoder has no effect with --precision bf16"):
        _command(source, "--precision", "bf16", "-o", tmp_path / "out", "--fp8_text_encoder")
    with pytest.raises(SystemExit):
        _command(source, "--precision", "bf16", "-o", tmp_path / "out", "--components", "dit,unet")
    assert "there is no component 'unet'" in capsys.readouterr().err


def test_one_conversion_at_a_time_writes_to_a_folder(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def second(_: str) -> None:
        with pytest.raises(InputError, match=f"another wanvram is writing to {out}"):
            convert(Conversion(source, "bf16"), out)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(Conversion(source, "bf16"), out, progress=second)
    assert convert(Conversion(source, "bf16"), out)["complete"]
